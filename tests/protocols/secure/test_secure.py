"""Shares, masks and whole numbers of secure aggregation, each against its defining property."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedknow.protocols.messages import Arrays
from fedknow.protocols.secure.fixed import (
    Summand,
    decode,
    decode_sums,
    encode,
    encode_sums,
    size_of,
    sum_size,
)
from fedknow.protocols.secure.masks import (
    agree,
    mask,
    new_key,
    open_shares,
    pair_mask,
    public_key,
    seal_shares,
)
from fedknow.protocols.secure.rounds import threshold_of
from fedknow.protocols.secure.shamir import (
    PRIME,
    SHARE_BYTES,
    deal,
    recover,
    weights_at_zero,
)

SESSION = bytes(range(32))


# --- shares


@settings(max_examples=30)
@given(st.binary(min_size=32, max_size=32), st.integers(2, 9), st.data())
def test_any_shares_of_the_threshold_tell_the_secret(secret, threshold, data):
    points = list(range(2, 12))
    shares = deal(secret, points, threshold)
    chosen = data.draw(
        st.lists(
            st.sampled_from(points),
            min_size=threshold,
            max_size=threshold,
            unique=True,
        )
    )
    assert recover({point: shares[point] for point in chosen}, 32) == secret


def test_shares_by_hand():
    # f(x) = 7 + 3 x at 1 and 2 is 10 and 13; f(0) = 2 * 10 - 13.
    weights = weights_at_zero([1, 2])
    assert weights == {1: 2, 2: PRIME - 1}
    shares = {
        point: value.to_bytes(66, "big") for point, value in ((1, 10), (2, 13))
    }
    assert recover(shares, 1) == b"\x07"


def test_fewer_shares_are_any_secret():
    secret = bytes(32)
    shares = deal(secret, [1, 2, 3, 4, 5], threshold=3)
    # Two shares fit each secret: here the one that a third share of the other's choice gives.
    other = deal(b"\xff" * 32, [1, 2, 3], threshold=3)
    two = {1: shares[1], 2: shares[2]}
    with pytest.raises(ValueError, match="no shares of one secret"):
        recover(two | {3: other[3]}, 32)
    assert all(len(share) == SHARE_BYTES for share in shares.values())
    assert deal(secret, [1, 2], 2) != deal(secret, [1, 2], 2)


@pytest.mark.parametrize(
    ("secret", "threshold"), [(bytes(65), 2), (bytes(32), 4), (bytes(32), 0)]
)
def test_what_cannot_be_dealt_is_refused(secret, threshold):
    with pytest.raises(ValueError, match="cannot be dealt"):
        deal(secret, [1, 2, 3], threshold)


# --- masks


def test_both_agree_and_nobody_else():
    a, b, c = new_key(), new_key(), new_key()
    key = agree(a, public_key(b), "mask", SESSION)
    assert key == agree(b, public_key(a), "mask", SESSION)
    others = {
        agree(c, public_key(a), "mask", SESSION),
        agree(a, public_key(b), "share", SESSION),
        agree(a, public_key(b), "mask", bytes(32)),
    }
    assert len(others | {key}) == 4


def test_a_mask_is_the_published_stream():
    # RFC 8439, appendix A.1, test vector 1: key, nonce and counter 0.
    first = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28")
    assert mask(bytes(32), 2).tobytes() == first
    assert mask(bytes(32), 5)[:2].tobytes() == first


@settings(max_examples=20)
@given(st.integers(2, 6), st.integers(1, 50))
def test_pairs_of_masks_cancel(clients, size):
    keys = [new_key() for _ in range(clients)]
    total = np.zeros(size, np.uint64)
    for one in range(clients):
        for peer in set(range(clients)) - {one}:
            key = agree(keys[one], public_key(keys[peer]), "mask", SESSION)
            total = total + pair_mask(key, size, one < peer)
    assert not total.any()


def test_shares_open_for_their_receiver_alone():
    key = bytes(32)
    sealed = seal_shares(key, 2, 3, b"shares")
    assert open_shares(key, 2, 3, sealed) == b"shares"
    for sender, receiver, package in (
        (3, 2, sealed),
        (2, 4, sealed),
        (2, 3, sealed[:-1] + bytes([sealed[-1] ^ 1])),
    ):
        with pytest.raises(ValueError, match="were not sealed"):
            open_shares(key, sender, receiver, package)
    assert seal_shares(key, 3, 2, b"shares") != sealed


# --- whole numbers


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_sums_are_exact_in_any_order_and_near_the_mean(seed, clients):
    draws = np.random.default_rng(seed)
    sent = Arrays(
        a=draws.normal(size=(2, 3)).astype(np.float32),
        b=np.float32(draws.normal()).reshape(()),
    )
    weights = draws.integers(1, 1000, clients)
    trained = [
        Arrays(
            (name, array + draws.normal(0, 0.1, array.shape).astype(np.float32))
            for name, array in sent.items()
        )
        for _ in range(clients)
    ]
    encoded = [
        encode(arrays, sent, int(weight), clients)
        for arrays, weight in zip(trained, weights, strict=True)
    ]
    total = sum(encoded, np.zeros(size_of(sent), np.uint64))
    shuffled = [encoded[place] for place in draws.permutation(clients)]
    assert np.array_equal(total, sum(shuffled, np.zeros(7, np.uint64)))
    mean = decode(total, sent, float(weights.sum()))
    for name, array in sent.items():
        expected = np.average(
            [arrays[name].astype(np.float64) for arrays in trained],
            axis=0,
            weights=weights,
        )
        assert mean[name].shape == array.shape
        assert mean[name].dtype == np.float32
        assert mean[name] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("value", [1e9, float("nan"), float("inf")])
def test_a_number_that_could_wrap_around_is_refused(value):
    sent = Arrays(a=np.zeros(2, np.float32))
    trained = Arrays(a=np.array([0.0, value], np.float32))
    with pytest.raises(ValueError, match="too large for secure aggregation"):
        encode(trained, sent, 2, 4)


def test_thirty_percent_may_leave():
    for clients in range(3, 200):
        threshold = threshold_of(0.66, clients)
        assert clients - int(0.3 * clients) >= threshold > clients / 2


# --- sums over samples

LAYOUT = {
    "a": Summand((2, 3), 2.0**-32, "raise it"),
    "nothing": Summand((0, 4), 1.0),
    "b": Summand((2,), 0.25),
}


def sums(a, b):
    return {
        "a": np.array(a, np.float64).reshape(2, 3),
        "nothing": np.zeros((0, 4)),
        "b": np.array(b, np.float64),
    }


def test_sums_by_hand():
    mine, yours = (
        sums([1, 0, -2, 0.5, 0, 0], [0.25, 0.3]),
        sums(range(6), [-1, 0]),
    )
    encoded = encode_sums(mine, LAYOUT, 2)
    assert encoded.dtype == np.uint64
    assert encoded.size == sum_size(LAYOUT) == 8
    # 0.3 is rounded to a multiple of 0.25; -2 is a number near the end of the ring.
    assert encoded[2] == 2**64 - 2 * 2**32
    assert encoded[6:].tolist() == [1, 1]
    total = decode_sums(encoded + encode_sums(yours, LAYOUT, 2), LAYOUT)
    assert list(total) == ["a", "nothing", "b"]
    assert total["a"].tolist() == [[1, 1, 0], [3.5, 4, 5]]
    assert total["nothing"].shape == (0, 4)
    assert total["b"].tolist() == [-0.75, 0.25]
    assert {array.dtype for array in total.values()} == {np.dtype(np.float64)}


@settings(max_examples=40)
@given(
    st.lists(
        st.lists(st.floats(-1e6, 1e6), min_size=8, max_size=8),
        min_size=1,
        max_size=9,
    ),
    st.randoms(),
)
def test_sums_are_exact_in_any_order_but_for_rounding_each(rows, random):
    encoded = [encode_sums(sums(row[:6], row[6:]), LAYOUT, 9) for row in rows]
    total = sum(encoded, np.uint64(0))
    random.shuffle(encoded)
    assert (total == sum(encoded, np.uint64(0))).all()
    decoded = decode_sums(total, LAYOUT)
    exact = np.sum(rows, axis=0)
    clients = len(rows)
    for name, expected in (("a", exact[:6]), ("b", exact[6:])):
        error = np.abs(decoded[name].ravel() - expected)
        # Half a unit each, and the rounding of float64.
        assert (error <= clients * LAYOUT[name].unit / 2 + 1e-8).all()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({"a": np.full((2, 3), 2.0**30 / 3)}, "a is too large .* 3 clients; raise it"),
        ({"a": np.full((2, 3), np.nan)}, "a is too large"),
        ({"b": np.array([np.inf, 0])}, "b is too large"),
        ({"b": np.zeros(3)}, r"b has shape \(3,\), not \(2,\)"),
        ({"c": np.zeros(3)}, "are not"),
    ],
)  # fmt: skip
def test_sums_that_do_not_fit_are_refused(spoil, words):
    honest = sums(range(6), [1, 2])
    encode_sums(honest, LAYOUT, 3)
    with pytest.raises(ValueError, match=words):
        encode_sums(honest | spoil, LAYOUT, 3)


def test_as_many_as_said_never_wrap_around():
    largest = np.nextafter(2.0**30 / 3, 0)
    for sign in (1, -1):
        encoded = encode_sums(sums([sign * largest] * 6, [0, 0]), LAYOUT, 3)
        total = decode_sums(encoded * np.uint64(3), LAYOUT)
        assert total["a"] == pytest.approx(sign * 2.0**30, rel=1e-9)
