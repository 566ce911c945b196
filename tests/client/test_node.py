"""The node: messages and state in, messages and state out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedknow.client.data.samples import SampleSpec
from fedknow.client.learners.frames.learner import Learner
from fedknow.client.node import Node
from fedknow.protocols.config import read_config
from fedknow.protocols.messages import (
    ARRAYS,
    CLIENT_FAILED,
    CONFIG,
    END_TASK,
    EVALUATE,
    KEPT,
    METRICS,
    TRAIN,
    Arrays,
    Config,
    Message,
    node_of,
)

TASKS = 3
SPEC = SampleSpec("image", (1, 2, 2), "uint8")


class Stream:
    """Three tiny tasks for any number of clients."""

    tasks, classes, spec, clients = TASKS, 6, SPEC, 4

    def __init__(self, make, incremental=False):
        self.make, self.incremental = make, incremental

    def length(self, client):
        return self.tasks

    def task(self, client, task):
        return self.make(task, seed=client, incremental=self.incremental)


class SameForAll(Stream):
    """All clients have the same samples."""

    def task(self, client, task):
        return super().task(0, task)


class Mislabelled(Stream):
    """The two labels of a task are exchanged in its test samples."""

    def task(self, client, task):
        data = super().task(client, task)
        test = replace(data.test, y=data.test.y ^ 1)
        return replace(data, test=test)


def tiny(shape, classes):
    """A model for these samples, as a user would bring it."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(
                torch.nn.Flatten(), torch.nn.Linear(4, 6), torch.nn.ReLU()
            )
            self.head = torch.nn.Linear(6, classes)

        def forward(self, x):
            return self.head(self.body(x))

    return Model()


class Raises(Learner):
    """Raises on one client."""

    def fit(self, task, round):
        raise RuntimeError("the disk of my dreams is full")


@pytest.fixture
def node(tiny_task, monkeypatch):
    def build(*overrides, incremental=False, stream=Stream):
        import fedknow.client.learners as learners

        def model(config, shape, classes, seed):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                return tiny(shape, classes)

        monkeypatch.setattr(learners, "build_model", model)
        config = read_config(
            {"train": {"epochs": 2, "batch_size": 8, "lr": 0.01}}, overrides
        )
        return Node(config, stream(tiny_task, incremental))

    return build


def ask(node, kind, client=0, state=None, **config):
    content = {
        ARRAYS: config.pop("arrays", None) or start(node),
        CONFIG: Config(config),
    }
    if "kept" in content[CONFIG]:
        content[KEPT] = content[CONFIG].pop("kept")
    return node.handle(
        Message(kind, node_of(client), "m1", content=content),
        state if state is not None else {},
    )


def start(node):
    return Arrays(
        (name, value.numpy()) for name, value in node.learner.send().items()
    )


def test_training_answers_with_arrays_and_numbers(node):
    n = node()
    reply, state = ask(n, TRAIN, task=0, round=1)
    assert reply.failure is None
    assert (reply.reply_to, reply.kind, reply.node) == ("m1", TRAIN, node_of(0))
    assert list(reply.content) == [ARRAYS, METRICS]
    assert {
        "num-examples",
        "loss",
        "accuracy",
        "seconds",
        "violated",
        "active",
    } <= reply.content[METRICS].keys()
    assert reply.content[METRICS]["num-examples"] == 20
    assert state["trained_task"] == 0


def test_answers_depend_on_client_task_and_round_only(node):
    n = node("learner=fedper")
    arrays = start(n)

    def train(client, round, seed=0):
        return ask(n, TRAIN, client, arrays=arrays, task=0, round=round)[
            0
        ].arrays()["body.1.weight"]

    first = train(0, 1)
    train(3, 2)
    assert np.array_equal(first, train(0, 1))
    assert not np.array_equal(first, train(1, 1))
    assert not np.array_equal(first, train(0, 2))


def test_clients_with_the_same_samples_draw_other_batches(node):
    n = node("learner=fedper", stream=SameForAll)
    arrays = start(n)
    bodies = [
        ask(n, TRAIN, client, arrays=arrays, task=0, round=1)[0].arrays()
        for client in range(3)
    ]
    for body in bodies[1:]:
        assert not np.array_equal(
            body["body.1.weight"], bodies[0]["body.1.weight"]
        )


def test_test_samples_are_scored_and_no_training_sample(node):
    """With exchanged labels each right answer is wrong, and each wrong one right."""
    right = {}
    for stream in (Stream, Mislabelled):
        n = node("train.epochs=8", "train.lr=0.1", stream=stream)
        trained, state = ask(n, TRAIN, task=0, round=1)
        reply, _ = ask(
            n,
            EVALUATE,
            state=state,
            arrays=trained.arrays(),
            task=0,
            scoring="personal",
        )
        [right[stream]] = reply.content[METRICS]["correct"]
    assert right[Stream] > 15
    assert right[Mislabelled] == 20 - right[Stream]


def test_received_arrays_may_be_read_only(node):
    n = node()
    arrays = start(n)
    for array in arrays.values():
        array.flags.writeable = False
    before = {name: array.copy() for name, array in arrays.items()}
    reply, _ = ask(n, TRAIN, arrays=arrays, task=0, round=1)
    assert reply.failure is None
    assert all(
        np.array_equal(array, before[name]) for name, array in arrays.items()
    )


def test_a_failing_client_says_why_and_keeps_its_state(node):
    n = node("learner=finetune")
    n.learner.__class__ = Raises
    old = {"kept": {}, "trained_task": 0}
    reply, state = ask(n, TRAIN, state=old, task=0, round=1)
    assert state is old
    assert reply.failure is not None
    assert reply.failure.code == CLIENT_FAILED
    assert reply.failure.reason.startswith(
        "RuntimeError: the disk of my dreams is full (test_node.py, line "
    )
    assert not reply.content


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [("query", {}, "no work of kind"), (TRAIN, {}, "'task'")],
)
def test_work_that_makes_no_sense_is_refused(node, kind, config, reason):
    reply, _ = ask(node(), kind, **config)
    assert reason in reply.failure.reason


def test_evaluation_scores_every_task_seen_and_changes_nothing(node):
    n = node()
    state = {}
    for task in range(2):
        _, state = ask(n, TRAIN, state=state, task=task, round=1)
        _, state = ask(n, END_TASK, state=state, task=task)
    reply, after = ask(
        n, EVALUATE, state=state, task=1, scoring="personal", collect=True
    )
    assert after is state
    metrics = reply.content[METRICS]
    assert metrics["total"] == [20, 20]
    assert metrics["accuracy"] == pytest.approx(
        np.mean([r / 20 for r in metrics["correct"]])
    )
    assert set(reply.content[KEPT]) == {"head.weight", "head.bias"}
    forward, _ = ask(
        n, EVALUATE, state=state, task=1, scoring="personal", forward=True
    )
    assert len(forward.content[METRICS]["correct"]) == TASKS
    assert forward.content[METRICS]["num-examples"] == 40


def test_a_message_cannot_ask_for_a_head_that_was_to_stay(node):
    n = node("learner=fedper", "evaluation.global_model=false")
    reply, _ = ask(n, EVALUATE, task=0, scoring="personal", collect=True)
    assert "evaluation.global_model = false" in reply.failure.reason
    assert KEPT not in reply.content


def test_global_scoring_uses_the_kept_parameters_given(node):
    n = node("learner=fedper")
    _, state = ask(n, TRAIN, task=0, round=1)
    kept = Arrays(
        {
            "head.weight": np.zeros((6, 6), np.float32),
            "head.bias": np.array([9, 0, 0, 0, 0, 0], np.float32),
        }
    )
    reply, after = ask(
        n, EVALUATE, state=state, task=0, scoring="global", kept=kept
    )
    assert after is state
    assert reply.content[METRICS]["correct"] == [10]  # class 0 for everything


def test_class_incremental_scoring_lets_all_seen_classes_compete(node):
    def right(incremental):
        n = node("learner=fedper", incremental=incremental)
        kept = Arrays(
            {
                "head.weight": np.zeros((6, 6), np.float32),
                "head.bias": np.array([1, 0, 0, 5, 0, 9], np.float32),
            }
        )
        return ask(n, EVALUATE, task=1, scoring="global", kept=kept)[0].content[
            METRICS
        ]["correct"]

    assert right(False) == [10, 10]  # task 0: class 0; task 1: class 3
    assert right(True) == [0, 10]  # class 3 wins everywhere; 5 is not seen yet


def test_a_client_never_chosen_still_ends_the_task_with_a_trained_head(node):
    n = node("learner=fedper")
    fresh = n.learner.local_parameters()["head.weight"]
    reply, state = ask(n, END_TASK, task=0)
    assert reply.failure is None
    assert reply.content[METRICS]["samples"] == 2 * 20
    assert not torch.equal(state["kept"]["head.weight"], fresh)
    again, same = ask(n, END_TASK, state=state, task=0)
    assert torch.equal(
        same["kept"]["head.weight"], state["kept"]["head.weight"]
    )  # it was trained already
    assert (
        again.content[METRICS]["knowledge-bytes"]
        == again.content[METRICS]["samples"]
        == 0
    )
