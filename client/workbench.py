"""A learner, and the steps of work that clients and groups share."""

from __future__ import annotations

import functools
import logging
from typing import Any, ClassVar

from torch import nn

from fedknow.client.compute.cost import Cost, costs
from fedknow.client.compute.device import DeviceTransfer, find_device
from fedknow.client.compute.sizes import module_bytes, tensor_bytes
from fedknow.client.data.stream import TaskData, TaskStream
from fedknow.client.features import FeatureStream, with_features
from fedknow.client.learners import build_learner
from fedknow.client.learners.frames.learner import Learner, Round, State, Tensors
from fedknow.client.learners.frames.round import part_of_hook
from fedknow.client.tensors import as_arrays, as_tensors
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.instructions import read_instructions
from fedknow.protocols.messages import (
    CLIENT_FAILED,
    Arrays,
    Message,
    client_of,
)
from fedknow.protocols.plugins import explain
from fedknow.protocols.seeds import integer
from fedknow.protocols.work import (
    EndTaskReport,
    EndTaskWork,
    TrainReport,
    TrainWork,
    Work,
)

__all__ = ["Workbench", "failed"]

log = logging.getLogger(__name__)


class Workbench:
    """The one learner that does the work of all clients, one after another.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment.
    stream : TaskStream
        Where clients find their data.

    Attributes
    ----------
    WATCH : str
        Name in a client's state of what finds its boundaries; no learner sees it.
    learner : Learner
        On the device of ``engine.device``.
    transfer : DeviceTransfer
        What crosses between the CPU and that device.

    Raises
    ------
    ConfigError
        If the learner cannot be built, or its device is not there.
    """

    WATCH: ClassVar[str] = "boundaries"

    def __init__(self, config: ExperimentConfig, stream: TaskStream) -> None:
        self.config = config
        self.transfer = DeviceTransfer(find_device(config.engine.device))
        self.learner = build_learner(
            config, stream.spec, stream.classes, self.transfer.device
        )
        self.stream = with_features(stream, self.learner, config.model)

    def task(self, client: int, task: int) -> TaskData:
        """Give a client's task, with its training samples on the device."""
        return self.transfer.enter_task(self.stream.task(client, task))

    def charge_features(self, data: TaskData, round: Round) -> None:
        """Charge the forward pass of a frozen part whose features are kept.

        It is charged once a task, whoever computed them: costs must not depend on what lies
        in a cache. A client without a state is charged in the task's first round.
        """
        if not isinstance(self.stream, FeatureStream):
            return
        is_stateful = self.learner.ends_task
        is_new = (
            not self.learner.has_trained(data.task)
            if is_stateful
            else round.number == 1
        )
        if is_new:
            flops = self.stream.sample_flops * len(data.train)
            with self.learner.meter.declared():
                self.learner.meter.add(flops=flops)

    def take_over(self, work: Work, state: State) -> None:
        """Make the learner a client, from its state and what was received.

        Raises
        ------
        ValueError
            If the model's frozen parameters are not those of the server.
        """
        _check_frozen(work, self.learner)
        # The strategy of the last message may have put other settings in their place.
        self.learner.train = self.config.train
        learned = {k: v for k, v in state.items() if k != self.WATCH}
        self.learner.load_state_dict(self.transfer.enter(learned))
        # A learner's own `receive` may write to what it is given.
        is_only_read = type(self.learner).receive is Learner.receive
        received = as_tensors(work.parameters, is_only_read)
        self.learner.receive(self.transfer.enter(received))
        if work.extra is not None:
            self.learner.receive_extra(
                self.transfer.enter(as_tensors(work.extra))
            )

    def round(self, client: int, work: TrainWork | EndTaskWork) -> Round:
        """Say which round work is for, and set the learner up for it.

        For this round a strategy may put other settings in place of the experiment's.

        Raises
        ------
        ValueError
            If a setting of the strategy makes no sense.
        """
        number = work.position.round or 0
        # These words are part of the seed: other words would be other results.
        purpose = "train" if isinstance(work, TrainWork) else "end_task"
        seed = integer(
            self.config.seed, purpose, client, work.position.task, number
        )
        instructions = read_instructions(work.settings, self.config.train)
        self.learner.train = instructions.train
        settings = instructions.learner_settings | self._records(work)
        return Round(number, seed, instructions.proximal_mu, client, settings)

    def report_training(
        self,
        data: TaskData,
        round: Round,
        measures: dict[str, float],
        samples: int,
    ) -> tuple[TrainReport, State]:
        """Report a round of training that the learner has just gone through.

        Parameters
        ----------
        data : TaskData
            What it learned from.
        round : Round
            The round.
        measures : dict
            What :meth:`Learner.fit` gave.
        samples : int
            Samples learned from, each as often as it was.

        Returns
        -------
        tuple
            The report, without costs, and the client's new state.
        """
        parameters = self.arrays(self.learner.send())
        # `Learner.send` copies, so nobody else holds these arrays. As they are read-only,
        # nobody needs to copy them again.
        if type(self.learner).send is Learner.send:
            for array in parameters.values():
                array.flags.writeable = False
        with part_of_hook(self.learner, "share"):
            extra = self.learner.share(data, round, ended=False)
        report = TrainReport(
            parameters=parameters,
            examples=len(data.train.y),
            samples=samples,
            measures=measures,
            extra=self.arrays(extra) if extra else None,
        )
        return report, self.state()

    def report_end(
        self,
        data: TaskData,
        round: Round,
        earlier: int = 0,
    ) -> tuple[EndTaskReport, State]:
        """End a task and report it.

        Parameters
        ----------
        data : TaskData
            The task.
        round : Round
            As :meth:`round` gave it.
        earlier : int
            Samples learned from for this that the meter has not seen.

        Returns
        -------
        tuple
            The report, without costs, and the client's new state.
        """
        # One part for both: memory of the first is often still there in the second.
        with self.learner.meter.part():
            measures = self.learner.end_task(data, round)
            extra = self.learner.share(data, round, ended=True)
        report = EndTaskReport(
            examples=len(data.train.y),
            samples=earlier + self.learner.meter.samples,
            measures=measures,
            extra=self.arrays(extra) if extra else None,
        )
        return report, self.state()

    def costs(self, cost: Cost, old: State, new: State) -> dict[str, float]:
        """Give the metrics of what work cost a client.

        Parameters
        ----------
        cost : Cost
            What was counted.
        old, new : dict
            The client's state when the work began and when it was done.
        """
        replay = 0
        knowledge = 0
        # A state that stayed is one object, and is counted once.
        for state in (old,) if old is new else (old, new):
            samples = sum(
                tensor_bytes(state.get(name, {})) for name in self.learner.replay
            )
            parameters = tensor_bytes(state.get("kept", {}))
            replay = max(replay, samples)
            # Samples and parameters are named apart.
            knowledge = max(knowledge, tensor_bytes(state) - parameters - samples)
        return costs(cost, self._weight_bytes, knowledge, replay)

    @functools.cached_property
    def _weight_bytes(self) -> int:
        """Size of the models that the method works with, scratch copies too."""
        parts = vars(self.learner).values()
        return module_bytes(*(p for p in parts if isinstance(p, nn.Module)))

    def state(self) -> State:
        """Give the client's state as it is now, on the CPU."""
        return self.transfer.leave(self.learner.state_dict())

    def arrays(self, tensors: Tensors) -> Arrays:
        """Give the learner's tensors as arrays of a message."""
        return as_arrays(self.transfer.leave(tensors))

    def _records(self, work: TrainWork | EndTaskWork) -> dict[str, Any]:
        """Bring the strategy's own records to the learner."""
        return {
            name: self.transfer.enter(as_tensors(record))
            if isinstance(record, Arrays)
            else dict(record)
            for name, record in work.records.items()
        }


def failed(message: Message, error: BaseException) -> Message:
    """Answer that a client could not do its work, and log why."""
    log.info(
        "client %d failed in %s",
        client_of(message.node),
        message.kind,
        exc_info=error,
    )
    return message.fail(CLIENT_FAILED, explain(error))


def _check_frozen(work: Work, learner: Learner) -> None:
    """Refuse work for a model whose frozen parameters are others than here.

    Frozen parameters do not travel, so the server sends a digest of its own.
    """
    digest = work.position.frozen
    if digest and digest != learner.entries.frozen_digest:
        raise ValueError(
            "the frozen parameters of this client's model are not the server's, and they "
            "are never sent; have "
            "model.name draw them by torch's generator alone, or read them from the same "
            "file everywhere"
        )
