"""The loop on the in-process grid, with clients whose answers are simple arithmetic, and at the
end with real ones."""

import errno
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.result import Result

from fedknow.client.data import make_benchmark
from fedknow.client.host import Host
from fedknow.client.learners import resolve
from fedknow.client.state import StateStore
from fedknow.protocols.config import ConfigError, read_config
from fedknow.protocols.messages import (
    END_TASK,
    EVALUATE,
    KEPT,
    TRAIN,
    Arrays,
    Metrics,
    client_of,
)
from fedknow.server.assemble import Clients, assemble
from fedknow.server.grids.inline import InlineGrid
from fedknow.server.reports.summary import summarise
from fedknow.server.run.experiment import Experiment, RunError
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.parts import Parts
from fedknow.strategies import build_strategy

CLIENTS, TASKS, ROUNDS = 4, 2, 3


class FakeLearner:
    ends_task = True
    sparse = False
    entries = SimpleNamespace(frozen_digest="")

    def send(self):
        return {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor(0.5)}

    def shares(self, ended):
        return {}


class FakeNode:
    """Client c trains by halving and adding c + count / 8, where ``count`` is how often it has
    trained (its state)."""

    def __init__(self, config, personal=True):
        self.config = config
        self.personal = personal
        self.seen = []
        # (client, task, round) -> function of the reply's arrays and metrics; with scoring,
        # of its metrics.
        self.spoil = {}

    def handle(self, message, state):
        client, config = client_of(message.node), message.config()
        self.seen.append((message.kind, client, dict(config)))
        if message.kind == TRAIN:
            count = state.get("count", 0) + 1
            arrays = Arrays(
                (
                    k,
                    np.asarray(
                        v * np.float32(0.5) + np.float32(client + count / 8)
                    ),
                )
                for k, v in message.arrays().items()
            )
            metrics = Metrics(
                {
                    "num-examples": client + 1,
                    "loss": float(count),
                    "accuracy": 0.25 * client,
                }
            )
            spoil = self.spoil.get((client, config["task"], config["round"]))
            if spoil is not None:
                try:
                    spoil(arrays, metrics)
                except ValueError as error:
                    return message.fail(2, f"ValueError: {error}"), state
            return message.reply({"arrays": arrays, "metrics": metrics}), {
                "count": count
            }
        if message.kind == END_TASK:
            report = Metrics(
                {"num-examples": 1, "knowledge-bytes": 100.0 * (client + 1)}
            )
            return message.reply({"metrics": report}), {
                **state,
                "ended": config["task"],
            }
        assert message.kind == EVALUATE
        last = (
            self.config.data.tasks
            if config.get("forward")
            else config["task"] + 1
        )
        total = [10 * (client + 1)] * last
        # right answers tell which task was trained, which is scored, and what the global head was
        bonus = (
            int(message.content[KEPT]["h"][0])
            if config.get("scoring") == "global"
            else client
        )
        correct = [config["task"] + task + bonus for task in range(last)]
        metrics = Metrics(
            {
                "num-examples": sum(total),
                "accuracy": 0.5,
                "loss": 1.0,
                "correct": correct,
                "total": total,
            }
        )
        if config.get("scoring"):
            metrics["losses"] = [1.0] * last
            spoil = self.spoil.get((client, config["task"], config["scoring"]))
            if spoil is not None:
                spoil(metrics)
        content = {"metrics": metrics}
        if config.get("collect"):
            head = np.array([client], np.float32)
            content[KEPT] = Arrays(h=head) if self.personal else Arrays()
        return message.reply(content), state


class Rig:
    """One experiment in a folder, which can be run, stopped and gone on with."""

    def __init__(self, path, *overrides, personal=True):
        base = {
            "data": {"clients": CLIENTS, "tasks": TASKS},
            "train": {"rounds": ROUNDS},
            "strategy": {"name": "fedavg"},
            "engine": {"backend": "inline"},
        }
        self.config = read_config(base, overrides)
        self.path = path
        self.personal = personal
        self.spoil = {}
        self.partition = {"digest": "abc"}

    def run(self, *observers, resume=False, strategy=None):
        opened = RunFolder.resume if resume else RunFolder.create
        with opened(self.path, self.config) as folder:
            self.node = FakeNode(self.config, self.personal)
            self.node.spoil = self.spoil
            store = StateStore(folder.clients, 2**20)
            with InlineGrid(
                self.config.data.clients,
                Host(self.config, None, store, self.node),
            ) as self.grid:
                strategy = strategy or build_strategy(
                    self.config.strategy, self.config.data.clients
                )
                parts = Parts(
                    self.config, FakeLearner(), strategy, self.partition
                )
                return Experiment(parts, self.grid, folder, observers).run()

    @property
    def events(self):
        return RunFolder.open(self.path).events()


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """No test here cuts the power, so nothing needs to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(
        "fedknow.server.run.checkpoint.sync_disk", lambda folder: None
    )


@pytest.fixture
def rig(tmp_path):
    return lambda *overrides, **options: Rig(
        tmp_path / "run", *overrides, **options
    )


def kinds(events):
    return [event["event"] for event in events]


def stop_at(place):
    """An observer that interrupts at the n-th event."""
    seen = []

    def observe(event):
        seen.append(event)
        if len(seen) == place:
            raise KeyboardInterrupt

    return observe


# --- the loop
# --------------------------------------------------------------------------------------


def test_events_come_in_order_and_go_to_observers_too(rig):
    seen = []
    run = rig()
    run.run(lambda event: seen.append(event.line()))
    task = ["round"] * 3 + ["evaluation", "task_end"]
    assert kinds(run.events) == ["start", *task, *task, "end"]
    assert seen == run.events
    start = run.events[0]
    assert (start["clients"], start["tasks"], start["rounds"]) == (4, 2, 3)
    assert (start["travelling"], start["bytes"], start["partition"]) == (
        3,
        12,
        "abc",
    )
    assert start["resumed_from"] is None
    assert start["versions"]["torch"] == torch.__version__
    assert start["versions"].keys() == {
        "fedknow",
        "flwr",
        "torch",
        "ray",
        "numpy",
        "python",
    }
    rounds = [event for event in run.events if event["event"] == "round"]
    assert [(e["task"], e["round"], e["server_round"]) for e in rounds] == [
        (0, 1, 1), (0, 2, 2), (0, 3, 3), (1, 1, 4), (1, 2, 5), (1, 3, 6),
    ]  # fmt: skip
    assert {event["clients"] for event in rounds} == {4}
    # client c has c + 1 samples: (0 * 1 + .25 * 2 + .5 * 3 + .75 * 4) / 10
    assert rounds[0]["accuracy"] == pytest.approx(0.5)
    assert rounds[0]["metrics"] == {
        "loss": pytest.approx(1.0),
        "accuracy": pytest.approx(0.5),
    }
    assert rounds[4]["loss"] == pytest.approx(5.0)
    assert all(event["peak_memory_mb"] > 10 for event in rounds)
    ends = [event for event in run.events if event["event"] == "task_end"]
    assert [event["knowledge_bytes"] for event in ends] == [250.0, 250.0]
    told = [
        (
            event["server_bytes"],
            event["client_memory_bytes"],
            event["samples"],
            event["flops"],
        )
        for event in ends
    ]
    assert told == [(0, None, None, None)] * 2  # these clients count no costs


def test_what_clients_needed(rig, monkeypatch):
    """Most memory so far, operations and samples, in training and when a task ended, interrupted
    or not."""
    handle = FakeNode.handle

    def counted(self, message, state):
        reply, state = handle(self, message, state)
        task, client = message.config()["task"], client_of(message.node)
        needed = {
            TRAIN: 1000.0 * (client + 1) - task,
            END_TASK: 4000.5 - client,
            EVALUATE: 1e9,
        }
        spent = {TRAIN: 10.0 * (client + 1), END_TASK: 1.0 + task, EVALUATE: 1e9}
        learned = {TRAIN: 5.0, END_TASK: 2.0 * client, EVALUATE: 1e9}
        told = {"memory-bytes": needed, "flops": spent, "samples": learned}
        reply.content["metrics"] |= {
            name: values[message.kind] for name, values in told.items()
        }
        return reply, state

    monkeypatch.setattr(FakeNode, "handle", counted)
    run = rig()
    with pytest.raises(KeyboardInterrupt):
        run.run(stop_at(7))
    run.run(resume=True)
    told = [
        (e["event"], e["client_memory_bytes"])
        for e in run.events
        if "client_memory_bytes" in e
    ]
    task = [("round", 4000.0)] * 3 + [("task_end", 4000.5)]
    assert told == [*task, *[("round", 4000.5)] * 3, ("task_end", 4000.5)]
    flops = [event["flops"] for event in run.events if "flops" in event]
    assert flops == [100.0, 100.0, 100.0, 4.0, 100.0, 100.0, 100.0, 8.0]
    samples = [event["samples"] for event in run.events if "samples" in event]
    assert samples == [20.0, 20.0, 20.0, 12.0, 20.0, 20.0, 20.0, 12.0]


def test_clients_are_told_task_and_round(rig):
    run = rig()
    run.run()
    told = [
        config
        for kind, client, config in run.node.seen
        if kind == TRAIN and client == 2
    ]
    assert [(c["task"], c["round"], c["server-round"]) for c in told] == [
        (0, 1, 1), (0, 2, 2), (0, 3, 3), (1, 1, 4), (1, 2, 5), (1, 3, 6),
    ]  # fmt: skip
    assert {(c["rounds"], c["tasks"]) for c in told} == {(3, 2)}
    ended = [
        (client, config)
        for kind, client, config in run.node.seen
        if kind == END_TASK
    ]
    assert ended == [
        (client, {"task": task}) for task in range(2) for client in range(4)
    ]


def test_fedavg_is_the_mean_weighted_by_samples(rig):
    result = rig("data.tasks=1", "train.rounds=2").run()
    expected = np.array([1.0, -2.0])
    for count in (1, 2):
        clients = [
            (c + 1) / 10 * (expected * 0.5 + c + count / 8) for c in range(4)
        ]
        expected = sum(clients)
    np.testing.assert_allclose(result.arrays["w"], expected, rtol=1e-6)
    assert {name: (v.shape, v.dtype) for name, v in result.arrays.items()} == {
        "w": ((2,), np.float32),
        "b": ((), np.float32),
    }


def test_raw_accuracies_are_what_clients_answered(rig):
    run = rig()
    result = run.run()
    stored = RunFolder.open(run.path).accuracy()
    for name, value in result.accuracy.items():
        np.testing.assert_array_equal(value, stored[name])
    sizes = np.array([10, 20, 30, 40])
    np.testing.assert_array_equal(
        stored["weights"], np.repeat(sizes[:, None], 2, axis=1)
    )
    for client in range(4):
        # head of the global model: (0 * 1 + 1 * 2 + 2 * 3 + 3 * 4) / 10 = 2
        for scoring, bonus in (("personal", client), ("global", 2)):
            size = sizes[client]
            expected = [
                [bonus / size, (1 + bonus) / size],
                [np.nan, (2 + bonus) / size],
            ]
            np.testing.assert_allclose(stored[scoring][client], expected)
    assert stored["round_personal"].shape == (0, 4, 2)
    end = run.events[-1]
    # sum over clients of both tasks' right answers over twice their samples, weighted by samples
    assert end["accuracy"] == pytest.approx(
        sum(3 + 2 * c for c in range(4)) / 200
    )
    assert end["accuracy_global"] == pytest.approx(4 * 7 / 200)
    assert end["gap"] == pytest.approx(end["accuracy"] - end["accuracy_global"])
    assert end["forgetting"] == pytest.approx(-4 / 100)
    assert end["backward_transfer"] == pytest.approx(4 / 100)
    assert end["forward_transfer"] is None
    evaluation = next(
        event for event in run.events if event["event"] == "evaluation"
    )
    assert evaluation["per_task"] == [pytest.approx(6 / 100)]
    assert evaluation["forgetting"] is None


def test_scoring_the_global_model_is_nobodys_traffic(rig):
    run = rig()
    run.run()
    traffic = run.grid.traffic.counts()
    assert run.events[-1]["traffic"] == traffic
    personal, shared = traffic["evaluate"], traffic["evaluate.global"]
    assert personal["messages"] == shared["messages"] == 8
    assert shared["down"] > personal["down"]  # the head comes along
    alone = Rig(run.path.parent / "alone", "evaluation.global_model=false")
    alone.run()
    assert personal == alone.grid.traffic.counts()["evaluate"]
    assert "evaluate.global" not in alone.grid.traffic.counts()
    assert traffic["train"] == {
        "down": 24 * (12 + 5 * 8),
        "up": 24 * (12 + 3 * 8),
        "messages": 24,
    }


def test_one_scoring_is_enough_where_everything_travels(rig):
    run = rig(personal=False)
    stored = run.run().accuracy
    np.testing.assert_array_equal(stored["personal"], stored["global"])
    assert sum(kind == EVALUATE for kind, *_ in run.node.seen) == 8


def test_without_the_global_scoring_there_is_none(rig):
    result = rig("evaluation.global_model=false").run()
    assert np.isnan(result.accuracy["global"]).all()
    assert result.summary["accuracy_global"] is None
    assert result.summary["accuracy"] is not None


def test_evaluation_within_tasks_and_of_tasks_to_come(rig):
    run = rig("evaluation.every=1", "evaluation.forward=true")
    stored = run.run().accuracy
    np.testing.assert_array_equal(
        stored["round_steps"], [[1, 0, 1], [2, 0, 2], [4, 1, 1], [5, 1, 2]]
    )
    assert stored["round_personal"].shape == (4, 4, 2)
    np.testing.assert_allclose(
        stored["round_personal"][2], stored["personal"][:, :, 1]
    )
    assert kinds(run.events).count("evaluation") == 6
    # client 3 before task 1 is learned: (0 + 1 + 3) / 40, and as much before any training
    assert (
        stored["personal"][3, 1, 0]
        == stored["untrained"][3, 1]
        == pytest.approx(0.1)
    )
    assert run.events[-1]["forward_transfer"] == pytest.approx(0.0)


def test_learners_that_keep_nothing_are_not_told_of_the_end_of_a_task(
    rig, monkeypatch
):
    monkeypatch.setattr(FakeLearner, "ends_task", False)
    run = rig()
    run.run()
    assert not any(kind == END_TASK for kind, *_ in run.node.seen)
    assert [
        e["knowledge_bytes"] for e in run.events if e["event"] == "task_end"
    ] == [
        0.0,
        0.0,
    ]


def test_the_strategys_own_evaluation_is_called_too(rig):
    run = rig("strategy.fraction_evaluate=1.0", "strategy.fraction=0.5")
    run.run()
    evaluations = [
        event for event in run.events if event["event"] == "evaluation"
    ]
    # the mean weighted by 10, 20, 30, 40 samples of 0, 1, 2, 3 right answers
    assert evaluations[0]["metrics"] == {
        "accuracy": 0.5,
        "loss": 1.0,
        "correct": [2.0],
        "total": [30.0],
    }
    plain = [
        config
        for kind, _, config in run.node.seen
        if kind == EVALUATE and "scoring" not in config
    ]
    assert [config["task"] for config in plain] == [0] * 4 + [1] * 4


# --- determinism
# --------------------------------------------------------------------------------------------------


def test_sampling_depends_on_the_seed_alone_and_leaves_no_trace(tmp_path):
    def sampled(name, before, *overrides):
        random.seed(before)
        np.random.seed(before)  # noqa: NPY002
        states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        run = Rig(tmp_path / name, "strategy.fraction=0.5", *overrides)
        torchs = torch.get_rng_state().tolist()
        run.run(lambda event: torch.rand(1))  # as a client in this process does
        assert torch.get_rng_state().tolist() == torchs
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002
        return [client for kind, client, _ in run.node.seen if kind == TRAIN]

    first = sampled("a", 1)
    assert first == sampled("b", 2)
    assert first != sampled("c", 1, "seed=7")
    assert (
        len({tuple(sorted(first[i : i + 2])) for i in range(0, 12, 2)}) > 1
    )  # not the same pair every round


STRATEGIES = [
    ("strategy=fedavg", "strategy.fraction=0.5"),
    ("strategy=fedadam", "strategy.fraction=0.75"),
    (
        "strategy=fedavgm",
        "strategy.server_momentum=0.9",
        "strategy.server_learning_rate=0.5",
    ),
    ("strategy=fedyogi",),
    (
        "strategy=dp-adaptive-clipping",
        "strategy.noise_multiplier=0.1",
        "strategy.num_sampled_clients=4",
    ),
]


def comparable(events):
    """Events without what is of the clock or of the machine."""
    dropped = ("time", "seconds", "peak_memory_mb", "resumed_from")
    return [
        {k: v for k, v in event.items() if k not in dropped} for event in events
    ]


@pytest.fixture(
    scope="module", params=STRATEGIES, ids=lambda o: o[0].partition("=")[2]
)
def undisturbed(request, tmp_path_factory):
    whole = Rig(tmp_path_factory.mktemp("runs") / "whole", *request.param)
    return request.param, whole, whole.run()


@pytest.mark.parametrize("place", range(1, 12))
def test_a_run_interrupted_anywhere_goes_on_as_if_nothing_had_happened(
    tmp_path, undisturbed, place
):
    overrides, whole, expected = undisturbed
    broken = Rig(tmp_path / "broken", *overrides)
    with pytest.raises(KeyboardInterrupt):
        broken.run(stop_at(place))
    assert broken.events[-1]["event"] == "interrupted"
    result = broken.run(resume=True)
    assert result.arrays.keys() == expected.arrays.keys()
    for name, value in expected.arrays.items():
        assert value.tobytes() == result.arrays[name].tobytes()
    for name, value in expected.accuracy.items():
        np.testing.assert_array_equal(value, result.accuracy[name])
    again = [
        event
        for event in broken.events
        if not (event["event"] == "start" and event["resumed_from"])
    ]
    assert comparable(again) == comparable(whole.events)
    assert broken.grid.traffic.counts() == whole.grid.traffic.counts()
    # files of client states: exactly one a client, of the same content
    assert len(list((broken.path / "clients").iterdir())) == CLIENTS


@pytest.mark.parametrize("message", [1, 11, 17, 24, 30, 40])
def test_so_does_one_interrupted_while_clients_work(
    tmp_path, monkeypatch, message
):
    whole, broken = Rig(tmp_path / "whole"), Rig(tmp_path / "broken")
    expected = whole.run()
    handle = FakeNode.handle

    def interrupted(self, work, state):
        if len(self.seen) == message:
            raise KeyboardInterrupt
        return handle(self, work, state)

    monkeypatch.setattr(FakeNode, "handle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    monkeypatch.undo()
    result = broken.run(resume=True)
    assert result.arrays["w"].tobytes() == expected.arrays["w"].tobytes()
    np.testing.assert_array_equal(
        result.accuracy["personal"], expected.accuracy["personal"]
    )
    assert broken.grid.traffic.counts() == whole.grid.traffic.counts()


def test_resuming_skips_what_is_done(rig):
    run = rig()
    with pytest.raises(KeyboardInterrupt):
        run.run(
            stop_at(9)
        )  # in the third round of the second task's: start, 3 rounds, 2 more, 2 rounds, round
    assert run.events[-1] == run.events[-1] | {
        "event": "interrupted",
        "task": 1,
        "round": 2,
    }
    run.run(resume=True)
    assert [
        event["resumed_from"] for event in run.events if event["event"] == "start"
    ] == [None, 5]
    assert {
        (c["task"], c["round"]) for kind, _, c in run.node.seen if kind == TRAIN
    } == {(1, 3)}
    seconds = [
        event["seconds"] for event in run.events if event["event"] == "end"
    ]
    assert seconds[0] > 0


def test_resuming_with_other_data_is_refused(rig):
    run = rig()
    with pytest.raises(KeyboardInterrupt):
        run.run(stop_at(4))
    run.partition = {"digest": "other"}
    with pytest.raises(ConfigError, match="other samples"):
        run.run(resume=True)


@pytest.mark.parametrize("writes", [5, 12, 20, 33])
def test_a_full_disk_ends_the_run_and_nothing_is_lost(
    tmp_path, monkeypatch, writes
):
    whole, broken = Rig(tmp_path / "whole"), Rig(tmp_path / "broken")
    expected = whole.run()
    real, done = os.fsync, []

    def full(descriptor):
        done.append(descriptor)
        if len(done) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"disk that holds .* is full.*--resume"):
        broken.run()
    monkeypatch.undo()
    result = broken.run(resume=True)
    assert result.arrays["w"].tobytes() == expected.arrays["w"].tobytes()
    np.testing.assert_array_equal(
        result.accuracy["personal"], expected.accuracy["personal"]
    )


# --- clients that fail
# --------------------------------------------------------------------------------------------


def nan(arrays, metrics):
    arrays["w"][1] = np.nan


def fall(arrays, metrics):
    raise ValueError("out of memory")


def rename(arrays, metrics):
    arrays["v"] = arrays.pop("w")


def forget_samples(arrays, metrics):
    del metrics["num-examples"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (nan, "NaN or infinite in 1 of 2 values"),
        (fall, "ValueError: out of memory"),
        (rename, "missing or unknown"),
        (forget_samples, "num-examples must be a positive number"),
    ],
)
def test_a_client_at_fault_ends_the_run_and_is_named(rig, spoil, words):
    run = rig()
    run.spoil = {(2, 1, 2): spoil}
    with pytest.raises(RunError) as error:
        run.run()
    assert "client 2, task 2, round 2" in str(error.value)
    assert words in str(error.value)
    assert "engine.on_client_error=skip" in str(error.value)
    [failure] = [event for event in run.events if event["event"] == "failure"]
    assert (
        failure["client"],
        failure["task"],
        failure["round"],
        failure["kind"],
    ) == (
        2,
        1,
        2,
        "train",
    )
    assert words in failure["reason"]
    run.spoil = {}  # mended: all that was earned is there
    run.run(resume=True)
    assert [
        event["resumed_from"] for event in run.events if event["event"] == "start"
    ] == [None, 4]


@pytest.mark.parametrize("spoil", [nan, fall, rename, forget_samples])
def test_or_it_is_left_out_and_counted(rig, spoil):
    run = rig("engine.on_client_error=skip", "data.tasks=1", "train.rounds=1")
    run.spoil = {(3, 0, 1): spoil}
    result = run.run()
    w = sum((c + 1) / 6 * (np.array([0.5, -1.0]) + c + 1 / 8) for c in range(3))
    np.testing.assert_allclose(result.arrays["w"], w, rtol=1e-6)
    event = next(event for event in run.events if event["event"] == "round")
    assert (event["clients"], event["failures"]) == (3, 1)
    assert kinds(run.events).count("failure") == 1


def test_scores_that_cannot_be_are_a_failure_of_that_client(tmp_path):
    def boast(metrics):
        metrics["correct"] = [total + 1 for total in metrics["total"]]

    run = Rig(tmp_path / "stops")
    run.spoil = {(2, 0, "global"): boast}
    with pytest.raises(
        RunError,
        match=r"client 2, task 1, round 3 \(evaluate\): correct must lie between",
    ):
        run.run()
    run = Rig(
        tmp_path / "skips",
        "engine.on_client_error=skip",
        "evaluation.forward=true",
    )
    run.spoil = {(2, 0, "personal"): boast}
    accuracy = run.run().accuracy
    assert np.isnan(accuracy["personal"][2, 0, 0])
    assert np.isfinite(accuracy["personal"][[0, 1, 3], 0, 0]).all()
    failures = [event for event in run.events if event["event"] == "failure"]
    assert [
        (event["client"], event["task"], event["round"]) for event in failures
    ] == [
        (2, 0, 0),
        (2, 0, 3),
    ]


def test_a_refused_update_leaves_the_clients_state_as_it_was(rig):
    run = rig("engine.on_client_error=skip", "data.tasks=1", "train.rounds=2")
    run.spoil = {(0, 0, 1): nan}
    run.run()
    losses = [event["loss"] for event in run.events if event["event"] == "round"]
    # the loss is the count of trainings; client 0 has one of ten samples and counts one less
    assert losses == [pytest.approx(1.0), pytest.approx(1.9)]


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_if_all_clients_fail_the_run_does(rig, policy):
    run = rig(f"engine.on_client_error={policy}")
    run.spoil = {(client, 0, 2): fall for client in range(4)}
    with pytest.raises(
        RunError,
        match="client 0, task 1, round 2"
        if policy == "stop"
        else "all 4 clients failed",
    ):
        run.run()


# --- strategies that do odd things
# ----------------------------------------------------------------------------------


def strategy(**hooks):
    base = {
        "fraction_evaluate": 0.0,
        "min_train_nodes": 1,
        "min_available_nodes": 1,
    }
    return type("Odd", (FedAvg,), hooks)(**base)


def poisoned(self, server_round, replies):
    arrays, metrics = FedAvg.aggregate_train(self, server_round, replies)
    return ArrayRecord(
        {name: array for name, array in arrays.items() if name != "b"}
    ), metrics


@pytest.mark.parametrize(
    ("hooks", "words"),
    [
        ({"aggregate_train": lambda self, r, replies: None}, "returned nothing (None)"),
        ({"aggregate_train": poisoned}, "arrays b are missing"),
        ({"aggregate_train": lambda self, r, replies: 1 / 0},
            "in aggregate_train, task 1, round 1: ZeroDivision"),
        ({"configure_train": lambda self, *a: None}, "failed in configure_train"),
        ({"configure_evaluate": lambda self, *a: [][0]},
            "failed in configure_evaluate, task 1, round 3: IndexError"),
    ],
)  # fmt: skip
def test_a_strategy_at_fault_is_named(rig, hooks, words):
    with pytest.raises(RunError) as error:
        rig().run(strategy=strategy(**hooks))
    assert "strategy fedavg" in str(error.value)
    assert words in str(error.value)


def warnings_of(run):
    return [
        event["reason"] for event in run.events if event["event"] == "warning"
    ]


def test_a_strategy_may_aggregate_nothing_in_some_rounds(rig):
    def aggregate(self, server_round, replies):
        if server_round in (1, 6):
            return FedAvg.aggregate_train(self, server_round, replies)
        return None, None

    run = rig()
    run.run(strategy=strategy(aggregate_train=aggregate))
    expected = "strategy aggregated nothing; the global model stays as it is"
    assert warnings_of(run) == [expected] * 4
    assert run.events[-1]["event"] == "end"


def test_a_run_that_never_aggregates_is_no_result(rig):
    nothing = strategy(aggregate_train=lambda self, r, replies: (None, None))
    run = rig()
    for resumed in (False, True):  # to go on changes nothing
        with pytest.raises(
            RunError,
            match=r"aggregated nothing by task 1, round 3, .*another --out",
        ):
            run.run(strategy=nothing, resume=resumed)
    assert not any(event["event"] == "end" for event in run.events)


def test_flowers_reason_for_aggregating_nothing_is_told(rig):
    from flwr.serverapp.strategy import Bulyan

    run = rig()
    bulyan = Bulyan(
        fraction_evaluate=0.0, num_malicious_nodes=1
    )  # needs 7 answers, of 4 clients
    with pytest.raises(
        RunError,
        match=r"Required at least 7 \(4\*num_malicious_nodes \+ 3\), but received 4",
    ):
        run.run(strategy=bulyan)
    assert len(warnings_of(run)) == 3
    assert (
        "Insufficient replies, skipping Bulyan aggregation: Required at least 7"
        in warnings_of(run)[0]
    )


def test_a_run_in_which_nobody_is_ever_chosen_is_no_result(rig):
    run = rig("data.tasks=1")
    with pytest.raises(RunError, match="aggregated nothing in the whole run"):
        run.run(strategy=strategy(configure_train=lambda self, *a: []))
    assert (
        warnings_of(run)
        == ["strategy chose no clients; the global model stays as it is"] * 3
    )


@pytest.mark.parametrize("hook", ["configure_train", "aggregate_train"])
def test_a_strategy_cannot_end_the_process(rig, hook):
    def leave(self, *arguments):
        raise SystemExit

    with pytest.raises(
        RunError, match=f"failed in {hook}, task 1, round 1: SystemExit"
    ):
        rig().run(strategy=strategy(**{hook: leave}))


@pytest.mark.parametrize("name", ["fedavg", "krum", "fedadam"])
def test_where_nothing_travels_any_strategy_will_do(rig, monkeypatch, name):
    monkeypatch.setattr(FakeLearner, "send", lambda self: {})
    run = rig(f"strategy={name}")
    result = run.run()
    assert result.arrays == {}
    assert [
        event["clients"] for event in run.events if event["event"] == "round"
    ] == [4] * 6
    assert run.events[0]["travelling"] == 0


def test_what_checkpoints_cannot_hold_is_told_once(rig):
    run = rig()
    odd = strategy()
    odd.socket = object()
    run.run(strategy=odd)
    [warning] = [event for event in run.events if event["event"] == "warning"]
    assert "socket (a object)" in warning["reason"]


class OwnLoop(FedAvg):
    """A strategy with a loop of its own, as asynchronous ones have."""

    def __init__(self, tell=True, **options):
        super().__init__(
            fraction_evaluate=0.0,
            min_train_nodes=1,
            min_available_nodes=1,
            **options,
        )
        self.tell = tell
        self.starts = 0

    def start(self, grid, initial_arrays, num_rounds=3, timeout=3600, train_config=None,
        evaluate_config=None,
              evaluate_fn=None):  # fmt: skip
        self.starts += 1
        arrays = initial_arrays
        if self.tell:
            evaluate_fn(0, arrays)
        for server_round in range(1, num_rounds + 1):
            messages = self.configure_train(
                server_round, arrays, train_config, grid
            )
            ids = grid.push_messages(messages)
            arrays, _ = self.aggregate_train(
                server_round, grid.pull_messages(ids)
            )
            if self.tell:
                evaluate_fn(server_round, arrays)
        return Result(arrays=arrays)


def test_a_strategy_with_a_loop_of_its_own_is_called_once_a_task(tmp_path):
    ours, theirs = Rig(tmp_path / "a"), Rig(tmp_path / "b")
    loop = OwnLoop()
    expected, result = ours.run(), theirs.run(strategy=loop)
    assert loop.starts == 2
    np.testing.assert_array_equal(result.arrays["w"], expected.arrays["w"])
    np.testing.assert_array_equal(
        result.accuracy["personal"], expected.accuracy["personal"]
    )
    told = [
        (c["task"], c["round"])
        for kind, client, c in theirs.node.seen
        if kind == TRAIN and client == 0
    ]
    assert told == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    rounds = [event for event in theirs.events if event["event"] == "round"]
    assert [event["server_round"] for event in rounds] == [1, 2, 3, 4, 5, 6]
    assert rounds[4]["loss"] == pytest.approx(5.0)
    assert not [event for event in theirs.events if event["event"] == "warning"]


def test_clients_are_scored_between_rounds_of_a_loop_of_its_own_too(tmp_path):
    ours, theirs = (
        Rig(tmp_path / "a", "evaluation.every=2"),
        Rig(tmp_path / "b", "evaluation.every=2"),
    )
    expected, result = ours.run(), theirs.run(strategy=OwnLoop())
    assert kinds(theirs.events) == kinds(ours.events)
    for name, array in expected.accuracy.items():
        np.testing.assert_array_equal(result.accuracy[name], array)


def test_real_clients_that_are_at_work_are_not_scored(rig, monkeypatch):
    monkeypatch.setattr(InlineGrid, "is_occupied", True)
    run = rig("evaluation.every=2")
    run.run(strategy=OwnLoop())
    assert kinds(run.events).count("evaluation") == 2
    warnings = [event for event in run.events if event["event"] == "warning"]
    assert [(event["task"], event["round"]) for event in warnings] == [
        (0, 2),
        (1, 2),
    ]


def test_it_is_resumed_at_the_task(tmp_path):
    whole, broken = Rig(tmp_path / "whole"), Rig(tmp_path / "broken")
    expected = whole.run(strategy=OwnLoop(fraction_train=0.5))
    with pytest.raises(KeyboardInterrupt):
        broken.run(stop_at(8), strategy=OwnLoop(fraction_train=0.5))
    result = broken.run(resume=True, strategy=OwnLoop(fraction_train=0.5))
    assert result.arrays["w"].tobytes() == expected.arrays["w"].tobytes()
    np.testing.assert_array_equal(
        result.accuracy["personal"], expected.accuracy["personal"]
    )
    assert [
        event["resumed_from"]
        for event in broken.events
        if event["event"] == "start"
    ] == [None, 3]


def test_one_that_cannot_be_followed_is_warned_of(rig):
    run = rig()
    run.run(strategy=OwnLoop(tell=False))
    warnings = [
        event["reason"] for event in run.events if event["event"] == "warning"
    ]
    assert len(warnings) == 2
    assert "never called evaluate_fn" in warnings[0]


def test_client_failures_end_a_loop_of_their_own_too(rig):
    run = rig()
    run.spoil = {(1, 0, 2): nan}
    with pytest.raises(RunError, match="client 1, task 1, round 2"):
        run.run(strategy=OwnLoop())


# --- real clients
# --------------------------------------------------------------------------------------


def real(path, *overrides):
    base = {
        "data": {
            "clients": 4,
            "tasks": 2,
            "classes_max": 2,
            "share": "overlapping",
            "test_samples": 0.5,
        },
        "train": {"rounds": 2, "epochs": 4, "batch_size": 8, "lr": 3e-3},
        "model": {"name": "cnn"},
    }
    config = resolve(read_config(base, overrides))
    benchmark = make_benchmark(config)
    with RunFolder.create(path, config) as folder:
        store = StateStore(folder.clients, 2**24)
        with InlineGrid(
            config.data.clients, Host(config, benchmark, store)
        ) as grid:
            parts = assemble(config, Clients.VIRTUAL, benchmark)
            return Experiment(parts, grid, folder).run()


def test_fedknow_learns_two_tasks_of_digits(tmp_path):
    result = real(tmp_path / "run")
    assert result.summary["accuracy"] > 0.8  # guessing gives 0.5
    assert np.isfinite(result.accuracy["global"][:, 0, :]).all()
    assert result.summary["traffic"]["train.end_task"]["messages"] == 8


@pytest.mark.parametrize(
    ("learner", "at_the_end"), [("fedknow", 3), ("fedper", 0)]
)
def test_all_samples_that_are_learned_from_are_told(
    tmp_path, learner, at_the_end
):
    """One client trains in a task's round, the others when it ends; FedKNOW then fine-tunes for
    three epochs."""
    changes = [
        f"learner={learner}",
        "train.rounds=1",
        "train.epochs=2",
        "strategy.fraction=0.26",
        "model=mlp",
    ]
    folder = RunFolder.open(real(tmp_path / "run", *changes).folder)
    benchmark = make_benchmark(folder.config)
    sizes = [
        [benchmark.train_size(c, t) for c in range(folder.config.data.clients)]
        for t in range(benchmark.tasks)
    ]
    told = {
        kind: [e["samples"] for e in folder.events() if e["event"] == kind]
        for kind in ("round", "task_end")
    }
    for size, in_round, ended in zip(
        sizes, told["round"], told["task_end"], strict=True
    ):
        assert in_round in [2 * n for n in size]
        assert in_round + ended == (2 + at_the_end) * sum(size)
    assert summarise(folder).measures()["samples"] == (2 + at_the_end) * np.sum(
        sizes
    )


def test_a_users_strategy_file_trains_real_clients(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3] / "examples")
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = real(
        tmp_path / "run",
        "strategy=own_strategy:ShortUpdates",
        "strategy.slack=1.5",
    )
    assert result.summary["accuracy"] > 0.8
