"""Which task a sample is of, by the answers of past tasks' knowledge.

The paper is task-incremental: a sample comes with its task. Where it does not, each task's
knowledge may say how sure it is of the sample among its own classes, and the surest one names the
task. This is no part of the paper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fedknow.client.learners.fedknow.knowledge import Knowledge
from fedknow.client.learners.frames.batch import widen
from fedknow.client.learners.frames.scoring import Predictor, among

__all__ = ["infer_tasks", "sureness"]


def sureness(logits: Tensor, measure: str) -> Tensor:
    """Say how sure an answer is.

    Parameters
    ----------
    logits : Tensor
        Of one task's classes, float [n, c].
    measure : {"probability", "energy"}
        The largest probability, or the logarithm of the sum of exponentials.

    Returns
    -------
    Tensor
        Float [n]; more is surer.

    Examples
    --------
    >>> sureness(torch.tensor([[0.0, 0.0]]), "probability").tolist()
    [0.5]
    """
    if measure == "energy":
        return logits.logsumexp(1)
    return logits.softmax(1).amax(1)


def infer_tasks(
    model: nn.Module,
    body: nn.Module,
    knowledge: Sequence[Knowledge],
    measure: str,
    images: Callable[[Tensor], Tensor],
) -> Predictor:
    """Make a predictor that answers a sample within the task it infers.

    Parameters
    ----------
    model : nn.Module
        What answers.
    body : nn.Module
        A body for knowledge to work in; its weights are overwritten.
    knowledge : sequence of Knowledge
        Of each finished task. Classes of none stay possible for every sample.
    measure : str
        See :func:`sureness`.
    images : callable
        Puts samples into the memory format that a body takes.
    """
    # Arguments and not attributes: a pass costs by their shapes.
    return functools.partial(
        _answer, model, body, list(knowledge), measure, images
    )


def _answer(  # noqa: PLR0913  # what the predictor is bound to, and the samples
    model: nn.Module,
    body: nn.Module,
    knowledge: Sequence[Knowledge],
    measure: str,
    images: Callable[[Tensor], Tensor],
    x: Tensor,
) -> Tensor:
    z = widen(model(x))
    answers = [part.logits(body, images(x), len(x)) for part in knowledge]
    sure = torch.stack([sureness(answer, measure) for answer in answers], 1)
    members = torch.zeros(
        len(knowledge), z.shape[1], dtype=torch.bool, device=z.device
    )
    for row, part in zip(members, knowledge, strict=True):
        row[list(part.classes)] = True
    # A task that goes on has no knowledge yet, and its classes must not be lost.
    members |= ~members.any(0)
    return among(z, members[sure.argmax(1)])
