"""A user's arrays as the input of a deployed model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedknow.client.data.samples import SampleSpec
from fedknow.protocols.config import ConfigError

__all__ = ["as_images", "as_input"]


def as_input(x: Any, spec: SampleSpec) -> Tensor:
    """Turn an array of samples into a model's input, before normalisation.

    Parameters
    ----------
    x : ndarray [n, ...]
        Samples: 8-bit images as :func:`as_images` takes them, tokens as integers, waveforms as
        int16 or floats, others as floats. Ragged ones may be shorter than the model's.
    spec : SampleSpec
        What the model expects.

    Returns
    -------
    Tensor [n, ...]
        Int64 for tokens, float32 for others.

    Raises
    ------
    ConfigError
        If the array is not as described.
    """
    if (spec.kind, spec.dtype) == ("image", "uint8"):
        return as_images(x, spec.shape)
    array = _filled_up(np.asarray(x), spec)
    if array.shape[1:] != spec.shape or not len(array):
        expected = ", ".join(map(str, spec.shape))
        raise ConfigError(
            f"x is {list(array.shape)}; it must be [n, {expected}] ({spec.axes}), "
            "n at least 1"
        )
    if spec.kind == "tokens":
        count = spec.vocabulary
        is_whole = array.dtype.kind in "iu"
        if not is_whole or array.min() < 0 or array.max() >= count:
            raise ConfigError(
                f"x must be token ids, integers from 0 to {count - 1}"
            )
        return torch.from_numpy(array.astype(np.int64))
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise ConfigError(f"x is {array.dtype}; it must be finite numbers")
    # Floats are taken as scaled already.
    scale = spec.scale if array.dtype.kind != "f" else 1.0
    return torch.from_numpy(array.astype(np.float32)).div_(scale)


def _filled_up(array: NDArray[Any], spec: SampleSpec) -> NDArray[Any]:
    """Bring ragged samples to the model's length, by zeros or a cut."""
    # A wrong number of axes is left as it is, for the caller to refuse.
    if not spec.is_ragged or array.ndim != 1 + len(spec.shape):
        return array
    length = spec.shape[0]
    array = array[:, :length]
    missing = length - array.shape[1]
    return np.pad(array, [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)])


def as_images(x: Any, shape: tuple[int, ...]) -> Tensor:
    """Turn an array of images into a model's input.

    Parameters
    ----------
    x : ndarray [n, C, H, W]
        uint8 from 0 to 255, or floats from 0 to 1.
    shape : tuple of int
        Channels, height and width that the model expects.

    Returns
    -------
    Tensor, float32 [n, C, H, W]
        From 0 to 1.

    Raises
    ------
    ConfigError
        If the array is not as described.
    """
    array = np.asarray(x)
    if array.ndim != 4 or array.shape[1:] != tuple(shape) or not len(array):
        expected = ", ".join(map(str, shape))
        raise ConfigError(
            f"x is {list(array.shape)}; it must be [n, {expected}], n at least 1"
        )
    if array.dtype == np.uint8:
        return torch.from_numpy(array.astype(np.float32)).div_(255)
    if array.dtype.kind != "f":
        raise ConfigError(
            f"x is {array.dtype}; it must be uint8, or floats from 0 to 1"
        )
    # Larger ones are probably 0 to 255, which would saturate the model.
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise ConfigError(
            f"x runs from {array.min():g} to {array.max():g}; floats must be from 0 to 1"
        )
    return torch.from_numpy(array.astype(np.float32))
