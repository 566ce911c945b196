"""The server's half of FedWEIT: sparse bases and adaptive parameters.

Yoon, Jeong, Lee, Yang and Hwang, "Federated Continual Learning with Weighted Inter-client
Transfer", ICML 2021, algorithm 1. A client sends its base weights where its mask is not zero,
``B_c * m_c``, and once a task its adaptive parameters ``A_c``. The server averages each base
weight over the clients that sent it, and hands out all ``A_c`` once a task.
"""

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
    """Averages each base weight over the clients that sent it.

    All clients' adaptive parameters are handed out once a task. An entry that is exactly zero
    in an answer was not sent; a weight that nobody sent stays as it is. Clients count equally,
    as in the paper.
    """

    def __init__(
        self,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(fraction_train, min_train_nodes, min_available_nodes)
        self._adaptive: Arrays | None = None
        self._informed: set[int] = set()
        self._base = Arrays()

    def prepare(self, setup: Setup) -> None:
        """Note how many clients there are."""
        # Failed clients have a row too, so the number comes from the configuration.
        self._clients = setup.config.data.clients

    def begin_round(self, task: int, arrays: Arrays) -> None:
        """Note the global base."""
        self._base = arrays

    def extra(self, task: int, client: int) -> Arrays | None:
        """Return all adaptive parameters for a client that does not have them yet.

        They are those of the previous task, by name [clients, ...].
        """
        return None if client in self._informed else self._adaptive

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average each weight over the clients that sent it."""
        # Flower's check, as in its own FedAvg.
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        if not valid:
            return None, None
        # Only an answer proves that the adaptive parameters have arrived.
        self._informed |= {
            client_of(reply.metadata.src_node_id) for reply in valid
        }
        contents = [reply.content for reply in valid]
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        sent = [
            to_arrays(content.array_records[self.arrayrecord_key])
            for content in contents
        ]
        averaged = Arrays()
        for name, current in self._base.items():
            averaged[name] = mean_of_sent(
                current, [arrays[name] for arrays in sent]
            )
        return to_record(averaged), metrics

    def aggregate_end_task(
        self,
        task: int,
        arrays: Arrays,
        replies: Sequence[Message],
    ) -> None:
        """Collect the adaptive parameters; those of a client that failed are zero."""
        adaptive = Arrays()
        for reply in replies:
            for name, array in reply.content.get(EXTRA, {}).items():
                assert isinstance(
                    array, np.ndarray
                )  # the checks of replies saw to it
                if name not in adaptive:
                    shape = self._clients, *array.shape
                    adaptive[name] = np.zeros(shape, array.dtype)
                adaptive[name][client_of(reply.node)] = array
        # None, not an empty record: without any, no extra record is sent.
        self._adaptive = adaptive or None
        self._informed = set()

    def state_dict(self) -> dict[str, Any]:
        """Return the adaptive parameters, and which clients have them."""
        tensors = {
            name: torch.from_numpy(array)
            for name, array in (self._adaptive or {}).items()
        }
        # Packed, because most adaptive parameters are zero.
        return {"adaptive": pack(tensors), "told": sorted(self._informed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        tensors = unpack(state["adaptive"])
        adaptive = Arrays(
            (name, tensor.numpy()) for name, tensor in tensors.items()
        )
        self._adaptive = adaptive or None
        self._informed = set(state["told"])


def mean_of_sent(current: np.ndarray, sent: Sequence[np.ndarray]) -> np.ndarray:
    """Average each entry over the arrays in which it is not zero.

    Parameters
    ----------
    current : ndarray
        The entries to keep where all are zero.
    sent : sequence of ndarray
        One array a client.
    """
    count = np.sum([array != 0 for array in sent], axis=0)
    # In double precision, so that the number of clients costs no digits.
    total = np.sum(sent, axis=0, dtype=np.float64)
    # Where nobody sent an entry, the divisor of 1 avoids a warning about 0 / 0.
    mean = np.where(count > 0, total / np.maximum(count, 1), current)
    result: np.ndarray = mean.astype(current.dtype)
    return result
