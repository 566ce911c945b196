"""Tensors as bytes: exact, or smaller with a stated error."""

from __future__ import annotations

import math
import zlib

import numpy as np

from fedknow.protocols.texts import counted
from fedknow.protocols.wire import fedknow_pb2 as pb
from fedknow.protocols.wire.encodings import LOSSY_TYPES, Encoding, lossy
from fedknow.protocols.wire.errors import Code, WireError
from fedknow.protocols.wire.limits import Limits
from fedknow.protocols.wire.lossy import (
    FROM_LOSSY,
    LAYOUTS,
    TO_LOSSY,
    WIDTHS,
    scale_fits,
)
from fedknow.protocols.wire.sparse import (
    check_sparse,
    elements,
    from_sparse,
    to_sparse,
)

__all__ = ["Encoding", "check", "decode", "encode", "lossy"]

# Little-endian, whatever the machine.
_TYPES: dict[int, np.dtype] = {
    value: np.dtype(name.lower()).newbyteorder("<")
    for name, value in pb.Tensor.Type.items()
    if value
}
_NUMBERS = {dtype.name: number for number, dtype in _TYPES.items()}


def encode(
    name: str, array: np.ndarray, encoding: Encoding = Encoding.DENSE
) -> tuple[pb.Tensor, memoryview]:
    """Return a tensor's description and its bytes.

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
        flat = to_sparse(tensor, flat)
    elif encoding is not Encoding.DENSE:
        if not lossy(array.dtype):
            raise WireError(
                Code.BAD_DTYPE,
                f"tensor {name!r} of dtype {array.dtype} cannot travel as {encoding}; "
                f"dense and sparse take it, {encoding} takes {' and '.join(LOSSY_TYPES)}",
            )
        tensor.layout = LAYOUTS[encoding]
        flat = TO_LOSSY[encoding](tensor, flat)
    payload = flat.view(np.uint8).data
    tensor.length = len(payload)
    # Beside the checksum of each chunk: this one also covers the cutting and the joining.
    tensor.crc32 = zlib.crc32(payload)
    return tensor, payload


def check(tensor: pb.Tensor, limits: Limits) -> int:
    """Check that a description can be true and is within the limits.

    It takes no memory.

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
    _check_shape(tensor, limits)
    size = math.prod(tensor.shape)
    if not _is_of_size(tensor, size, dtype):
        raise WireError(
            Code.BAD_SHAPE,
            f"tensor {name!r}: {counted(tensor.length, 'byte')} "
            f"with {counted(tensor.count, 'element')} present "
            "cannot be the shape "
            f"{tuple(tensor.shape)} of {dtype.name} in layout "
            f"{pb.Tensor.Layout.Name(tensor.layout)}",
        )
    nbytes: int = size * dtype.itemsize
    return nbytes


def _check_shape(tensor: pb.Tensor, limits: Limits) -> None:
    """Refuse a shape above the limits."""
    if len(tensor.shape) > limits.dims:
        raise WireError(
            Code.TOO_LARGE,
            f"tensor {tensor.name!r} has {counted(len(tensor.shape), 'dimension')}; "
            f"at most {limits.dims} taken",
        )
    # A side of 0 would hide any size of the other sides, which NumPy multiplies too.
    if math.prod(side or 1 for side in tensor.shape) > limits.elements:
        shape = tuple(tensor.shape)
        raise WireError(
            Code.TOO_LARGE,
            f"tensor {tensor.name!r} has shape {shape}, above the limit of elements: "
            f"{limits.elements}",
        )


def _is_of_size(tensor: pb.Tensor, size: int, dtype: np.dtype) -> bool:
    """Say if the announced bytes can hold so many elements in their layout."""
    if tensor.layout in (pb.Tensor.MASK, pb.Tensor.GAPS):
        return check_sparse(tensor, size, dtype)
    if tensor.layout == pb.Tensor.DENSE:
        return bool(tensor.length == size * dtype.itemsize)
    if tensor.layout in WIDTHS:
        _check_lossy(tensor, dtype)
        return bool(tensor.length == size * WIDTHS[tensor.layout])
    raise WireError(
        Code.MALFORMED,
        f"tensor {tensor.name!r} has layout number {tensor.layout}, which is none of 1 to 6",
    )


def _check_lossy(tensor: pb.Tensor, dtype: np.dtype) -> None:
    """Refuse a lossy layout that the dtype or the scale does not allow."""
    name = tensor.name
    if not lossy(dtype):
        raise WireError(
            Code.BAD_DTYPE,
            f"tensor {name!r} has a lossy layout, which {dtype.name} has not",
        )
    # A hostile scale would turn whole numbers into infinity or NaN.
    if tensor.layout == pb.Tensor.SCALED and not scale_fits(tensor.scale, dtype):
        raise WireError(
            Code.BAD_VALUE,
            f"tensor {name!r} has scale {tensor.scale!r}, of which {dtype.name} has no 127",
        )


def decode(
    tensor: pb.Tensor, payload: memoryview, limits: Limits | None = None
) -> np.ndarray:
    """Return the array that a description and its bytes stand for.

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
    # Before anything is allocated, as sizes are only claims of the sender.
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
        flat = elements(tensor, payload, dtype)
    elif tensor.layout in (pb.Tensor.MASK, pb.Tensor.GAPS):
        flat = from_sparse(tensor, payload, dtype)
    else:
        with np.errstate(
            invalid="ignore"
        ):  # a signalling NaN becomes a quiet one
            flat = FROM_LOSSY[tensor.layout](tensor, payload, dtype)
    return flat.reshape(tuple(tensor.shape))
