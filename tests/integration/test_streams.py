"""Each kind of stream, through whole runs: every learner, and every way to reach clients."""

import functools
from pathlib import Path

import numpy as np
import pytest
from real_clients import run_real_clients

from fedknow.client.data import Column, Dataset, load_dataset, make_benchmark
from fedknow.client.learners import learner_class, list_learners, resolve
from fedknow.client.permissions import Permissions
from fedknow.protocols.config import ConfigError, DataConfig, read_config
from fedknow.server.assemble import Clients, assemble
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_report")

CLIENTS, TASKS = 3, 4
BASE = {
    "data": {"clients": CLIENTS, "tasks": TASKS, "partition": "iid"},
    "model": {"name": "mlp"},
    "train": {"rounds": 1, "batch_size": 32, "lr": 1e-2},
    # Real clients keep their heads at home unless told otherwise.
    "evaluation": {"global_model": True},
    "engine": {"backend": "inline"},
}
STREAMS = {
    "rotation": [
        "data.scenario=domain-incremental",
        "data.domain=rotation",
        "data.repeats=2",
        "data.blur=0.2",
    ],
    "fewer tasks": ["data.scenario=class-incremental", "data.tasks_min=2"],
    "people": [
        "data.name=test_streams:drawers",
        "data.partition=natural",
        "data.client_column=drawer",
        "data.scenario=class-incremental",
        "data.labelled=0.5",
    ],
}
DOMAIN_LEARNERS = [
    name
    for name in list_learners()
    if "domain-incremental" in learner_class(name).scenarios
]


def drawers(config):
    """Give digits with a drawer for each sample, of whom one drew no 0."""
    digits = load_dataset(DataConfig())
    values = []
    for y in (digits.train_y, digits.test_y):
        drawer = np.arange(len(y)) % 7
        drawer[(y == 0) & (drawer == 3)] = 4
        values.append(drawer)
    return Dataset.from_arrays(
        "drawn digits",
        digits.train_x,
        digits.train_y,
        digits.test_x,
        digits.test_y,
        columns={"drawer": Column.from_values(*values)},
    )


def experiment(*changes):
    return resolve(read_config(BASE, changes))


@functools.cache
def _config(name):
    return experiment("learner=ewc", *STREAMS[name])


@pytest.mark.parametrize("name", ["rotation", "people"])
def test_real_clients_come_to_the_same_numbers(
    tmp_path, numbers, monkeypatch, name
):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = _config(name)
    simulate(config, tmp_path / "inline")
    permissions = Permissions(frozenset({config.data.name}))
    run_real_clients(config, tmp_path / "grpc", permissions=permissions)
    assert numbers(tmp_path / "inline") == numbers(tmp_path / "grpc")


@pytest.mark.parametrize("learner", DOMAIN_LEARNERS)
def test_each_learner_meets_new_domains(tmp_path, learner):
    config = experiment(
        f"learner={learner}",
        "data.scenario=domain-incremental",
        "data.domain=permutation",
        "data.tasks=2",
        "data.clients=2",
        f"model.train={learner_class(learner).model_train}",
    )
    simulate(config, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    accuracy = run.accuracy()["personal"]
    assert np.isfinite(accuracy[:, np.triu(np.ones((2, 2), bool))]).all()
    kinds = {event["event"] for event in run.events()}
    assert not kinds & {"failure", "warning"}


def test_clients_are_scored_on_the_tasks_they_have(tmp_path):
    simulate(_config("fewer tasks"), tmp_path / "run")
    accuracy = RunFolder.open(tmp_path / "run").accuracy()["personal"]
    # Tasks of the three clients: 4, 3 and 2; each is scored to the end of the run.
    for client, count in enumerate((4, 3, 2)):
        measured = np.isfinite(accuracy[client])
        assert measured[:count, -1].all()
        assert not measured[count:].any()


def test_a_client_ends_its_last_task_with_the_run(tmp_path):
    simulate(_config("fewer tasks"), tmp_path / "run")
    ended = [
        event["samples"]
        for event in RunFolder.open(tmp_path / "run").events()
        if event["event"] == "task_end"
    ]
    stream = make_benchmark(_config("fewer tasks"))

    def total(pairs):
        return sum(stream.train_size(*pair) for pair in pairs)

    # EWC passes once over the samples of a task that ends: at the third client's second task
    # only the first two clients end theirs.
    assert ended == [
        total([(0, 0), (1, 0), (2, 0)]),
        total([(0, 1), (1, 1)]),
        total([(0, 2)]),
        total([(0, 3), (1, 2), (2, 1)]),
    ]


def test_a_gathering_server_refuses_clients_of_fewer_tasks():
    config = experiment("learner=fedweit", "data.tasks_min=2")
    with pytest.raises(ConfigError, match=r"client 2 has 2 of data\.tasks = 4"):
        assemble(config, Clients.VIRTUAL)
