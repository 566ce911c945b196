"""One round of local training: batches, gradients, steps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from fedknow.client.compute.signature import describe_attributes, describe_values
from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.batch import Head, Samples
from fedknow.client.learners.frames.batching import batches, check_batches
from fedknow.client.learners.frames.exchange import Tensors
from fedknow.client.learners.frames.optimizers import drop_gradients
from fedknow.protocols.config import TrainConfig
from fedknow.protocols.errors import FedknowError

if TYPE_CHECKING:
    from fedknow.client.learners.frames.learner import Learner

__all__ = [
    "Diverged",
    "Round",
    "StepKey",
    "part_of_hook",
    "run_round",
    "seed_torch",
    "take_step",
]

_STEP_HOOKS = frozenset({"begin_epoch", "gradient", "loss", "step"})
"""Hooks that run with each step or between steps."""


class Diverged(FedknowError, RuntimeError):
    """Training produced a loss that is not a number."""

    @classmethod
    def in_epoch(
        cls,
        loss: float,
        epoch: int,
        train: TrainConfig,
        remedy: str = "",
    ) -> Self:
        """Say in which epoch (from 0), and what to do about it."""
        return cls(
            f"loss is {loss} in epoch {epoch + 1}; lower train.lr = {train.lr} "
            f"or set train.clip_norm{remedy}"
        )


@dataclass(frozen=True)
class Round:
    """Which round of local training this is.

    Attributes
    ----------
    number : int
        Round within the task, from 1; 0 where a client trains for itself at the end of a task.
    seed : int
        Seeds the order of batches and dropout; depends on run, client, task and round only.
    proximal_mu : float
        Weight of FedProx's term ``mu / 2 * ||w - w_global||^2`` (Li et al., MLSys 2020); 0 without.
    client : int
        Which client this is, from 0: its place in what the server sends of all clients.
    settings : mapping
        What else the strategy tells this client: keys of its config record that the learner
        names in :attr:`Learner.reads`, and all others; records of other kinds as mappings under
        their own names.
    """

    number: int
    seed: int
    proximal_mu: float = 0.0
    client: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


class StepKey:
    """The keys by which steps of equal cost are known, for one round.

    Parameters
    ----------
    learner : Learner
        The learner.
    is_pulled : bool
        Whether FedProx's term is added.
    """

    def __init__(self, learner: Learner, is_pulled: bool) -> None:
        self._learner = learner
        self._common = (is_pulled, _describe_settings(learner.train))
        # Without a method's own hook there is nothing that could change between steps.
        self._is_steady = learner.overridden.isdisjoint(_STEP_HOOKS)
        self._state: Hashable = None

    def __call__(self, count: int, head: Head) -> Hashable:
        """Give the key of the next step: all that its cost can depend on.

        The step is on ``count`` samples.
        """
        if self._state is None or not self._is_steady:
            self._state = self._describe()
        return ("step", count, head.width, self._common, self._state)

    def _describe(self) -> Hashable:
        """Describe the learner as it is now."""
        learner = self._learner
        return (
            tuple(map(_is_free, learner.all_parameters)),
            describe_attributes(learner, learner.frame_attributes),
        )


def run_round(learner: Learner, task: TaskData, round: Round) -> dict[str, float]:
    """Train one round (:meth:`Learner.fit`)."""
    samples = learner.training_data(task, round)
    smallest = learner.smallest_batch(samples.x)
    size = learner.train.batch_size
    check_batches(len(samples), size, smallest)
    # One generator for the order, another for dropout: more layers must not change the batches.
    generator = torch.Generator().manual_seed(round.seed)
    seed_torch(round.seed)
    samples = Samples(learner.images(samples.x), samples.y, samples.head)
    anchor = _anchor(learner) if round.proximal_mu else {}
    learner.model.train()
    with part_of_hook(learner, "begin"):
        learner.begin(task, round)
    key = StepKey(learner, bool(anchor))
    total, correct = 0.0, 0
    for epoch in range(learner.epochs):
        with learner.counting("begin_epoch"):
            learner.begin_epoch(epoch)
        total, correct = 0.0, 0
        for index in batches(
            len(samples), size, generator, learner.device, smallest
        ):
            with learner.meter.part(key(len(index), samples.head)):
                loss, right = take_step(learner, samples, index, anchor, round)
                # Negated, as a comparison with NaN is false.
                if not loss < float("inf"):
                    raise Diverged.in_epoch(
                        loss, epoch, learner.train, learner.remedy
                    )
            # Weighted by samples, as the last batch may be shorter.
            total += loss * len(index)
            correct += right
    return {"loss": total / len(samples), "accuracy": correct / len(samples)}


def part_of_hook(learner: Learner, name: str) -> AbstractContextManager[None]:
    """Count a hook apart, where a method has made it anew.

    The frame's own costs nothing.
    """
    if name in learner.overridden:
        return learner.meter.part()
    return nullcontext()


def take_step(
    learner: Learner,
    samples: Samples,
    index: torch.Tensor,
    anchor: Tensors,
    round: Round,
) -> tuple[float, int]:
    """Take one step.

    Returns
    -------
    tuple of float and int
        Mean loss of the batch, and how many of its samples were told rightly. Where the loss
        is not finite, parameters stay as they are.
    """
    batch = samples.batch(index)
    drop_gradients(learner.optimizer)
    loss, right = learner.gradient(batch)
    if not loss < float("inf"):
        return loss, right
    # FedProx's gradient comes first, so that clipping bounds the whole of it.
    for name, start in anchor.items():
        parameter = learner.trainable[name]
        if parameter.grad is not None:
            parameter.grad.add_(
                parameter.detach() - start, alpha=round.proximal_mu
            )
    if learner.train.clip_norm:
        nn.utils.clip_grad_norm_(
            learner.model.parameters(), learner.train.clip_norm
        )
    learner.step()
    return loss, right


def _anchor(learner: Learner) -> Tensors:
    """Copy the global model that FedProx's term pulls towards."""
    return {
        name: parameter.detach().clone()
        for name, parameter in learner.trainable.items()
        if learner.entries.travels(name)
    }


@lru_cache
def _describe_settings(train: TrainConfig) -> Hashable:
    # The learning rate may differ in each round, and costs nothing.
    return describe_values(item for item in train if item[0] != "lr")


def _is_free(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def seed_torch(seed: int) -> None:
    """Seed PyTorch's generators of the devices in use, for dropout.

    ``torch.manual_seed`` does the same, and formats a stack trace for each kind of device that
    is not in use: 0.3 ms, a tenth of a small client's round.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
