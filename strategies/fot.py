"""The server's half of FOT: updates orthogonal to past tasks' inputs.

Bakman, Yaldiz, Ezzeldin and Avestimehr, "Federated Orthogonal Training: Mitigating Global
Catastrophic Forgetting in Continual Federated Learning", ICLR 2024. A layer with weights W
keeps its answer to an input x of a past task if its update D is orthogonal to the subspace U of
those inputs:

    (W + D) x = W x   where   D U = 0   and   x lies in U

So the server averages the clients' updates, and projects the mean: ``D <- D - D U U^T``. When a
task is over, U grows by the principal directions of its inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from torch import Tensor

from fedknow.client.host import one_thread
from fedknow.client.learners.fot import Fot as FotLearner
from fedknow.client.learners.fot import dimension
from fedknow.protocols.config import ConfigError
from fedknow.protocols.flower import to_arrays, to_record
from fedknow.protocols.messages import EXTRA, Arrays, Message
from fedknow.strategies.paired import PairedStrategy, Setup
from fedknow.strategies.subspaces import (
    extend,
    extend_from_sketch,
    project,
    restrict,
)

__all__ = ["Fot", "symmetric"]


class Fot(PairedStrategy):
    """FedAvg whose update is orthogonal to the inputs of past tasks.

    The mean update is projected layer by layer. The server stores one basis a layer, at most
    [d, d] for a layer with inputs of d numbers.

    Parameters
    ----------
    threshold : float
        epsilon of the first task: the share of the inputs' energy that the subspace must hold
        (:func:`~fedknow.strategies.subspaces.extend`).
    increase : float
        The growth of epsilon with each further task, up to 1.
    fraction_train, min_train_nodes, min_available_nodes
        See :class:`~fedknow.strategies.paired.PairedStrategy`.
    """

    def __init__(
        self,
        threshold: float = 0.95,
        increase: float = 0.0,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(fraction_train, min_train_nodes, min_available_nodes)
        self.threshold = threshold
        self.increase = increase
        self._global = Arrays()

    def prepare(self, setup: Setup) -> None:
        """Take the layers' names and sizes from the learner."""
        if not isinstance(setup.learner, FotLearner):
            raise ConfigError(
                "strategy.name = 'fot' is one half of a method; set learner.name = 'fot'"
            )
        # Double precision: errors of float32 add up over tasks.
        self._bases: dict[str, Tensor] = {}
        for name, layer in setup.learner.layers.items():
            self._bases[name] = torch.zeros(
                dimension(layer), 0, dtype=torch.float64
            )

    def begin_round(self, task: int, arrays: Arrays) -> None:
        """Remember the global parameters, from which updates are counted."""
        self._global = arrays

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average as FedAvg does, and project the mean update."""
        record, metrics = super().aggregate_train(server_round, replies)
        if record is None:
            return record, metrics
        arrays = to_arrays(record)
        # One thread, so that sums do not depend on the machine's number of cores.
        with one_thread():
            for name, basis in self._bases.items():
                # In the first task no subspace exists yet.
                if basis.shape[1]:
                    self._project_layer(arrays, f"body.{name}", basis)
        return to_record(arrays), metrics

    def aggregate_end_task(
        self,
        task: int,
        arrays: Arrays,
        replies: Sequence[Message],
    ) -> None:
        """Add up the clients' statistics of inputs and enlarge the subspaces."""
        records = [reply.content.get(EXTRA) for reply in replies]
        extras = [record for record in records if isinstance(record, Arrays)]
        if not extras:
            return
        # A subspace cannot hold more than all of the energy.
        threshold = min(1.0, self.threshold + task * self.increase)
        with one_thread():
            for name, basis in self._bases.items():
                self._bases[name] = _enlarge(basis, name, extras, threshold)

    def state_dict(self) -> dict[str, Any]:
        """Return the bases."""
        return {name: basis.numpy() for name, basis in self._bases.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._bases = {name: torch.tensor(basis) for name, basis in state.items()}

    def _project_layer(self, arrays: Arrays, layer: str, basis: Tensor) -> None:
        """Project one layer's update, in place."""
        weight = f"{layer}.weight"
        # A frozen parameter does not travel, so a layer may lack its weight or its bias.
        keys = [key for key in (weight, f"{layer}.bias") if key in arrays]
        widths = [arrays[key][0].size for key in keys]
        free_basis = restrict(basis, sum(widths), weight in arrays)
        old = _rows(self._global, keys)
        new = _rows(arrays, keys)
        projected = old + project(new - old, free_basis)
        parts = torch.split(projected, widths, 1)
        for key, part in zip(keys, parts, strict=True):
            arrays[key] = part.reshape(arrays[key].shape).float().numpy()


def _rows(arrays: Arrays, keys: Sequence[str]) -> Tensor:
    """Lay out a layer's parameters as one row a node, float64 [nodes, d]."""
    parts = [torch.tensor(arrays[key]).double() for key in keys]
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1)


def _enlarge(
    basis: Tensor,
    layer: str,
    extras: Sequence[Arrays],
    threshold: float,
) -> Tensor:
    """Enlarge one layer's subspace by the inputs of all clients."""
    total = _sum(extra[layer] for extra in extras)
    # A sketch has rows and columns; a second moment comes as one row, its upper triangle.
    is_sketch = total.dim() == 2
    if is_sketch:
        energy = _sum(extra[f"{layer}.energy"] for extra in extras)[0]
        return extend_from_sketch(basis, total, energy, threshold)
    return extend(basis, symmetric(total, len(basis)), threshold)


def _sum(parts: Iterable[np.ndarray]) -> Tensor:
    """Add up the clients' arrays in float64.

    No more than one client's array is copied at a time.
    """
    tensors = (torch.tensor(part, dtype=torch.float64) for part in parts)
    # In place, on the first client's copy.
    return functools.reduce(Tensor.add_, tensors)


def symmetric(triangle: Tensor, d: int) -> Tensor:
    """Undo :func:`fedknow.client.learners.fot.triangle`."""
    upper = torch.zeros(d, d, dtype=triangle.dtype)
    upper[torch.ones(d, d, dtype=torch.bool).triu()] = triangle
    # The diagonal must not count twice.
    return upper + upper.triu(1).T
