"""The server's half of a method that exchanges more than parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedknow.client.data.stream import TaskStream
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.flower import to_arrays, to_record
from fedknow.protocols.messages import CONFIG, EXTRA, Arrays, Message, client_of

if TYPE_CHECKING:
    from fedknow.client.learners import Learner

__all__ = ["PairedStrategy", "Setup", "to_tensors"]


@dataclass(frozen=True)
class Setup:
    """The parts of an experiment that a strategy gets before it begins.

    Attributes
    ----------
    config : ExperimentConfig
        The experiment, with every setting of its learner.
    learner : Learner
        A freshly built one, with the initial model, for the strategy alone.
    stream : TaskStream or None
        The clients' data; ``None`` where they have their own, which nobody else sees.
    """

    config: ExperimentConfig
    learner: Learner
    stream: TaskStream | None


class PairedStrategy(FedAvg):
    """Federated averaging for methods that exchange more than parameters.

    Beside the parameters an ``extra`` record of arrays travels, both ways. The result of
    :meth:`extra` for a client goes with its work to the learner's
    :meth:`~fedknow.client.learners.Learner.receive_extra`. The result of the learner's
    :meth:`~fedknow.client.learners.Learner.share` comes to :meth:`collect` after a round, and
    to :meth:`aggregate_end_task` when a task is over. Arrays that arrive have been checked:
    finite, and of the names, dtypes and shapes that the learner declares. Their bytes are
    counted separately (``train.extra``, ``train.end_task.extra``).

    A learner names its strategy in :attr:`~fedknow.client.learners.Learner.strategy`.

    Parameters
    ----------
    fraction_train : float
        Share of the clients that train in a round.
    min_train_nodes, min_available_nodes : int
        As Flower's FedAvg has them.
    """

    takes_sums: ClassVar[bool] = False
    """Whether the arrays of one client may be the sum of all clients', once a task when it ends, as
    under ``privacy.secure``. Nothing else of single clients is looked at then."""

    def __init__(
        self,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(
            fraction_train=fraction_train,
            fraction_evaluate=0.0,
            min_train_nodes=min_train_nodes,
            min_evaluate_nodes=1,
            min_available_nodes=min_available_nodes,
        )
        self._task = 0

    # --- hooks that a method overrides

    def prepare(self, setup: Setup) -> None:
        """Get ready for the first round.

        A resumed run calls this before :meth:`load_state_dict`.

        Raises
        ------
        ConfigError
            If the method cannot be run in this experiment.
        """

    def begin_round(self, task: int, arrays: Arrays) -> None:
        """Get ready for a round, given the global parameters.

        The round's clients have been drawn, and its work has not been handed out yet.
        """

    def extra(self, task: int, client: int) -> Arrays | None:
        """Return the arrays that go to a client besides the global parameters.

        Return the same object for all clients that get the same, so that it is encoded once.

        Parameters
        ----------
        task : int
            The current task, from 0.
        client : int
            From 0.
        """
        return None

    def extra_to_score(self) -> Arrays | None:
        """Return arrays for all clients that are scored, for their answers.

        The learner's :meth:`~fedknow.client.learners.Learner.receive_extra` gets them.
        """
        return None

    def collect(self, task: int, extras: Mapping[int, Arrays]) -> None:
        """Take the arrays that clients shared with a round's answers, by client.

        This comes before the parameters are averaged.
        """

    def aggregate_end_task(
        self, task: int, arrays: Arrays, replies: Sequence[Message]
    ) -> Arrays | None:
        """Take the clients' answers at the end of a task.

        Parameters
        ----------
        task : int
            The task that is over, from 0.
        arrays : Arrays
            The global parameters.
        replies : sequence of Message
            The clients' good answers in the order of clients. The record ``extra`` holds the
            arrays that a client shared.

        Returns
        -------
        Arrays or None
            The global parameters that are scored, and that the next task begins with; ``None``:
            they stay as they are.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return everything that must be the same when a run is resumed.

        It is a tree of numbers, text, arrays and Flower's records.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""

    def kept_bytes(self) -> int:
        """Return the bytes of past tasks' and clients' data on this side.

        By default these are all arrays in :meth:`state_dict`.
        """
        return _array_bytes(self.state_dict())

    # --- Flower's hooks

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[FlowerMessage]:
        """Make FedAvg's messages, and add the ``extra`` records."""
        self._task = int(config["task"])  # type: ignore[arg-type]
        messages = list(
            super().configure_train(server_round, arrays, config, grid)
        )
        # After the draw of clients: a method that draws numbers itself must not change it.
        self.begin_round(self._task, to_arrays(arrays))
        # By identity: arrays that several clients get are encoded once. The arrays are held
        # here too, since Python may give a freed object's identity to another one.
        encoded: dict[int, tuple[Arrays, ArrayRecord]] = {}
        for message in messages:
            extra = self.extra(
                self._task, client_of(message.metadata.dst_node_id)
            )
            if extra is None:
                continue
            if id(extra) not in encoded:
                encoded[id(extra)] = extra, to_record(extra)
            _, record = encoded[id(extra)]
            # FedAvg's messages share one content, so each gets a new one.
            content = {
                self.arrayrecord_key: arrays,
                EXTRA: record,
                CONFIG: message.content[self.configrecord_key],
            }
            message.content = RecordDict(content)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the ``extra`` records out, then average as Flower's FedAvg does."""
        replies = list(replies)
        extras: dict[int, Arrays] = {}
        for reply in replies:
            if reply.has_content() and EXTRA in reply.content:
                client = client_of(reply.metadata.src_node_id)
                extras[client] = to_arrays(reply.content.array_records[EXTRA])
                # Flower refuses replies with more than one record of arrays.
                records = dict(reply.content)
                del records[EXTRA]
                reply.content = RecordDict(records)
        if extras:
            self.collect(self._task, extras)
        return super().aggregate_train(server_round, replies)


def to_tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Copy arrays into tensors that a learner may change."""
    return {name: torch.tensor(array) for name, array in arrays.items()}


def _array_bytes(tree: Any) -> int:
    """Count the bytes of all arrays in nested mappings, lists and records."""
    if isinstance(tree, np.ndarray | Tensor):
        return int(tree.nbytes)
    if isinstance(tree, ArrayRecord):
        return sum(array.nbytes for array in to_arrays(tree).values())
    if isinstance(tree, Mapping):
        return sum(map(_array_bytes, tree.values()))
    if isinstance(tree, list | tuple):
        return sum(map(_array_bytes, tree))
    return 0
