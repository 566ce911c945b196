"""Tasks that arrive at each client at rounds of its own."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedknow.protocols.config import ConfigError, read_config
from fedknow.server.arrivals import Arrivals
from fedknow.server.run_folder import RunFolder
from fedknow.simulations.simulate import simulate

BASE = {
    "data": {"clients": 3, "tasks": 2, "classes_max": 2, "test_samples": 0.5},
    "train": {"rounds": 2, "epochs": 1, "batch_size": 8},
    "learner": {"name": "ewc"},
    "strategy": {"name": "fedavg"},
    "engine": {"backend": "inline"},
}
STAGGERED = ["data.arrival=staggered", "data.arrival_lag=2"]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """No test here cuts the power, so nothing needs to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("fedknow.server.checkpoint.sync_disk", lambda folder: None)


def schedule(*changes):
    return Arrivals.of(read_config(BASE, changes))


def test_staggered_clients_are_evenly_behind():
    it = schedule(*STAGGERED)
    assert it.starts.tolist() == [[0, 2], [0, 3], [0, 4]]
    assert it.rounds == 6
    assert [it.rounds_of(task) for task in (0, 1)] == [2, 4]
    assert [it.position(1, done) for done in range(6)] == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert [it.leaving(done) for done in range(1, 7)] == [{}, {0: [0]}, {0: [1]}, {0: [2]}, {}, {1: [0, 1, 2]}]
    assert [it.over(0, done) for done in (3, 4)] == [False, True]
    assert [it.over(1, done) for done in (5, 6)] == [False, True]


def test_poisson_arrivals_have_the_rate_that_was_asked_for():
    it = schedule("data.arrival=poisson", "data.clients=200", "data.tasks=10", "train.rounds=20")
    gaps = np.diff(it.starts, axis=1)
    assert gaps.min() >= 1
    # exponential of mean 20, rounded up: 1 / (1 - exp(-1 / 20)), give or take 5 %
    assert gaps.mean() == pytest.approx(1 / (1 - np.exp(-1 / 20)), rel=0.05)
    assert gaps.std() == pytest.approx(20, rel=0.1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_every_client_ends_each_of_its_tasks_once_and_in_order(clients, tasks, rounds, seed):
    sizes = [f"data.clients={clients}", f"data.tasks={tasks}", f"train.rounds={rounds}", f"seed={seed}"]
    it = schedule("data.arrival=poisson", *sizes)
    ended = {client: [] for client in range(clients)}
    for done in range(1, it.rounds + 1):
        for task, those in it.leaving(done).items():
            for client in those:
                ended[client].append(task)
    assert all(order == list(range(tasks)) for order in ended.values())
    assert sum(it.rounds_of(task) for task in range(tasks)) == it.rounds


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.arrival=staggered"], "data.arrival_lag = 0 with data.arrival = 'staggered'"),
        (["data.arrival_lag=3"], "data.arrival_lag = 3 with data.arrival = 'same'"),
        ([*STAGGERED, "strategy=fedasync"], "strategy fedasync has a loop of its own"),
        ([*STAGGERED, "learner=fot"], "strategy fot gathers what clients send"),
        ([*STAGGERED, "evaluation.every=1"], "evaluation.every = 1"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        simulate(read_config(BASE, changes), tmp_path / "run", report=False)
    assert not (tmp_path / "run").exists()


def run(out, *changes, observers=(), resume=False):
    return simulate(read_config(BASE, [*STAGGERED, *changes]), out, resume, observers, report=False)


def test_clients_are_scored_when_a_task_of_their_own_is_over(tmp_path):
    result = run(tmp_path / "run")
    events = RunFolder.open(tmp_path / "run").events()
    assert [event["server_round"] for event in events if event["event"] == "round"] == [1, 2, 3, 4, 5, 6]
    # All have ended their first task after the fourth round, and the second after the sixth.
    kinds = [event["event"] for event in events[1:-1]]
    told = ["evaluation", "task_end"]
    assert kinds == ["round"] * 4 + told + ["round"] * 2 + told
    assert [event["task"] for event in events if event["event"] == "evaluation"] == [0, 1]
    accuracy = result.accuracy["personal"]
    assert np.isfinite(accuracy[:, 0, 0]).all()
    assert np.isfinite(accuracy[:, :, 1]).all()
    assert np.isnan(accuracy[:, 1, 0]).all()
    traffic = events[-1]["traffic"]
    assert traffic["train"]["messages"] == 6 * 3
    assert traffic["train.end_task"]["messages"] == traffic["evaluate"]["messages"] == 2 * 3
    assert events[-1]["accuracy_global"] is None


def test_a_client_alone_does_not_notice_that_it_is_staggered(tmp_path):
    """What travels nowhere depends on the client alone: client 0, which nobody keeps waiting, trains as ever."""
    alone = ["learner=local"]
    ours = run(tmp_path / "a", *alone).accuracy["personal"]
    same = simulate(read_config(BASE, alone), tmp_path / "b", report=False).accuracy["personal"]
    assert ours[0, 0, 0] == same[0, 0, 0]


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path):
    expected = run(tmp_path / "a")
    seen = []

    def stop(event):
        seen.append(event)
        if len(seen) == 4:  # start and three rounds: one client is at its second task
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", observers=[stop])
    result = run(tmp_path / "b", resume=True)
    for name, array in expected.accuracy.items():
        np.testing.assert_array_equal(array, result.accuracy[name])
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(array, result.arrays[name])
