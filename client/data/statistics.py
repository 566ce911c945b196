"""Mean and standard deviation of each channel of a data set's samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.ragged import Ragged
from fedknow.client.data.samples import Raw, SampleSpec

__all__ = ["channel_statistics", "levels", "statistics"]

Numbers = tuple[float, ...]

_CHUNK_BYTES = 1 << 24
"""Samples are read so many bytes at a time, so that a mapped file is never held whole."""


def channel_statistics(raw: Raw, spec: SampleSpec) -> tuple[Numbers, Numbers]:
    """Compute mean and standard deviation of each channel.

    They are on the scale that a model is to see.

    Parameters
    ----------
    raw : ndarray [N, ...] or Ragged
        Stored samples.
    spec : SampleSpec
        What they are.

    Returns
    -------
    (tuple of float, tuple of float)
        Means, standard deviations; both empty for tokens, which have no scale.
    """
    if spec.kind == "tokens":
        return (), ()
    if spec.kind == "image" and spec.dtype == "uint8":
        counts: Any = 0
        for part in _chunks(raw):
            counts = counts + levels(part)
        return statistics(counts)
    return _moments(raw, spec)


def levels(x: NDArray[np.uint8]) -> NDArray[np.int64]:
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


def statistics(counts: NDArray[np.int64]) -> tuple[Numbers, Numbers]:
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


def _moments(raw: Raw, spec: SampleSpec) -> tuple[Numbers, Numbers]:
    """Add up chunks of numbers, double precision throughout."""
    count = 0
    mean = np.zeros(spec.channels)
    squares = np.zeros(spec.channels)
    for part in _chunks(raw):
        columns = _by_channel(part, spec).astype(np.float64) / spec.scale
        size = len(columns)
        own_mean = columns.mean(0)
        own_squares = ((columns - own_mean) ** 2).sum(0)
        # Chan, Golub and LeVeque 1979: sums of squares about means can be joined, where the
        # difference of two large sums would lose digits.
        distance = own_mean - mean
        total = count + size
        squares += own_squares + distance**2 * (count * size / total)
        mean = mean + distance * (size / total)
        count = total
    std = np.sqrt(squares / count)
    std[std == 0] = 1.0
    return tuple(mean.tolist()), tuple(std.tolist())


def _by_channel(part: NDArray[Any], spec: SampleSpec) -> NDArray[Any]:
    """Lay numbers out as [numbers a channel, channels]."""
    if spec.kind == "image":
        part = np.moveaxis(part, 1, -1)
    return part.reshape(-1, spec.channels)


def _chunks(raw: Raw) -> Iterator[NDArray[Any]]:
    """Cut samples into pieces of :data:`_CHUNK_BYTES`, or of one sample."""
    if isinstance(raw, Ragged):
        for row in range(len(raw)):
            yield raw.row(row)
        return
    rows = max(1, _CHUNK_BYTES // max(1, raw[:1].nbytes))
    for start in range(0, len(raw), rows):
        yield raw[start : start + rows]
