"""A data set in memory: plain ``uint8`` arrays, and what is known of them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.protocols.config import ConfigError
from fedknow.protocols.extras import how_to_install
from fedknow.protocols.texts import counted

__all__ = [
    "Dataset",
    "Images",
    "Labels",
    "has_channels_last",
    "levels",
    "require",
    "statistics",
]

log = logging.getLogger(__name__)

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels, train and test apart.

    Attributes
    ----------
    name : str
        What the data set is called in messages.
    train_x, test_x : ndarray of uint8, shape (N, C, H, W)
        Images; may be read-only.
    train_y, test_y : ndarray of int64, shape (N,)
        Labels, 0 to ``classes - 1``.
    class_names : tuple of str
        One name per class.
    mean, std : tuple of float
        Per channel, of the training images on the scale 0..1.
    groups : tuple of tuple of int
        Classes that belong together (Omniglot's alphabets), which make natural tasks; empty
        where there are none.

    Raises
    ------
    ConfigError
        If the arrays do not fit each other or this description.
    """

    name: str
    train_x: Images
    train_y: Labels
    test_x: Images
    test_y: Labels
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for part, x, y in (
            ("train", self.train_x, self.train_y),
            ("test", self.test_x, self.test_y),
        ):
            _check_arrays(self.name, part, x, y)
            if y.min() < 0 or y.max() >= self.classes:
                raise self._wrong(
                    f"{part}_y runs from {y.min()} to {y.max()}; "
                    f"with {counted(self.classes, 'class name')} it must stay within 0..{self.classes - 1}"
                )
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise self._wrong(
                f"train images are {self.train_x.shape[1:]}, test images {self.test_x.shape[1:]}"
            )
        channels = self.train_x.shape[1]
        if (
            len(self.mean) != channels
            or len(self.std) != channels
            or min(self.std) <= 0
        ):
            raise self._wrong(
                f"mean and std need {counted(channels, 'number')}, one a channel, and std above 0"
            )
        grouped = [label for group in self.groups for label in group]
        if len(set(grouped)) != len(grouped) or not set(grouped) <= set(
            range(self.classes)
        ):
            raise self._wrong(
                "groups must hold each class at most once, and only classes there are"
            )

    def check_labels(self) -> None:
        """Refuse labels with gaps: a class without samples is neither learned nor scored.

        Raises
        ------
        ConfigError
            Naming the classes without samples.
        """
        for part, y in (("train", self.train_y), ("test", self.test_y)):
            missing = np.setdiff1d(np.arange(self.classes), y)
            if len(missing):
                named = ", ".join(map(str, missing[:5])) + (
                    ", ..." if len(missing) > 5 else ""
                )
                raise self._wrong(
                    f"{part}_y has no sample of {len(missing)} of {self.classes} classes ({named}); "
                    "number the classes that have samples from 0 without gaps, "
                    "as np.unique(y, return_inverse=True) does"
                )

    @classmethod
    def from_arrays(
        cls,
        name: str,
        train_x: Images,
        train_y: Labels,
        test_x: Images,
        test_y: Labels,
        class_names: Sequence[str] | None = None,
        groups: Sequence[Sequence[int]] = (),
    ) -> Dataset:
        """A data set whose channel statistics, and class names unless given, come from the arrays
        themselves.

        Raises
        ------
        ConfigError
            If the arrays do not fit each other, or if the channels seem to stand last.
        """
        _check_arrays(name, "train", train_x, train_y)
        _check_axes(name, train_x.shape[1:])
        names = (
            tuple(class_names)
            if class_names is not None
            else tuple(map(str, range(int(train_y.max()) + 1)))
        )
        mean, std = statistics(levels(train_x))
        return cls(
            name,
            train_x,
            train_y,
            test_x,
            test_y,
            names,
            mean,
            std,
            tuple(map(tuple, groups)),
        )

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image: channels, height, width."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"data set {self.name!r}: {what}")


def _check_arrays(name: str, part: str, x: Any, y: Any) -> None:
    def wrong(what: str, array: Any, right: str) -> ConfigError:
        is_array = isinstance(array, np.ndarray)
        found = (
            f"{array.dtype} {list(array.shape)}" if is_array else type(array).__name__
        )
        return ConfigError(
            f"data set {name!r}: {part}_{what} is {found}; it must be a NumPy array, {right}"
        )

    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 4:
        raise wrong("x", x, "uint8 [N, C, H, W]")
    if not isinstance(y, np.ndarray) or y.dtype != np.int64 or y.shape != x.shape[:1]:
        raise wrong("y", y, f"int64 [{len(x)}]")
    if len(y) == 0:
        raise ConfigError(f"data set {name!r}: {part}_x holds no samples")


def has_channels_last(shape: Sequence[int]) -> bool:
    """Tell whether three numbers look like height, width, channels: a square, and 1, 3 or 4.

    Parameters
    ----------
    shape : sequence of int
        What is taken for channels, height, width.
    """
    first, second, third = shape
    return third in (1, 3, 4) and first == second > third


def _check_axes(name: str, shape: Sequence[int]) -> None:
    """Refuse images whose channels stand last; warn where that is likely only."""
    first, second, third = shape
    found = f"data set {name!r}: train_x is [N, {first}, {second}, {third}]"
    transpose = "x.transpose(0, 3, 1, 2)"
    if has_channels_last(shape):
        raise ConfigError(
            f"{found}, which looks like height, width, channels; it must be [N, C, H, W]: "
            f"give {transpose}. If it has {first} channels indeed, make it by Dataset(...) with "
            "a mean and std of each"
        )
    if third in (3, 4) and min(first, second) > 2 * third:
        log.warning(
            "%s and is taken for %d channels of %d x %d; if it is height, width, channels, give %s",
            found,
            first,
            second,
            third,
            transpose,
        )


def levels(x: Images) -> NDArray[np.int64]:
    """How often each channel has each of the 256 levels: uint8 [N, C, H, W] -> int64 [C, 256]."""
    return np.stack(
        [
            np.bincount(x[:, channel].ravel(), minlength=256)
            for channel in range(x.shape[1])
        ]
    )


def statistics(
    counts: NDArray[np.int64],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel on the scale 0..1, exactly, from counts of its
    levels [C, 256]."""
    scale = np.arange(256) / 255
    means, stds = [], []
    for of_channel in counts:
        weight = of_channel / of_channel.sum()
        mean = float(weight @ scale)
        means.append(mean)
        stds.append(
            float(np.sqrt(weight @ (scale - mean) ** 2)) or 1.0
        )  # a constant channel stays as it is
    return tuple(means), tuple(stds)


def require(module: str) -> Any:
    """Import a package of the ``data`` extra.

    Raises
    ------
    ConfigError
        If it is not installed; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this data set or partition needs the package {error.name!r}, which is not installed; "
            f"{how_to_install('data')}"
        ) from error
