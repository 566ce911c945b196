"""Checks of a strategy's results, before the experiment uses them."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord

from fedknow.protocols.flower import to_arrays
from fedknow.protocols.messages import Arrays
from fedknow.server.checks.arrays import check_finite, check_like
from fedknow.server.checks.faults import RunError, Unusable

__all__ = ["check_aggregate", "check_arrays"]


def check_aggregate(
    returned: object, current: Arrays, strategy: str
) -> tuple[Arrays | None, dict[str, Any]]:
    """Take what a strategy's ``aggregate_train`` returned.

    Parameters
    ----------
    returned : object
        Should be ``(ArrayRecord or None, MetricRecord or None)``.
    current : Arrays
        The present parameters: the new ones must have the same names, shapes and, once cast,
        dtypes (Flower's mean turns integers into floats; they are rounded back).
    strategy : str
        Who is to be named if something is wrong.

    Returns
    -------
    tuple
        The new parameters in the order of the present ones (``None``: nothing was aggregated),
        and the metrics.

    Raises
    ------
    RunError
        If it is something else, or a number is not finite.
    """
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise RunError(
            f"strategy {strategy}: aggregate_train returned {_describe(returned)}; it "
            f"must return a pair, an ArrayRecord "
            "(or None) and a MetricRecord (or None)"
        )
    arrays, metrics = returned
    for value, kind in ((arrays, ArrayRecord), (metrics, MetricRecord)):
        if value is not None and not isinstance(value, kind):
            raise RunError(
                f"strategy {strategy}: aggregate_train returned {_describe(value)} where "
                f"a {kind.__name__} belongs"
            )
    # Flower allows None for "no metrics".
    numbers = dict(metrics) if metrics is not None else {}
    if arrays is None:
        return None, numbers
    return check_arrays(arrays, current, strategy), numbers


def check_arrays(record: ArrayRecord, current: Arrays, strategy: str) -> Arrays:
    """Take parameters from a strategy; see :func:`check_aggregate`."""
    arrays = to_arrays(record)
    try:
        for name, array in arrays.items():
            check_finite(name, array)
        # Types may differ: Flower's means are float64, and are cast back below.
        check_like(arrays, current, dtypes=False)
        arrays = Arrays(
            (name, _cast(arrays[name], current[name].dtype)) for name in current
        )
        for (
            name,
            array,
        ) in arrays.items():  # a float64 may be too large for a float32
            check_finite(name, array)
    except Unusable as problem:
        raise RunError(
            f"strategy {strategy} returned unusable parameters: {problem}"
        ) from None
    return arrays


def _cast(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if array.dtype == dtype:
        return array
    # An overflow becomes infinity here, which the caller refuses by name.
    with np.errstate(over="ignore"):
        # Flower's mean turns integers into floats: 2.9999998 was a 3.
        if dtype.kind in "iub" and array.dtype.kind == "f":
            array = np.rint(array)
        return array.astype(dtype)


def _describe(value: object) -> str:
    return "nothing (None)" if value is None else f"a {type(value).__name__}"
