"""Tasks that arrive at each client at rounds of its own."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from fedknow.client.data import make_benchmark
from fedknow.client.learners import build_learner, resolve
from fedknow.protocols.config import ConfigError, read_config
from fedknow.server.grids.inline import InlineGrid
from fedknow.server.run.experiment import Experiment
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.parts import Parts
from fedknow.server.run.task_times import TaskTimes, has_task_times
from fedknow.server.serve import serve
from fedknow.simulations.simulate import simulate
from fedknow.strategies import build_strategy

BASE = {
    "data": {"clients": 3, "tasks": 2, "classes_max": 2, "test_samples": 0.5},
    "train": {"rounds": 2, "epochs": 1, "batch_size": 8},
    "learner": {"name": "ewc"},
    "strategy": {"name": "fedavg"},
    "engine": {"backend": "inline"},
}
STAGGERED = ["data.arrival=staggered", "data.arrival_lag=2"]
FLEET = ["fleet=infinite"]
TIMED = [*FLEET, "data.arrival_seconds=10"]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """No test here cuts the power, so nothing needs to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(
        "fedknow.server.run.checkpoint.sync_disk", lambda folder: None
    )


class OwnLoop(FedAvg):
    """A strategy of a user's that knows nothing of tasks."""

    def start(self, *args, **kwargs):
        return super().start(*args, **kwargs)


def schedule(*changes):
    return TaskTimes.plan(read_config(BASE, changes))


def walk(it):
    """Who leaves which task at which moment, told at each moment at which somebody does; the
    server does no rounds."""
    found = []
    while not it.is_over:
        moment = it.next_moment()
        while leaving := it.leaving(moment):
            for task, clients in leaving.items():
                found.append((moment, task, clients))
                it.leave(clients, 0)
    return found


def test_staggered_clients_are_evenly_behind():
    it = schedule(*STAGGERED)
    assert it.ends.tolist() == [[2, 6], [3, 6], [4, 6]]
    assert walk(it) == [(2, 0, [0]), (3, 0, [1]), (4, 0, [2]), (6, 1, [0, 1, 2])]


def test_a_client_counts_rounds_from_where_its_task_began():
    it = schedule(*STAGGERED)
    places = []
    for done in range(6):
        for clients in it.leaving(done).values():
            it.leave(clients, done)
        places.append((it.position(1), it.task))
        it.steps += 1
    assert places == [
        ((0, 1), 0),
        ((0, 2), 0),
        ((0, 3), 0),
        ((1, 1), 0),
        ((1, 2), 1),
        ((1, 3), 1),
    ]
    assert not it.is_idle(100)  # in rounds nobody waits


def test_tasks_at_all_clients_in_rounds_need_no_schedule():
    assert not has_task_times(read_config(BASE))
    assert has_task_times(read_config(BASE, STAGGERED))
    assert has_task_times(read_config(BASE, TIMED))


def test_schedules_in_virtual_seconds():
    same = schedule(*TIMED)
    assert same.ends.tolist() == [[10, 20]] * 3
    assert walk(same) == [(10, 0, [0, 1, 2]), (20, 1, [0, 1, 2])]
    staggered = schedule(*TIMED, "data.arrival=staggered", "data.arrival_lag=25")
    assert staggered.ends.tolist() == [[10, 45], [22.5, 45], [35, 45]]
    assert walk(staggered) == [
        (10, 0, [0]),
        (22.5, 0, [1]),
        (35, 0, [2]),
        (45, 1, [0, 1, 2]),
    ]


def test_the_server_waits_when_everybody_has_had_its_rounds():
    it = schedule(*TIMED, "data.arrival=staggered", "data.arrival_lag=5")
    assert [it.is_idle(done) for done in range(4)] == [False, False, True, True]
    it.leave([0], 2)
    assert [it.is_idle(done) for done in range(2, 5)] == [False, False, True]
    assert it.span(2) == (2, 15)
    assert it.span(3) == (1, 15)


def test_who_is_late_meets_all_tasks_in_order():
    it = schedule(*TIMED, "data.tasks=4")
    it.leave([0], 1)
    assert it.leaving(30) == {0: [1, 2], 1: [0]}
    assert it.task == 0
    assert it.next_moment() == 10


@pytest.mark.parametrize(
    "unit", [[], ["data.arrival_seconds=20", "fleet=infinite"]]
)
def test_poisson_arrivals_have_the_rate_that_was_asked_for(unit):
    it = schedule(
        "data.arrival=poisson",
        "data.clients=200",
        "data.tasks=10",
        "train.rounds=20",
        *unit,
    )
    gaps = np.diff(it.ends[:, :-1], axis=1)
    # exponential of mean 20; in rounds rounded up: 1 / (1 - exp(-1 / 20)), give or take 5 %
    assert gaps.mean() == pytest.approx(
        20 if unit else 1 / (1 - np.exp(-1 / 20)), rel=0.05
    )
    assert gaps.std() == pytest.approx(20, rel=0.1)
    assert gaps.min() > 0 if unit else gaps.min() >= 1
    assert (it.ends[:, -1] == it.ends.max()).all()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 1000),
    st.floats(0, 9),
    st.booleans(),
)
def test_every_client_ends_each_of_its_tasks_once_and_in_order(
    clients, tasks, rounds, seed, pace, seconds
):
    """However far apart the moments are at which the server looks."""
    unit = [f"data.arrival_seconds={rounds}", "fleet=infinite"] if seconds else []
    sizes = [
        f"data.clients={clients}",
        f"data.tasks={tasks}",
        f"train.rounds={rounds}",
        f"seed={seed}",
    ]
    it = schedule("data.arrival=poisson", *sizes, *unit)
    ended = {client: [] for client in range(clients)}
    moment = 0.0
    while not it.is_over:
        moment = max(moment + pace, it.next_moment())
        while leaving := it.leaving(moment):
            for task, those in leaving.items():
                for client in those:
                    assert it.ends[client, task] <= moment
                    ended[client].append(task)
                it.leave(those, 0)
    assert all(order == list(range(tasks)) for order in ended.values())


def test_a_restored_schedule_goes_on_where_it_was():
    it, again = schedule(*STAGGERED), schedule(*STAGGERED)
    it.steps = 7
    it.leave([0, 2], 3)
    it.steps = 9
    again.restore(it.state())
    assert [again.position(client) for client in range(3)] == [
        (1, 3),
        (0, 10),
        (1, 3),
    ]
    assert again.task == 0
    assert again.span(3) == (1, np.inf)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["data.arrival=staggered"],
            "data.arrival_lag = 0 with data.arrival = 'staggered'",
        ),
        (
            ["data.arrival_lag=3"],
            "data.arrival_lag = 3 with data.arrival = 'same'",
        ),
        (
            ["data.arrival=staggered", "data.arrival_lag=2.5"],
            "data.arrival_lag = 2.5: rounds are counted in whole",
        ),
        (
            ["data.arrival_seconds=10"],
            "data.arrival_seconds = 10: only a fleet has virtual time",
        ),
        (["data.arrival_seconds=-1"], "data.arrival_seconds = -1"),
        (
            [*STAGGERED, "strategy=own_loop:OwnLoop"],
            "strategy own_loop:OwnLoop has a loop of its own",
        ),
        ([*STAGGERED, "learner=fot"], "strategy fot gathers what clients send"),
        ([*STAGGERED, "evaluation.every=1"], "evaluation.every = 1"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path, monkeypatch, changes, words
):
    monkeypatch.setitem(sys.modules, "own_loop", SimpleNamespace(OwnLoop=OwnLoop))
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        simulate(read_config(BASE, changes), tmp_path / "run", report=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([*TIMED], "fleet.devices: real clients are devices themselves"),
        (
            [*STAGGERED, "strategy=fedbuff", "strategy.buffer=2"],
            "strategy fedbuff has clients at work when others are to end a task",
        ),
    ],
)
def test_what_real_clients_cannot_do_is_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        serve(read_config(BASE, changes), tmp_path / "run", "127.0.0.1:0")
    assert not (tmp_path / "run").exists()


def test_times_need_a_grid_that_has_time(tmp_path):
    """Flower's own grid, for example, which knows of no fleet."""
    config = resolve(read_config(BASE, TIMED))
    benchmark = make_benchmark(config)
    learner = build_learner(config, benchmark.shape, benchmark.classes)
    parts = Parts(config, learner, build_strategy(config.strategy))
    with (
        RunFolder.create(tmp_path / "run", config) as folder,
        InlineGrid(3, SimpleNamespace()) as grid,
        pytest.raises(
            ConfigError,
            match=r"data\.arrival_seconds = 10: real clients have no virtual time",
        ),
    ):
        Experiment(parts, grid, folder)


def run(out, *changes, observers=(), resume=False):
    return simulate(
        read_config(BASE, [*STAGGERED, *changes]),
        out,
        resume,
        observers,
        report=False,
    )


def test_clients_are_scored_when_a_task_of_their_own_is_over(tmp_path):
    result = run(tmp_path / "run")
    events = RunFolder.open(tmp_path / "run").events()
    assert [
        event["server_round"] for event in events if event["event"] == "round"
    ] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    # All have ended their first task after the fourth round, and the second after the sixth.
    # The server is at the task of whoever is furthest behind.
    assert [(e["task"], e["round"]) for e in events if e["event"] == "round"] == [
        (0, n) for n in range(1, 5)
    ] + [
        (1, 1),
        (1, 2),
    ]
    kinds = [event["event"] for event in events[1:-1]]
    told = ["evaluation", "task_end"]
    assert kinds == ["round"] * 4 + told + ["round"] * 2 + told
    assert [
        event["task"] for event in events if event["event"] == "evaluation"
    ] == [
        0,
        1,
    ]
    accuracy = result.accuracy["personal"]
    assert np.isfinite(accuracy[:, 0, 0]).all()
    assert np.isfinite(accuracy[:, :, 1]).all()
    assert np.isnan(accuracy[:, 1, 0]).all()
    traffic = events[-1]["traffic"]
    assert traffic["train"]["messages"] == 6 * 3
    assert (
        traffic["train.end_task"]["messages"]
        == traffic["evaluate"]["messages"]
        == 2 * 3
    )
    assert events[-1]["accuracy_global"] is None


def test_a_client_alone_does_not_notice_that_it_is_staggered(tmp_path):
    """What travels nowhere depends on the client alone: client 0, which nobody keeps waiting,
    trains as ever."""
    alone = ["learner=local"]
    ours = run(tmp_path / "a", *alone).accuracy["personal"]
    same = simulate(
        read_config(BASE, alone), tmp_path / "b", report=False
    ).accuracy["personal"]
    assert ours[0, 0, 0] == same[0, 0, 0]


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path):
    expected = run(tmp_path / "a")
    seen = []

    def stop(event):
        seen.append(event)
        if (
            len(seen) == 4
        ):  # start and three rounds: one client is at its second task
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", observers=[stop])
    result = run(tmp_path / "b", resume=True)
    for name, array in expected.accuracy.items():
        np.testing.assert_array_equal(array, result.accuracy[name])
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(array, result.arrays[name])


def test_asynchronous_strategies_count_the_same_rounds(tmp_path):
    expected = run(tmp_path / "a")
    result = run(tmp_path / "b", "strategy=fedbuff", "strategy.buffer=3")
    for name, array in expected.accuracy.items():
        np.testing.assert_array_equal(array, result.accuracy[name])
    rounds = [
        [e["task"], e["round"]]
        for e in RunFolder.open(tmp_path / "b").events()
        if e["event"] == "round"
    ]
    assert rounds == [[0, 1], [0, 2], [0, 3], [0, 4], [1, 1], [1, 2]]
