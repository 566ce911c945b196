"""Streams whose boundaries nobody tells, through whole runs."""

import numpy as np
import pytest
from real_clients import run_real_clients

from fedknow.client.learners import resolve
from fedknow.protocols.config import ConfigError, read_config
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_report")

CLIENTS, TASKS = 2, 3
BASE = {
    "data": {
        "clients": CLIENTS,
        "tasks": TASKS,
        "partition": "iid",
        "scenario": "domain-incremental",
        "domain": "permutation",
        "classes_per_task": 0,
    },
    "model": {"name": "mlp"},
    "train": {"rounds": 3, "epochs": 2, "batch_size": 16, "lr": 2e-2},
    "engine": {"backend": "inline"},
    # Real clients keep their heads at home unless this is asked for.
    "evaluation": {"global_model": True},
}
HIDDEN = "data.boundaries=hidden"


def experiment(*changes):
    return resolve(read_config(BASE, changes))


def run(path, *changes):
    return RunFolder.open(simulate(experiment(*changes), path).folder)


def found(folder):
    return [event for event in folder.events() if event["event"] == "boundary"]


@pytest.mark.parametrize("learner", ["ewc", "fedknow"])
def test_found_at_once_it_is_as_if_told(tmp_path, learner):
    """Each client finds each boundary in a task's first round, and no other.

    Learners then do what they do when they are told, with the same seeds.
    """
    hidden = run(tmp_path / "hidden", f"learner={learner}", HIDDEN)
    places = [(b["client"], b["task"], b["round"]) for b in found(hidden)]
    assert sorted(places) == [
        (client, task, 1) for client in range(CLIENTS) for task in (1, 2)
    ]
    assert all(0 < boundary["delay"] <= 100 for boundary in found(hidden))
    told = run(tmp_path / "told", f"learner={learner}")
    for scoring in ("personal", "global"):
        np.testing.assert_array_equal(
            hidden.accuracy()[scoring], told.accuracy()[scoring]
        )
    kinds = {event["event"] for event in hidden.events()}
    assert not kinds & {"failure", "warning"}


def test_without_a_change_nothing_is_found(tmp_path):
    # Tasks whose samples are of one distribution: there is no boundary to be found.
    same = ["data.domain=labels", "data.domain_alpha=1e6", "learner=ewc"]
    assert found(run(tmp_path / "run", HIDDEN, *same)) == []


def test_blurred_boundaries_are_found_too(tmp_path):
    blurred = run(tmp_path / "run", HIDDEN, "data.blur=0.2", "learner=ewc")
    places = {(b["client"], b["task"]) for b in found(blurred)}
    assert places == {(c, t) for c in range(CLIENTS) for t in (1, 2)}


@pytest.mark.slow
def test_workers_find_the_same(tmp_path, numbers):
    changes = ["learner=fedknow", HIDDEN, "data.blur=0.2"]
    expected = run(tmp_path / "inline", *changes)
    on_ray = ["engine.backend=ray", "engine.workers=2"]
    run(tmp_path / "ray", *changes, *on_ray)
    assert numbers(tmp_path / "ray") == numbers(expected.path)


def test_real_clients_find_the_same(tmp_path, numbers):
    changes = ["learner=ewc", HIDDEN, "data.tasks=2", "train.rounds=2"]
    expected = run(tmp_path / "inline", *changes)
    run_real_clients(experiment(*changes), tmp_path / "real")
    assert numbers(tmp_path / "real") == numbers(expected.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.scenario=task-incremental", "data.domain="], "sees every bound"),
        (["learner=flcn"], "choose another learner"),
        (["engine.vectorize=on"], "engine.vectorize = 'auto' or 'off'"),
        (["engine.running_mean=true"], "engine.running_mean = false"),
    ],
)
def test_what_needs_to_be_told_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", HIDDEN, *changes)


def test_the_rate_does_nothing_where_boundaries_are_told():
    with pytest.raises(ConfigError, match=r"data\.boundaries = 'hidden'"):
        experiment("data.false_alarms=0.01")
