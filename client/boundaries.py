"""Task boundaries that nobody tells (``data.boundaries = "hidden"``).

A client looks at the loss of the model that it receives on samples of its own, before it
trains. When a :class:`~fedknow.client.drift.DriftTest` finds that the loss has risen, a new task
has begun: the client ends the one before, with the samples that it trained on last, and goes on.
Learners see tasks as they were found, and scores are by the stream's own tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from fedknow.client.data.stream import TaskData
from fedknow.client.drift import MOST_LOSSES, DriftTest
from fedknow.client.learners.frames.batch import HeadSlice
from fedknow.client.learners.frames.learner import Learner, State
from fedknow.client.learners.frames.scoring import predict
from fedknow.client.workbench import Workbench
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.seeds import integer
from fedknow.protocols.work import (
    BOUNDARIES,
    BOUNDARY_DELAY,
    EndTaskWork,
    Position,
    TrainReport,
    TrainWork,
)

__all__ = ["BoundaryFinder"]


@dataclass
class _Watch:
    """What a client keeps to find boundaries.

    Attributes
    ----------
    test : DriftTest
    count : int
        Boundaries found so far.
    place : int
        Where in its stream the client trained last; -1: nowhere yet.
    """

    test: DriftTest
    count: int = 0
    place: int = -1

    @classmethod
    def read(cls, state: State, false_alarms: float) -> _Watch:
        if not state:
            return cls(DriftTest(false_alarms))
        # A copy, as the test changes its losses and a state must stay as it was saved.
        test = DriftTest(false_alarms, state["losses"].numpy().copy())
        return cls(test, state["count"], state["place"])

    def state(self) -> State:
        return {
            "losses": torch.from_numpy(self.test.losses.copy()),
            "count": self.count,
            "place": self.place,
        }


class BoundaryFinder:
    """Trains clients that are not told where a task begins.

    Parameters
    ----------
    bench : Workbench
        The learner, and the steps of work.
    config : ExperimentConfig
        ``data.false_alarms`` is used.
    """

    def __init__(self, bench: Workbench, config: ExperimentConfig) -> None:
        self._bench = bench
        self._config = config

    def train(
        self, client: int, work: TrainWork, state: State
    ) -> tuple[TrainReport, State]:
        """Train a round; before it, end the task before if a new one has begun.

        Parameters
        ----------
        client : int
        work : TrainWork
            Its position says where the client is in its stream, and goes to no learner.
        state : State
            What the client kept.

        Returns
        -------
        tuple
            The report, which says how many boundaries were found, and the new state.
        """
        bench = self._bench
        place = work.position.task
        watch = _Watch.read(
            state.get(Workbench.WATCH, {}), self._config.data.false_alarms
        )
        bench.take_over(work, state)
        data = bench.task(client, place)
        losses = self._losses(data, client, work)
        delay = watch.test.find(losses)
        # A client that has not trained has no task to end.
        if delay is not None and watch.place >= 0:
            self._end(client, work, watch)
            watch.count += 1
        else:
            delay = None
        watch.place = place
        data = replace(data, task=watch.count)
        round = bench.round(client, work)
        learner = bench.learner
        with learner.counting("fit"):
            measures = learner.fit(data, round)
        measures |= {
            BOUNDARIES: float(watch.count),
            BOUNDARY_DELAY: float(delay or 0),
        }
        samples = learner.meter.samples
        report, new = bench.report_training(data, round, measures, samples)
        return report, new | {Workbench.WATCH: watch.state()}

    def _losses(
        self, data: TaskData, client: int, work: TrainWork
    ) -> list[float]:
        """Give the received model's losses on samples in an order by the seed."""
        position = work.position
        seed = integer(
            self._config.seed, "drift", client, position.task, position.round or 0
        )
        # Samples may be sorted by class, and the test is of losses in any order.
        draws = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(data.train), generator=draws)
        # As many as are kept: a forward pass each, and enough for any alarm.
        index = order[:MOST_LOSSES].to(data.train.y.device)
        return _losses(
            self._bench.learner,
            data,
            index,
            self._config.evaluation.batch_size,
        )

    def _end(self, client: int, work: TrainWork, watch: _Watch) -> None:
        """End the task before, on the samples that were trained on last."""
        bench = self._bench
        ended = replace(bench.task(client, watch.place), task=watch.count)
        # The round that a server's message would have named, with the same seed.
        ending = EndTaskWork(
            position=Position(watch.place), parameters=work.parameters
        )
        round = bench.round(client, ending)
        with bench.learner.meter.part():
            bench.learner.end_task(ended, round)
        # Ending may change the model; the round begins with the one that was received.
        bench.take_over(work, bench.state())


def _losses(
    learner: Learner, data: TaskData, index: torch.Tensor, batch_size: int
) -> list[float]:
    # Without dropout, whose noise would hide a change of the losses.
    learner.model.eval()
    head = HeadSlice(data.head, learner.head.out_features, learner.device)
    z = predict(learner, learner.model, data.train.x[index], batch_size)
    labels = head.labels(data.train.y[index])
    losses: list[float] = F.cross_entropy(
        head.logits(z), labels, reduction="none"
    ).tolist()
    return losses
