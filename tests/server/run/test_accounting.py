"""Epsilon against an independent accountant and numbers worked out by hand."""

import math

import pytest

from fedknow.server.run.accounting import delta_of, epsilon_of


@pytest.mark.parametrize(
    ("noise", "rounds", "delta", "epsilon"),
    [
        (1, 1, 1e-5, 9.997256),
        (2, 1, 1e-5, 4.377178),
        (4, 10, 1e-5, 7.511276),
        (8, 100, 1e-6, 14.450777),
        (20, 30, 1e-5, 2.207059),
    ],
)
def test_epsilon_is_that_of_googles_accountant(noise, rounds, delta, epsilon):
    """dp-accounting 0.6.0: `PLDAccountant().compose(GaussianDpEvent(noise / 2), rounds)`."""
    assert epsilon_of(noise, rounds, delta) == pytest.approx(epsilon, rel=1e-4)


def test_delta_at_epsilon_zero_is_the_distance_of_two_gaussians():
    # 2 Phi(1/2) - 1
    assert delta_of(0.0, 1.0) == pytest.approx(0.3829249225)


def test_no_release_and_much_noise_tell_nothing():
    assert epsilon_of(1.0, 0, 1e-5) == 0
    assert epsilon_of(1e6, 1, 1e-5) == 0


@pytest.mark.parametrize("noise", [0.01, 0.5, 1e3])
def test_epsilon_gives_delta_back(noise):
    epsilon = epsilon_of(noise, 7, 1e-5)
    mu = 2 * math.sqrt(7) / noise
    assert math.isfinite(epsilon)
    assert delta_of(epsilon, mu) == pytest.approx(1e-5, rel=1e-3)
