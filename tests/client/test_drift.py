"""The drift test: few false alarms on any distribution, and quick alarms after a change."""

import numpy as np
import pytest

from fedknow.client.drift import MOST_LOSSES, DriftTest, _bet

ROUND = 100
DISTRIBUTIONS = {
    "exponential": lambda rng: rng.exponential(1.0, ROUND),
    "heavy": lambda rng: rng.pareto(1.1, ROUND),
    "two values": lambda rng: rng.integers(0, 2, ROUND).astype(float),
}


def test_a_bet_is_fair() -> None:
    grid = (np.arange(100_000) + 0.5) / 100_000
    assert np.mean([_bet(p) for p in grid.tolist()]) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_false_alarms_are_as_rare_as_stated(name) -> None:
    rng = np.random.default_rng(1)
    streams, rounds, rate = 60, 8, 2e-4
    alarms = 0
    for _ in range(streams):
        test = DriftTest(rate)
        found = [test.find(DISTRIBUTIONS[name](rng)) for _ in range(rounds)]
        alarms += any(found)
    # The bound: 16 % of streams of 800 losses.
    assert alarms <= rate * rounds * ROUND * streams


@pytest.mark.parametrize(("before", "most"), [(60, 25), (256, 15)])
def test_a_change_is_found_soon(before, most) -> None:
    rng = np.random.default_rng(2)
    delays = []
    for _ in range(50):
        test = DriftTest(1e-4)
        assert test.find(rng.exponential(0.3, before)) is None
        delays.append(test.find(0.5 + rng.exponential(1.0, ROUND)))
    assert None not in delays
    assert np.quantile(delays, 0.9) <= most


def test_twice_the_loss_is_found_in_a_round() -> None:
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(50):
        test = DriftTest(1e-4)
        test.find(rng.exponential(0.3, MOST_LOSSES))
        found += test.find(rng.exponential(0.6, MOST_LOSSES)) is not None
    assert found >= 47


def test_losses_that_fall_are_no_drift_and_do_not_hide_one() -> None:
    rng = np.random.default_rng(3)
    test = DriftTest(1e-4)
    # A model that learns: each round's losses are lower than those of the round before.
    for level in (2.3, 1.5, 1.0, 0.6, 0.4):
        assert test.find(level * rng.exponential(1.0, MOST_LOSSES)) is None
    # Lower than in the first round, and higher than now.
    assert test.find(1.5 * rng.exponential(1.0, MOST_LOSSES)) <= 60


def test_what_is_kept_is_bounded_and_new_after_an_alarm() -> None:
    rng = np.random.default_rng(4)
    test = DriftTest(1e-4)
    for _ in range(5):
        test.find(rng.random(ROUND))
    assert len(test.losses) == MOST_LOSSES
    assert test.find(5 + rng.random(ROUND)) is not None
    assert len(test.losses) == ROUND
    assert test.find(5 + rng.random(ROUND)) is None
