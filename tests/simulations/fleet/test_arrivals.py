"""Tasks that arrive in virtual time, on devices that take their time."""

import os

import numpy as np
import pytest
import tomli_w

from fedknow.client.node import Node
from fedknow.protocols.config import read_config
from fedknow.protocols.messages import END_TASK, TRAIN, client_of
from fedknow.server.arrivals import Arrivals
from fedknow.server.run_folder import RunFolder
from fedknow.simulations.fleet.grid import FleetGrid
from fedknow.simulations.simulate import simulate

BASE = {
    "data": {"clients": 3, "tasks": 2, "classes_max": 2, "test_samples": 0.5},
    "train": {"rounds": 2, "epochs": 1, "batch_size": 8},
    "learner": {"name": "ewc"},
    "strategy": {"name": "fedavg"},
    "engine": {"backend": "inline"},
    "fleet": {"devices": {"jetson-tx2": 1, "jetson-nano": 2}, "up": 1e5, "down": 1e5},
}
"""A round takes about a second, and telling clients that a task is over half of one."""
INFINITE = ["fleet.devices=infinite", "fleet.up=0", "fleet.down=0"]
STAGGERED = ["data.arrival=staggered", "data.arrival_seconds=3", "data.arrival_lag=2", "train.rounds=20"]
POISSON = ["data.arrival=poisson", "data.arrival_seconds=2", "train.rounds=20", "data.tasks=3"]

MARKOV = [*POISSON, "fleet.availability=markov", "fleet.online=4", "fleet.offline=1", "data.arrival_seconds=4"]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """No test here cuts the power, so nothing needs to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("fedknow.server.checkpoint.sync_disk", lambda folder: None)


@pytest.fixture
def work(monkeypatch):
    """What clients are asked to do: kind, client, task and round (None where there is none)."""
    seen = []
    handle = Node.handle

    def watch(self, message, state):
        config = message.config()
        seen.append((message.kind, client_of(message.node), config["task"], config.get("round")))
        return handle(self, message, state)

    monkeypatch.setattr(Node, "handle", watch)
    return seen


def run(out, *changes, observers=(), resume=False):
    return simulate(read_config(BASE, changes), out, resume, observers, report=False)


def events(out, kind):
    return [event for event in RunFolder.open(out).events() if event["event"] == kind]


def assert_same(a, b):
    for name, array in a.arrays.items():
        np.testing.assert_array_equal(array, b.arrays[name])
    for name, array in a.accuracy.items():
        np.testing.assert_array_equal(array, b.accuracy[name])


def test_devices_that_take_no_time_have_all_their_rounds_and_wait(tmp_path):
    """The same numbers as without time: the next task comes when all rounds of the last are done."""
    timed = run(tmp_path / "a", *INFINITE, "data.arrival_seconds=10")
    config = read_config({name: value for name, value in BASE.items() if name != "fleet"})
    assert_same(timed, simulate(config, tmp_path / "b", report=False))
    assert [event["virtual_seconds"] for event in events(tmp_path / "a", "round")] == [0, 0, 10, 10]
    assert [event["virtual_seconds"] for event in events(tmp_path / "a", "task_end")] == [10, 20]


def test_staggered_clients_change_their_tasks_at_moments_of_their_own(tmp_path, work):
    changes = ["data.arrival=staggered", "data.arrival_seconds=10", "data.arrival_lag=4"]
    result = run(tmp_path / "run", *INFINITE, *changes)
    # Client 0 changes at 10, 1 at 12, 2 at 14, and the run ends at 24. Whenever a task has arrived there are rounds
    # until everybody has had two of its own.
    assert [event["virtual_seconds"] for event in events(tmp_path / "run", "round")] == [0, 0, 10, 10, 12, 12, 14, 14]
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
    assert [entry[1:3] for entry in work if entry[0] == END_TASK] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert [event["virtual_seconds"] for event in events(tmp_path / "run", "task_end")] == [14, 24]
    assert np.isfinite(result.accuracy["personal"][:, 0, 0]).all()
    assert np.isfinite(result.accuracy["personal"][:, :, 1]).all()


@pytest.mark.parametrize("changes", [STAGGERED, POISSON, MARKOV])
def test_work_is_of_the_task_that_is_there_when_it_is_given_out(tmp_path, monkeypatch, changes):
    given = []
    send = FleetGrid.send_and_receive

    def watch(self, messages, *, timeout=None):
        messages = list(messages)
        given.extend(
            (self.now, client_of(message.metadata.dst_node_id), message.content["config"]["task"])
            for message in messages
        )
        return send(self, messages, timeout=timeout)

    monkeypatch.setattr(FleetGrid, "send_and_receive", watch)
    run(tmp_path / "run", *changes)
    ends = Arrivals.of(read_config(BASE, changes)).ends
    assert len(given) > 9
    assert [task for _, _, task in given] == [(ends[client] <= now).sum() for now, client, _ in given]
    rounds, told = events(tmp_path / "run", "round"), events(tmp_path / "run", "task_end")
    assert rounds[-1]["virtual_seconds"] <= told[-1]["virtual_seconds"]
    assert told[-1]["virtual_seconds"] >= ends.max()
    for task, end in enumerate(told):
        own = [event for event in rounds if event["task"] == task]
        assert [event["round"] for event in own] == list(range(1, len(own) + 1))
        assert all(event["virtual_seconds"] < end["virtual_seconds"] for event in own)
        assert end["virtual_seconds"] >= ends[:, task].max()


@pytest.mark.parametrize("learner", ["fedknow", "finetune", "fedweit"])
def test_tasks_that_are_over_before_a_round_is_are_ended_in_order(tmp_path, work, learner):
    """A round takes longer than three tasks: clients train on the first, and the others end without a round."""
    changes = [f"learner={learner}", "data.arrival_seconds=0.2", "data.tasks=3"]
    result = run(tmp_path / "run", *changes)
    assert {entry[1:] for entry in work if entry[0] == TRAIN} == {(client, 0, 1) for client in range(3)}
    told = [entry[2] for entry in work if entry[0] == END_TASK and entry[1] == 1]
    assert told == ([] if learner == "finetune" else [0, 1, 2])
    assert [event["task"] for event in events(tmp_path / "run", "task_end")] == [0, 1, 2]
    known = np.isfinite(result.accuracy["personal"])
    assert (known == np.triu(np.ones((3, 3), bool))).all()


def test_no_two_pieces_of_work_of_a_client_share_a_seed(tmp_path, work):
    run(tmp_path / "run", *POISSON, "strategy.fraction=0.7", "fleet.dropout=0.3", "fleet.deadline=1.5")
    trained = [entry for entry in work if entry[0] == TRAIN]
    assert len(set(trained)) == len(trained) > 6
    for client in range(3):
        tasks = [task for kind, who, task, _ in work if kind in (TRAIN, END_TASK) and who == client]
        assert tasks == sorted(tasks)
        assert [task for kind, who, task, _ in work if kind == END_TASK and who == client] == [0, 1, 2]


@pytest.mark.parametrize(("changes", "after"), [(STAGGERED, 4), (POISSON, 3), (["data.arrival_seconds=4"], 2)])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path, changes, after):
    changes = [*changes, "fleet.compute_sigma=0.5", "fleet.jitter=0.1"]
    expected = run(tmp_path / "a", *changes)
    seen = []

    def stop(event):
        seen.append(event)
        if sum(event["event"] == "round" for event in seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", *changes, observers=[stop])
    assert_same(expected, run(tmp_path / "b", *changes, resume=True))
    times = [[(e["task"], e["round"], e["virtual_seconds"]) for e in events(tmp_path / f, "round")] for f in "ab"]
    assert times[0] == times[1]
    assert len(times[0]) > after


def test_numbers_and_times_do_not_depend_on_workers(tmp_path):
    changes = [*POISSON, "fleet.compute_sigma=0.5", "fleet.dropout=0.2"]
    a = run(tmp_path / "a", *changes, "engine.backend=ray", "engine.workers=1")
    b = run(tmp_path / "b", *changes, "engine.backend=ray", "engine.workers=2")
    assert_same(a, b)
    times = [[event["virtual_seconds"] for event in events(tmp_path / folder, "round")] for folder in "ab"]
    assert times[0] == times[1]


def test_time_goes_on_while_nobody_is_there(tmp_path, work):
    """All come at 12 s, when the first of two tasks of 10 s is over, and go for good at 18 s."""
    trace = tmp_path / "trace.csv"
    trace.write_text("client,start,end\n" + "".join(f"{client},12,18\n" for client in range(3)), "utf-8")
    changes = ["data.arrival_seconds=10", "train.rounds=3", f"fleet.availability={trace}", "learner=finetune"]
    result = run(tmp_path / "run", *INFINITE, *changes)
    assert {entry[2:] for entry in work if entry[0] == TRAIN} == {(1, 1), (1, 2), (1, 3)}
    assert [event["virtual_seconds"] for event in events(tmp_path / "run", "round")] == [12, 12, 12]
    # Nobody has learned the first task, but all were scored on it: the model is the one that the run began with.
    assert [event["virtual_seconds"] for event in events(tmp_path / "run", "task_end")] == [10, 20]
    assert np.isfinite(result.accuracy["personal"][:, 0, 0]).all()


def test_a_device_that_is_too_small_keeps_nobody_else(tmp_path):
    """It fails in rounds, and when its task is over, which is put on record."""
    numbers = {"peak": 1e11, "efficiency": 1.0, "memory": 1e5, "reserved": 0.0, "busy": 1.0, "idle": 0.1}
    small = {"about": "small", **numbers, "source": dict.fromkeys(numbers, "assumed")}
    profiles = tmp_path / "small.toml"
    profiles.write_text(tomli_w.dumps({"small": small}), "utf-8")
    changes = [*STAGGERED, f"fleet.profiles={profiles}", "fleet.devices={jetson-tx2=2,small=1}"]
    result = run(tmp_path / "run", *changes)
    assert {event["fault"] for event in events(tmp_path / "run", "failure")} == {"out_of_memory"}
    assert {event["client"] for event in events(tmp_path / "run", "failure")} == {2}
    assert np.isfinite(result.accuracy["personal"][:2, :, 1]).all()


def test_with_the_same_arrival_for_all_clients_are_scored_on_the_way(tmp_path):
    run(tmp_path / "run", *INFINITE, "data.arrival_seconds=10", "evaluation.every=1")
    scored = [
        (event["task"], event["round"], event["virtual_seconds"]) for event in events(tmp_path / "run", "evaluation")
    ]
    assert scored == [(0, 1, 0), (0, 2, 10), (1, 1, 10), (1, 2, 20)]
