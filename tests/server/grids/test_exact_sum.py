"""Sums that no order can change."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedknow.server.grids.exact_sum import CHUNK, ExactSum


def total(arrays, weights=None, parts=1):
    """The sum of arrays, first in parts and then of the parts."""
    sums = [ExactSum(arrays[0].shape) for _ in range(parts)]
    for i, array in enumerate(arrays):
        sums[i % parts].add(array, weights[i] if weights else 1.0)
    for other in sums[1:]:
        sums[0].merge(other)
    return sums[0].value()


def test_what_cancels_leaves_what_is_small():
    terms = [np.array([value]) for value in (2.0**40, 3.0, -(2.0**40))]
    assert total(terms)[0] == 3.0
    # A plain sum of float32 gives 0 in this order and 3 in another.
    plain = np.float32(2.0**40) + np.float32(3) - np.float32(2.0**40)
    assert plain == 0.0


def test_a_mean_of_tenths_by_hand():
    """Ten times 0.1 in float64 adds up to 0.9999999999999999, one by one."""
    terms = [np.array([0.1])] * 10
    assert sum(float(term[0]) for term in terms) != 1.0
    assert total(terms)[0] == math.fsum([0.1] * 10) == 1.0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-1e30, 1e30), st.floats(-1e-3, 1e-3)),
        min_size=1,
        max_size=20,
    ),
    st.randoms(),
    st.integers(1, 4),
)
def test_no_order_and_no_parting_changes_a_bit(values, random, parts):
    arrays = [np.array(pair) for pair in values]
    expected = total(arrays)
    random.shuffle(arrays)
    assert total(arrays, parts=parts).tobytes() == expected.tobytes()
    largest = max(abs(value) for pair in values for value in pair)
    for place in (0, 1):
        exact = float(sum(Fraction(pair[place]) for pair in values))
        slack = (
            len(values) * (largest * 2.0**-53 + 2.0**-830) + abs(exact) * 2.0**-51
        )
        assert abs(expected[place] - exact) <= slack


def test_terms_at_the_edges_of_slices():
    """Half units, which round to even, and signs: the same from either side."""
    edges = [
        s * m * 2.0**e for s in (1, -1) for m in (1, 1.5) for e in range(-60, 60)
    ]
    arrays = [np.array([edge]) for edge in edges]
    up, down = total(arrays), total(arrays[::-1])
    assert up.tobytes() == down.tobytes() == total(arrays, parts=7).tobytes()
    assert up[0] == 0.0


def test_more_elements_than_a_chunk_and_counters():
    numbers = np.arange(2 * CHUNK + 3).reshape(1, -1)
    found = total([numbers, numbers], [1.0, 0.5])
    np.testing.assert_array_equal(found, numbers * 1.5)
    assert total([np.zeros((0, 2))]).shape == (0, 2)
    assert total([np.array(-0.0)]) == 0.0


def test_what_would_overflow_is_refused():
    with pytest.raises(OverflowError, match=r"1e\+300"):
        total([np.array([1e300])])
