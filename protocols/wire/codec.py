"""Tensors as bytes: exact, or smaller with a stated error."""

from __future__ import annotations

import enum
import math
import zlib
from collections.abc import Iterator

import numpy as np

from fedknow.protocols.texts import counted
from fedknow.protocols.wire import fedknow_pb2 as pb
from fedknow.protocols.wire.errors import Code, WireError
from fedknow.protocols.wire.limits import Limits

__all__ = ["Encoding", "check", "decode", "encode", "lossy"]


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
_TYPES: dict[int, np.dtype] = {
    value: np.dtype(name.lower()).newbyteorder("<")
    for name, value in pb.Tensor.Type.items()
    if value
}
_NUMBERS = {dtype.name: number for number, dtype in _TYPES.items()}
_LOSSY_TYPES = ("float32", "float64")
_LAYOUTS = {
    Encoding.FP16: pb.Tensor.FP16,
    Encoding.BF16: pb.Tensor.BF16,
    Encoding.INT8: pb.Tensor.SCALED,
}
_WIDTH = {pb.Tensor.FP16: 2, pb.Tensor.BF16: 2, pb.Tensor.SCALED: 1}
"""Bytes of an element in each lossy layout."""
_GAP_BYTES = 5
"""Longest LEB128 form of a distance: ``Limits.elements`` keeps it below 2**35."""
_TINY = float(np.finfo(np.float64).tiny)
_BLOCK = 1 << 16
"""Elements that are quantised at once, so that float64 intermediates stay in the cache."""


def lossy(dtype: np.dtype) -> bool:
    """Whether a lossy encoding takes this dtype: float32 and float64 only."""
    return dtype.name in _LOSSY_TYPES


def encode(
    name: str, array: np.ndarray, encoding: Encoding = Encoding.DENSE
) -> tuple[pb.Tensor, memoryview]:
    """A tensor's description and its bytes.

    Parameters
    ----------
    name : str
        For the description and for errors.
    array : numpy.ndarray
        Any shape, byte order and strides; bool, integers and floats.
    encoding : Encoding
        The lossy ones take float32 and float64 only.

    Returns
    -------
    tuple of (fedknow_pb2.Tensor, memoryview)
        The description, whose ``offset`` is 0, and the bytes. A dense contiguous array is not
        copied: the bytes are its own memory.

    Raises
    ------
    WireError
        ``BAD_DTYPE``: a dtype that does not travel (in this encoding); ``BAD_VALUE``: a number
        that it cannot hold.
    """
    number = _NUMBERS.get(array.dtype.name)
    if number is None:
        raise WireError(
            Code.BAD_DTYPE,
            f"tensor {name!r} has dtype {array.dtype}; these travel: {', '.join(sorted(_NUMBERS))}",
        )
    # Neither call copies a little-endian array that lies in order.
    flat = np.ravel(np.asarray(array, dtype=_TYPES[number]))
    tensor = pb.Tensor(
        name=name,
        type=pb.Tensor.Type.Name(number),
        shape=array.shape,
        layout=pb.Tensor.DENSE,
    )
    if encoding is Encoding.SPARSE:
        flat = _to_sparse(tensor, flat)
    elif encoding is not Encoding.DENSE:
        if not lossy(array.dtype):
            raise WireError(
                Code.BAD_DTYPE,
                f"tensor {name!r} of dtype {array.dtype} cannot travel as {encoding}; "
                f"dense and sparse take it, {encoding} takes {' and '.join(_LOSSY_TYPES)}",
            )
        tensor.layout = _LAYOUTS[encoding]
        flat = _TO_LOSSY[encoding](tensor, flat)
    payload = flat.view(np.uint8).data
    tensor.length = len(payload)
    # Beside the checksum of each chunk: this one also covers the cutting and the joining.
    tensor.crc32 = zlib.crc32(payload)
    return tensor, payload


def check(tensor: pb.Tensor, limits: Limits) -> int:
    """Whether a description can be true and is within the limits; takes no memory.

    Returns
    -------
    int
        Bytes of the array it describes.

    Raises
    ------
    WireError
        ``BAD_DTYPE``, ``BAD_SHAPE``, ``BAD_VALUE``, ``MALFORMED`` or ``TOO_LARGE``.
    """
    name = tensor.name
    dtype = _TYPES.get(tensor.type)
    if dtype is None:
        raise WireError(
            Code.BAD_DTYPE,
            f"tensor {name!r} has type number {tensor.type}, which is none of 1 to 12",
        )
    if len(tensor.shape) > limits.dims:
        raise WireError(
            Code.TOO_LARGE,
            f"tensor {name!r} has {counted(len(tensor.shape), 'dimension')}; at most {limits.dims} taken",
        )
    size = math.prod(tensor.shape)
    # A side of 0 would hide any size of the other sides, which NumPy multiplies too.
    if math.prod(side or 1 for side in tensor.shape) > limits.elements:
        shape = tuple(tensor.shape)
        raise WireError(
            Code.TOO_LARGE,
            f"tensor {name!r} has shape {shape}, above the limit of elements: {limits.elements}",
        )
    nbytes: int = size * dtype.itemsize
    if tensor.layout in (pb.Tensor.MASK, pb.Tensor.GAPS):
        fits = _check_sparse(tensor, size, dtype)
    elif tensor.layout == pb.Tensor.DENSE:
        fits = tensor.length == nbytes
    elif tensor.layout in _WIDTH:
        fits = tensor.length == size * _WIDTH[tensor.layout]
        if not lossy(dtype):
            raise WireError(
                Code.BAD_DTYPE,
                f"tensor {name!r} has a lossy layout, which {dtype.name} has not",
            )
        # A hostile scale would turn whole numbers into infinity or NaN.
        if tensor.layout == pb.Tensor.SCALED and not _scale_fits(tensor.scale, dtype):
            raise WireError(
                Code.BAD_VALUE,
                f"tensor {name!r} has scale {tensor.scale!r}, of which {dtype.name} has no 127",
            )
    else:
        raise WireError(
            Code.MALFORMED,
            f"tensor {name!r} has layout number {tensor.layout}, which is none of 1 to 6",
        )
    if not fits:
        raise WireError(
            Code.BAD_SHAPE,
            f"tensor {name!r}: {counted(tensor.length, 'byte')} "
            f"with {counted(tensor.count, 'element')} present "
            "cannot be the shape "
            f"{tuple(tensor.shape)} of {dtype.name} in layout {pb.Tensor.Layout.Name(tensor.layout)}",
        )
    return nbytes


def decode(
    tensor: pb.Tensor, payload: memoryview, limits: Limits | None = None
) -> np.ndarray:
    """The array that a description and its bytes stand for.

    Parameters
    ----------
    tensor : fedknow_pb2.Tensor
        The description; its ``offset`` is not looked at.
    payload : memoryview
        The bytes, ``tensor.length`` of them.
    limits : Limits, optional
        What is refused.

    Returns
    -------
    numpy.ndarray
        Of the shape and dtype that were encoded. A dense one is a view of ``payload``, writable
        if that is; any other one owns its memory.

    Raises
    ------
    WireError
        As :func:`check`; and ``TRUNCATED``, ``BAD_CHECKSUM``, ``MALFORMED`` or ``BAD_VALUE``
        for the bytes.
    """
    check(tensor, limits or Limits())
    if len(payload) != tensor.length:
        raise WireError(
            Code.TRUNCATED,
            f"tensor {tensor.name!r}: {len(payload)} of {counted(tensor.length, 'byte')}",
        )
    # After the length, as the checksum of too few bytes would only say that it is wrong.
    if zlib.crc32(payload) != tensor.crc32:
        raise WireError(
            Code.BAD_CHECKSUM, f"tensor {tensor.name!r} was changed on its way"
        )
    dtype = _TYPES[tensor.type]
    if tensor.layout == pb.Tensor.DENSE:
        flat = _elements(tensor, payload, dtype)
    elif tensor.layout in (pb.Tensor.MASK, pb.Tensor.GAPS):
        flat = _from_sparse(tensor, payload, dtype)
    else:
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
            flat = _FROM_LOSSY[tensor.layout](tensor, payload, dtype)
    return flat.reshape(tuple(tensor.shape))


def _elements(tensor: pb.Tensor, payload: memoryview, dtype: np.dtype) -> np.ndarray:
    flat = np.frombuffer(payload, dtype)
    # NumPy takes any byte for a bool, and its operations then give undefined results.
    if dtype.kind == "b" and flat.view(np.uint8).max(initial=0) > 1:
        raise WireError(
            Code.BAD_VALUE,
            f"tensor {tensor.name!r} of bool holds a byte that is neither 0 nor 1",
        )
    return flat


# Sparse


def _to_sparse(tensor: pb.Tensor, flat: np.ndarray) -> np.ndarray:
    """The present elements and their index, as bytes, or the elements themselves where that is no
    larger."""
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


def _check_sparse(tensor: pb.Tensor, size: int, dtype: np.dtype) -> bool:
    # Only what a sender has a reason to send: it bounds the memory that reading takes by the
    # size of the result.
    index = tensor.length - tensor.count * dtype.itemsize
    # A sparse form that is no smaller than the dense one has no honest sender.
    if tensor.count > size or tensor.length >= size * dtype.itemsize:
        return False
    if tensor.layout == pb.Tensor.MASK:
        return index == _mask_bytes(size)
    return tensor.count <= index <= tensor.count * _GAP_BYTES and index < _mask_bytes(
        size
    )


def _from_sparse(tensor: pb.Tensor, payload: memoryview, dtype: np.dtype) -> np.ndarray:
    size, split = math.prod(tensor.shape), tensor.count * dtype.itemsize
    values, index = (
        _elements(tensor, payload[:split], dtype),
        np.frombuffer(payload[split:], np.uint8),
    )
    where = (
        _from_mask(tensor, index, size)
        if tensor.layout == pb.Tensor.MASK
        else _from_gaps(tensor, index, size)
    )
    flat = np.zeros(size, dtype)
    flat[where] = values
    return flat


def _from_mask(tensor: pb.Tensor, index: np.ndarray, size: int) -> np.ndarray:
    bits = np.unpackbits(index, bitorder="little").view(np.bool_)
    # A bit set in the padding would count as an element that has no place.
    if np.count_nonzero(bits) != tensor.count or bits[size:].any():
        raise WireError(
            Code.MALFORMED,
            f"tensor {tensor.name!r}: its mask does not show {tensor.count} of {counted(size, 'element')}",
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
        where = np.cumsum(gaps) - 1  # neither overflows: 2**31 gaps of 2**31 at most
        if where.max(initial=-1) < size:
            return where
    raise WireError(
        Code.MALFORMED,
        f"tensor {tensor.name!r}: its index does not show {tensor.count} of {counted(size, 'element')}",
    )


def _mask_bytes(size: int) -> int:
    return (size + 7) // 8


def _to_varints(values: np.ndarray) -> np.ndarray:
    """Positive integers below 2**35 as LEB128: seven bits a byte, lowest first, the top bit says
    that more follow."""
    shifts = np.arange(0, 7 * _GAP_BYTES, 7)
    # As many columns as the largest value needs, and one at least.
    width = int(np.count_nonzero(values.max(initial=1) >> shifts))
    rest = values[:, None] >> shifts[:width]
    septets = (rest & 0x7F).astype(np.uint8)
    septets[:, :-1] |= (rest[:, 1:] > 0).astype(np.uint8) << 7
    whole: np.ndarray = septets[rest > 0]
    return whole


def _from_varints(raw: np.ndarray) -> np.ndarray | None:
    """The integers (int64), or None where the bytes are not whole ones of at most five bytes."""
    last = raw < 0x80
    # The usual case, distances below 128: one byte each, so the bytes are the numbers.
    if last.all():
        return raw.astype(np.int64)
    ends = np.flatnonzero(last)
    # The last number would go on beyond the end of the bytes.
    if not last[-1]:
        return None
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    # Longer forms are never sent, and from the tenth byte on the shift would overflow.
    if lengths.max() > _GAP_BYTES:
        return None
    values = np.zeros(len(ends), np.int64)
    for byte in range(int(lengths.max())):
        longer = lengths > byte
        values[longer] |= (raw[starts[longer] + byte] & np.int64(0x7F)) << (7 * byte)
    return values


# Lossy


def _to_fp16(tensor: pb.Tensor, flat: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        half = flat.astype("<f2")
    _refuse_overflow(tensor, flat, np.isinf(half), Encoding.FP16)
    return half


def _from_fp16(tensor: pb.Tensor, payload: memoryview, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(payload, "<f2").astype(dtype)


def _to_bf16(tensor: pb.Tensor, flat: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        bits = flat.astype("<f4", copy=False).view("<u4")
    # To nearest, ties to even. The sum wraps around for some NaN, which are put right after it.
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    upper: np.ndarray = (rounded >> np.uint32(16)).astype("<u2")
    nan = np.isnan(flat)
    if nan.any():
        upper[nan] = (bits[nan] >> np.uint32(16)) | np.uint32(
            0x40
        )  # quiet: a set bit survives the cut
    _refuse_overflow(tensor, flat, (upper & np.uint16(0x7FFF)) == 0x7F80, Encoding.BF16)
    return upper


def _from_bf16(tensor: pb.Tensor, payload: memoryview, dtype: np.dtype) -> np.ndarray:
    bits = np.frombuffer(payload, "<u2").astype("<u4") << np.uint32(16)
    return bits.view("<f4").astype(dtype, copy=False)


def _refuse_overflow(
    tensor: pb.Tensor, flat: np.ndarray, infinite: np.ndarray, encoding: Encoding
) -> None:
    if infinite.any() and np.isfinite(flat[infinite]).any():
        largest = float(np.abs(flat[np.isfinite(flat)]).max())
        raise WireError(
            Code.BAD_VALUE,
            f"tensor {tensor.name!r} holds {largest:g}, which {encoding} cannot hold; send it dense",
        )


def _to_scaled(tensor: pb.Tensor, flat: np.ndarray) -> np.ndarray:
    top = max(float(flat.max(initial=0)), -float(flat.min(initial=0)))
    # Also keeps the scale of an all-zero tensor above 0, as it divides.
    scale = max(
        top / 127, _TINY
    )  # a subnormal scale would be too coarse a number itself
    if not _scale_fits(scale, flat.dtype):
        raise WireError(
            Code.BAD_VALUE,
            f"tensor {tensor.name!r} holds {top:g}, which has no 127th part; send it dense",
        )
    tensor.scale = scale
    quantised = np.empty(flat.size, np.int8)
    for block in _blocks(flat.size):
        quantised[block] = np.rint(np.divide(flat[block], scale, dtype=np.float64))
    return quantised


def _from_scaled(tensor: pb.Tensor, payload: memoryview, dtype: np.dtype) -> np.ndarray:
    quantised = np.frombuffer(payload, np.int8)
    # The sender's range is symmetric, so that -128 is nobody's rounding.
    if quantised.min(initial=0) < -127:
        raise WireError(
            Code.BAD_VALUE, f"tensor {tensor.name!r} holds -128; -127 to 127 are in use"
        )
    flat = np.empty(quantised.size, dtype)
    for block in _blocks(flat.size):
        flat[block] = np.multiply(quantised[block], tensor.scale, dtype=np.float64)
    return flat


def _scale_fits(scale: float, dtype: np.dtype) -> bool:
    with np.errstate(over="ignore"):
        # The largest number that can arrive must be finite in the tensor's own dtype.
        return bool(scale > 0 and np.isfinite(dtype.type(127.0 * scale)))


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, size, _BLOCK))


_TO_LOSSY = {
    Encoding.FP16: _to_fp16,
    Encoding.BF16: _to_bf16,
    Encoding.INT8: _to_scaled,
}
_FROM_LOSSY = {
    pb.Tensor.FP16: _from_fp16,
    pb.Tensor.BF16: _from_bf16,
    pb.Tensor.SCALED: _from_scaled,
}
