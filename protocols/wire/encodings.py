"""How tensors travel: the encodings."""

from __future__ import annotations

import enum

import numpy as np

__all__ = ["LOSSY_TYPES", "Encoding", "lossy"]

LOSSY_TYPES = ("float32", "float64")
"""Dtypes that a lossy encoding takes."""


class Encoding(enum.StrEnum):
    """How a tensor travels. ``x'`` is what arrives of an element ``x``."""

    DENSE = "dense"
    """Exact: all elements."""
    SPARSE = "sparse"
    """Exact to the bit, ``-0.0`` and NaN included: the elements that are not 0, and where they are
    (one bit an element, or the distances between them). A tensor that would not shrink travels
    dense. Mind that ``x * mask`` leaves ``-0.0`` in half of the places; adding ``0.0`` makes it
    0."""
    FP16 = "fp16"
    """``|x - x'| <= 2**-11 |x| + 2**-25``. NaN and infinity arrive; a finite number above 65504 is
    refused."""
    BF16 = "bf16"
    """``|x - x'| <= 2**-8 |x| + 2**-134``. NaN and infinity arrive; a finite number above about
    3.39e38 is refused."""
    INT8 = "int8"
    """``|x - x'| <= scale / 2`` with ``scale = max|x| / 127``, and one rounding of ``x'`` to its
    dtype. NaN, infinity and float64 at the very end of its range are refused."""


# Little-endian whatever the machine: two hosts of different byte order read the same bytes.


def lossy(dtype: np.dtype) -> bool:
    """Say if a lossy encoding takes this dtype."""
    return dtype.name in LOSSY_TYPES
