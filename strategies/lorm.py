"""The server's half of LoRM: factors merged so that answers agree.

Salami et al., "Closed-Form Merging of Parameter-Efficient Modules for Federated Continual
Learning", ICLR 2025. Equations are those of :mod:`fedknow.client.learners.lorm`.

Each merge is written around the mean that FedAvg takes: Eq. (1) as ``W = M + (sum_i (W_i - M)
G_i) (sum_i G_i)^+`` with M the mean of the W_i. Where the sum of the G_i has an inverse that is
the same. Where it has none, no input of any client decides, and the mean stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid
from torch import Tensor

from fedknow.client.host import one_thread
from fedknow.client.learners.lorm import FEATURES, trains_b
from fedknow.client.learners.lorm import Lorm as LormLearner
from fedknow.protocols.config import ConfigError
from fedknow.protocols.flower import to_arrays, to_record
from fedknow.protocols.messages import (
    EXTRA,
    Arrays,
    Message,
    client_of,
)
from fedknow.strategies.fot import symmetric
from fedknow.strategies.paired import (
    PairedStrategy,
    Setup,
    to_tensors,
)

__all__ = ["Lorm", "merge", "merge_low_rank", "merge_tasks"]

Task = dict[str, Tensor]
"""Factors and G of a task: ``NAME.a`` [r, d], ``NAME.b`` [out, r], ``NAME.g`` [d] or [d, d]."""


class Lorm(PairedStrategy):
    """Merges low-rank adapters of clients and tasks in closed form.

    The server stores the factors of each task and the sums of G.

    Parameters
    ----------
    gram : {"diagonal", "full"}
        What clients send of G.
    fraction_train, min_train_nodes, min_available_nodes
        See :class:`~fedknow.strategies.paired.PairedStrategy`.
    """

    def __init__(
        self,
        gram: str = "diagonal",
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(
            fraction_train,
            min_train_nodes,
            min_available_nodes,
        )
        self.gram = gram
        self._tasks: list[Task] = []
        self._current: Task = {}
        self._grams: dict[int, dict[str, Tensor]] = {}

    def prepare(self, setup: Setup) -> None:
        """Take the adapters' names, and the factors that each task begins with."""
        if not isinstance(setup.learner, LormLearner):
            raise ConfigError(
                "strategy.name = 'lorm' is one half of a method; set learner.name = 'lorm'"
            )
        self._names = list(setup.learner.adapters)
        self._initial = {
            name: value.numpy() for name, value in setup.learner.send().items()
        }
        self._widths = {
            name: adapter.a.weight[0].numel()
            for name, adapter in setup.learner.adapters.items()
        } | {FEATURES: setup.learner.head.in_features}

    # --- Flower's hooks

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[FlowerMessage]:
        """Note which factor the round trains."""
        # Merging must know later which of the two factors was trained.
        self._is_b_trained = trains_b(int(config["round"]))  # type: ignore[arg-type]
        return super().configure_train(server_round, arrays, config, grid)

    def begin_round(self, task: int, arrays: Arrays) -> None:
        """Remember the global parameters, of which one factor is everybody's."""
        self._sent = arrays
        self._grams = {}

    def collect(self, task: int, extras: Mapping[int, Arrays]) -> None:
        """Take G of a round's clients."""
        self._grams = {
            client: self._unpack(extra) for client, extra in extras.items()
        }

    def aggregate_train(
        self,
        server_round: int,
        replies: Iterable[FlowerMessage],
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average as FedAvg does, then merge by Eqs. (1) to (3)."""
        # A list, as an iterator would be used up before the base class reads it.
        replies = list(replies)
        updates = {
            client_of(reply.metadata.src_node_id): to_arrays(
                reply.content.array_records[self.arrayrecord_key]
            )
            for reply in replies
            if reply.has_content()
        }
        record, metrics = super().aggregate_train(server_round, replies)
        # In the order of clients, so that sums are the same wherever a run goes on.
        clients = sorted(self._grams.keys() & updates.keys())
        if record is None or not clients:
            return record, metrics
        arrays = to_arrays(record)
        # On one thread, so that sums are taken in one order on every machine.
        with one_thread():
            for name in self._names:
                self._merge_layer(arrays, name, updates, clients)
            self._merge_head(arrays, updates, clients)
            sums = _sum([self._grams[client] for client in clients])
            self._current = self._task_of(arrays, sums)
        return to_record(arrays), metrics

    def aggregate_end_task(
        self,
        task: int,
        arrays: Arrays,
        replies: Sequence[Message],
    ) -> Arrays | None:
        """Store the task's factors, and begin the next ones."""
        extras = [reply.content.get(EXTRA) for reply in replies]
        grams = [self._unpack(e) for e in extras if isinstance(e, Arrays)]
        if grams:
            with one_thread():
                self._tasks.append(self._task_of(arrays, _sum(grams)))
        elif self._current:
            # Nobody answered in the end: the last round's sums are the best there are.
            self._tasks.append(self._current)
        self._current = {}
        # Adapters of past tasks are merged for scoring, so a new task begins with fresh ones.
        following = Arrays(arrays)
        for name in self._names:
            for key in (
                f"body.{name}.a.weight",
                f"body.{name}.b.weight",
            ):
                following[key] = self._initial[key]
        return following

    def extra_to_score(self) -> Arrays | None:
        """Return the factors of all tasks, Eq. (4)."""
        # With the current task, as scores are taken in the middle of it too.
        tasks = [
            *self._tasks,
            *([self._current] if self._current else []),
        ]
        if not tasks:
            return None
        extra = Arrays()
        for name in self._names:
            with one_thread():
                a, b = merge_tasks(tasks, name)
            shape_a = self._initial[f"body.{name}.a.weight"].shape
            shape_b = self._initial[f"body.{name}.b.weight"].shape
            extra[f"{name}.a"] = a.view(len(a), *shape_a[1:]).float().numpy()
            extra[f"{name}.b"] = (
                b.reshape(*b.shape, *shape_b[2:]).contiguous().float().numpy()
            )
        return extra

    def state_dict(self) -> dict[str, Any]:
        """Return the factors and sums of all tasks."""
        tasks = [*self._tasks, self._current]
        return {"tasks": list(map(_to_arrays, tasks))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        *self._tasks, self._current = map(to_tensors, state["tasks"])

    # --- merging

    def _unpack(self, extra: Arrays) -> dict[str, Tensor]:
        """Read one client's G, float64 [d] or [d, d] a layer."""
        # In float64, as a nearly singular matrix magnifies rounding when it is inverted.
        grams = {
            n: torch.tensor(a, dtype=torch.float64) for n, a in extra.items()
        }
        if self.gram == "diagonal":
            return grams
        # A matrix that is symmetric travels by half.
        return {n: symmetric(half, self._widths[n]) for n, half in grams.items()}

    def _merge_layer(
        self,
        arrays: Arrays,
        name: str,
        updates: Mapping[int, Arrays],
        clients: Sequence[int],
    ) -> None:
        """Merge the trained factor of one adapter, in place."""
        keys = {key: f"body.{name}.{key}.weight" for key in "ab"}
        trained, common = ("b", "a") if self._is_b_trained else ("a", "b")
        # A mean of equal numbers may round them, so the common factor is what was sent.
        arrays[keys[common]] = self._sent[keys[common]]
        mean = arrays[keys[trained]]
        matrices = [_matrix(updates[c][keys[trained]]) for c in clients]
        grams = [self._grams[client][name] for client in clients]
        merged = (
            merge_low_rank(
                _matrix(mean),
                matrices,
                grams,
                _matrix(self._sent[keys["a"]]),
            )
            if self._is_b_trained
            else merge(_matrix(mean), matrices, grams)
        )
        arrays[keys[trained]] = merged.view(mean.shape).float().numpy()

    def _merge_head(
        self,
        arrays: Arrays,
        updates: Mapping[int, Arrays],
        clients: Sequence[int],
    ) -> None:
        """Merge the head's weight by Eq. (1), in place."""
        key = "head.weight"
        matrices = [_matrix(updates[client][key]) for client in clients]
        grams = [self._grams[client][FEATURES] for client in clients]
        merged = merge(_matrix(arrays[key]), matrices, grams)
        arrays[key] = merged.float().numpy()

    def _task_of(self, arrays: Arrays, sums: Mapping[str, Tensor]) -> Task:
        """Gather factors and G of a task."""
        task: Task = {}
        for name in self._names:
            task[f"{name}.a"] = _matrix(arrays[f"body.{name}.a.weight"])
            task[f"{name}.b"] = _matrix(arrays[f"body.{name}.b.weight"])
            task[f"{name}.g"] = sums[name]
        return task


def merge(
    mean: Tensor,
    matrices: Sequence[Tensor],
    grams: Sequence[Tensor],
) -> Tensor:
    """Merge matrices so that answers agree, Eqs. (1) and (3).

    Parameters
    ----------
    mean : Tensor
        Stays where no input decides, float64 [m, d].
    matrices : sequence of Tensor
        W_i, float64 [m, d].
    grams : sequence of Tensor
        G_i, float64 [d, d], or their diagonals [d].
    """
    total = _added(grams)
    pairs = zip(matrices, grams, strict=True)
    # Deviations from the mean, so that the mean stays where no input decides.
    deviation = _added([_times(matrix - mean, gram) for matrix, gram in pairs])
    return mean + _divided(deviation, total)


def merge_low_rank(
    mean: Tensor,
    matrices: Sequence[Tensor],
    grams: Sequence[Tensor],
    a: Tensor,
) -> Tensor:
    """Merge factors B_i over a common A, Eq. (2): float64 [out, r].

    Parameters
    ----------
    mean, matrices, grams
        As :func:`merge` has them, with the B_i, float64 [out, r], as matrices.
    a : Tensor
        A, float64 [r, d].
    """
    # G as A sees it: the same problem as Eq. (1) in r dimensions.
    seen = [_times(a, gram) @ a.T for gram in grams]
    return merge(mean, matrices, seen)


def merge_tasks(tasks: Sequence[Task], name: str) -> tuple[Tensor, Tensor]:
    """Make one adapter of those of all tasks, Eq. (4).

    Returns
    -------
    tuple of Tensor
        A, float64 [T r, d], and B, float64 [out, T r].
    """
    total = _added([task[f"{name}.g"] for task in tasks])
    parts = [
        _divided(
            _times(task[f"{name}.a"], task[f"{name}.g"]),
            total,
        )
        for task in tasks
    ]
    return torch.cat(parts), torch.cat([task[f"{name}.b"] for task in tasks], 1)


def _times(matrix: Tensor, gram: Tensor) -> Tensor:
    """Multiply by G, or by its diagonal."""
    return matrix * gram if gram.dim() == 1 else matrix @ gram


def _divided(matrix: Tensor, gram: Tensor) -> Tensor:
    """Multiply by the pseudo-inverse of G, or of its diagonal."""
    if gram.dim() == 1:
        # A column whose input was always 0 has no say.
        return torch.where(gram > 0, matrix / gram, 0.0)
    # A pseudo-inverse: inputs seldom span all directions.
    inverse: Tensor = torch.linalg.pinv(gram, hermitian=True)
    return matrix @ inverse


def _added(parts: Sequence[Tensor]) -> Tensor:
    """Add tensors up in their order."""
    return torch.stack(list(parts)).sum(0)


def _sum(
    grams: Sequence[Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Add up the clients' G, layer by layer."""
    sums: dict[str, Tensor] = {}
    for name in grams[0]:
        sums[name] = _added([gram[name] for gram in grams])
    return sums


def _to_arrays(task: Task) -> dict[str, np.ndarray]:
    """Turn a task's tensors into arrays for a checkpoint."""
    return {name: value.numpy() for name, value in task.items()}


def _matrix(array: Any) -> Tensor:
    """Lay a layer's weights out as one row a node, float64."""
    weight = torch.tensor(array, dtype=torch.float64)
    return weight.reshape(len(weight), -1)
