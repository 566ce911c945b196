"""Tensors of which only the elements that are not 0 travel."""

from __future__ import annotations

import math

import numpy as np

from fedknow.protocols.texts import counted
from fedknow.protocols.wire import fedknow_pb2 as pb
from fedknow.protocols.wire.errors import Code, WireError

__all__ = ["check_sparse", "elements", "from_sparse", "to_sparse"]

_LONGEST_GAP = 5
"""Bytes of the longest LEB128 form of a distance: ``Limits.elements`` keeps it below 2**35."""


def elements(
    tensor: pb.Tensor, payload: memoryview, dtype: np.dtype
) -> np.ndarray:
    """Give bytes as elements, on the same memory.

    Raises
    ------
    WireError
        ``BAD_VALUE``: a bool that is neither 0 nor 1.
    """
    flat = np.frombuffer(payload, dtype)
    # NumPy takes any byte for a bool, and its operations then give undefined results.
    if dtype.kind == "b" and flat.view(np.uint8).max(initial=0) > 1:
        raise WireError(
            Code.BAD_VALUE,
            f"tensor {tensor.name!r} of bool holds a byte that is neither 0 nor 1",
        )
    return flat


def to_sparse(tensor: pb.Tensor, flat: np.ndarray) -> np.ndarray:
    """Give the present elements and their index, as bytes.

    Where that is no smaller, give the elements themselves.
    """
    present = (
        flat.view(f"<u{flat.itemsize}") != 0
    )  # by bits: -0.0 is an element like any other
    count = int(np.count_nonzero(present))
    layout, index = pb.Tensor.MASK, np.empty(0, np.uint8)
    if count < _mask_bytes(flat.size):  # a distance takes a byte at least
        layout, index = (
            pb.Tensor.GAPS,
            _to_varints(np.diff(np.flatnonzero(present), prepend=-1)),
        )
    if count >= _mask_bytes(flat.size) or len(index) >= _mask_bytes(flat.size):
        layout, index = pb.Tensor.MASK, np.packbits(present, bitorder="little")
    if count * flat.itemsize + len(index) >= flat.nbytes:
        return flat
    tensor.layout, tensor.count = layout, count
    return np.concatenate((flat[present].view(np.uint8), index))


def check_sparse(tensor: pb.Tensor, size: int, dtype: np.dtype) -> bool:
    """Say if a sparse layout can hold so many elements in its bytes."""
    # Only what a sender has a reason to send: it bounds the memory that reading takes by the
    # size of the result.
    index = tensor.length - tensor.count * dtype.itemsize
    # A sparse form that is no smaller than the dense one has no honest sender.
    if tensor.count > size or tensor.length >= size * dtype.itemsize:
        return False
    if tensor.layout == pb.Tensor.MASK:
        return index == _mask_bytes(size)
    return (
        tensor.count <= index <= tensor.count * _LONGEST_GAP
        and index < _mask_bytes(size)
    )


def from_sparse(
    tensor: pb.Tensor, payload: memoryview, dtype: np.dtype
) -> np.ndarray:
    """Give all elements, from the present ones and their index.

    Raises
    ------
    WireError
        If the index is damaged.
    """
    size, split = math.prod(tensor.shape), tensor.count * dtype.itemsize
    values, index = (
        elements(tensor, payload[:split], dtype),
        np.frombuffer(payload[split:], np.uint8),
    )
    places = (
        _from_mask(tensor, index, size)
        if tensor.layout == pb.Tensor.MASK
        else _from_gaps(tensor, index, size)
    )
    flat = np.zeros(size, dtype)
    flat[places] = values
    return flat


def _from_mask(tensor: pb.Tensor, index: np.ndarray, size: int) -> np.ndarray:
    bits = np.unpackbits(index, bitorder="little").view(np.bool_)
    # A bit set in the padding would count as an element that has no place.
    if np.count_nonzero(bits) != tensor.count or bits[size:].any():
        raise WireError(
            Code.MALFORMED,
            f"tensor {tensor.name!r}: its mask does not show {tensor.count} of "
            f"{counted(size, 'element')}",
        )
    return bits[:size]


def _from_gaps(tensor: pb.Tensor, index: np.ndarray, size: int) -> np.ndarray:
    gaps = _from_varints(index)
    if (
        gaps is not None
        and len(gaps) == tensor.count
        # A distance of 0 would write one element twice.
        and gaps.min(initial=1) > 0
        and gaps.max(initial=0) <= size
    ):
        places = (
            np.cumsum(gaps) - 1
        )  # neither overflows: 2**31 gaps of 2**31 at most
        if places.max(initial=-1) < size:
            return places
    raise WireError(
        Code.MALFORMED,
        f"tensor {tensor.name!r}: its index does not show {tensor.count} of "
        f"{counted(size, 'element')}",
    )


def _mask_bytes(size: int) -> int:
    return (size + 7) // 8


def _to_varints(values: np.ndarray) -> np.ndarray:
    """Write positive integers below 2**35 as LEB128.

    Seven bits a byte, lowest first; the top bit says that more follow.
    """
    shifts = np.arange(0, 7 * _LONGEST_GAP, 7)
    # As many columns as the largest value needs, and one at least.
    width = int(np.count_nonzero(values.max(initial=1) >> shifts))
    shifted = values[:, None] >> shifts[:width]
    septets = (shifted & 0x7F).astype(np.uint8)
    septets[:, :-1] |= (shifted[:, 1:] > 0).astype(np.uint8) << 7
    varints: np.ndarray = septets[shifted > 0]
    return varints


def _from_varints(raw: np.ndarray) -> np.ndarray | None:
    """Read integers (int64).

    None, where the bytes are not whole integers of at most five bytes.
    """
    is_end = raw < 0x80
    # The usual case, distances below 128: one byte each, so the bytes are the numbers.
    if is_end.all():
        return raw.astype(np.int64)
    ends = np.flatnonzero(is_end)
    # The last number would go on beyond the end of the bytes.
    if not is_end[-1]:
        return None
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    # Longer forms are never sent, and from the tenth byte on the shift would overflow.
    if lengths.max() > _LONGEST_GAP:
        return None
    values = np.zeros(len(ends), np.int64)
    for byte in range(int(lengths.max())):
        longer = lengths > byte
        values[longer] |= (raw[starts[longer] + byte] & np.int64(0x7F)) << (
            7 * byte
        )
    return values
