"""Learners on sentences and on windows of sensors: each runs, or is refused before the run.

The numbers are those of real clients over real sockets, bit for bit.
"""

import numpy as np
import pytest
from real_clients import run_real_clients

from fedknow.client.learners import learner_class, list_learners, resolve
from fedknow.client.permissions import Permissions
from fedknow.protocols.config import ConfigError, read_config
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_report")

CLIENTS, TASKS = 2, 2
BASE = {
    "data": {
        "clients": CLIENTS,
        "tasks": TASKS,
        "classes_per_task": 2,
        "classes_max": 2,
        "samples": 0.5,
        "test_samples": 0.5,
    },
    "train": {"rounds": 2, "epochs": 1, "batch_size": 8, "lr": 1e-2},
    # Real clients keep their heads at home unless told otherwise.
    "evaluation": {"global_model": True},
    "engine": {"backend": "inline"},
}
KINDS = {
    "sentences": ["model=transformer", "model.dim=8", "model.heads=2"],
    "windows": ["model=cnn1d", "model.channels=4", "model.hidden=8"],
}
REFUSED = {
    "agscl": "a chain of convolutions and linear layers",
    "fot": "nothing to learn but convolutions and linear layers",
    "fedprotip": "nothing to learn but convolutions and linear layers",
    "co2l": "works on samples of kind image",
    "target": "works on samples of kind image",
    "lander": "works on samples of kind image",
}
"""Learners that look into images, or into the layers of a plain network."""


@pytest.fixture(autouse=True)
def data_sets(monkeypatch, parts):
    """Find the module of data sets."""
    monkeypatch.syspath_prepend(parts)


def experiment(name, data, *changes):
    scenario = learner_class(name).scenarios[0]
    keys = [
        f"learner={name}",
        f"data.name=kinds_data:{data}",
        f"data.scenario={scenario}",
        *KINDS[data],
        *changes,
    ]
    keys.append(f"model.train={learner_class(name).model_train}")
    return resolve(read_config(BASE, keys))


@pytest.mark.parametrize("data", KINDS)
@pytest.mark.parametrize("name", list_learners())
def test_it_runs_or_is_refused_before(tmp_path, name, data):
    reason = REFUSED.get(name)
    if name == "bcn" and data == "sentences":
        reason = "works on samples of kind image or series"
    if reason is not None:
        with pytest.raises(ConfigError, match=reason):
            simulate(experiment(name, data), tmp_path / "run")
        return
    run = RunFolder.open(
        simulate(experiment(name, data), tmp_path / "run").folder
    )
    learned = np.triu(np.ones((TASKS, TASKS), bool))
    assert np.isfinite(run.accuracy()["personal"][:, learned]).all()
    events = run.events()
    kinds = {event["event"] for event in events}
    assert not kinds & {"failure", "warning"}
    costs = [event for event in events if event["event"] == "round"]
    assert all(event["loss"] is not None for event in costs)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("fedknow", "sentences"),
        ("flcn", "sentences"),
        ("er", "windows"),
        pytest.param("fedknow", "windows", marks=pytest.mark.slow),
        pytest.param("flcn", "windows", marks=pytest.mark.slow),
    ],
)
def test_real_clients_do_not_matter(tmp_path, numbers, name, data):
    permissions = Permissions(frozenset([f"kinds_data:{data}"]))
    expected = simulate(experiment(name, data), tmp_path / "inline").folder
    run_real_clients(
        experiment(name, data), tmp_path / "run", permissions=permissions
    )
    assert numbers(tmp_path / "run") == numbers(expected)


@pytest.mark.parametrize("data", KINDS)
def test_clients_at_once_learn_the_same(tmp_path, data):
    accuracies = []
    for vectorize in ("off", "on"):
        config = experiment("fedavg", data, f"engine.vectorize={vectorize}")
        run = simulate(config, tmp_path / vectorize)
        accuracies.append(RunFolder.open(run.folder).accuracy()["global"])
    np.testing.assert_allclose(*accuracies, atol=0.1)
