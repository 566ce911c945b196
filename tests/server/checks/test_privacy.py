"""Noise on clients is refused where it could not hold what it promises."""

import pytest

from fedknow.protocols.config import ConfigError, read_config
from fedknow.server.assemble import Clients, assemble


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("strategy=fedbuff", "strategy fedbuff asks clients whenever"),
        ("strategy=fedasync", "strategy fedasync asks clients whenever"),
        ("attack=signflip learner=fedavg", "attack.name = 'signflip'"),
        ("engine.running_mean=true learner=fedavg", "engine.running_mean = True"),
        ("learner=fedper", "evaluation.global_model = true"),
        (
            "learner=fedweit strategy=fedweit",
            "privacy.clip = 1: learner fedweit sends",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    changes = ["privacy.clip=1", "privacy.noise=1", *change.split()]
    with pytest.raises(ConfigError) as caught:
        assemble(read_config({}, changes), Clients.VIRTUAL)
    assert said in str(caught.value)


def test_nodes_of_flowers_are_refused():
    config = read_config({}, ["privacy.clip=1"])
    with pytest.raises(ConfigError, match="that the server knows"):
        assemble(config, Clients.FLOWER)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["privacy.noise=1"], "set privacy.clip"),
        (["privacy.clip=1", "privacy.noise=0.001"], "protects nobody"),
        (["privacy.clip=1", "privacy.delta=0.1"], "without privacy.noise"),
    ],
)
def test_settings_that_do_nothing_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        read_config({}, changes)
