"""The server's half of a method whose two sides tell each other more than parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
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

__all__ = ["PairedStrategy", "Setup"]


@dataclass(frozen=True)
class Setup:
    """What a strategy is told of the experiment before it begins.

    Attributes
    ----------
    config : ExperimentConfig
        The experiment, with every setting of its learner.
    learner : Learner
        A freshly built one, with the initial model: the strategy's own to work with.
    stream : TaskStream or None
        The clients' data; ``None`` where they have their own, which nobody else sees.
    """

    config: ExperimentConfig
    learner: Learner
    stream: TaskStream | None


class PairedStrategy(FedAvg):
    """Federated averaging whose two sides may tell each other more than parameters; the frame for
    such methods.

    Beside the parameters an ``extra`` record of arrays travels, both ways: what :meth:`extra`
    gives for a client goes with its work to the learner's
    :meth:`~fedknow.client.learners.Learner.receive_extra`; what the learner's
    :meth:`~fedknow.client.learners.Learner.share` gives comes to :meth:`collect` after a round,
    and to :meth:`aggregate_end_task` when a task is over. What arrives has been checked:
    finite, and of the names, dtypes and shapes that the learner declares. Its bytes are counted
    apart (``train.extra``, ``train.end_task.extra``).

    A learner names its strategy in :attr:`~fedknow.client.learners.Learner.strategy`.

    Parameters
    ----------
    fraction_train : float
        Share of the clients that train in a round.
    min_train_nodes, min_available_nodes : int
        As Flower's FedAvg has them.
    """

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

    # --- what a method overrides
    # ----------------------------------------------------------------------------------

    def prepare(self, setup: Setup) -> None:
        """Before the first round, and before a resumed run's :meth:`load_state_dict`.

        Raises
        ------
        ConfigError
            If the method cannot be run in this experiment.
        """

    def begin_round(self, task: int, arrays: Arrays) -> None:
        """Before a round's work is handed out, when its clients have been drawn; with the global
        parameters."""

    def extra(self, task: int, client: int) -> Arrays | None:
        """What goes to a client (from 0) with its work of the round, besides the global parameters.

        Give the same object to all clients that are told the same, so that it is prepared once.
        """
        return None

    def collect(self, task: int, extras: Mapping[int, Arrays]) -> None:
        """What clients shared with their answers of a round, by client; before the parameters are
        averaged."""

    def aggregate_end_task(
        self, task: int, arrays: Arrays, replies: Sequence[Message]
    ) -> None:
        """A task is over.

        Parameters
        ----------
        task : int
            Which, from 0.
        arrays : Arrays
            The global parameters.
        replies : sequence of Message
            The clients' good answers in the order of clients; what a client shared is in the
            record ``extra``.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that must be the same when a run is resumed: a tree of numbers, text, arrays and
        Flower's records."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""

    def kept_bytes(self) -> int:
        """Size of what this side keeps of past tasks and of clients' data: all arrays in
        :meth:`state_dict`."""
        return _array_bytes(self.state_dict())

    # --- Flower's hooks
    # -------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[FlowerMessage]:
        """Flower's FedAvg, and the ``extra`` record for each client that gets one."""
        self._task = int(config["task"])  # type: ignore[arg-type]
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.begin_round(
            self._task, to_arrays(arrays)
        )  # after the draw of clients, which is then FedAvg's
        records: dict[int, tuple[Arrays, ArrayRecord]] = {}
        for message in messages:
            extra = self.extra(self._task, client_of(message.metadata.dst_node_id))
            if extra is not None:
                if id(extra) not in records:
                    records[id(extra)] = extra, to_record(extra)
                _, record = records[id(extra)]
                message.content = RecordDict(
                    {
                        self.arrayrecord_key: arrays,
                        EXTRA: record,
                        CONFIG: message.content[self.configrecord_key],
                    }
                )
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the ``extra`` records out, then Flower's FedAvg."""
        replies = list(replies)
        extras: dict[int, Arrays] = {}
        for reply in replies:
            if reply.has_content() and EXTRA in reply.content:
                extras[client_of(reply.metadata.src_node_id)] = to_arrays(
                    reply.content.array_records[EXTRA]
                )
                reply.content = RecordDict(
                    {
                        name: record
                        for name, record in reply.content.items()
                        if name != EXTRA
                    }
                )
        if extras:
            self.collect(self._task, extras)
        return super().aggregate_train(server_round, replies)


def _array_bytes(tree: Any) -> int:
    """Bytes of all arrays in nested mappings, lists and records."""
    if isinstance(tree, np.ndarray | Tensor):
        return int(tree.nbytes)
    if isinstance(tree, ArrayRecord):
        return sum(array.nbytes for array in to_arrays(tree).values())
    if isinstance(tree, Mapping):
        return sum(map(_array_bytes, tree.values()))
    return sum(map(_array_bytes, tree)) if isinstance(tree, list | tuple) else 0
