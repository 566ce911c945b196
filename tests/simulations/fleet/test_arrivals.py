"""Tasks that arrive in virtual time, on devices that take their time."""

import os

import numpy as np
import pytest
import tomli_w

from fedknow.client.node import Node
from fedknow.protocols.config import read_config
from fedknow.protocols.messages import END_TASK, TRAIN, client_of
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.task_times import TaskTimes
from fedknow.simulations.fleet.grid import FleetGrid
from fedknow.simulations.simulate import simulate

BASE = {
    "data": {"clients": 3, "tasks": 2, "classes_max": 2, "test_samples": 0.5},
    "train": {"rounds": 2, "epochs": 1, "batch_size": 8},
    "learner": {"name": "ewc"},
    "strategy": {"name": "fedavg"},
    "engine": {"backend": "inline"},
    "fleet": {
        "devices": {"jetson-tx2": 1, "jetson-nano": 2},
        "up": 1e5,
        "down": 1e5,
    },
}
"""A round takes about a second, and telling clients that a task is over half of one."""
INFINITE = ["fleet.devices=infinite", "fleet.up=0", "fleet.down=0"]
STAGGERED = [
    "data.arrival=staggered",
    "data.arrival_seconds=3",
    "data.arrival_lag=2",
    "train.rounds=20",
]
POISSON = [
    "data.arrival=poisson",
    "data.arrival_seconds=2",
    "train.rounds=20",
    "data.tasks=3",
]

MARKOV = [
    *POISSON,
    "fleet.availability=markov",
    "fleet.online=4",
    "fleet.offline=1",
    "data.arrival_seconds=4",
]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """No test here cuts the power, so nothing needs to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(
        "fedknow.server.run.checkpoint.sync_disk", lambda folder: None
    )


@pytest.fixture
def work(monkeypatch):
    """What clients are asked to do: kind, client, task and round (None where there is none)."""
    seen = []
    handle = Node.handle

    def watch(self, message, state):
        config = message.config()
        seen.append(
            (
                message.kind,
                client_of(message.node),
                config["task"],
                config.get("round"),
            )
        )
        return handle(self, message, state)

    monkeypatch.setattr(Node, "handle", watch)
    return seen


def run(out, *changes, observers=(), resume=False):
    return simulate(
        read_config(BASE, changes), out, resume, observers, report=False
    )


def events(out, kind):
    return [
        event for event in RunFolder.open(out).events() if event["event"] == kind
    ]


def assert_same(a, b):
    for name, array in a.arrays.items():
        np.testing.assert_array_equal(array, b.arrays[name])
    for name, array in a.accuracy.items():
        np.testing.assert_array_equal(array, b.accuracy[name])


def test_devices_that_take_no_time_have_all_their_rounds_and_wait(tmp_path):
    """Numbers equal those without time: a task comes when all rounds are done."""
    timed = run(tmp_path / "a", *INFINITE, "data.arrival_seconds=10")
    config = read_config(
        {name: value for name, value in BASE.items() if name != "fleet"}
    )
    assert_same(timed, simulate(config, tmp_path / "b", report=False))
    assert [
        event["virtual_seconds"] for event in events(tmp_path / "a", "round")
    ] == [
        0,
        0,
        10,
        10,
    ]
    assert [
        event["virtual_seconds"] for event in events(tmp_path / "a", "task_end")
    ] == [10, 20]


def test_staggered_clients_change_their_tasks_at_moments_of_their_own(
    tmp_path, work
):
    changes = [
        "data.arrival=staggered",
        "data.arrival_seconds=10",
        "data.arrival_lag=4",
    ]
    result = run(tmp_path / "run", *INFINITE, *changes)
    # Client 0 changes at 10, 1 at 12, 2 at 14, and the run ends at 24. Whenever a task has
    # arrived there are rounds until everybody has had two of its own.
    assert [
        event["virtual_seconds"] for event in events(tmp_path / "run", "round")
    ] == [0, 0, 10, 10, 12, 12, 14, 14]
    trained = [entry[1:] for entry in work if entry[0] == TRAIN]
    assert [sorted(trained[i : i + 3]) for i in range(0, len(trained), 3)] == [
        [(0, 0, 1), (1, 0, 1), (2, 0, 1)],
        [(0, 0, 2), (1, 0, 2), (2, 0, 2)],
        [(0, 1, 1), (1, 0, 3), (2, 0, 3)],
        [(0, 1, 2), (1, 0, 4), (2, 0, 4)],
        [(0, 1, 3), (1, 1, 1), (2, 0, 5)],
        [(0, 1, 4), (1, 1, 2), (2, 0, 6)],
        [(0, 1, 5), (1, 1, 3), (2, 1, 1)],
        [(0, 1, 6), (1, 1, 4), (2, 1, 2)],
    ]
    assert [entry[1:3] for entry in work if entry[0] == END_TASK] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (0, 1),
        (1, 1),
        (2, 1),
    ]
    assert [
        event["virtual_seconds"] for event in events(tmp_path / "run", "task_end")
    ] == [14, 24]
    assert np.isfinite(result.accuracy["personal"][:, 0, 0]).all()
    assert np.isfinite(result.accuracy["personal"][:, :, 1]).all()


@pytest.mark.parametrize("changes", [STAGGERED, POISSON, MARKOV])
def test_work_is_of_the_task_that_is_there_when_it_is_given_out(
    tmp_path, monkeypatch, changes
):
    given = []
    give_out = FleetGrid._give_out

    def watch(self, work, options):
        given.extend(
            (self.clock_time, client_of(message.node), message.config()["task"])
            for message in work
            if message.kind == TRAIN
        )
        give_out(self, work, options)

    monkeypatch.setattr(FleetGrid, "_give_out", watch)
    run(tmp_path / "run", *changes)
    ends = TaskTimes.plan(read_config(BASE, changes)).ends
    assert len(given) > 9
    assert [task for _, _, task in given] == [
        (ends[client] <= now).sum() for now, client, _ in given
    ]
    rounds, told = (
        events(tmp_path / "run", "round"),
        events(tmp_path / "run", "task_end"),
    )
    assert rounds[-1]["virtual_seconds"] <= told[-1]["virtual_seconds"]
    assert told[-1]["virtual_seconds"] >= ends.max()
    for task, end in enumerate(told):
        own = [event for event in rounds if event["task"] == task]
        assert [event["round"] for event in own] == list(range(1, len(own) + 1))
        assert all(
            event["virtual_seconds"] < end["virtual_seconds"] for event in own
        )
        assert end["virtual_seconds"] >= ends[:, task].max()


@pytest.mark.parametrize("learner", ["fedknow", "finetune", "fedweit"])
def test_tasks_that_are_over_before_a_round_is_are_ended_in_order(
    tmp_path, work, learner
):
    """A round takes longer than three tasks: clients train on the first, and the others end
    without a round."""
    changes = [f"learner={learner}", "data.arrival_seconds=0.2", "data.tasks=3"]
    result = run(tmp_path / "run", *changes)
    assert {entry[1:] for entry in work if entry[0] == TRAIN} == {
        (client, 0, 1) for client in range(3)
    }
    told = [entry[2] for entry in work if entry[0] == END_TASK and entry[1] == 1]
    assert told == ([] if learner == "finetune" else [0, 1, 2])
    assert [event["task"] for event in events(tmp_path / "run", "task_end")] == [
        0,
        1,
        2,
    ]
    known = np.isfinite(result.accuracy["personal"])
    assert (known == np.triu(np.ones((3, 3), bool))).all()


def test_no_two_pieces_of_work_of_a_client_share_a_seed(tmp_path, work):
    run(
        tmp_path / "run",
        *POISSON,
        "strategy.fraction=0.7",
        "fleet.dropout=0.3",
        "fleet.deadline=1.5",
    )
    trained = [entry for entry in work if entry[0] == TRAIN]
    assert len(set(trained)) == len(trained) > 6
    for client in range(3):
        tasks = [
            task
            for kind, who, task, _ in work
            if kind in (TRAIN, END_TASK) and who == client
        ]
        assert tasks == sorted(tasks)
        assert [
            task
            for kind, who, task, _ in work
            if kind == END_TASK and who == client
        ] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "after"),
    [(STAGGERED, 4), (POISSON, 3), (["data.arrival_seconds=4"], 2)],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    tmp_path, changes, after
):
    changes = [*changes, "fleet.compute_sigma=0.5", "fleet.jitter=0.1"]
    expected = run(tmp_path / "a", *changes)
    seen = []

    def stop(event):
        seen.append(event)
        if sum(event.event == "round" for event in seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", *changes, observers=[stop])
    assert_same(expected, run(tmp_path / "b", *changes, resume=True))
    times = [
        [
            (e["task"], e["round"], e["virtual_seconds"])
            for e in events(tmp_path / f, "round")
        ]
        for f in "ab"
    ]
    assert times[0] == times[1]
    assert len(times[0]) > after


@pytest.mark.parametrize(
    ("strategy", "engine"),
    [
        ([], ["engine.backend=ray", "engine.workers=1"]),
        (["strategy=fedbuff", "strategy.buffer=2"], ["engine.backend=inline"]),
    ],
)
def test_numbers_and_times_do_not_depend_on_workers(tmp_path, strategy, engine):
    changes = [
        *POISSON,
        *strategy,
        "fleet.compute_sigma=0.5",
        "fleet.dropout=0.2",
    ]
    a = run(tmp_path / "a", *changes, *engine)
    b = run(tmp_path / "b", *changes, "engine.backend=ray", "engine.workers=2")
    assert_same(a, b)
    times = [
        [event["virtual_seconds"] for event in events(tmp_path / folder, "round")]
        for folder in "ab"
    ]
    assert times[0] == times[1]


def test_time_goes_on_while_nobody_is_there(tmp_path, work):
    """All come at 12 s, when the first of two tasks of 10 s is over, and go for good at 18 s."""
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "client,start,end\n"
        + "".join(f"{client},12,18\n" for client in range(3)),
        "utf-8",
    )
    changes = [
        "data.arrival_seconds=10",
        "train.rounds=3",
        f"fleet.availability={trace}",
        "learner=finetune",
    ]
    result = run(tmp_path / "run", *INFINITE, *changes)
    assert {entry[2:] for entry in work if entry[0] == TRAIN} == {
        (1, 1),
        (1, 2),
        (1, 3),
    }
    assert [
        event["virtual_seconds"] for event in events(tmp_path / "run", "round")
    ] == [12, 12, 12]
    # Nobody has learned the first task, but all were scored on it: the model is the one that
    # the run began with.
    assert [
        event["virtual_seconds"] for event in events(tmp_path / "run", "task_end")
    ] == [10, 20]
    assert np.isfinite(result.accuracy["personal"][:, 0, 0]).all()


def test_a_device_that_is_too_small_keeps_nobody_else(tmp_path):
    """It fails in rounds, and when its task is over, which is put on record."""
    numbers = {
        "peak": 1e11,
        "efficiency": 1.0,
        "memory": 1e5,
        "reserved": 0.0,
        "busy": 1.0,
        "idle": 0.1,
    }
    small = {
        "about": "small",
        **numbers,
        "source": dict.fromkeys(numbers, "assumed"),
    }
    profiles = tmp_path / "small.toml"
    profiles.write_text(tomli_w.dumps({"small": small}), "utf-8")
    changes = [
        *STAGGERED,
        f"fleet.profiles={profiles}",
        "fleet.devices={jetson-tx2=2,small=1}",
    ]
    result = run(tmp_path / "run", *changes)
    assert {event["fault"] for event in events(tmp_path / "run", "failure")} == {
        "out_of_memory"
    }
    assert {event["client"] for event in events(tmp_path / "run", "failure")} == {
        2
    }
    assert np.isfinite(result.accuracy["personal"][:2, :, 1]).all()


def test_with_the_same_arrival_for_all_clients_are_scored_on_the_way(tmp_path):
    run(
        tmp_path / "run",
        *INFINITE,
        "data.arrival_seconds=10",
        "evaluation.every=1",
    )
    scored = [
        (event["task"], event["round"], event["virtual_seconds"])
        for event in events(tmp_path / "run", "evaluation")
    ]
    assert scored == [(0, 1, 0), (0, 2, 10), (1, 1, 10), (1, 2, 20)]


# --- clients that do not wait for each other
# ----------------------------------------------------------------------

ASYNCHRONOUS = [
    ["strategy=fedasync"],
    ["strategy=fedbuff", "strategy.buffer=2"],
    ["strategy=semisync", "strategy.deadline=0.8"],
]


@pytest.mark.parametrize(
    "strategy", [*ASYNCHRONOUS, ["strategy=fedbuff", "strategy.buffer=3"]]
)
def test_asynchronous_devices_that_take_no_time_have_all_their_rounds_and_wait(
    tmp_path, strategy
):
    timed = run(tmp_path / "a", *INFINITE, "data.arrival_seconds=10", *strategy)
    tree = {name: value for name, value in BASE.items() if name != "fleet"}
    assert_same(
        timed, simulate(read_config(tree, strategy), tmp_path / "b", report=False)
    )
    assert [
        event["virtual_seconds"] for event in events(tmp_path / "a", "round")
    ] == [
        0,
        0,
        10,
        10,
    ]


@pytest.mark.parametrize(
    "arrival",
    [
        STAGGERED,
        ["data.arrival=staggered", "data.arrival_lag=3", "train.rounds=4"],
    ],
)
def test_with_everybody_in_the_buffer_fedbuff_is_fedavg_whenever_tasks_arrive(
    tmp_path, arrival
):
    a = run(tmp_path / "a", *arrival, *INFINITE)
    b = run(
        tmp_path / "b",
        *arrival,
        *INFINITE,
        "strategy=fedbuff",
        "strategy.buffer=3",
    )
    assert_same(a, b)


@pytest.mark.parametrize("strategy", ASYNCHRONOUS)
@pytest.mark.parametrize(
    "arrival",
    [STAGGERED, POISSON, MARKOV, ["data.arrival_seconds=4", "train.rounds=30"]],
)
def test_who_is_at_work_ends_its_task_when_it_is_done(
    tmp_path, monkeypatch, strategy, arrival
):
    given, told, busy = [], [], set()
    push, pull, exchange = (
        FleetGrid._give_out,
        FleetGrid._take_in,
        FleetGrid.exchange,
    )

    def give(self, work, options):
        for message in work:
            if message.kind == TRAIN:
                given.append(
                    (
                        self.clock_time,
                        client_of(message.node),
                        *map(message.config().get, ("task", "round")),
                    )
                )
                busy.add(client_of(message.node))
        push(self, work, options)

    def take(self, reply, version, options):
        busy.discard(client_of(reply.node))
        return pull(self, reply, version, options)

    def ask(self, messages, options):
        assert busy.isdisjoint(client_of(message.node) for message in messages)
        told.extend(
            (self.clock_time, client_of(message.node), message.config()["task"])
            for message in messages
            if message.kind == END_TASK
        )
        return exchange(self, messages, options)

    monkeypatch.setattr(FleetGrid, "_give_out", give)
    monkeypatch.setattr(FleetGrid, "_take_in", take)
    monkeypatch.setattr(FleetGrid, "exchange", ask)
    result = run(tmp_path / "run", *strategy, *arrival)
    it = TaskTimes.plan(read_config(BASE, [*strategy, *arrival]))
    tasks = it.ends.shape[1]
    assert len(given) > 9
    for now, client, task, _ in given:
        assert task == min((it.ends[client] <= now).sum(), tasks - 1)
    assert len({entry[1:] for entry in given}) == len(given)
    for client in range(3):
        assert [task for _, who, task in told if who == client] == list(
            range(tasks)
        )
        assert all(
            now >= it.ends[client, task]
            for now, who, task in told
            if who == client
        )
        for task in {task for _, who, task, _ in given if who == client}:
            assert (
                min(
                    number
                    for _, who, at, number in given
                    if (who, at) == (client, task)
                )
                >= 1
            )
    known = np.isfinite(result.accuracy["personal"])
    assert (known == np.triu(np.ones((tasks, tasks), bool))).all()
    assert [
        event["task"] for event in events(tmp_path / "run", "task_end")
    ] == list(range(tasks))


def test_asynchronous_work_goes_on_while_others_change_their_tasks(tmp_path):
    """All clients are waited for only when a task is over for all of them."""
    run(
        tmp_path / "run",
        *STAGGERED,
        "strategy=fedbuff",
        "strategy.buffer=1",
        "learner=finetune",
    )
    late = [
        event["metrics"]["staleness-max"]
        for event in events(tmp_path / "run", "round")
        if event["task"] == 0
    ]
    times = [
        event["virtual_seconds"]
        for event in events(tmp_path / "run", "round")
        if event["task"] == 0
    ]
    across = [
        stale for stale, time in zip(late, times, strict=True) if 3 < time < 5
    ]
    assert max(across) >= 1


@pytest.mark.parametrize("strategy", ASYNCHRONOUS)
def test_a_stopped_asynchronous_run_goes_on_from_the_last_task(
    tmp_path, strategy
):
    changes = [*STAGGERED, *strategy, "fleet.compute_sigma=0.5"]
    expected = run(tmp_path / "a", *changes)
    seen = []

    def stop(event):
        seen.append(event.event)
        if "task_end" in seen and seen[-2:] == ["round", "round"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", *changes, observers=[stop])
    assert seen.count("task_end") == 1
    assert_same(expected, run(tmp_path / "b", *changes, resume=True))
    times = [
        [
            (e["task"], e["round"], e["virtual_seconds"])
            for e in events(tmp_path / f, "round")
        ]
        for f in "ab"
    ]
    assert times[0] == times[1]


def test_more_clients_can_be_asked_than_are_needed(tmp_path, work):
    """Those who are asked besides are at tasks of their own too."""
    run(
        tmp_path / "run",
        *STAGGERED,
        "strategy.fraction=0.6",
        "fleet.over_commit=1.5",
    )
    trained = [entry[1:] for entry in work if entry[0] == TRAIN]
    assert len(set(trained)) == len(trained)
    assert {entry[:2] for entry in trained} == {
        (client, task) for client in range(3) for task in range(2)
    }
