"""The server's half of FOT (Bakman et al., ICLR 2024): the subspace of past tasks, and updates orthogonal to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from torch import Tensor

from fedknow.client.host import one_thread
from fedknow.client.learners.fot import Fot as FotLearner
from fedknow.protocols.config import ConfigError
from fedknow.protocols.flower import to_arrays, to_record
from fedknow.protocols.messages import EXTRA, Arrays, Message
from fedknow.strategies.counterpart import Counterpart, Setup

__all__ = ["Fot", "extend", "project"]


def extend(basis: Tensor, sketch: Tensor, threshold: float) -> Tensor:
    """Enlarge a layer's subspace by as few principal directions as a task's inputs ask for.

    With A the sketch of the inputs and U the basis, directions of ``A - U U^T A`` are added, the strongest first, until
    ``|U U^T A|^2 >= threshold |A|^2`` for the new U. (The authors' clients project their inputs before they sketch
    them, and are sent U for it; as a sketch is linear in the inputs, the server can do it afterwards. They also compare
    clients' ratios of norms, averaged; here it is the energies of everybody's inputs, as a principal subspace asks.)

    Parameters
    ----------
    basis : Tensor
        U with orthonormal columns, float64 [d, k]; k may be 0.
    sketch : Tensor
        A, float64 [d, m].
    threshold : float
        epsilon, in (0, 1].

    Returns
    -------
    Tensor
        Orthonormal columns, float64 [d, k'], whose first k span what ``basis`` spans.
    """
    rest = sketch - basis @ (basis.T @ sketch)
    directions, strength, _ = torch.linalg.svd(rest, full_matrices=False)
    energy, gained = sketch.square().sum(), strength.square()
    held = energy - rest.square().sum() + gained.cumsum(0) - gained  # before each direction is added
    # What is left below rounding is no direction, even where all of the energy is asked for.
    needed = (held < threshold * energy) & (strength > 1e-7 * energy.sqrt())
    count = min(int(needed.sum()), len(basis) - basis.shape[1])
    orthonormal, _ = torch.linalg.qr(torch.cat([basis, directions[:, :count]], 1))
    return cast(Tensor, orthonormal)


def project(update: Tensor, basis: Tensor) -> Tensor:
    """An update without its part in the subspace: float [nodes, d] -> [nodes, d], with U float [d, k]."""
    return update - (update @ basis) @ basis.T


class Fot(Counterpart):
    """FedAvg whose averaged update is projected, layer by layer, off the subspace of past tasks' inputs.

    What a layer gives for an input in that subspace stays as it was, for ``(W + D) x = W x`` where ``D U = 0`` and x
    lies in U. Keeps one basis a layer, at most [d, d].

    Parameters
    ----------
    threshold : float
        epsilon (:func:`extend`).
    fraction_train, min_train_nodes, min_available_nodes
        See :class:`~fedknow.strategies.counterpart.Counterpart`.
    """

    def __init__(
        self,
        threshold: float = 0.95,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(fraction_train, min_train_nodes, min_available_nodes)
        self.threshold = threshold
        self._before = Arrays()

    def prepare(self, setup: Setup) -> None:
        """Learn the layers' names and sizes from the learner."""
        if not isinstance(setup.learner, FotLearner):
            raise ConfigError("strategy.name = 'fot' is one half of a method; set learner.name = 'fot'")
        layout = setup.learner.shares(ended=True)
        self._bases = {name: torch.zeros(shape[0], 0, dtype=torch.float64) for name, (_, shape) in layout.items()}

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
        before, after = (
            torch.cat([torch.tensor(tree[key]).double().reshape(len(tree[key]), -1) for key in keys], 1)
            for tree in (self._before, arrays)
        )
        rows = before + project(after - before, basis)
        widths = [arrays[key][0].size for key in keys]
        for key, part in zip(keys, torch.split(rows, widths, 1), strict=True):
            arrays[key] = part.reshape(arrays[key].shape).float().numpy()

    def aggregate_end_task(self, task: int, arrays: Arrays, replies: Sequence[Message]) -> None:
        """Add up the clients' sketches and enlarge the subspaces."""
        extras = [reply.content[EXTRA] for reply in replies if EXTRA in reply.content]
        with one_thread():
            for name, basis in self._bases.items():
                parts = [torch.tensor(extra[name]).double() for extra in extras if isinstance(extra, Arrays)]
                if parts:
                    self._bases[name] = extend(basis, torch.stack(parts).sum(0), self.threshold)

    def state_dict(self) -> dict[str, Any]:
        """The bases."""
        return {name: basis.numpy() for name, basis in self._bases.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._bases = {name: torch.tensor(basis) for name, basis in state.items()}
