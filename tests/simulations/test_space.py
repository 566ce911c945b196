"""Ranges of settings, as they are written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedknow.protocols.config import ConfigError
from fedknow.simulations.space import Choice, Integers, Reals, read_space

READ = {
    "log:1e-4..1e-1": Reals(1e-4, 1e-1, is_log=True),
    "log:1e-4..1e-1/4": Reals(1e-4, 1e-1, is_log=True, points=4),
    "uniform:-1..0.5": Reals(-1.0, 0.5),
    "int:1..5": Integers(1, 5),
    "choice:sgd,adam": Choice(("sgd", "adam")),
    "1,2.5,true,x": Choice((1, 2.5, True, "x")),
}


@pytest.mark.parametrize("text", READ)
def test_a_range_is_read(text):
    assert read_space([f"a.b={text}"]) == {"a.b": READ[text]}
    assert read_space({"a.b": text}) == {"a.b": READ[text]}


def test_a_mapping_may_have_lists():
    assert read_space({"a": [1, "x"]}) == {"a": Choice((1, "x"))}


REFUSED = {
    "log:0..1": "begins above 0",
    "log:1..nan": "larger|finite",
    "uniform:2..1": "from a smaller to a larger",
    "uniform:0..inf": "must be finite",
    "uniform:0..1/1": "two points or more",
    "int:1..5/3": "leave /N out",
    "int:1.5..3": "not both numbers",
    "int:1": "is no range",
    "choice:a": "a single value",
    "choice:a,": "an empty value",
    "a,a": "a value twice",
    "lgo:1..2": "is no range; write log:",
    "7": "is no range",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_range_is_refused_by_its_key(text):
    with pytest.raises(ConfigError, match=f"^train.lr = .*({REFUSED[text]})"):
        read_space([f"train.lr={text}"])


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (["train.lr"], "write KEY=RANGE"),
        (["a=1,2", "a=2,3"], "searched twice"),
        (["seed=int:0..3"], "seed: cannot be searched"),
        (["engine.workers=int:1..3"], "cannot be searched"),
        ([], "nothing to search"),
        ({"a": 3}, "must be a range as text"),
        ({"a": [1, None]}, "must be text, a number"),
    ],
)
def test_what_cannot_be_searched_is_refused(over, words):
    with pytest.raises(ConfigError, match=words):
        read_space(over)


def test_a_grid_of_equal_ratios():
    [lr] = read_space(["train.lr=log:1e-4..1e-1/4"]).values()
    assert lr.grid == [1e-4, 1e-3, 1e-2, 1e-1]
    [share] = read_space(["a=uniform:0..1/5"]).values()
    assert share.grid == [0.0, 0.25, 0.5, 0.75, 1.0]


@given(
    low=st.floats(1e-6, 1.0), factor=st.floats(1.5, 1e6), points=st.integers(2, 9)
)
def test_a_grid_stays_within_its_ends(low, factor, points):
    grid = Reals(low, low * factor, is_log=True, points=points).grid
    assert len(grid) == points
    assert grid == sorted(grid)
    assert grid[0] == pytest.approx(low, rel=1e-5)
    assert grid[-1] == pytest.approx(low * factor, rel=1e-5)
