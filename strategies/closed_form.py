"""The server's half of closed-form learners: add sums up, solve.

Equations are those of :mod:`fedknow.client.learners.afcl` and
:mod:`fedknow.client.learners.stsa`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from torch import Tensor

from fedknow.client.host import one_thread
from fedknow.client.learners.frames.closed_form import ClosedForm
from fedknow.protocols.config import ConfigError
from fedknow.protocols.flower import to_record
from fedknow.protocols.messages import EXTRA, Arrays, Message, client_of
from fedknow.strategies.paired import PairedStrategy, Setup

__all__ = ["Afcl", "Stsa", "light_gram", "solve"]

_WORST = 1e13
"""Condition number up to which a solution in float64 has some right digits."""


class Afcl(PairedStrategy):
    """Sums X'X and X'Y over clients and tasks, and solves for the head.

    Sums are float64, and the order in which they come changes the solution by rounding alone.

    Parameters
    ----------
    ridge : float
        gamma, the weight of the squared norm of the classifier.
    fraction_train, min_train_nodes, min_available_nodes
        See :class:`~fedknow.strategies.paired.PairedStrategy`.
    """

    name = "Afcl"
    takes_sums = True

    def __init__(
        self,
        ridge: float = 1.0,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(fraction_train, min_train_nodes, min_available_nodes)
        self.ridge = ridge

    def prepare(self, setup: Setup) -> None:
        """Make room for the sums.

        Raises
        ------
        ConfigError
            If the learner is another one.
        """
        if not isinstance(setup.learner, ClosedForm):
            raise ConfigError(
                f"strategy {self.name} is one half of a method; set learner.name = "
                f"{self.name.lower()!r}"
            )
        head = setup.learner.head
        self._is_new = False
        self.reset(head.in_features, head.out_features)

    def reset(self, width: int, classes: int) -> None:
        """Begin with no sums, for features [width]."""
        # In float64: the solution needs digits that long sums in float32 have lost.
        self._gram = torch.zeros(width, width, dtype=torch.float64)
        self._moment = torch.zeros(width, classes, dtype=torch.float64)

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add one client's sums of one task, or those of several, Eq. (3)."""
        self._moment += sums["moment"]
        # A client sends the smaller one of two forms, and the other one empty.
        if len(rows := sums["factor"]):
            self._gram.addmm_(rows.T, rows)
        elif len(half := sums["gram"]):
            self._gram += _symmetric(half, len(self._gram))

    def solution(self) -> Tensor:
        """Solve for the classifier, float64 [width, classes]."""
        return solve(self._gram, self._moment, self.ridge)

    # --- Flower's hooks

    def collect(self, task: int, extras: Mapping[int, Arrays]) -> None:
        """Add up what clients shared in a round."""
        with one_thread():
            # In the order of clients, so that sums are the same wherever a run goes on.
            for client in sorted(extras):
                self.add(_tensors(extras[client]))
        self._is_new = True

    def begin_round(self, task: int, arrays: Arrays) -> None:
        """Note the parameters that clients are sent."""
        self._sent = arrays

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Put the solution in the place of the averaged head."""
        record, metrics = super().aggregate_train(server_round, replies)
        if record is None:
            return record, metrics
        # Clients return what they were sent, and a mean would round it.
        solved = self._solved(self._sent)
        return to_record(self._sent if solved is None else solved), metrics

    def aggregate_end_task(
        self, task: int, arrays: Arrays, replies: Sequence[Message]
    ) -> Arrays | None:
        """Add up what clients shared that no round had chosen; solve again.

        So each task's scores are those of all samples so far, after the last task too.
        """
        extras: dict[int, Arrays] = {}
        for reply in replies:
            extra = reply.content.get(EXTRA)
            if isinstance(extra, Arrays):
                extras[client_of(reply.node)] = extra
        if extras:
            self.collect(task, extras)
        return self._solved(arrays)

    def _solved(self, arrays: Arrays) -> Arrays | None:
        """Put the solution into a copy of the parameters, if sums came."""
        if not self._is_new:
            return None
        # Threads split a sum by the number of cores, and rounding follows.
        with one_thread():
            weight = self.solution().T
        solved = Arrays(arrays)
        solved["head.weight"] = weight.float().contiguous().numpy()
        # Eq. (1) has no constant; a user's head may have none either.
        if "head.bias" in solved:
            solved["head.bias"] = np.zeros_like(solved["head.bias"])
        self._is_new = False
        return solved

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return {
            "gram": self._gram.numpy(),
            "moment": self._moment.numpy(),
            "is_new": self._is_new,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._gram = torch.tensor(state["gram"])
        self._moment = torch.tensor(state["moment"])
        self._is_new = bool(state["is_new"])


class Stsa(Afcl):
    """AFCL on random features; in the light form from class sums alone.

    Parameters
    ----------
    ridge : float
        gamma, the weight of the squared norm of the classifier.
    light : bool
        Whether clients send class sums alone.
    fraction_train, min_train_nodes, min_available_nodes
        See :class:`~fedknow.strategies.paired.PairedStrategy`.
    """

    name = "Stsa"

    def __init__(  # noqa: PLR0913: those of its base class, and one
        self,
        ridge: float = 1.0,
        light: bool = False,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(
            ridge, fraction_train, min_train_nodes, min_available_nodes
        )
        self.light = light

    def reset(self, width: int, classes: int) -> None:
        """Begin with no sums, for features [width]."""
        if not self.light:
            super().reset(width, classes)
            return
        self._width, self._classes = width, classes
        self._rows: dict[str, Tensor] = {
            "sums": torch.zeros(0, width, dtype=torch.float64),
            "classes": torch.zeros(0, dtype=torch.int64),
            "counts": torch.zeros(0, dtype=torch.int64),
        }

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add one client's sums of one task."""
        if not self.light:
            super().add(sums)
            return
        # Eq. (3) weighs them by counts that later clients may change.
        self._rows = {
            name: torch.cat([rows, sums[name]])
            for name, rows in self._rows.items()
        }

    def solution(self) -> Tensor:
        """Solve for the classifier, float64 [width, classes]."""
        if not self.light:
            return super().solution()
        sums, labels = self._rows["sums"], self._rows["classes"]
        moment = sums.new_zeros(self._classes, self._width)
        moment.index_add_(0, labels, sums)
        gram = light_gram(sums, labels, self._rows["counts"], moment)
        return solve(gram, moment.T, self.ridge)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        if not self.light:
            return super().state_dict()
        rows = {name: value.numpy() for name, value in self._rows.items()}
        return {**rows, "is_new": self._is_new}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        if not self.light:
            super().load_state_dict(state)
            return
        self._rows = {name: torch.tensor(state[name]) for name in self._rows}
        self._is_new = bool(state["is_new"])


def light_gram(
    sums: Tensor, labels: Tensor, counts: Tensor, moment: Tensor
) -> Tensor:
    """Estimate X'X from class sums, STSA's Eq. (2) and (3).

    Parameters
    ----------
    sums : Tensor of float64, shape (rows, d)
        s_kc.
    labels, counts : Tensor of int64, shape (rows,)
        c and n_kc of each row.
    moment : Tensor of float64, shape (classes, d)
        s_c.

    Returns
    -------
    Tensor of float64, shape (d, d)
        Positive semi-definite. A class of one group gives ``s_c s_c' / N_c``, as nothing is
        known of how its samples differ.
    """
    classes = len(moment)
    samples = sums.new_zeros(classes)
    samples.index_add_(0, labels, counts.double())
    groups = torch.bincount(labels, minlength=classes).double()
    # With one group A = 1 and B = 0 give that matrix.
    divisor = (groups - 1).clamp(min=1)
    has_several = groups > 1
    a = torch.where(has_several, (samples - 1) / divisor, 1.0)
    b = torch.where(
        has_several, (samples - groups) / (divisor * samples.clamp(min=1)), 0.0
    )
    weights = a[labels] / counts
    return (sums.T * weights) @ sums - (moment.T * b) @ moment


def solve(gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """Solve (G + gamma I) W = P by Cholesky, AFCL's Eq. (2).

    Parameters
    ----------
    gram : Tensor of float64, shape (d, d)
        G, symmetric and positive semi-definite; not changed.
    moment : Tensor of float64, shape (d, c)
        P.
    ridge : float
        gamma.

    Raises
    ------
    ConfigError
        If the condition number may be too large for a right digit.
    """
    # The largest eigenvalue is at most the trace, and none is below gamma.
    worst = 1 + gram.trace().item() / ridge
    # A copy, as the sums go on with the next task.
    regular = gram.clone()
    regular.diagonal().add_(ridge)
    # Tells of a failure and does not raise, so that one error names the setting.
    lower, fault = torch.linalg.cholesky_ex(regular)
    if worst > _WORST or fault.item():
        raise ConfigError(
            f"learner.ridge = {ridge:g}: the sums have a condition number of up to {worst:.1e}, "
            f"and float64 bears {_WORST:.0e}; raise learner.ridge to "
            f"{gram.trace().item() / _WORST:.1e} or more"
        )
    return torch.cholesky_solve(moment, lower)


def _symmetric(half: Tensor, size: int) -> Tensor:
    """Lay out a matrix from its upper half."""
    rows, columns = torch.triu_indices(size, size)
    matrix = half.new_zeros(size, size)
    matrix[rows, columns] = half
    matrix[columns, rows] = half
    return matrix


def _tensors(extra: Arrays) -> dict[str, Tensor]:
    return {name: torch.tensor(array) for name, array in extra.items()}
