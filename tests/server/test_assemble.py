"""An experiment has three ways in; each builds its parts once and refuses the same alike."""

import json

import pytest

from fedknow.client.learners import (
    build_learner,
    keeps_parameters,
    learner_class,
    list_learners,
    resolve,
)
from fedknow.protocols.config import ConfigError, read_config
from fedknow.server import assemble as module
from fedknow.server.assemble import Clients, assemble
from fedknow.server.flower_app import run_on_flower
from fedknow.server.serve import serve
from fedknow.simulations.simulate import simulate

BASE = {
    "data.clients": 3,
    "data.tasks": 2,
    "data.classes_max": 2,
    "learner.name": "fedavg",
    "model.name": "mlp",
    "strategy.name": "fedavg",
    "train.rounds": 1,
    "engine.backend": "inline",
}
RUNNING_MEAN = {"engine.running_mean": True}
STAGGERED = {"data.arrival": "staggered", "data.arrival_lag": 1}
REFUSED = [
    ({"data.name": "nothere"}, "nothere"),
    ({"learner.name": "fedavgg"}, "did you mean 'fedavg'"),
    ({"model.name": "mlpp"}, "did you mean 'mlp'"),
    ({"strategy.name": "fedadm"}, "did you mean 'fedadam'"),
    ({"strategy.min_train_nodes": 50}, "50"),
    ({"strategy.fractoin": 0.5}, "fractoin"),
    (
        {**RUNNING_MEAN, "strategy.name": "fedmedian"},
        "engine.running_mean = true",
    ),
    ({**RUNNING_MEAN, "learner.name": "fedweit"}, "engine.running_mean = true"),
    (
        {**STAGGERED, "learner.name": "fedweit", "strategy.name": "fedweit"},
        "data.arrival = 'staggered'",
    ),
    ({**STAGGERED, "evaluation.every": 1}, "evaluation.every = 1"),
    (
        {"model.name": "resnet18", "train.batch_size": 1},
        "train.batch_size = 1",
    ),
]


def experiment(changes):
    """The configuration of these flat keys."""
    sets = [
        f"{key}={json.dumps(value)}" for key, value in {**BASE, **changes}.items()
    ]
    return read_config({}, sets)


def by_simulation(changes, out):
    simulate(experiment(changes), out)


def by_server(changes, out):
    serve(experiment(changes), out, "127.0.0.1:0")


def by_flower(changes, out):
    run_on_flower(None, {**BASE, **changes, "out": str(out)})


DOORS = [by_simulation, by_server, by_flower]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_all_ways_in_refuse_alike_and_leave_no_folder(tmp_path, changes, words):
    texts = set()
    for enter in DOORS:
        with pytest.raises(ConfigError) as refusal:
            enter(changes, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        texts.add(str(refusal.value))
    assert len(texts) == 1
    assert words in texts.pop()


@pytest.mark.parametrize("enter", [by_server, by_flower])
def test_clients_that_are_devices_have_no_fleet(tmp_path, enter):
    with pytest.raises(ConfigError, match="a fleet is for fedknow simulate"):
        enter({"fleet.devices": "phone-low"}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_builds_its_strategy_and_its_learner_once(tmp_path, monkeypatch):
    built = []

    def counting(name):
        build = getattr(module, name)

        def count(*arguments):
            built.append(name)
            return build(*arguments)

        monkeypatch.setattr(module, name, count)

    counting("build_strategy")
    counting("build_learner")
    simulate(
        experiment({"fleet.devices": "phone-low"}), tmp_path / "run", report=False
    )
    assert sorted(built) == ["build_learner", "build_strategy"]


def test_parts_have_the_complete_configuration():
    parts = assemble(experiment({}), Clients.VIRTUAL)
    assert parts.stream is not None
    assert parts.partition["digest"] == parts.stream.partition.summary()["digest"]


def test_the_server_knows_nothing_of_data_that_clients_bring():
    changes = {"data.name": "local", "data.shape": [1, 8, 8], "data.classes": 4}
    parts = assemble(experiment(changes), Clients.REAL)
    assert parts.stream is None
    assert parts.partition == {}
    assert sum(tensor.numel() for tensor in parts.learner.send().values()) > 0


@pytest.mark.parametrize("clients", [Clients.REAL, Clients.FLOWER])
def test_heads_stay_at_home_unless_the_user_says_otherwise(clients):
    def is_scored(**changes):
        parts = assemble(experiment(changes), clients)
        return parts.config.evaluation.global_model

    assert not is_scored(**{"learner.name": "fedrep"})
    # Where all of it travels anyway, scoring costs nothing.
    assert is_scored(**{"learner.name": "fedavg"})
    setting = {"evaluation.global_model": True}
    assert is_scored(**{"learner.name": "fedrep", **setting})


def test_simulations_score_the_global_model():
    parts = assemble(experiment({"learner.name": "fedrep"}), Clients.VIRTUAL)
    assert parts.config.evaluation.global_model


@pytest.mark.parametrize("name", list_learners())
def test_who_keeps_parameters_is_known_without_a_model(name):
    config = experiment({"learner.name": name, "model.name": "cnn"})
    kind = learner_class(name)
    changes = [f"data.scenario={kind.scenarios[0]}"]
    # "all" is the default, which another default of the learner's may replace.
    if kind.model_train != "all":
        changes.append(f"model.train={kind.model_train}")
    config = resolve(read_config(config.model_dump(), changes))
    learner = build_learner(config, (1, 8, 8), 10)
    assert keeps_parameters(config) == bool(learner.local_parameters())
