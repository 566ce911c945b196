import math

import pytest

from fedknow.protocols.bounds import check_between
from fedknow.protocols.config import ConfigError


@pytest.mark.parametrize("value", [0, 1, 0.5])
def test_numbers_within_the_bounds_are_taken_both_bounds_included(value):
    check_between("--x", value, 0, 1)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -1, 2, 10**400, 1.0000001]
)
def test_all_others_are_refused_with_the_bounds(value):
    with pytest.raises(
        ConfigError,
        match=r"^--x .*: must be a (whole )?number from 0 to 1; do this$",
    ):
        check_between("--x", value, 0, 1, "do this")
