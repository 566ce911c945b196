"""Data sets and a model that benchmarks name as ``parts:...``.

Their pixels and sizes matter here, not accuracy.

Imports our package only where a data set is asked for: ``pfl_client.py`` takes the model, and
runs without us.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from fedknow.client.data import Dataset
    from fedknow.protocols.config import DataConfig

__all__ = [
    "Split",
    "cifar10_like",
    "dnn",
    "like_images",
    "mnist_like",
    "two_layer_cnn",
]


def like_images(
    shape: tuple[int, int, int], samples: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Make ten smooth patterns under heavy noise, each class equally often.

    Returns uint8 [n, C, H, W] and labels int64 [n].
    """
    rng = np.random.default_rng(seed)
    channels, height, width = shape
    coarse = rng.normal(size=(10, channels, 4, 4))
    patterns = np.kron(coarse, np.ones((-(-height // 4), -(-width // 4))))[
        :, :, :height, :width
    ]
    labels = rng.permutation(np.arange(samples) % 10)
    images = np.empty((samples, *shape), np.uint8)
    for part in np.array_split(np.arange(samples), max(1, samples // 5000)):
        noisy = (
            128
            + 6 * patterns[labels[part]]
            + 60 * rng.standard_normal((len(part), *shape), np.float32)
        )
        images[part] = noisy.clip(0, 255)
    return images, labels.astype(np.int64)


def mnist_like(config: DataConfig) -> Dataset:
    """Make data of MNIST's shape and size.

    60,000 training and 10,000 test images of 1x28x28, ten classes.
    """
    return _dataset("mnist-like", (1, 28, 28), 60_000, 10_000)


def cifar10_like(config: DataConfig) -> Dataset:
    """Make data of CIFAR-10's shape and size.

    50,000 training and 10,000 test images of 3x32x32, ten classes.
    """
    return _dataset("cifar10-like", (3, 32, 32), 50_000, 10_000)


def _dataset(
    name: str, shape: tuple[int, int, int], train: int, test: int
) -> Dataset:
    from fedknow.client.data import Dataset

    images, labels = like_images(shape, train + test)
    return Dataset.from_arrays(
        name, images[:train], labels[:train], images[train:], labels[train:]
    )


class Split(nn.Module):
    """Body and head; Glorot-uniform weights, as in pfl-research's benchmarks."""

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body, self.head = body, head
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, C, H, W] to logits [n, classes]."""
        z: Tensor = self.head(self.body(x))
        return z


def two_layer_cnn(
    shape: tuple[int, int, int],
    classes: int,
    dropout: bool = True,
    quick: bool = False,
) -> Split:
    """Make pfl-research's CNN for CIFAR-10.

    Two 3x3 convolutions, one pooling, two dense layers, dropout of 0.25 and 0.5.

    1,626,442 parameters at 3x32x32 and ten classes. ``quick``: with our dropout layer, whose
    masks are drawn faster.
    """
    drop: type[nn.Dropout] = nn.Dropout
    if quick:
        from fedknow.client.models import (
            Dropout as drop,
        )  # pfl's environment has no fedknow
    channels, height, width = shape
    places = ((height - 4) // 2) * ((width - 4) // 2)
    body = nn.Sequential(
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        drop(0.25 if dropout else 0.0),
        nn.Flatten(),
        nn.Linear(64 * places, 128),
        nn.ReLU(),
        drop(0.5 if dropout else 0.0),
    )
    return Split(body, nn.Linear(128, classes))


def dnn(
    shape: tuple[int, int, int], classes: int, dropout: bool = False
) -> Split:
    """Make two dense hidden layers of 64, without dropout.

    That is 55,050 parameters at 1x28x28 and ten classes.
    """
    inputs = shape[0] * shape[1] * shape[2]
    body = nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
    )
    return Split(body, nn.Linear(64, classes))
