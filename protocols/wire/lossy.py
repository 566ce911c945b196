"""Tensors of which each element travels in fewer bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedknow.protocols.wire import fedknow_pb2 as pb
from fedknow.protocols.wire.encodings import Encoding
from fedknow.protocols.wire.errors import Code, WireError

__all__ = [
    "FROM_LOSSY",
    "LAYOUTS",
    "TO_LOSSY",
    "WIDTHS",
    "scale_fits",
]

LAYOUTS = {
    Encoding.FP16: pb.Tensor.FP16,
    Encoding.BF16: pb.Tensor.BF16,
    Encoding.INT8: pb.Tensor.SCALED,
}
WIDTHS = {
    pb.Tensor.FP16: 2,
    pb.Tensor.BF16: 2,
    pb.Tensor.SCALED: 1,
}
"""Bytes of an element in each lossy layout."""
_TINY = float(np.finfo(np.float64).tiny)
_BLOCK = 1 << 16
"""Elements that are quantised at once, so that float64 intermediates stay in the cache."""


def _to_fp16(tensor: pb.Tensor, flat: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        half = flat.astype("<f2")
    _refuse_overflow(tensor, flat, np.isinf(half), Encoding.FP16)
    return half


def _from_fp16(
    tensor: pb.Tensor, payload: memoryview, dtype: np.dtype
) -> np.ndarray:
    return np.frombuffer(payload, "<f2").astype(dtype)


def _to_bf16(tensor: pb.Tensor, flat: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        bits = flat.astype("<f4", copy=False).view("<u4")
    # To nearest, ties to even. The sum wraps around for some NaN, which are put right after it.
    rounded = bits + (
        np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    )
    upper: np.ndarray = (rounded >> np.uint32(16)).astype("<u2")
    nan = np.isnan(flat)
    if nan.any():
        upper[nan] = (bits[nan] >> np.uint32(16)) | np.uint32(
            0x40
        )  # quiet: a set bit survives the cut
    _refuse_overflow(
        tensor,
        flat,
        (upper & np.uint16(0x7FFF)) == 0x7F80,
        Encoding.BF16,
    )
    return upper


def _from_bf16(
    tensor: pb.Tensor, payload: memoryview, dtype: np.dtype
) -> np.ndarray:
    bits = np.frombuffer(payload, "<u2").astype("<u4") << np.uint32(16)
    return bits.view("<f4").astype(dtype, copy=False)


def _refuse_overflow(
    tensor: pb.Tensor,
    flat: np.ndarray,
    infinite: np.ndarray,
    encoding: Encoding,
) -> None:
    if infinite.any() and np.isfinite(flat[infinite]).any():
        largest = float(np.abs(flat[np.isfinite(flat)]).max())
        raise WireError(
            Code.BAD_VALUE,
            f"tensor {tensor.name!r} holds {largest:g}, which {encoding} cannot hold; "
            f"send it dense",
        )


def _to_scaled(tensor: pb.Tensor, flat: np.ndarray) -> np.ndarray:
    top = max(
        float(flat.max(initial=0)),
        -float(flat.min(initial=0)),
    )
    # Also keeps the scale of an all-zero tensor above 0, as it divides.
    scale = max(
        top / 127, _TINY
    )  # a subnormal scale would be too coarse a number itself
    if not scale_fits(scale, flat.dtype):
        raise WireError(
            Code.BAD_VALUE,
            f"tensor {tensor.name!r} holds {top:g}, which has no 127th part; send it dense",
        )
    tensor.scale = scale
    quantised = np.empty(flat.size, np.int8)
    for block in _blocks(flat.size):
        quantised[block] = np.rint(
            np.divide(flat[block], scale, dtype=np.float64)
        )
    return quantised


def _from_scaled(
    tensor: pb.Tensor, payload: memoryview, dtype: np.dtype
) -> np.ndarray:
    quantised = np.frombuffer(payload, np.int8)
    # The sender's range is symmetric, so that -128 is nobody's rounding.
    if quantised.min(initial=0) < -127:
        raise WireError(
            Code.BAD_VALUE,
            f"tensor {tensor.name!r} holds -128; -127 to 127 are in use",
        )
    # By blocks, as a large tensor in float64 would need much memory at once.
    flat = np.empty(quantised.size, dtype)
    for block in _blocks(flat.size):
        flat[block] = np.multiply(
            quantised[block], tensor.scale, dtype=np.float64
        )
    return flat


def scale_fits(scale: float, dtype: np.dtype) -> bool:
    """Say if 127 times a scale is a number of the dtype."""
    with np.errstate(over="ignore"):
        # The largest number that can arrive must be finite in the tensor's own dtype.
        return bool(scale > 0 and np.isfinite(dtype.type(127.0 * scale)))


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, size, _BLOCK))


TO_LOSSY = {
    Encoding.FP16: _to_fp16,
    Encoding.BF16: _to_bf16,
    Encoding.INT8: _to_scaled,
}
FROM_LOSSY = {
    pb.Tensor.FP16: _from_fp16,
    pb.Tensor.BF16: _from_bf16,
    pb.Tensor.SCALED: _from_scaled,
}
