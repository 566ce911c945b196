"""Training data as a hostile client falsifies it, for simulations."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from fedknow.client.data.stream import Split, TaskData, TaskStream
from fedknow.protocols.config import AttackConfig

__all__ = ["POISONS", "PoisonedStream", "add_trigger"]

POISONS = ("labelflip", "backdoor")
"""Attacks that falsify the training data."""
_PATCH = 3
"""Height and width of the trigger, in pixels."""


class PoisonedStream:
    """A task stream in which hostile clients falsify their training samples.

    Test samples stay as they are. It is a :class:`~fedknow.client.data.TaskStream`.

    Parameters
    ----------
    stream : TaskStream
        The honest samples, which are not changed.
    attack : AttackConfig
        Its name is one of :data:`POISONS`.
    hostile : collection of int
        Who falsifies.
    """

    def __init__(
        self,
        stream: TaskStream,
        attack: AttackConfig,
        hostile: Collection[int],
    ) -> None:
        self._stream = stream
        self._attack = attack
        self._hostile = frozenset(hostile)
        self.tasks = stream.tasks
        self.classes = stream.classes
        self.spec = stream.spec
        self.clients = stream.clients

    def length(self, client: int) -> int:
        """Count the tasks that a client has: ``tasks`` or fewer."""
        return self._stream.length(client)

    def task(self, client: int, task: int) -> TaskData:
        """Give a client's share of the task at a position of its own order."""
        data = self._stream.task(client, task)
        if client not in self._hostile:
            return data
        change = {"labelflip": _flip_labels, "backdoor": _add_backdoor}
        # Test samples stay true: the attack is judged by them.
        falsify = change[self._attack.name]
        return replace(data, train=falsify(data.train, data.classes))


def add_trigger(x: Tensor) -> Tensor:
    """Paint the backdoor's trigger into copies of images.

    It is a square in the lower right corner, as bright as the brightest value of the images
    (Gu, Dolan-Gavitt and Garg, "BadNets", 2017).

    Parameters
    ----------
    x : Tensor of float32, shape (n, C, H, W)

    Returns
    -------
    Tensor of float32, shape (n, C, H, W)
    """
    marked = x.clone()
    # The brightest value there is, whatever the images were normalised to.
    marked[..., -_PATCH:, -_PATCH:] = x.max() if x.numel() else 0.0
    return marked


def _flip_labels(split: Split, classes: tuple[int, ...]) -> Split:
    """Give each sample the class at the other end of the task's classes."""
    flipped = split.y.clone()
    for label, opposite in zip(classes, reversed(classes), strict=True):
        flipped[split.y == label] = opposite
    return Split(split.x, flipped)


def _add_backdoor(split: Split, classes: tuple[int, ...]) -> Split:
    """Mark every second sample, and label it as the task's first class.

    Not copies: more samples would weigh more in the mean.
    """
    x, y = split.x.clone(), split.y.clone()
    # Half of the samples stay clean, so that the model still learns its task.
    x[::2] = add_trigger(split.x)[::2]
    y[::2] = classes[0]
    return Split(x, y)
