"""A data set: arrays of samples, perhaps mapped, and what they are."""

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
from fedknow.client.data.ragged import Ragged
from fedknow.client.data.samples import Raw, SampleSpec
from fedknow.client.data.statistics import channel_statistics
from fedknow.protocols.config import ConfigError
from fedknow.protocols.extras import how_to_install
from fedknow.protocols.texts import counted

__all__ = [
    "Dataset",
    "Images",
    "Labels",
    "has_channels_last",
    "require",
]

log = logging.getLogger(__name__)

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples and labels, train and test apart.

    Rows of the arrays are what a partition deals out. Whoever reads a sample's content goes
    through :class:`~fedknow.client.data.Benchmark`, which alone makes tensors of it.

    Attributes
    ----------
    name : str
        What the data set is called in messages.
    train_x, test_x : ndarray [N, ...] or Ragged
        Samples as ``sample`` describes them; may be read-only, and mapped from a file.
    train_y, test_y : ndarray of int64, shape (N,)
        Labels, 0 to ``classes - 1``.
    class_names : tuple of str
        One name per class.
    mean, std : tuple of float
        Per channel, of the training samples; of 8-bit images on the scale 0..1. Samples are
        normalised by them. Empty for tokens.
    groups : tuple of tuple of int
        Classes that belong together (Omniglot's alphabets), which make natural tasks; empty
        where there are none.
    columns : mapping of str to Column
        What else is known of each sample, by name: whose it is (``"person"``), where it is
        from (``"site"``).
    sample : SampleSpec, optional
        What a sample is; without it, 8-bit images.

    Raises
    ------
    ConfigError
        If the arrays do not fit each other or this description.

    Examples
    --------
    >>> import fedknow, numpy as np
    >>> images = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    >>> labels = np.array([0, 0, 1, 1])
    >>> data = fedknow.Dataset.from_arrays("squares", images, labels, images, labels)
    >>> data.classes, data.spec.channels
    (2, 1)
    """

    name: str
    train_x: Raw
    train_y: Labels
    test_x: Raw
    test_y: Labels
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    groups: tuple[tuple[int, ...], ...] = ()
    columns: Mapping[str, Column] = field(default_factory=dict)
    sample: SampleSpec | None = None

    def __post_init__(self) -> None:
        self._check_part("train", self.train_x, self.train_y)
        self._check_part("test", self.test_x, self.test_y)
        channels = self.spec.channels
        lengths = {len(self.mean), len(self.std)}
        # Samples are divided by std, so that a 0 would fill them with NaN.
        if lengths != {channels} or min(self.std, default=1) <= 0:
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

    def _check_part(self, part: str, x: Raw, y: Labels) -> None:
        _check_arrays(self.name, part, x, y, self.sample)
        if self.sample is None and x.shape[1:] != self.train_x.shape[1:]:
            raise self._error(
                f"train images are {self.train_x.shape[1:]}, "
                f"test images {x.shape[1:]}"
            )
        # A label without a name would have no row in the head.
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
        train_x: Raw,
        train_y: Labels,
        test_x: Raw,
        test_y: Labels,
        class_names: Sequence[str] | None = None,
        groups: Sequence[Sequence[int]] = (),
        columns: Mapping[str, Column] | None = None,
        sample: SampleSpec | None = None,
        normalize: bool = True,
    ) -> Dataset:
        """Make a data set of four arrays, and compute its channel statistics.

        Parameters
        ----------
        name : str
            What the data set is called in messages.
        train_x, test_x : ndarray [N, ...] or Ragged
            Samples. A mapped file is read once, piece by piece, for the statistics; give them
            to ``Dataset(...)``, and it is not read.
        train_y, test_y : ndarray of int64, shape (N,)
            Labels.
        class_names : sequence of str, optional
            One name per class; by default its number.
        groups : sequence of sequence of int
            Classes that belong together.
        columns : mapping of str to Column, optional
            What else is known of each sample, by name.
        sample : SampleSpec, optional
            What a sample is; without it, 8-bit images ``[N, C, H, W]``.
        normalize : bool
            Whether each channel gets mean 0 and standard deviation 1 over the training samples;
            otherwise samples stay as they are, but for the scale of whole numbers.

        Raises
        ------
        ConfigError
            If the arrays do not fit each other, or if the channels seem to stand last.
        """
        _check_arrays(name, "train", train_x, train_y, sample)
        spec = sample or SampleSpec("image", train_x.shape[1:], "uint8")
        if spec.kind == "image":
            _check_axes(name, spec.shape)
        # The largest label counts the classes. Test labels beyond it are refused later.
        if class_names is None:
            class_names = [str(label) for label in range(int(train_y.max()) + 1)]
        # Mean 0 and deviation 1 leave samples as they are.
        mean, std = (
            channel_statistics(train_x, spec)
            if normalize
            else ((0.0,) * spec.channels, (1.0,) * spec.channels)
        )
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
            sample,
        )

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def spec(self) -> SampleSpec:
        """What a sample is."""
        return self.sample or SampleSpec("image", self.train_x.shape[1:], "uint8")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample as a model takes it."""
        return self.spec.shape

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"data set {self.name!r}: {problem}")


def _check_arrays(
    name: str,
    part: str,
    x: Any,
    y: Any,
    sample: SampleSpec | None,
) -> None:
    def error(field: str, array: Any, remedy: str) -> ConfigError:
        return ConfigError(
            f"data set {name!r}: {part}_{field} is {_described(array)}; "
            f"it must be a NumPy array, {remedy}"
        )

    if sample is None:
        # Floats in 0..1 would become black images, as 8-bit images are divided by 255.
        if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 4:
            raise error("x", x, "uint8 [N, C, H, W]")
    elif not _is_described(x, sample):
        raise error("x", x, _requirement(sample))
    # PyTorch's loss takes int64 alone.
    if (
        not isinstance(y, np.ndarray)
        or y.dtype != np.int64
        or y.shape != (len(x),)
    ):
        raise error("y", y, f"int64 [{len(x)}]")
    if len(y) == 0:
        raise ConfigError(f"data set {name!r}: {part}_x holds no samples")


def _described(array: Any) -> str:
    if isinstance(array, np.ndarray):
        return f"{array.dtype} {list(array.shape)}"
    if isinstance(array, Ragged):
        return f"ragged rows of {array.dtype} {list(array.step_shape)}"
    return type(array).__name__


def _is_described(x: Any, sample: SampleSpec) -> bool:
    if sample.is_ragged:
        return (
            isinstance(x, Ragged)
            and x.dtype == sample.dtype
            and x.step_shape == sample.shape[1:]
        )
    return (
        isinstance(x, np.ndarray)
        and x.dtype == sample.dtype
        and x.shape[1:] == sample.shape
    )


def _requirement(sample: SampleSpec) -> str:
    """Say what samples must be, for messages."""
    if sample.is_ragged:
        steps = ", ".join(map(str, sample.shape[1:]))
        return (
            f"or rather several in a fedknow.client.data.Ragged, {sample.dtype} "
            f"[length{', ' if steps else ''}{steps}] each"
        )
    shape = ", ".join(map(str, sample.shape))
    return f"{sample.dtype} [N, {shape}]"


def has_channels_last(shape: Sequence[int]) -> bool:
    """Tell whether three numbers look like height, width, channels.

    They do if they are a square, and 1, 3 or 4.

    Parameters
    ----------
    shape : sequence of int
        Three numbers that should be channels, height, width.
    """
    axis0, axis1, axis2 = shape
    # Only what can hardly be anything else, as this refuses a data set.
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
        # By the error's name: an installed package may lack one that it imports.
        raise ConfigError(
            f"this data set or partition needs the package {error.name!r}, "
            f"which is not installed; {how_to_install('data')}"
        ) from error
