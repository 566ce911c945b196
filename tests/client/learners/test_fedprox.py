"""FedProx: its mu reaches the strategy, and from there the clients (the term itself: test_learners.py)."""

import pytest

from fedknow.client.learners import resolve
from fedknow.protocols.config import ConfigError, read_config
from fedknow.strategies import build_strategy


def test_mu_reaches_the_strategy():
    config = read_config({}, ["learner=fedprox", "learner.proximal_mu=0.5", "strategy.fraction=0.25"])
    resolved = resolve(config)
    assert resolved.strategy.model_dump() == {"name": "fedprox", "fraction": 0.25, "proximal_mu": 0.5}
    assert resolve(resolved) == resolved
    strategy = build_strategy(resolved.strategy)
    assert (strategy.proximal_mu, strategy.fraction_train) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["strategy=fedadam"], ["strategy.name = 'fedadam'", "learner.name = 'fedprox'", "leave strategy.name out"]),
        (["strategy=fedprox", "strategy.proximal_mu=2"], ["strategy.proximal_mu = 2", "learner.proximal_mu = 0.01"]),
    ],
)
def test_what_contradicts_is_refused(changes, words):
    with pytest.raises(ConfigError) as error:
        resolve(read_config({}, ["learner=fedprox", *changes]))
    assert all(word in str(error.value) for word in words)
