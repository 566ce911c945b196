"""A data set in memory: plain ``uint8`` arrays and their description."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.columns import Column, check_columns
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

    Rows of the arrays are what a partition deals out. Whoever reads a sample's content goes
    through :class:`~fedknow.client.data.Benchmark`, which alone makes tensors of it.

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
    columns : mapping of str to Column
        What else is known of each sample, by name: whose it is (``"person"``), where it is
        from (``"site"``).

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
    columns: Mapping[str, Column] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_part("train", self.train_x, self.train_y)
        self._check_part("test", self.test_x, self.test_y)
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise self._error(
                f"train images are {self.train_x.shape[1:]}, "
                f"test images {self.test_x.shape[1:]}"
            )
        channels = self.train_x.shape[1]
        lengths = {len(self.mean), len(self.std)}
        # Images are divided by std, so that a 0 would fill them with NaN.
        if lengths != {channels} or min(self.std) <= 0:
            raise self._error(
                f"mean and std need {counted(channels, 'number')}, one a channel, "
                "and std above 0"
            )
        grouped = list(chain.from_iterable(self.groups))
        # A class in two groups would belong to two tasks, and be new in the second one.
        has_repeats = len(set(grouped)) != len(grouped)
        if has_repeats or not set(grouped) <= set(range(self.classes)):
            raise self._error(
                "groups must hold each class at most once, and only classes there are"
            )
        sizes = len(self.train_y), len(self.test_y)
        if problem := check_columns(self.columns, *sizes):
            raise self._error(problem)

    def _check_part(self, part: str, x: Images, y: Labels) -> None:
        _check_arrays(self.name, part, x, y)
        if y.min() < 0 or y.max() >= self.classes:
            raise self._error(
                f"{part}_y runs from {y.min()} to {y.max()}; "
                f"with {counted(self.classes, 'class name')} it must stay within "
                f"0..{self.classes - 1}"
            )

    def check_labels(self) -> None:
        """Refuse labels with gaps.

        A class without samples would be neither learned nor scored.

        Raises
        ------
        ConfigError
            Naming the classes without samples.
        """
        for part, y in (("train", self.train_y), ("test", self.test_y)):
            missing = np.setdiff1d(np.arange(self.classes), y)
            if len(missing) == 0:
                continue
            named = ", ".join(map(str, missing[:5]))
            if len(missing) > 5:
                named += ", ..."
            raise self._error(
                f"{part}_y has no sample of {len(missing)} of {self.classes} classes "
                f"({named}); number the classes that have samples from 0 without gaps, "
                "as np.unique(y, return_inverse=True) does"
            )

    @classmethod
    def from_arrays(  # noqa: PLR0913  # a user's own data set in one call
        cls,
        name: str,
        train_x: Images,
        train_y: Labels,
        test_x: Images,
        test_y: Labels,
        class_names: Sequence[str] | None = None,
        groups: Sequence[Sequence[int]] = (),
        columns: Mapping[str, Column] | None = None,
    ) -> Dataset:
        """Make a data set of four arrays, and compute its channel statistics.

        Parameters
        ----------
        name : str
            What the data set is called in messages.
        train_x, test_x : ndarray of uint8, shape (N, C, H, W)
            Images.
        train_y, test_y : ndarray of int64, shape (N,)
            Labels.
        class_names : sequence of str, optional
            One name per class; by default its number.
        groups : sequence of sequence of int
            Classes that belong together.
        columns : mapping of str to Column, optional
            What else is known of each sample, by name.

        Raises
        ------
        ConfigError
            If the arrays do not fit each other, or if the channels seem to stand last.
        """
        _check_arrays(name, "train", train_x, train_y)
        _check_axes(name, train_x.shape[1:])
        # The largest label counts the classes. Test labels beyond it are refused later.
        if class_names is None:
            class_names = [str(label) for label in range(int(train_y.max()) + 1)]
        mean, std = statistics(levels(train_x))
        return cls(
            name,
            train_x,
            train_y,
            test_x,
            test_y,
            tuple(class_names),
            mean,
            std,
            tuple(map(tuple, groups)),
            columns or {},
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

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"data set {self.name!r}: {problem}")


def _check_arrays(name: str, part: str, x: Any, y: Any) -> None:
    def error(field: str, array: Any, remedy: str) -> ConfigError:
        actual = (
            f"{array.dtype} {list(array.shape)}"
            if isinstance(array, np.ndarray)
            else type(array).__name__
        )
        return ConfigError(
            f"data set {name!r}: {part}_{field} is {actual}; "
            f"it must be a NumPy array, {remedy}"
        )

    # Floats in 0..1 would become black images, as all images are divided by 255.
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 4:
        raise error("x", x, "uint8 [N, C, H, W]")
    if (
        not isinstance(y, np.ndarray)
        or y.dtype != np.int64
        or y.shape != x.shape[:1]
    ):
        raise error("y", y, f"int64 [{len(x)}]")
    if len(y) == 0:
        raise ConfigError(f"data set {name!r}: {part}_x holds no samples")


def has_channels_last(shape: Sequence[int]) -> bool:
    """Tell whether three numbers look like height, width, channels.

    They do if they are a square, and 1, 3 or 4.

    Parameters
    ----------
    shape : sequence of int
        Three numbers that should be channels, height, width.
    """
    axis0, axis1, axis2 = shape
    return axis2 in (1, 3, 4) and axis0 == axis1 > axis2


def _check_axes(name: str, shape: Sequence[int]) -> None:
    """Refuse images whose channels stand last; warn where they may."""
    axis0, axis1, axis2 = shape
    actual = f"data set {name!r}: train_x is [N, {axis0}, {axis1}, {axis2}]"
    transpose = "x.transpose(0, 3, 1, 2)"
    if has_channels_last(shape):
        raise ConfigError(
            f"{actual}, which looks like height, width, channels; it must be "
            f"[N, C, H, W]: give {transpose}. If it has {axis0} channels indeed, make it "
            "by Dataset(...) with a mean and std of each"
        )
    # Images that are no square: the numbers alone cannot settle it.
    if axis2 in (3, 4) and min(axis0, axis1) > 2 * axis2:
        log.warning(
            "%s and is taken for %d channels of %d x %d; "
            "if it is height, width, channels, give %s",
            actual,
            axis0,
            axis1,
            axis2,
            transpose,
        )


def levels(x: Images) -> NDArray[np.int64]:
    """Count how often each channel has each of the 256 levels.

    Parameters
    ----------
    x : ndarray of uint8, shape (N, C, H, W)
        Images.

    Returns
    -------
    ndarray of int64, shape (C, 256)
    """
    counts = []
    for channel in range(x.shape[1]):
        # Counts of levels in place of a sum over floats: exact, in any order, and without a
        # copy of the images as floats.
        counts.append(np.bincount(x[:, channel].ravel(), minlength=256))
    return np.stack(counts)


def statistics(
    counts: NDArray[np.int64],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation of each channel on the scale 0..1.

    Counts of levels give them exactly, and batch by batch: no pass over all pixels in
    floating point is needed.

    Parameters
    ----------
    counts : ndarray of int64, shape (C, 256)
        From :func:`levels`, added up over batches.

    Returns
    -------
    (tuple of float, tuple of float)
        Means, standard deviations.
    """
    scale = np.arange(256) / 255
    means, stds = [], []
    for channel in counts:
        weight = channel / channel.sum()
        mean = float(weight @ scale)
        std = float(np.sqrt(weight @ (scale - mean) ** 2))
        means.append(mean)
        # A constant channel stays as it is: no division by zero.
        stds.append(std or 1.0)
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
            f"this data set or partition needs the package {error.name!r}, "
            f"which is not installed; {how_to_install('data')}"
        ) from error
