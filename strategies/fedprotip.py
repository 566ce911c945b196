"""The server's half of FedProTIP: FOT's, and directions of features.

Cha, Chen and Vikalo, "Task-Agnostic Federated Continual Learning via Replay-Free Gradient
Projection", 2025. Equations are those of :mod:`fedknow.client.learners.fedprotip`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedknow.client.host import one_thread
from fedknow.client.learners.fedprotip import CLASSES, FEATURES
from fedknow.client.learners.fedprotip import FedProtip as FedProtipLearner
from fedknow.protocols.config import ConfigError
from fedknow.protocols.messages import EXTRA, Arrays, Message
from fedknow.strategies.fot import Fot, symmetric
from fedknow.strategies.paired import Setup
from fedknow.strategies.subspaces import extend

__all__ = ["FedProtip", "Space", "references"]


@dataclass(eq=False)
class Space:
    """The features of one task.

    Attributes
    ----------
    classes : list of int
        The task's.
    moment : Tensor
        M_u, float64 [f, f]: the sum of f f' over all clients' samples.
    basis : Tensor
        U_t, float64 [f, k], orthogonal to the bases of earlier tasks.
    """

    classes: list[int]
    moment: Tensor
    basis: Tensor


class FedProtip(Fot):
    """FOT that tells clients which features each task has.

    The server stores what FOT stores, and for each task the second moment of its features, [f,
    f], and directions of them. Tasks are told apart by their sets of classes.

    Parameters
    ----------
    threshold, increase
        See :class:`~fedknow.strategies.fot.Fot`.
    directions : int
        Directions found for each task, at most.
    fraction_train, min_train_nodes, min_available_nodes
        See :class:`~fedknow.strategies.paired.PairedStrategy`.
    """

    def __init__(  # noqa: PLR0913  # the strategy's settings
        self,
        threshold: float = 0.775,
        increase: float = 0.001,
        directions: int = 20,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(
            threshold,
            increase,
            fraction_train,
            min_train_nodes,
            min_available_nodes,
        )
        self.directions = directions
        self._spaces: list[Space] = []

    def prepare(self, setup: Setup) -> None:
        """Take the layers' names and sizes from the learner."""
        if not isinstance(setup.learner, FedProtipLearner):
            raise ConfigError(
                "strategy.name = 'fedprotip' is one half of a method; "
                "set learner.name = 'fedprotip'"
            )
        super().prepare(setup)
        self._width = setup.learner.head.in_features

    def aggregate_end_task(
        self,
        task: int,
        arrays: Arrays,
        replies: Sequence[Message],
    ) -> None:
        """Enlarge FOT's subspaces, and find directions of the task's features."""
        super().aggregate_end_task(task, arrays, replies)
        with one_thread():
            for reply in replies:
                extra = reply.content.get(EXTRA)
                if isinstance(extra, Arrays):
                    self._add(extra)
            for space in self._spaces:
                # Earlier tasks keep the directions that clients were told of.
                if not space.basis.shape[1]:
                    space.basis = self._find_directions(space.moment)

    def extra_to_score(self) -> Arrays | None:
        """Return directions and references of all tasks so far."""
        if not self._spaces:
            return None
        bases = [space.basis for space in self._spaces]
        with one_thread():
            table = references([s.moment for s in self._spaces], bases)
        sizes = [basis.shape[1] for basis in bases]
        labels = [torch.tensor(space.classes) for space in self._spaces]
        numbers = [torch.full_like(c, t) for t, c in enumerate(labels)]
        return Arrays(
            bases=torch.cat(bases, 1).float().numpy(),
            sizes=np.array(sizes, np.int64),
            references=table.float().numpy(),
            classes=torch.cat(labels).numpy(),
            tasks=torch.cat(numbers).numpy(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the bases of layers, and the tasks' features."""
        spaces = [
            {
                "classes": space.classes,
                "moment": space.moment.numpy(),
                "basis": space.basis.numpy(),
            }
            for space in self._spaces
        ]
        return {"layers": super().state_dict(), "spaces": spaces}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        super().load_state_dict(state["layers"])
        self._spaces = [
            Space(
                list(entry["classes"]),
                torch.tensor(entry["moment"]),
                torch.tensor(entry["basis"]),
            )
            for entry in state["spaces"]
        ]

    def _add(self, extra: Arrays) -> None:
        """Add one client's features to those of its task."""
        # Sorted, as clients may name the classes of a task in any order.
        classes = sorted(int(label) for label in extra[CLASSES])
        half = torch.tensor(extra[FEATURES], dtype=torch.float64)
        moment = symmetric(half, self._width)
        for space in self._spaces:
            if space.classes == classes:
                space.moment += moment
                return
        nothing = moment.new_zeros(self._width, 0)
        self._spaces.append(Space(classes, moment, nothing))

    def _find_directions(self, moment: Tensor) -> Tensor:
        """Find the strongest directions that no earlier task has."""
        held = torch.cat([space.basis for space in self._spaces], 1)
        enlarged = extend(held, moment, 1.0)
        # Of new directions the strongest come first.
        start = held.shape[1]
        return enlarged[:, start : start + self.directions]


def references(moments: Sequence[Tensor], bases: Sequence[Tensor]) -> Tensor:
    """Take r_ut of Eq. (1) but for each row's factor, float64 [T, T].

    Parameters
    ----------
    moments : sequence of Tensor
        M_u, float64 [f, f].
    bases : sequence of Tensor
        U_t, float64 [f, k]; k may be 0.
    """
    rows = []
    for moment in moments:
        energies = [(basis * (moment @ basis)).sum() for basis in bases]
        # Rounding may leave the energy of a direction without any below zero.
        rows.append(torch.stack(energies).clamp_min(0).sqrt())
    return torch.stack(rows)
