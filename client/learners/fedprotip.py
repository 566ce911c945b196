"""FedProTIP: orthogonal updates, and a guess which task a sample is of.

Cha, Chen and Vikalo, "Task-Agnostic Federated Continual Learning via Replay-Free Gradient
Projection", 2025, arXiv 2509.21606. This is the client's half; the server's is
:class:`fedknow.strategies.fedprotip.FedProtip`. Updates are orthogonal to what past tasks feed
into each layer, as in :mod:`~fedknow.client.learners.fot`. Besides, the server finds directions
U_t of the features f of each task t, orthogonal to those of earlier tasks. How much of a sample
lies in each of them is its relevance, which is compared with that of each task's samples:

    a_t(x) = |U_t' f(x)|,   r_ut = sqrt(mean over x of task u of a_t(x)^2)    (1)
    u(x) = argmax_u <a(x), r_u> / (|a(x)| |r_u|)                              (2)

The answer is among the classes of task u(x). Equations are numbered here, as the paper's were not
at hand; the program meant is github.com/seohyeon-cha/FedProTIP at 12d2c22. It differs:

- It guesses one task for a whole batch of test samples, all of which are of one task. Here each
  sample is guessed alone.
- Its clients keep features of past tasks for r_ut. Here the server has their second moments M_u,
  and r_ut^2 is trace(U_t' M_u U_t) but for a factor that Eq. (2) does not see.
- It projects the gradient of each step, and its clients take part one after the other. Here the
  server projects the mean update, so any optimizer keeps past inputs' answers.
- It leaves the first task's directions out of Eq. (1), and guesses the second task by a threshold.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.fot import (
    Fot,
    FotSettings,
    check_triangle,
    triangle,
)
from fedknow.client.learners.frames.batch import Samples, widen
from fedknow.client.learners.frames.learner import (
    HeadSlice,
    Layout,
    LearnerSettings,
    Predictor,
    Round,
    State,
    Tensors,
)
from fedknow.client.learners.frames.scoring import among
from fedknow.client.learners.frames.shared import check_classes

__all__ = [
    "CLASSES",
    "FEATURES",
    "FedProtip",
    "FedProtipSettings",
    "relevance",
]

FEATURES = ".features"
"""Name of the features' second moment among the layers'; no module's name begins with a dot."""
CLASSES = ".classes"
"""Name of the task's classes."""


class FedProtipSettings(FotSettings):
    """Settings of :class:`FedProtip`."""

    exchange: Literal["all", "body"] = "all"
    """What is averaged; with ``body`` each client has a head of its own."""
    threshold: float = Field(0.775, gt=0, le=1)
    """The share of the inputs' energy that the subspace of past tasks has to hold; the authors'
    for CIFAR-100."""
    increase: float = Field(0.001, ge=0, lt=1)
    """What is added to the threshold after each task, up to 1."""
    directions: int = Field(20, ge=1, le=1_000_000)
    """Directions of the features that are found for each task; the authors have 20, and 30 of a
    pretrained network."""


class FedProtip(Fot):
    """Updates orthogonal to past tasks, and task prediction (2025).

    Cha et al.; a sample is answered among the classes of the task that its features are likest.
    Each task is trained among its own classes alone, so its rows of the head are left alone later.

    Keeps: nothing about past tasks; the subspaces are the server's. Sends: the model, and once a
    task what :class:`~fedknow.client.learners.fot.Fot` sends, the features' second moment, float
    [f (f + 1) / 2], and the task's classes. Gets: with each scoring the directions of the
    features, float [f, T r] after T tasks, and r_ut, float [T, T]. Needs: what Fot needs, and
    f multiplications for each number in the features. Valid: class- or task-incremental; models
    that Fot can train.
    """

    Settings = FedProtipSettings
    settings: FedProtipSettings
    strategy = "fedprotip"
    scenarios: ClassVar[tuple[str, ...]] = (
        "class-incremental",
        "task-incremental",
    )
    search: ClassVar[Mapping[str, Sequence[float | str]]] = {
        "threshold": [0.775, 0.9, 0.95, 0.99],
        "directions": [5, 10, 20],
    }

    @classmethod
    def strategy_options(cls, settings: LearnerSettings) -> dict[str, Any]:
        """Give FOT's options, and the number of directions."""
        assert isinstance(settings, FedProtipSettings)
        return super().strategy_options(settings) | {
            "directions": settings.directions
        }

    # --- state, and what travels

    def load_own_state(self, state: State) -> None:
        """Begin without directions, which come with each scoring."""
        self._spaces: Tensors = {}
        self._moment = torch.zeros(0, device=self.device)

    def receive_extra(self, extra: Tensors) -> None:
        """Take the directions of features, for scoring.

        ``bases`` float [f, k] with ``sizes`` int64 [T] of the tasks' columns, ``references``
        float [T, T], and for each of the ``classes`` int64 [m] the one of the ``tasks``.

        Raises
        ------
        ValueError
            If they do not fit together.
        """
        names = {"bases", "sizes", "references", "classes", "tasks"}
        count = len(extra["sizes"]) if extra.keys() == names else -1
        if (
            count < 1
            or extra["bases"].shape
            != (self.head.in_features, int(extra["sizes"].sum()))
            or extra["references"].shape != (count, count)
            or extra["classes"].shape != extra["tasks"].shape
        ):
            raise ValueError(
                f"directions of features with {', '.join(extra)} do not fit together"
            )
        # A copy, as received arrays are views of a message's buffer.
        self._spaces = {name: value.clone() for name, value in extra.items()}

    def shares(self, ended: bool) -> Layout:
        """List FOT's statistics, the features' second moment, and the classes."""
        width = self.head.in_features
        added: Layout = {
            FEATURES: ("float32", (width * (width + 1) // 2,)),
            CLASSES: ("int64", (-1,)),
        }
        return super().shares(ended) | (added if ended else {})

    def check_share(self, shared: Mapping[str, np.ndarray]) -> None:
        """Refuse moments that no inputs have, and classes that are not there."""
        check_triangle(FEATURES, shared[FEATURES], self.head.in_features)
        classes = shared[CLASSES]
        check_classes(CLASSES, classes, self.head.out_features)
        if len(np.unique(classes)) < len(classes):
            raise ValueError("a class is named twice")
        own_names = (FEATURES, CLASSES)
        super().check_share(
            {n: array for n, array in shared.items() if n not in own_names}
        )

    def share(self, task: TaskData, round: Round, ended: bool) -> Tensors:
        """Give what :meth:`shares` lists; there is nothing after a round."""
        width = self.head.in_features
        # Anew, as the sums are of the present model's features.
        self._moment = torch.zeros(width, width, device=self.device)
        shared = super().share(task, round, ended)
        if not ended:
            return shared
        return shared | {
            FEATURES: triangle(self._moment),
            CLASSES: torch.tensor(task.classes),
        }

    def note(self, features: Tensor) -> None:
        """Add features, float [n, f], to their second moment."""
        self._moment.addmm_(features.T, features)

    # --- training, and answers

    def training_data(self, task: TaskData, round: Round) -> Samples:
        """Give the task's samples, told from its own classes alone."""
        head = HeadSlice(task.classes, self.head.out_features, self.device)
        return Samples(task.train.x, head.labels(task.train.y), head)

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """End a task; where nothing is personal, there is nothing to train."""
        if self.exchange == "all":
            return {"knowledge-bytes": 0.0}
        return super().end_task(task, round)

    def predictors(self, count: int) -> Iterable[Predictor]:
        """Give one predictor for all tasks, which guesses each sample's task."""
        if not self._spaces:
            return super().predictors(count)
        # Arguments and not attributes: a pass costs by their shapes.
        predictor = functools.partial(
            _answer, self.body, self.head, dict(self._spaces)
        )
        return [predictor] * count


def relevance(features: Tensor, bases: Tensor, sizes: Sequence[int]) -> Tensor:
    """Take a(x) of Eq. (1), brought to length 1: float [n, T].

    Parameters
    ----------
    features : Tensor
        Float [n, f].
    bases : Tensor
        Directions of all tasks side by side, float [f, k].
    sizes : sequence of int
        How many columns each task has; 0 where no direction was left for it.
    """
    squares = (features @ bases).square()
    parts = torch.split(squares, list(sizes), 1)
    energy = torch.stack([part.sum(1) for part in parts], 1)
    return F.normalize(energy.sqrt(), dim=1)


def _answer(
    body: nn.Module, head: nn.Linear, spaces: Tensors, x: Tensor
) -> Tensor:
    """Answer samples among the classes of the tasks that Eq. (2) gives."""
    features = body(x)
    z = widen(head(features))
    a = relevance(widen(features), spaces["bases"], spaces["sizes"].tolist())
    guessed = (a @ F.normalize(spaces["references"], dim=1).T).argmax(1)
    members = torch.zeros(
        len(spaces["sizes"]), z.shape[1], dtype=torch.bool, device=z.device
    )
    members[spaces["tasks"], spaces["classes"]] = True
    return among(z, members[guessed])
