"""The server's half of FOT (Bakman et al., ICLR 2024): the subspace of past tasks, and updates
orthogonal to it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

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

__all__ = ["Fot", "extend", "extend_from_sketch", "project"]

log = logging.getLogger(__name__)


ROUNDING = 1e-6
"""A direction with a smaller share of the energy is taken for rounding: moments are sent as float32.
"""


def extend(basis: Tensor, moment: Tensor, threshold: float) -> Tensor:
    """Enlarge a layer's subspace by as few directions as a task's inputs ask for.

    With X the inputs and U the basis, eigenvectors of ``R R^T``, ``R = X - U U^T X``, are
    added, the largest first, until ``|U^T X|^2 >= threshold |X|^2`` for the new U. That holds
    up to what is taken for rounding: 1e-6 of the energy for each direction. (The authors'
    clients are sent U and project their inputs themselves; as ``R R^T`` follows from ``X X^T``,
    the server can do it. They also average clients' ratios ``|R| / |X|``, not squared; here the
    energies of everybody's inputs are compared, as a principal subspace asks.)

    Parameters
    ----------
    basis : Tensor
        U with orthonormal columns, float64 [d, k]; k may be 0.
    moment : Tensor
        X X^T, float64 [d, d].
    threshold : float
        epsilon, in (0, 1].

    Returns
    -------
    Tensor
        Orthonormal columns, float64 [d, k'], whose first k span what ``basis`` spans.
    """
    rest = moment - basis @ (basis.T @ moment)
    rest -= (rest @ basis) @ basis.T
    ascending, directions = torch.linalg.eigh(rest)
    energy, gained = moment.trace(), ascending.flip(0)
    held = (
        energy - rest.trace() + gained.cumsum(0) - gained
    )  # before each direction is added
    return _enlarge(
        basis,
        directions.flip(1),
        (held < threshold * energy) & (gained > ROUNDING * energy),
    )


def extend_from_sketch(
    basis: Tensor, sketch: Tensor, energy: Tensor, threshold: float
) -> Tensor:
    """:func:`extend` where the second moment is too large to be sent.

    Directions are singular vectors of ``A - U U^T A`` for one part of the sketch's columns.
    These columns lie closer to them than the inputs do, so what U holds is measured on the
    other columns, an eighth of the sketch, which are independent of U: ``|A - U U^T A|^2`` over
    their number is on average the energy that U leaves out, with a standard error of at most
    ``4 / sqrt(m)`` of it, 11 % for m = 1280, and less the more directions the rest has. So
    ``|U^T X|^2 >= threshold |X|^2`` is missed by a few times ``(1 - threshold) 4 / sqrt(m)
    |X|^2`` at worst. Where 7 m / 8 directions are too few for it, all of them are added and a
    warning is logged.

    Parameters
    ----------
    basis : Tensor
        U with orthonormal columns, float64 [d, k].
    sketch : Tensor
        A, float64 [d, m]: X Omega with Omega drawn from the standard normal distribution.
    energy : Tensor
        |X|^2, float64 scalar.
    threshold : float
        epsilon, in (0, 1].

    Returns
    -------
    Tensor
        As :func:`extend`.
    """
    rest = sketch - basis @ (basis.T @ sketch)
    measuring, finding = torch.tensor_split(rest, [rest.shape[1] // 8], dim=1)
    directions, values, _ = torch.linalg.svd(finding, full_matrices=False)
    gained = (directions.T @ measuring).square().mean(1)
    ever = energy - measuring.square().sum(0).mean() + gained.cumsum(0)
    if ever[-1] < (threshold - ROUNDING) * energy:
        log.warning(
            "FOT: the sketch's %d directions hold about %.3f of a layer's inputs, not the %g asked for; "
            "raise learner.columns = %d",
            *(len(gained), ever[-1] / energy, threshold, sketch.shape[1]),
        )
    needed = (ever - gained < threshold * energy) & (
        values.square() > ROUNDING * finding.shape[1] * energy
    )
    return _enlarge(basis, directions, needed)


def _enlarge(basis: Tensor, directions: Tensor, needed: Tensor) -> Tensor:
    """The basis and the first of the directions, as many as are needed and there is room for."""
    count = min(int(needed.sum()), len(basis) - basis.shape[1])
    orthonormal, _ = torch.linalg.qr(torch.cat([basis, directions[:, :count]], 1))
    return cast(Tensor, orthonormal)


def project(update: Tensor, basis: Tensor) -> Tensor:
    """An update without its part in the subspace: float [nodes, d] -> [nodes, d], with U float [d, k]."""
    return update - (update @ basis) @ basis.T


class Fot(PairedStrategy):
    """FedAvg whose averaged update is projected, layer by layer, off the subspace of past tasks'
    inputs.

    What a layer gives for an input in that subspace stays as it was, for ``(W + D) x = W x``
    where ``D U = 0`` and x lies in U. Keeps one basis a layer, at most [d, d].

    Parameters
    ----------
    threshold : float
        epsilon (:func:`extend`) of the first task.
    increase : float
        What epsilon grows by with each further task, up to 1.
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
        self._before = Arrays()

    def prepare(self, setup: Setup) -> None:
        """Learn the layers' names and sizes from the learner."""
        if not isinstance(setup.learner, FotLearner):
            raise ConfigError(
                "strategy.name = 'fot' is one half of a method; set learner.name = 'fot'"
            )
        layers = setup.learner.layers
        self._bases = {
            name: torch.zeros(dimension(layer), 0, dtype=torch.float64)
            for name, layer in layers.items()
        }

    def begin_round(self, task: int, arrays: Arrays) -> None:
        """Remember the parameters that updates are counted from."""
        self._before = arrays

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """FedAvg's mean, its difference from the parameters before projected."""
        record, metrics = super().aggregate_train(server_round, replies)
        if record is None:
            return record, metrics
        arrays = to_arrays(record)
        with one_thread():
            for name, basis in self._bases.items():
                if basis.shape[1]:
                    self._project_layer(arrays, f"body.{name}", basis)
        return to_record(arrays), metrics

    def _project_layer(self, arrays: Arrays, name: str, basis: Tensor) -> None:
        keys = [key for key in (f"{name}.weight", f"{name}.bias") if key in arrays]
        basis = _seen_by(
            basis, sum(arrays[key][0].size for key in keys), f"{name}.weight" in arrays
        )
        before, after = (
            torch.cat(
                [
                    torch.tensor(tree[key]).double().reshape(len(tree[key]), -1)
                    for key in keys
                ],
                1,
            )
            for tree in (self._before, arrays)
        )
        rows = before + project(after - before, basis)
        widths = [arrays[key][0].size for key in keys]
        for key, part in zip(keys, torch.split(rows, widths, 1), strict=True):
            arrays[key] = part.reshape(arrays[key].shape).float().numpy()

    def aggregate_end_task(
        self, task: int, arrays: Arrays, replies: Sequence[Message]
    ) -> None:
        """Add up what clients know of their inputs and enlarge the subspaces."""
        extras = [
            extra
            for reply in replies
            if isinstance(extra := reply.content.get(EXTRA), Arrays)
        ]
        if not extras:
            return
        threshold = min(1.0, self.threshold + task * self.increase)
        with one_thread():
            for name, basis in self._bases.items():
                total = _sum(extra[name] for extra in extras)
                if total.dim() == 2:
                    energy = _sum(extra[f"{name}.energy"] for extra in extras)[0]
                    self._bases[name] = extend_from_sketch(
                        basis, total, energy, threshold
                    )
                else:
                    self._bases[name] = extend(
                        basis, _symmetric(total, len(basis)), threshold
                    )

    def state_dict(self) -> dict[str, Any]:
        """The bases."""
        return {name: basis.numpy() for name, basis in self._bases.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._bases = {name: torch.tensor(basis) for name, basis in state.items()}


def _seen_by(basis: Tensor, size: int, weight: bool) -> Tensor:
    """The subspace as the free parameters of a partly frozen layer see it; the whole one of a free
    layer.

    An update D that is zero in the frozen columns has ``D U = 0`` if it is orthogonal to the other
    rows of U.

    Parameters
    ----------
    basis : Tensor
        U, float64 [d, k].
    size : int
        Free parameters of a node.
    weight : bool
        Whether its weight is among them; otherwise they are its bias, U's last row.
    """
    if size == len(basis):
        return basis
    rows = basis[:size] if weight else basis[-size:]
    directions, values, _ = torch.linalg.svd(rows, full_matrices=False)
    return cast(Tensor, directions[:, values > ROUNDING])


def _sum(parts: Iterable[np.ndarray]) -> Tensor:
    """Of all clients, in float64; no more than one client's is copied at a time."""
    return functools.reduce(
        Tensor.add_, (torch.tensor(part, dtype=torch.float64) for part in parts)
    )


def _symmetric(triangle: Tensor, d: int) -> Tensor:
    """Undo :func:`fedknow.client.learners.fot.triangle`."""
    upper = torch.zeros(d, d, dtype=triangle.dtype)
    upper[torch.ones(d, d, dtype=torch.bool).triu()] = triangle
    return upper + upper.triu(1).T
