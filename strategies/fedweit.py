"""The server's half of FedWEIT (Yoon et al., ICML 2021): the mean of what was sent, and
everybody's adaptive parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.app import Message as FlowerMessage

from fedknow.client.learners.frames.sparse import pack, unpack
from fedknow.protocols.flower import to_arrays, to_record
from fedknow.protocols.messages import EXTRA, Arrays, Message, client_of
from fedknow.strategies.paired import PairedStrategy, Setup

__all__ = ["FedWeit"]


class FedWeit(PairedStrategy):
    """Averages each base weight over the clients that sent it; hands out all clients' adaptive
    parameters once a task.

    What is exactly zero in an answer was not sent; a weight that nobody sent stays as it is.
    Clients count equally, as in the paper.
    """

    def __init__(
        self,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(fraction_train, min_train_nodes, min_available_nodes)
        self._adaptive: Arrays | None = None
        self._told: set[int] = set()
        self._current = Arrays()

    def prepare(self, setup: Setup) -> None:
        """Note how many clients there are."""
        self._clients = setup.config.data.clients

    def begin_round(self, task: int, arrays: Arrays) -> None:
        """Note the global base."""
        self._current = arrays

    def extra(self, task: int, client: int) -> Arrays | None:
        """All adaptive parameters of the previous task, by name [clients, ...], for a client that
        has not had them."""
        return None if client in self._told else self._adaptive

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean over those who sent a weight, for each weight."""
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        if not valid:
            return None, None
        self._told |= {client_of(reply.metadata.src_node_id) for reply in valid}
        sent = [
            to_arrays(reply.content.array_records[self.arrayrecord_key])
            for reply in valid
        ]
        metrics = self.train_metrics_aggr_fn(
            [reply.content for reply in valid], self.weighted_by_key
        )
        return to_record(
            {
                name: mean_of_sent(now, [a[name] for a in sent])
                for name, now in self._current.items()
            }
        ), metrics

    def aggregate_end_task(
        self, task: int, arrays: Arrays, replies: Sequence[Message]
    ) -> None:
        """Collect the adaptive parameters; those of a client that failed are zero."""
        shared = {
            client_of(reply.node): reply.content[EXTRA]
            for reply in replies
            if EXTRA in reply.content
        }
        adaptive, self._told = Arrays(), set()
        for client, record in shared.items():
            for name, array in record.items():
                assert isinstance(array, np.ndarray)  # the inspector saw to it
                if name not in adaptive:
                    adaptive[name] = np.zeros(
                        (self._clients, *array.shape), array.dtype
                    )
                adaptive[name][client] = array
        self._adaptive = adaptive or None

    def state_dict(self) -> dict[str, Any]:
        """The adaptive parameters, and who has had them."""
        tensors = {
            name: torch.from_numpy(array)
            for name, array in (self._adaptive or {}).items()
        }
        return {"adaptive": pack(tensors), "told": sorted(self._told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._adaptive = (
            Arrays(
                (name, value.numpy())
                for name, value in unpack(state["adaptive"]).items()
            )
            or None
        )
        self._told = set(state["told"])


def mean_of_sent(current: np.ndarray, sent: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of the entries that are not zero, entry by entry; the current one where all are."""
    count = np.sum([array != 0 for array in sent], axis=0)
    total = np.sum(sent, axis=0, dtype=np.float64)
    mean: np.ndarray = np.where(
        count > 0, total / np.maximum(count, 1), current
    ).astype(current.dtype)
    return mean
