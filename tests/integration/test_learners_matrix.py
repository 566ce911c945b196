"""What every learner must do, whoever wrote it: a learner is in here as soon as it has a name.

Each runs a small experiment undisturbed in one process, where one learner object serves all
clients. It comes to the same numbers, bit for bit, with states that are read back from
safetensors before each message and a run that is interrupted twice; and with real clients over
real sockets, each of which has a learner object of its own, so that what leaks from one client
to the next shows.
"""

import functools

import numpy as np
import pytest
from real_clients import run_real_clients

from fedknow.client.learners import learner_class, list_learners, resolve
from fedknow.client.state import StateStore
from fedknow.protocols.config import read_config
from fedknow.server.run.folder import RunFolder
from fedknow.simulations import simulate as simulations
from fedknow.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_report")

CLIENTS, TASKS, ROUNDS = 3, 3, 2
BASE = {
    "data": {
        "clients": CLIENTS,
        "tasks": TASKS,
        "classes_per_task": 2,
        "classes_max": 2,
        "test_samples": 0.5,
    },
    "model": {"name": "cnn"},
    "train": {"rounds": ROUNDS, "epochs": 2, "batch_size": 16, "lr": 1e-3},
    "strategy": {
        "name": "fedavg",
        "fraction": 0.5,
    },  # one of the three: some are never chosen in a task
    # Real clients keep their heads at home unless told otherwise.
    "evaluation": {"global_model": True},
    "engine": {"backend": "inline"},
}
MATRIX = [
    (name, scenario)
    for name in list_learners()
    for scenario in learner_class(name).scenarios
    if scenario != "domain-incremental"  # test_streams.py runs all of them in it
]
FIRST = [(name, learner_class(name).scenarios[0]) for name in list_learners()]
# Those train generators, for minutes.
GENERATIVE = ("target", "lander")
# How good their images are is no question here.
LITTLE_EFFORT = (
    "learner.samples=64",
    "learner.generator_steps=8",
    "learner.student_steps=4",
)


def slow_unless(are_short):
    """Mark all pairs slow but those that the condition names."""
    return [
        pair if are_short(pair) else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in MATRIX
    ]


EACH = slow_unless(lambda pair: pair in FIRST or pair[0] not in GENERATIVE)
LONG = slow_unless(lambda pair: pair in FIRST and pair[0] != "lander")


def experiment(name, scenario, *changes):
    keys = [f"learner={name}", f"data.scenario={scenario}", *changes]
    if name in GENERATIVE:
        keys += LITTLE_EFFORT
    trained = learner_class(name).model_train
    keys.append(f"model.train={trained}")
    # What the server mixes of a round goes to those who train again in the task.
    if name == "loci":
        keys.append("strategy.fraction=1")
    # Adapters begin as nothing, and B alone is trained in the first round.
    if trained == "lora":
        keys.append("train.lr=0.01")
    return resolve(read_config(BASE, keys))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The folder of a learner's undisturbed run."""

    @functools.cache
    def of(name, scenario):
        return simulate(
            experiment(name, scenario), tmp_path_factory.mktemp("matrix") / "run"
        ).folder

    return of


def interrupt(kind, task):
    """An observer that interrupts at a task's first event of a kind."""
    left = [True]

    def observe(event):
        if event.event == kind and event.task == task and left:
            left.clear()
            raise KeyboardInterrupt

    return observe


@pytest.mark.parametrize(("name", "scenario"), EACH)
def test_it_runs_and_is_scored_both_ways(expected, name, scenario):
    run = RunFolder.open(expected(name, scenario))
    events, accuracy = run.events(), run.accuracy()
    learned = np.triu(np.ones((TASKS, TASKS), bool))  # seen by trained
    for scoring in ("personal", "global"):
        assert np.isfinite(accuracy[scoring][:, learned]).all()
        assert np.isnan(accuracy[scoring][:, ~learned]).all()
        # The bound in one place may be right everywhere, from the first task on.
        if name != "joint-central":
            assert len(np.unique(accuracy[scoring][:, learned])) > 1
    rounds = [event for event in events if event["event"] == "round"]
    assert len(rounds) == TASKS * ROUNDS
    assert all(event["loss"] is not None for event in rounds)
    assert not [
        event for event in events if event["event"] in ("failure", "warning")
    ]
    kept = [
        event["knowledge_bytes"]
        for event in events
        if event["event"] == "task_end"
    ]
    assert kept == sorted(
        kept
    )  # what is known of past tasks does not become less
    # A client that was just trained on two classes tells them apart better than a coin does.
    assert np.diagonal(accuracy["personal"], axis1=1, axis2=2).max() > 0.5


@pytest.mark.parametrize(("name", "scenario"), LONG)
def test_interrupts_and_states_read_back_do_not_matter(
    expected, tmp_path, numbers, monkeypatch, name, scenario
):
    monkeypatch.setattr(
        simulations,
        "open_states",
        lambda folder, memory, durable: StateStore(folder, 0, durable),
    )
    config = experiment(name, scenario)
    for kind, task, resume in (("task_end", 0, False), ("round", 1, True)):
        with pytest.raises(KeyboardInterrupt):
            simulate(config, tmp_path / "run", resume, [interrupt(kind, task)])
    simulate(config, tmp_path / "run", resume=True)
    assert numbers(tmp_path / "run") == numbers(expected(name, scenario))


@pytest.mark.parametrize(("name", "scenario"), LONG)
def test_real_clients_do_not_matter(expected, tmp_path, numbers, name, scenario):
    run_real_clients(experiment(name, scenario), tmp_path / "run")
    assert numbers(tmp_path / "run") == numbers(expected(name, scenario))
