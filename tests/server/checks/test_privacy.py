"""Privacy is refused where it could not hold what it promises."""

import pytest
from flwr.serverapp.strategy import FedAvg

from fedknow.protocols.config import ConfigError, read_config
from fedknow.server.assemble import Clients, assemble
from fedknow.server.checks.privacy import check_privacy


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
        (
            "learner=afcl model.train=head",
            "learner afcl sends arrays beside the parameters, to which no noise is added",
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


SECURE = ["privacy.secure=true", "model.train=head", "learner=stsa"]


def test_sums_in_closed_form_are_taken():
    assemble(read_config({}, SECURE), Clients.VIRTUAL)
    assemble(read_config({}, [*SECURE, "learner=afcl"]), Clients.VIRTUAL)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["learner.light=true"],
            "that are no sums, so they would be in the clear; set learner.light = false, choose",
        ),
        (
            ["learner=fot", "model.train=all"],
            "learner fot sends arrays beside the parameters that are no sums",
        ),
        (
            ["fleet.devices=infinite", "fleet.over_commit=1.5"],
            "fleet.over_commit = 1.5 asks clients that have agreed on no masks",
        ),
    ],
)
def test_what_has_no_sums_is_refused(changes, said):
    with pytest.raises(ConfigError) as caught:
        assemble(read_config({}, [*SECURE, *changes]), Clients.VIRTUAL)
    assert said in str(caught.value)


def test_a_strategy_must_take_sums():
    parts = assemble(read_config({}, SECURE), Clients.VIRTUAL)
    check_privacy(parts.config, parts.strategy, parts.learner)
    with pytest.raises(ConfigError, match="does not take the sums of learner"):
        check_privacy(parts.config, FedAvg(), parts.learner)
