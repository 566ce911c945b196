"""Tensors as bytes: exact where that is promised, within the stated bound where not, and refused
where hostile."""

from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedknow.protocols.wire import Code, Encoding, Limits, WireError
from fedknow.protocols.wire import fedknow_pb2 as pb
from fedknow.protocols.wire.codec import check, decode, encode, lossy

TYPES = [name.lower() for name, number in pb.Tensor.Type.items() if number]
TENSORS = st.sampled_from(TYPES).flatmap(
    lambda name: hnp.arrays(
        name, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)
    )
)
FLOATS = st.sampled_from(["float32", "float64"])


def there_and_back(array, encoding):
    tensor, payload = encode("w", array, encoding)
    return decode(tensor, memoryview(bytes(payload)))


def same_bits(array, other):
    return (array.dtype, array.shape, array.tobytes()) == (
        other.dtype,
        other.shape,
        other.tobytes(),
    )


def refused(code, action, *arguments):
    with pytest.raises(WireError) as raised:
        action(*arguments)
    assert raised.value.code is code, raised.value
    return raised.value.reason


def floats(draw, name, most):
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
    width = 32 if name == "float32" else 64
    bound = float(np.float32(most)) if name == "float32" else most
    elements = st.floats(-bound, bound, width=width)
    return draw(hnp.arrays(name, shape, elements=elements))


@given(TENSORS)
@settings(deadline=None)
def test_exact_encodings_keep_every_bit(array):
    assert same_bits(there_and_back(array, Encoding.DENSE), array)
    assert same_bits(there_and_back(array, Encoding.SPARSE), array)


@given(
    st.sampled_from(TYPES),
    st.integers(1, 3000),
    st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5]),
    st.integers(0, 2**32),
)
@settings(deadline=None)
def test_sparse_tensors_of_any_density_keep_every_bit(name, size, density, seed):
    rng = np.random.default_rng(seed)
    bits = rng.integers(1, 256, size).astype(np.uint8)
    array = np.where(rng.random(size) < density, bits, 0).astype(name)
    tensor, payload = encode("w", array, Encoding.SPARSE)
    assert len(payload) <= array.nbytes
    assert same_bits(decode(tensor, payload), array)


def test_negative_zero_nan_and_infinity_are_elements_of_a_sparse_tensor():
    array = np.zeros(1000, np.float32)
    array[[3, 400, 999]] = -0.0, np.nan, -np.inf
    array.view(np.uint32)[500] = 0x7F800001  # a signalling NaN
    tensor, payload = encode("w", array, Encoding.SPARSE)
    assert (tensor.layout, tensor.count, len(payload)) == (
        pb.Tensor.GAPS,
        4,
        4 * 4 + 6,
    )  # gaps 4, 397, 100, 499
    assert same_bits(decode(tensor, payload), array)


@pytest.mark.parametrize(
    ("present", "layout", "size"),
    [
        (0, pb.Tensor.GAPS, 0),
        (
            100,
            pb.Tensor.GAPS,
            400 + 100,
        ),  # gaps of 40: one byte each, against 500 bytes of mask
        (499, pb.Tensor.GAPS, 4 * 499 + 499),
        (500, pb.Tensor.MASK, 4 * 500 + 500),
        (3800, pb.Tensor.MASK, 4 * 3800 + 500),
        (3900, pb.Tensor.DENSE, 4 * 4000),
    ],
)
def test_sparse_takes_the_smallest_layout(present, layout, size):
    array = np.zeros(4000, np.float32)
    array[np.linspace(0, 3999, present).astype(int)] = 1
    assert np.count_nonzero(array) == present
    tensor, payload = encode("w", array, Encoding.SPARSE)
    assert (tensor.layout, len(payload)) == (layout, size)


@pytest.mark.parametrize("gap", [1, 127, 128, 16383, 16384, 2_097_151, 2_097_152])
def test_gaps_of_every_length(gap):
    array = np.zeros(gap + 200, np.uint8)
    array[gap - 1] = array[gap + 199] = 7
    tensor, payload = encode("w", array, Encoding.SPARSE)
    assert tensor.layout == pb.Tensor.GAPS
    assert same_bits(decode(tensor, payload), array)


def test_dense_bytes_are_little_endian_and_not_copied():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor, payload = encode("w", array)
    assert np.shares_memory(np.frombuffer(payload, np.float32), array)
    assert payload.tobytes() == b"".join(
        np.float32(x).tobytes() for x in range(6)
    )
    assert tensor.crc32 == zlib.crc32(payload)
    body = bytearray(payload)
    back = decode(tensor, memoryview(body))
    assert back.flags.writeable
    assert np.shares_memory(back, np.frombuffer(body, np.uint8))
    swapped = encode("w", array.astype(">f4"))[1]
    assert swapped == payload


def test_strides_do_not_matter():
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    for view in (array.T, array[::2, ::-1], np.asfortranarray(array)):
        assert np.array_equal(there_and_back(view, Encoding.DENSE), view)


@given(st.data(), FLOATS)
@settings(deadline=None)
def test_fp16_is_within_its_bound(data, name):
    array = floats(data.draw, name, 65504.0)
    back = there_and_back(array, Encoding.FP16)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    wide, error = (
        array.astype(np.float64),
        np.abs(array.astype(np.float64) - back),
    )
    assert (error <= 2.0**-11 * np.abs(wide) + 2.0**-25).all()


@given(st.data(), FLOATS)
@settings(deadline=None)
def test_bf16_is_within_its_bound(data, name):
    array = floats(data.draw, name, 3.38e38)
    back = there_and_back(array, Encoding.BF16)
    assert back.dtype == array.dtype
    wide, error = (
        array.astype(np.float64),
        np.abs(array.astype(np.float64) - back),
    )
    assert (error <= 2.0**-8 * np.abs(wide) + 2.0**-134).all()


@given(st.data(), FLOATS)
@settings(deadline=None)
def test_int8_is_within_its_bound(data, name):
    array = floats(
        data.draw, name, data.draw(st.sampled_from([1e-300, 1e-40, 1.0, 1e30]))
    )
    tensor, payload = encode("w", array, Encoding.INT8)
    back = decode(tensor, payload)
    assert len(payload) == array.size
    largest = float(np.abs(array).max(initial=0))
    assert tensor.scale == max(largest / 127, np.finfo(np.float64).tiny)
    wide = array.astype(np.float64)
    rounding = np.spacing(np.abs(back)).astype(np.float64) / 2
    assert (
        np.abs(wide - back) <= tensor.scale / 2 * (1 + 1e-12) + rounding
    ).all()


@given(hnp.arrays(np.uint16, 50))
@settings(deadline=None)
def test_bf16_numbers_travel_as_they_are(upper):
    array = (upper.astype(np.uint32) << 16).view(np.float32)
    back = there_and_back(array, Encoding.BF16)
    assert np.array_equal(back, array, equal_nan=True)
    assert np.array_equal(np.signbit(back), np.signbit(array))


def test_bf16_rounds_to_nearest_even():
    one, step = 1.0, 2.0**-7
    array = np.array(
        [
            one + step / 2,
            one + 1.5 * step,
            one + step / 2 + 1e-6,
            -one - 1.5 * step,
        ],
        np.float32,
    )
    assert there_and_back(array, Encoding.BF16).tolist() == [
        one,
        one + 2 * step,
        one + step,
        -one - 2 * step,
    ]


@pytest.mark.parametrize("encoding", [Encoding.FP16, Encoding.BF16])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_halves_keep_nan_and_infinity(encoding, name):
    array = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 1.5], name)
    if name == "float32":
        array = np.append(
            array,
            np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(
                np.float32
            ),
        )
    back = there_and_back(array, encoding)
    assert np.array_equal(back, array, equal_nan=True)
    assert np.signbit(back[4])


@pytest.mark.parametrize(
    ("encoding", "value", "name"),
    [
        (Encoding.FP16, 65520.0, "float32"),
        (Encoding.FP16, 1e300, "float64"),
        (Encoding.BF16, 3.4e38, "float32"),
        (Encoding.BF16, 1e300, "float64"),
        (Encoding.INT8, np.nan, "float32"),
        (Encoding.INT8, np.inf, "float32"),
        (Encoding.INT8, -np.inf, "float64"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(encoding, value, name):
    reason = refused(
        Code.BAD_VALUE, encode, "body.w", np.array([1, value], name), encoding
    )
    assert "body.w" in reason
    assert "dense" in reason


@pytest.mark.parametrize(
    "encoding", [Encoding.FP16, Encoding.BF16, Encoding.INT8]
)
@pytest.mark.parametrize("name", ["float16", "int64", "bool"])
def test_lossy_encodings_take_float32_and_float64_only(encoding, name):
    assert not lossy(np.dtype(name))
    assert "'w' of dtype" in refused(
        Code.BAD_DTYPE, encode, "w", np.ones(3, name), encoding
    )


@pytest.mark.parametrize(
    "array",
    [
        np.ones(2, complex),
        np.array(["a"]),
        np.array([None]),
        np.zeros(2, "M8[s]"),
    ],
)
def test_other_dtypes_are_refused(array):
    assert "float32" in refused(Code.BAD_DTYPE, encode, "w", array)


@pytest.mark.parametrize("encoding", list(Encoding))
@given(data=st.data())
@settings(deadline=None)
def test_a_flipped_bit_never_gets_through(encoding, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    array = np.where(rng.random(300) < 0.1, rng.standard_normal(300), 0).astype(
        np.float32
    )
    tensor, payload = encode("w", array, encoding)
    broken = bytearray(payload)
    broken[data.draw(st.integers(0, len(broken) - 1))] ^= 1 << data.draw(
        st.integers(0, 7)
    )
    refused(Code.BAD_CHECKSUM, decode, tensor, memoryview(broken))
    cut = data.draw(st.integers(0, len(broken) - 1))
    refused(Code.TRUNCATED, decode, tensor, payload[:cut])


def described(**changes):
    tensor, _ = encode("w", np.ones((3, 4), np.float32))
    for field, value in changes.items():
        if field == "shape":
            tensor.shape[:] = value
        else:
            setattr(tensor, field, value)
    return tensor


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        (Code.BAD_DTYPE, {"type": 0}),
        (Code.BAD_DTYPE, {"type": 77}),
        (
            Code.BAD_DTYPE,
            {"type": pb.Tensor.INT32, "layout": pb.Tensor.FP16, "length": 24},
        ),
        (Code.MALFORMED, {"layout": 0}),
        (Code.MALFORMED, {"layout": 77}),
        (Code.TOO_LARGE, {"shape": [1] * 17}),
        (Code.TOO_LARGE, {"shape": [1 << 63, 1 << 63]}),
        (Code.TOO_LARGE, {"shape": [0, (1 << 64) - 1], "length": 0}),
        (
            Code.TOO_LARGE,
            {"shape": [1 << 40], "layout": pb.Tensor.GAPS, "length": 0},
        ),
        (Code.BAD_SHAPE, {"shape": [3, 5]}),
        (Code.BAD_SHAPE, {"length": 47}),
        (Code.BAD_SHAPE, {"layout": pb.Tensor.FP16}),
        (Code.BAD_SHAPE, {"layout": pb.Tensor.SCALED, "scale": 1.0}),
        (Code.BAD_SHAPE, {"layout": pb.Tensor.MASK, "count": 13}),
        (Code.BAD_SHAPE, {"layout": pb.Tensor.MASK, "count": 1 << 63}),
        (Code.BAD_SHAPE, {"layout": pb.Tensor.GAPS, "count": 1, "length": 4}),
        (
            Code.BAD_SHAPE,
            {"layout": pb.Tensor.GAPS, "count": 1, "length": 6},
        ),  # a mask would be as small
        (
            Code.BAD_VALUE,
            {"layout": pb.Tensor.SCALED, "length": 12, "scale": 0.0},
        ),
        (
            Code.BAD_VALUE,
            {"layout": pb.Tensor.SCALED, "length": 12, "scale": -1.0},
        ),
        (
            Code.BAD_VALUE,
            {"layout": pb.Tensor.SCALED, "length": 12, "scale": float("nan")},
        ),
        (
            Code.BAD_VALUE,
            {"layout": pb.Tensor.SCALED, "length": 12, "scale": 1e38},
        ),
    ],
)
def test_descriptions_that_cannot_be_true_are_refused(code, changes):
    refused(code, check, described(**changes), Limits())


@pytest.mark.parametrize(
    ("code", "name", "changes", "payload"),
    [
        (Code.BAD_VALUE, "bool", {"shape": [2]}, [1, 2]),
        (
            Code.BAD_VALUE,
            "float32",
            {"shape": [2], "layout": pb.Tensor.SCALED, "scale": 1.0},
            [0, 128],
        ),
        (
            Code.MALFORMED,
            "uint8",
            {"shape": [20], "layout": pb.Tensor.MASK, "count": 2},
            [5, 5, 1, 0, 0],
        ),
        (
            Code.MALFORMED,
            "uint8",
            {"shape": [20], "layout": pb.Tensor.MASK, "count": 1},
            [5, 0, 0, 0x80],
        ),
        (
            Code.MALFORMED,
            "uint8",
            {"shape": [20], "layout": pb.Tensor.GAPS, "count": 1},
            [5, 0],
        ),
        (
            Code.MALFORMED,
            "uint8",
            {"shape": [20], "layout": pb.Tensor.GAPS, "count": 1},
            [5, 21],
        ),
        (
            Code.MALFORMED,
            "uint8",
            {"shape": [20], "layout": pb.Tensor.GAPS, "count": 2},
            [5, 5, 11, 10],
        ),
        (
            Code.MALFORMED,
            "uint8",
            {"shape": [20], "layout": pb.Tensor.GAPS, "count": 1},
            [5, 0x81],
        ),
        (
            Code.MALFORMED,
            "uint8",
            {"shape": [20], "layout": pb.Tensor.GAPS, "count": 1},
            [5, 1, 1],
        ),
        (
            Code.MALFORMED,
            "uint8",
            {"shape": [99], "layout": pb.Tensor.GAPS, "count": 2},
            [5, 5] + [0x80] * 5 + [1, 1],
        ),
    ],
)
def test_bytes_that_lie_are_refused_though_their_checksum_is_right(
    code, name, changes, payload
):
    data = memoryview(bytes(payload))
    number = pb.Tensor.Type.Value(name.upper())
    refused(
        code,
        decode,
        described(
            type=number, length=len(data), crc32=zlib.crc32(data), **changes
        ),
        data,
    )


def test_reading_a_sparse_tensor_takes_memory_in_proportion_to_it():
    array = np.zeros(1 << 20, np.float32)
    array[:: 1 << 7] = 1  # gaps of two bytes
    for values in (
        array,
        np.where(np.arange(1 << 20) % 3 == 0, np.float32(1), np.float32(0)),
    ):
        tensor, payload = encode("w", values, Encoding.SPARSE)
        tracemalloc.start()
        try:
            decode(tensor, payload)
            assert (
                tracemalloc.get_traced_memory()[1]
                < values.nbytes + 10 * values.size
            )
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    ("field", "value"),
    [("streams", 0), ("elements", (1 << 31) + 1), ("message_bytes", -1)],
)
def test_limits_that_cannot_be(field, value):
    with pytest.raises(ValueError, match=f"limit {field} = {value}: must be"):
        Limits(**{field: value})
