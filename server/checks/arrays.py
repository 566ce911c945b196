"""Checks of arrays: finite numbers, names, shapes, dtypes and norms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from fedknow.client.learners.frames.learner import Layout
from fedknow.protocols.messages import EXTRA, Arrays, Record
from fedknow.protocols.texts import counted
from fedknow.server.checks.faults import Fault, Unusable

__all__ = [
    "check_finite",
    "check_layout",
    "check_like",
    "finite_norm",
    "longest_noise",
    "norm",
]

_TAIL = 6.0
"""Deviations beyond its usual length that noise has once in a thousand million times."""


def check_finite(name: str, array: np.ndarray) -> None:
    """Raise :class:`Unusable` if a number of an array is NaN or infinite."""
    if array.dtype.kind in "fc" and not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise Unusable(
            Fault.NOT_FINITE,
            name,
            f"{name}: NaN or infinite in {bad} of {counted(array.size, 'value')}",
        )


def check_like(
    arrays: Arrays, expected: Mapping[str, np.ndarray], dtypes: bool = True
) -> None:
    """Raise :class:`Unusable` if arrays are not like those expected.

    Names and shapes must be the same, and dtypes too unless ``dtypes`` is false.
    """
    if arrays.keys() != expected.keys():
        mismatched = sorted(arrays.keys() ^ expected.keys())
        are_all_missing = all(name in expected for name in mismatched)
        problem = "missing" if are_all_missing else "missing or unknown"
        raise Unusable(
            Fault.NAMES,
            mismatched[0],
            f"arrays {', '.join(mismatched[:5])} are {problem}",
        )
    for name, array in arrays.items():
        if array.shape != expected[name].shape:
            raise Unusable(
                Fault.SHAPE,
                name,
                f"{name} has shape {array.shape}, not {expected[name].shape}",
            )
        if dtypes and array.dtype != expected[name].dtype:
            raise Unusable(
                Fault.DTYPE,
                name,
                f"{name} has dtype {array.dtype}, not {expected[name].dtype}",
            )


def check_layout(record: Record, layout: Layout) -> None:
    """Raise :class:`Unusable` unless an ``extra`` record is as declared."""
    if not isinstance(record, Arrays):
        raise Unusable(
            Fault.NAMES,
            EXTRA,
            f"the record {EXTRA!r} must hold arrays, not {type(record).__name__}",
        )
    mismatched = sorted(record.keys() ^ layout.keys())
    if mismatched:
        raise Unusable(
            Fault.NAMES,
            mismatched[0],
            f"extra arrays {', '.join(mismatched[:5])} are missing, or not the method's",
        )
    for name, array in record.items():
        dtype, shape = layout[name]
        if array.dtype.name != dtype:
            raise Unusable(
                Fault.DTYPE, name, f"{name} has dtype {array.dtype}, not {dtype}"
            )
        if not _is_declared(array.shape, shape):
            raise Unusable(
                Fault.SHAPE,
                name,
                f"{name} has shape {array.shape}, not {shape} (-1: any size)",
            )


def _is_declared(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    """Return whether a shape is the declared one, in which -1 is any size."""
    return len(shape) == len(declared) and all(
        # A length of -1 depends on the client, and any will do.
        expected in (-1, size)
        for size, expected in zip(shape, declared, strict=True)
    )


def norm(arrays: Iterable[np.ndarray]) -> float:
    """Return the L2 norm of all real numbers but integers.

    It is infinite where its square is above what a float32 holds.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return math.hypot(
            *(_length(array) for array in arrays if array.dtype.kind == "f")
        )


def finite_norm(arrays: Arrays) -> float:
    """Return :func:`norm`; raise :class:`Unusable` if it is not finite."""
    # One pass serves both: the length of an array with a NaN or infinity is not finite either.
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = {
            name: _length(array)
            for name, array in arrays.items()
            if array.dtype.kind in "fc"
        }
    for name, length in lengths.items():
        if not math.isfinite(length):  # or its square was too large for a float32
            check_finite(name, arrays[name])
    return math.hypot(
        *(
            length
            for name, length in lengths.items()
            if arrays[name].dtype.kind == "f"
        )
    )


def _length(array: np.ndarray) -> float:
    # In memory order, so that a transposed array is not copied.
    flat = array.ravel(order="K")
    if flat.dtype == np.float16:
        # Squares of float16 overflow from 256 on.
        flat = flat.astype(np.float32)
    # One call of BLAS without a temporary; for complex numbers vdot takes the conjugate.
    return math.sqrt(abs(np.vdot(flat, flat)))


def longest_noise(deviation: float, arrays: Mapping[str, np.ndarray]) -> float:
    """Bound the norm of Gaussian noise that was added to arrays.

    In d dimensions it is as long as the root of d deviations, and hardly longer.

    Examples
    --------
    >>> longest_noise(2.0, {"w": np.zeros(100)})
    32.0
    """
    size = sum(array.size for array in arrays.values())
    return deviation * (math.sqrt(size) + _TAIL)
