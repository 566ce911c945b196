"""Scoring: forward passes over test samples, and right answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fedknow.client.compute.signature import describe
from fedknow.client.data.stream import Split
from fedknow.client.learners.frames.batch import HeadSlice, widen

if TYPE_CHECKING:
    from fedknow.client.learners.frames.learner import Learner

__all__ = ["Predictor", "Score", "among", "logits", "predict", "score"]

Predictor = Callable[[Tensor], Tensor]
"""Samples, float [n, C, H, W], to logits over the whole head [n, classes]."""
Score = tuple[int, int, float]
"""Number of samples told rightly, number of samples, mean loss."""


def predict(
    learner: Learner,
    predictor: Predictor,
    x: Tensor,
    batch_size: int,
) -> Tensor:
    """Give a predictor's answers to samples, in the present mode.

    Parameters
    ----------
    learner : Learner
        Whose precision and memory format are used; it is charged.
    predictor : callable
        Samples to logits, or to features [n, m].
    x : Tensor
        Float [n, C, H, W].
    batch_size : int
        Samples a pass.
    """
    parts = torch.split(learner.images(x), batch_size)
    kind = describe(predictor)
    answers = []
    with torch.no_grad(), learner.autocast():
        for part in parts:
            with learner.meter.part(("predict", kind, part.shape)):
                answers.append(widen(predictor(part)))
        return torch.cat(answers)


@torch.inference_mode()
def score(
    learner: Learner,
    splits: Sequence[Split],
    heads: Sequence[Sequence[int]],
    batch_size: int,
) -> list[Score]:
    """Score several test sets.

    Parameters
    ----------
    learner : Learner
        Answers them, in evaluation mode.
    splits : sequence of Split
        Test samples of each task.
    heads : sequence of sequences of int
        The classes a prediction may name, for each.
    batch_size : int
        Samples a pass.

    Returns
    -------
    list of (right, total, mean loss), one for each test set
    """
    learner.model.eval()
    scores: list[Score] = []
    for predictor, tasks in _runs(learner, len(splits)):
        # Tasks with the same predictor share passes, so that few batches are short.
        x = torch.cat([splits[task].x for task in tasks])
        z = predict(learner, predictor, x, batch_size)
        sizes = [len(splits[task].y) for task in tasks]
        for task, part in zip(tasks, torch.split(z, sizes), strict=True):
            head = HeadSlice(
                heads[task], learner.head.out_features, learner.device
            )
            scores.append(_score(part, splits[task].y, head))
    return scores


@torch.inference_mode()
def logits(learner: Learner, x: Tensor, batch_size: int) -> Tensor:
    """Answer samples of the first task: [n, C, H, W] -> [n, classes]."""
    learner.model.eval()
    (predictor,) = learner.predictors(1)
    return predict(learner, predictor, x, batch_size)


def among(z: Tensor, allowed: Tensor) -> Tensor:
    """Lower logits below all others where they are not allowed.

    Parameters
    ----------
    z : Tensor
        Float [n, classes].
    allowed : Tensor
        Bool [n, classes].
    """
    # By as much as is needed: minus infinity would make the loss of a wrong guess infinite.
    spread = z.amax(1, keepdim=True) - z.amin(1, keepdim=True) + 1
    return torch.where(allowed, z, z - spread)


def _runs(learner: Learner, count: int) -> Iterator[tuple[Predictor, list[int]]]:
    """Give predictors, each with the consecutive tasks that share it."""
    predictors = iter(learner.predictors(count))
    predictor: Predictor | None = None
    tasks: list[int] = []
    for task in range(count):
        with learner.meter.part():  # it may have to be made
            following = next(predictors)
        if predictor is not None and following is not predictor:
            yield predictor, tasks
            tasks = []
        predictor = following
        tasks.append(task)
    if predictor is not None:
        yield predictor, tasks


def _score(z: Tensor, y: Tensor, head: HeadSlice) -> Score:
    sliced = head.logits(z)
    labels = head.labels(y)
    loss = F.cross_entropy(sliced, labels).item()
    # Counts and not shares: they add up over clients without a rounding error.
    right = int((sliced.argmax(1) == labels).sum())
    return right, len(labels), loss
