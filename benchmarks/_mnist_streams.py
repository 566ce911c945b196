"""Streams made of MNIST as publications make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedknow.client.data.datasets import load_dataset
from fedknow.protocols.config import DataConfig
from fedknow.protocols.seeds import generator

Pair = tuple[Tensor, Tensor]
"""Images, float [n, 1, 28, 28] from 0 to 1, and labels, int64 [n]."""
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Mnist:
    """The data set as published, images from 0 to 1."""

    train: Pair
    test: Pair


@dataclass(frozen=True)
class Stage:
    """A task of a stream.

    Attributes
    ----------
    classes : tuple of int
        Its slice of the head.
    train : Tensor of int64
        Its training samples.
    change : callable
        Makes its images of the original ones.
    """

    classes: tuple[int, ...]
    train: Tensor
    change: Change


def load_mnist(folder: str) -> Mnist:
    """Load MNIST, images from 0 to 1."""
    data = load_dataset(DataConfig(name="mnist", dir=folder))

    def pair(x: Any, y: Any) -> Pair:
        images = torch.from_numpy(np.array(x)).float().div_(255)
        return images.view(-1, 1, 28, 28), torch.from_numpy(np.array(y)).long()

    return Mnist(pair(data.train_x, data.train_y), pair(data.test_x, data.test_y))


def rotations(data: Mnist, seed: int) -> list[Stage]:
    """Make 20 tasks of 1,000 images, each turned by an angle of its own."""
    rng = generator(seed, "published/rotations")
    stages = []
    for task in range(20):
        degrees = (task + rng.random()) * 180 / 20
        stages.append(
            Stage(tuple(range(10)), _drawn(data, rng, 1000), _turn(degrees))
        )
    return stages


def permutations(data: Mnist, seed: int) -> list[Stage]:
    """Make 20 tasks of 1,000 images, each with its pixels in another order."""
    rng = generator(seed, "published/permutations")
    stages = []
    for _ in range(20):
        order = torch.from_numpy(rng.permutation(28 * 28))
        stages.append(
            Stage(tuple(range(10)), _drawn(data, rng, 1000), _shuffle(order))
        )
    return stages


def split(data: Mnist, seed: int) -> list[Stage]:
    """Make five tasks of two digits each, in their order."""
    labels = data.train[1]
    stages = []
    for low in range(0, 10, 2):
        rows = torch.nonzero((labels == low) | (labels == low + 1))[:, 0]
        stages.append(Stage((low, low + 1), rows, _same))
    return stages


def _drawn(data: Mnist, rng: np.random.Generator, count: int) -> Tensor:
    rows = rng.permutation(len(data.train[1]))[:count]
    return torch.from_numpy(rows)


def _same(x: Tensor) -> Tensor:
    return x


def _shuffle(order: Tensor) -> Change:
    return lambda x: x.flatten(1)[:, order].view_as(x)


def _turn(degrees: float) -> Change:
    """Turn images as the authors' program does, without interpolation."""

    def turn(x: Tensor) -> Tensor:
        rotated = []
        for image in (x * 255).round().to(torch.uint8).numpy():
            rotated.append(np.asarray(Image.fromarray(image[0]).rotate(degrees)))
        return torch.from_numpy(np.stack(rotated)[:, None]).float() / 255

    return turn
