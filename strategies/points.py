"""Records of arrays as points: one long row of numbers each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedknow.protocols.flower import to_arrays, to_record
from fedknow.protocols.messages import Arrays

__all__ = ["Floats", "Taken", "arrays_of", "flatten", "lay_out", "unflatten"]

Floats = NDArray[np.float64]
Taken = tuple[ArrayRecord | None, MetricRecord | None]
"""Arrays and metrics that a strategy aggregates."""


def arrays_of(content: RecordDict) -> Arrays:
    """Give the one record of arrays of an answer that was checked."""
    return to_arrays(next(iter(content.array_records.values())))


def flatten(arrays: Arrays, names: Sequence[str]) -> Floats:
    """Lay arrays out as float64 [d], in the order of names."""
    parts = [arrays[name].astype(np.float64).ravel() for name in names]
    return np.concatenate(parts)


def lay_out(contents: Sequence[RecordDict], names: Sequence[str] = ()) -> Floats:
    """Lay answers out as float64 [n, d]."""
    answers = [arrays_of(content) for content in contents]
    order = names or list(answers[0])
    return np.stack([flatten(answer, order) for answer in answers])


def unflatten(point: Floats, template: Arrays) -> ArrayRecord:
    """Give a point the names, shapes and dtypes of some arrays."""
    arrays = Arrays()
    start = 0
    for name, array in template.items():
        values = point[start : start + array.size].reshape(array.shape)
        # Whole numbers come out of a mean as fractions.
        if array.dtype.kind in "iu":
            values = np.rint(values)
        arrays[name] = values.astype(array.dtype)
        start += array.size
    return to_record(arrays)
