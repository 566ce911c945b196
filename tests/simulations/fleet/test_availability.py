import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedknow.protocols.config import ConfigError, FleetConfig
from fedknow.simulations.fleet.availability import (
    Always,
    Markov,
    Trace,
    make_presence,
)

TRACE = Trace([[(0.0, 2.0), (5.0, 10.0)], [(3.0, 4.0)]], 10.0)


def test_a_trace_by_hand():
    assert [TRACE.is_present(0, t) for t in (0, 1.9, 2, 4.9, 5, 9.9, 10, 12)] == [
        True,
        True,
        False,
        False,
        True,
        True,
        True,
        False,
    ]
    assert TRACE.completion(0, 1.0, 0.0) == 1.0
    assert TRACE.completion(0, 3.0, 0.0) == 5.0
    assert TRACE.completion(0, 1.0, 1.0) == 2.0
    assert TRACE.completion(0, 1.0, 8.0) == 12.0
    assert TRACE.completion(0, 1.0, 9.0) == 16.0
    assert TRACE.between(0, 1.0, 16.0) == 1 + 5 + 2 + 1
    assert [TRACE.until(0, t) for t in (0, 1, 2, 4, 6, 10, 11, 14, 26)] == [
        0,
        1,
        2,
        2,
        3,
        7,
        8,
        9,
        17,
    ]
    # A third client is the first recorded one again.
    assert TRACE.completion(2, 3.0, 0.0) == 5.0
    assert TRACE.completion(3, 0.0, 1.5) == 13.5


def test_always():
    assert Always().is_present(3, 1e9)
    assert Always().completion(0, 2.0, 3.0) == 5.0
    assert Always().between(0, 2.0, 3.5) == 1.5
    assert Always().until(0, 3.5) == 3.5


def test_markov_is_a_function_of_the_seed_and_there_as_often_as_it_should_be():
    one, other = Markov(1, 30.0, 10.0), Markov(1, 30.0, 10.0)
    times = [100.0, 5.0, 2000.0, 0.0]
    assert [one.completion(4, t, 50.0) for t in times] == [
        other.completion(4, t, 50.0) for t in reversed(times)
    ][::-1]
    share = (
        sum(one.between(client, 0.0, 10_000.0) for client in range(40)) / 400_000
    )
    assert share == pytest.approx(0.75, abs=0.01)
    assert sum(
        one.is_present(client, 0.0) for client in range(2000)
    ) / 2000 == pytest.approx(0.75, abs=0.03)


@given(st.integers(0, 5), st.floats(0, 500), st.floats(0, 500))
def test_who_has_been_there_so_long_was_there_so_long(client, time, seconds):
    for presence in (TRACE, Markov(7, 20.0, 5.0), Always()):
        end = presence.completion(client, time, seconds)
        assert end >= time + seconds - 1e-9
        assert presence.between(client, time, end) == pytest.approx(
            seconds, abs=1e-6
        )
        assert presence.until(client, end) == pytest.approx(
            presence.between(client, 0.0, end), abs=1e-6
        )


def test_files(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("client,start,end\nx,5,10\ny,3,4\nx,0,2\n")
    presence = make_presence(
        FleetConfig(devices=["infinite"], availability=str(path)), 0
    )
    assert [presence.completion(c, 1.0, 8.0) for c in (0, 2)] == [12.0, 12.0]
    for text, message in (
        ("client,start,end\nx,5,4\n", "line 2.*not 0 <= start < end"),
        ("client,start\nx,5\n", "line 2"),
        ("client,start,end\nx,0,5\nx,4,6\n", "client x overlap at 4"),
        ("client,start,end\n", "nobody"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            Trace.read(path)
    with pytest.raises(
        ConfigError, match=r"fleet\.availability.*cannot be read.*'markov'"
    ):
        Trace.read(tmp_path / "none.csv")
    assert math.isinf(Always().span(0, 0)[1])
