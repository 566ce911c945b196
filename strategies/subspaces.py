"""Subspaces of a layer's inputs, and updates orthogonal to them.

The linear algebra of FOT (:mod:`fedknow.strategies.fot`). A subspace is a matrix U with
orthonormal columns, float64 [d, k], for inputs of d numbers.
"""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor

__all__ = ["extend", "extend_from_sketch", "project", "restrict"]

log = logging.getLogger(__name__)


ROUNDING = 1e-6
"""The share of the energy below which a direction counts as a rounding error.

Moments are sent as float32.
"""


def extend(basis: Tensor, moment: Tensor, threshold: float) -> Tensor:
    """Enlarge a layer's subspace by as few directions as a task's inputs need.

    With X the inputs and U the basis, eigenvectors of ``R R^T``, ``R = X - U U^T X``, are
    added, the largest first, until ``|U^T X|^2 >= threshold |X|^2`` for the new U. This holds
    up to the rounding limit: 1e-6 of the energy for each direction.

    The authors' server sends U to the clients, which project their inputs themselves. As ``R
    R^T`` follows from ``X X^T``, the server can do it. They also average clients' ratios ``|R|
    / |X|``, not squared. Here the energies of all clients' inputs are compared, as the
    definition of a principal subspace asks.

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
        Orthonormal columns, float64 [d, k'], whose first k span the space of ``basis``.
    """
    residual = moment - basis @ (basis.T @ moment)
    # From both sides: R R^T = (I - U U^T) X X^T (I - U U^T).
    residual -= (residual @ basis) @ basis.T
    # eigh sorts upwards, and the largest directions are needed first.
    ascending, directions = torch.linalg.eigh(residual)
    gains = ascending.flip(0)
    energy = moment.trace()
    # The energy that the subspace holds before each direction is added.
    held = energy - residual.trace() + gains.cumsum(0) - gains
    is_needed = (held < threshold * energy) & (gains > ROUNDING * energy)
    return _enlarge(basis, directions.flip(1), int(is_needed.sum()))


def extend_from_sketch(
    basis: Tensor,
    sketch: Tensor,
    energy: Tensor,
    threshold: float,
) -> Tensor:
    """Enlarge a layer's subspace by a sketch of the inputs.

    A sketch is sent where the second moment is too large. Directions are singular vectors
    of ``A - U U^T A`` for one part of the sketch's columns. These columns lie closer to
    them than the inputs do. So the share that U holds is measured on the other columns, an
    eighth of the sketch, which are independent of U. On average ``|A - U U^T A|^2`` over
    their number is the energy that U leaves out. Its standard error is at most ``4 /
    sqrt(m)`` of it, 11 % for m = 1280, and less with more directions in the residual. So
    ``|U^T X|^2 >= threshold |X|^2`` is missed by a few times ``(1 - threshold) 4 / sqrt(m)
    |X|^2`` at worst. Where 7 m / 8 directions are too few for it, all of them are added and
    a warning is logged.

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
    residual = sketch - basis @ (basis.T @ sketch)
    columns = sketch.shape[1]
    # Columns that chose the directions would overrate them.
    measuring, finding = torch.tensor_split(residual, [columns // 8], dim=1)
    directions, values, _ = torch.linalg.svd(finding, full_matrices=False)
    gains = (directions.T @ measuring).square().mean(1)
    # The energy that the subspace holds once each direction has been added.
    held = energy - measuring.square().sum(0).mean() + gains.cumsum(0)
    if held[-1] < (threshold - ROUNDING) * energy:
        log.warning(
            "FOT: the sketch's %d directions hold about %.3f of a layer's inputs, "
            "not the %g asked for; raise learner.columns = %d",
            len(gains),
            held[-1] / energy,
            threshold,
            columns,
        )
    is_short = held - gains < threshold * energy
    is_real = values.square() > ROUNDING * finding.shape[1] * energy
    return _enlarge(basis, directions, int((is_short & is_real).sum()))


def project(update: Tensor, basis: Tensor) -> Tensor:
    """Remove from an update its part in the subspace.

    Parameters
    ----------
    update : Tensor
        One row a node, float [nodes, d].
    basis : Tensor
        U, float [d, k].

    Returns
    -------
    Tensor
        Float [nodes, d].
    """
    return update - (update @ basis) @ basis.T


def restrict(basis: Tensor, size: int, has_weight: bool) -> Tensor:
    """Restrict a subspace to the free parameters of a partly frozen layer.

    An update D that is zero in the frozen columns has ``D U = 0`` if it is orthogonal to the
    other rows of U.

    Parameters
    ----------
    basis : Tensor
        U, float64 [d, k].
    size : int
        Free parameters of a node; with all d the subspace stays as it is.
    has_weight : bool
        Whether its weight is among them; otherwise they are its bias, U's last row.
    """
    if size == len(basis):
        return basis
    rows = basis[:size] if has_weight else basis[-size:]
    # The rows of an orthonormal matrix are not orthonormal themselves.
    directions, values, _ = torch.linalg.svd(rows, full_matrices=False)
    return cast(Tensor, directions[:, values > ROUNDING])


def _enlarge(basis: Tensor, directions: Tensor, count: int) -> Tensor:
    """Add up to ``count`` directions to a basis, as many as there is room for."""
    room = len(basis) - basis.shape[1]
    added = directions[:, : min(count, room)]
    # The directions are orthogonal to U up to rounding alone, which would add up over tasks.
    orthonormal, _ = torch.linalg.qr(torch.cat([basis, added], 1))
    return cast(Tensor, orthonormal)
