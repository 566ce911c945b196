"""What a sample is, and how it becomes the input of a model.

A data set holds raw samples as they are stored: 8-bit pixels, 16-bit audio, token ids. A model
takes one tensor a batch. :class:`SampleSpec` describes both sides, and :func:`model_input` is
the only place where one becomes the other.

| kind | model input of one sample | examples |
|---|---|---|
| ``image`` | float32 ``[C, H, W]`` | photographs, handwriting |
| ``series`` | float32 ``[T, C]`` | windows of sensors, frames of a spectrogram |
| ``waveform`` | float32 ``[T]`` | sound |
| ``tokens`` | int64 ``[T]``, 0 where there is no token | sentences |
| ``table`` | float32 ``[F]`` | rows of a table |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedknow.client.data.ragged import Ragged
from fedknow.protocols.config import ConfigError
from fedknow.protocols.texts import counted

__all__ = [
    "PADDING",
    "Kind",
    "Raw",
    "SampleSpec",
    "as_spec",
    "local_input",
    "model_input",
    "normalized",
    "shaped",
]

Kind = Literal["image", "series", "waveform", "tokens", "table"]
Raw = NDArray[Any] | Ragged
"""Stored samples: rows of an array, or of arrays of unequal lengths."""

PADDING = 0
"""The token id that stands where a sentence has no token; a model's mask is ``ids != 0``."""

_AXES: dict[Kind, str] = {
    "image": "channels, height, width",
    "series": "time steps, channels",
    "waveform": "time steps",
    "tokens": "tokens",
    "table": "columns",
}
_STORED: dict[Kind, tuple[str, ...]] = {
    "image": ("uint8", "float32"),
    "series": ("float32", "int8", "int16", "uint8"),
    "waveform": ("int16", "float32"),
    "tokens": ("int32", "int64", "int16", "uint16"),
    "table": ("float32", "uint8", "int16"),
}
_SCALES: dict[tuple[Kind, str], float] = {
    ("image", "uint8"): 255.0,
    ("waveform", "int16"): 32768.0,
}
"""What stored whole numbers are divided by; others are taken as they are."""


@dataclass(frozen=True)
class SampleSpec:
    """What one sample of a data set is.

    Attributes
    ----------
    kind : {"image", "series", "waveform", "tokens", "table"}
        What a model may do with it: convolutions over pixels, a look-up of tokens, ...
    shape : tuple of int
        Of one sample as model input. Of ragged samples the first number is the most that is
        read: longer ones are cut, shorter ones are filled up with zeros.
    dtype : str
        How samples are stored, as NumPy names it.
    is_ragged : bool
        Whether samples are stored at their own lengths.
    vocabulary : int
        Tokens: ids are 0 to ``vocabulary - 1``, and 0 stands where there is no token.
    rate : float
        Series and waveforms: steps a second; 0 where nobody knows.

    Raises
    ------
    ConfigError
        If the numbers do not fit the kind.

    Examples
    --------
    >>> from fedknow.client.data.samples import SampleSpec
    >>> str(SampleSpec("series", (64, 3), "float32", rate=32))
    'series of 64x3'
    """

    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    is_ragged: bool = False
    vocabulary: int = 0
    rate: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(
                f"kind = {self.kind!r}: a sample is one of {', '.join(get_args(Kind))}"
            )
        axes = _AXES[self.kind]
        if len(self.shape) != len(axes.split(",")) or min(self.shape) < 1:
            raise ConfigError(
                f"shape = {list(self.shape)}: samples of kind {self.kind!r} have {axes}"
            )
        if self.dtype not in _STORED[self.kind]:
            # NumPy makes doubles unless told otherwise. Other types have no one remedy.
            is_double = (
                self.dtype == "float64" and "float32" in _STORED[self.kind]
            )
            raise ConfigError(
                f"dtype = {self.dtype!r}: samples of kind {self.kind!r} are stored as "
                f"{' or '.join(_STORED[self.kind])}"
                + ("; x.astype('float32') converts them" if is_double else "")
            )
        # Without the number of ids nobody could size an embedding.
        if (self.kind == "tokens") != (self.vocabulary > 1):
            raise ConfigError(
                f"vocabulary = {self.vocabulary}: tokens have at least 2 ids, one of which "
                f"is {PADDING} for no token, and samples of other kinds have 0"
            )
        if self.is_ragged and self.kind not in ("series", "waveform", "tokens"):
            raise ConfigError(
                f"is_ragged: samples of kind {self.kind!r} all have one shape"
            )

    @property
    def channels(self) -> int:
        """How many numbers a mean or standard deviation has; 0 for tokens."""
        if self.kind == "tokens":
            return 0
        if self.kind == "waveform":
            return 1
        return self.shape[0] if self.kind == "image" else self.shape[-1]

    @property
    def axes(self) -> str:
        """Names of the axes of one sample, for messages."""
        return _AXES[self.kind]

    @property
    def input_dtype(self) -> torch.dtype:
        """Type of model inputs: float32, or int64 for tokens."""
        return torch.int64 if self.kind == "tokens" else torch.float32

    @property
    def scale(self) -> float:
        """Number that stored samples are divided by."""
        return _SCALES.get((self.kind, self.dtype), 1.0)

    def blank(self, *count: int, device: torch.device | str = "cpu") -> Tensor:
        """Make samples whose shape and type alone matter: all zeros.

        Parameters
        ----------
        count : int
            Axes in front of a sample's own.
        device : torch.device or str
            Where to make them.
        """
        return torch.zeros(
            *count, *self.shape, dtype=self.input_dtype, device=device
        )

    def random(self, count: int) -> Tensor:
        """Draw samples by torch's generator: normal, or of any tokens."""
        if self.kind == "tokens":
            # From 1, as 0 stands for no token.
            return torch.randint(1, self.vocabulary, (count, *self.shape))
        return torch.randn(count, *self.shape)

    def __str__(self) -> str:
        """Name kind and shape, as in ``images of 3x32x32``."""
        plural = {"image": "images", "waveform": "waveforms", "table": "rows"}
        size = "x".join(map(str, self.shape))
        return f"{plural.get(self.kind, self.kind)} of {size}"


def as_spec(sample: SampleSpec | Sequence[int]) -> SampleSpec:
    """Give a specification; a shape alone is that of 8-bit images."""
    if isinstance(sample, SampleSpec):
        return sample
    return SampleSpec("image", tuple(sample), "uint8")


def shaped(values: Sequence[float], spec: SampleSpec) -> Tensor:
    """Shape a number a channel for model inputs of a kind, float32.

    It is ``[1, C, 1, 1]`` for images, and ``[C]`` where channels come last.
    """
    numbers = torch.tensor(values, dtype=torch.float32)
    return numbers.view(1, -1, 1, 1) if spec.kind == "image" else numbers


def model_input(
    raw: Raw,
    spec: SampleSpec,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Turn stored samples into the input of a model.

    Parameters
    ----------
    raw : ndarray [n, ...] or Ragged
        A copy that nobody else needs: it may be written to.
    spec : SampleSpec
        What they are.
    mean, std : sequence of float
        A number a channel, on the scale of model inputs.

    Returns
    -------
    Tensor [n, ...]
        Of the type and shape that ``spec`` says.

    Raises
    ------
    ValueError
        If a token id is outside the vocabulary, or a number is not finite.
    """
    x = torch.from_numpy(_padded(raw, spec)).to(spec.input_dtype)
    if spec.kind == "tokens":
        _check_tokens(x, spec)
        return x
    # In place, as a share may be hundreds of megabytes.
    if spec.scale != 1:
        x.div_(spec.scale)
    if spec.dtype == "float32" and not torch.isfinite(x).all():
        # One NaN in a sample would spread to all weights in the first step.
        raise ValueError("samples hold NaN or infinity")
    means, stds = shaped(mean, spec), shaped(std, spec)
    if spec.is_ragged:
        return x.copy_(normalized(x, spec, means, stds))
    return x.sub_(means).div_(stds)


def normalized(x: Tensor, spec: SampleSpec, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise samples; what fills ragged ones up stays zero.

    Parameters
    ----------
    x : Tensor [n, ...]
        Samples, scaled.
    spec : SampleSpec
        What they are. In ragged ones a step of zeros alone counts as none.
    mean, std : Tensor
        From :func:`shaped`.
    """
    if spec.kind == "tokens":
        return x
    result = (x - mean) / std
    if not spec.is_ragged:
        return result
    # A step is padding if all its channels are zero.
    is_step = x != 0
    if x.dim() == 3:
        is_step = is_step.any(2, keepdim=True)
    return torch.where(is_step, result, torch.zeros_like(x))


def local_input(raw: NDArray[Any], spec: SampleSpec) -> Tensor:
    """Turn the samples of a device's own file into the input of a model.

    No client knows the mean of all, so that the scale is fixed: 8-bit pixels become -1..1,
    16-bit sound -1..1, and floats stay as they are.

    Parameters
    ----------
    raw : ndarray [n, ...]
        Samples; not written to.
    spec : SampleSpec
        What they are.

    Raises
    ------
    ValueError
        If a token id is outside the vocabulary.
    """
    # A copy of float32 too, as the arrays at hand are given out again.
    kind = np.int64 if spec.kind == "tokens" else np.float32
    x = torch.from_numpy(raw.astype(kind))
    if spec.kind == "tokens":
        _check_tokens(x, spec)
    elif spec.kind == "image" and raw.dtype == np.uint8:
        # To -1 to 1, as a client cannot know the statistics of all clients' images.
        x.div_(127.5).sub_(1)
    elif spec.kind == "waveform" and raw.dtype == np.int16:
        x.div_(32768)
    return x


def _padded(raw: Raw, spec: SampleSpec) -> NDArray[Any]:
    return raw.padded(spec.shape[0]) if isinstance(raw, Ragged) else raw


def _check_tokens(x: Tensor, spec: SampleSpec) -> None:
    # On a GPU an index out of range ends the process, and names no sample.
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < spec.vocabulary:
        raise ValueError(
            f"token ids run from {int(x.min())} to {int(x.max())}; the vocabulary has "
            f"{counted(spec.vocabulary, 'id')}, from 0"
        )
