"""Joint training: every sample in its own slice, the same number of samples, and plain training in
the first task."""

import numpy as np
import pytest
import torch
from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.baselines import FedPer
from fedknow.client.learners.frames.learner import Round
from fedknow.client.learners.joint import (
    Joint,
    JointEqual,
    JointSettings,
)
from fedknow.client.models import SplitModel
from fedknow.protocols.config import TrainConfig

SGD = TrainConfig(
    epochs=1,
    batch_size=64,
    optimizer="sgd",
    lr=0.5,
    weight_decay=0.0,
    channels_last=False,
)


def weights(learner):
    return learner.send() | learner.local_parameters()


def test_one_step_by_hand():
    """A linear model on two tasks: rows of a task's classes move by that task's samples alone."""
    weight = np.array([[0.5, -1.0], [0.25, 0.75], [1.0, 0.5], [-0.5, 1.5]])
    x = np.array([[1.0, 0.5], [-0.5, 2.0], [2.0, -1.0], [0.3, 0.4]])
    y = np.array([0, 1, 2, 3])
    model = SplitModel(nn.Flatten(), nn.Linear(2, 4, bias=False))
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor(weight))

    def task(number):
        part = slice(2 * number, 2 * number + 2)
        split = Split(
            torch.tensor(x[part], dtype=torch.float32).view(-1, 1, 1, 2),
            torch.tensor(y[part]),
        )
        return TaskData(
            number,
            (2 * number, 2 * number + 1),
            tuple(range(2 * number + 2)),
            split,
            split,
        )

    learner = Joint(model, SGD, JointSettings(budget=2.0))
    learner.memory.store(task(0), 2, 0)
    report = learner.fit(task(1), Round(1, 0))
    e = np.exp(x @ weight.T) * np.kron(np.eye(2), np.ones((2, 2)))
    p = e / e.sum(1, keepdims=True)
    expected = weight - 0.5 * (p - np.eye(4)).T @ x / 4
    assert learner.head.weight.detach().numpy() == pytest.approx(
        expected, rel=1e-5
    )
    assert report["loss"] == pytest.approx(
        -np.log(p[range(4), y]).mean(), rel=1e-5
    )
    assert report["accuracy"] == (p.argmax(1) == y).mean()


def test_the_first_task_is_plain_training(tiny_model, tiny_task):
    joint, plain = (
        kind(tiny_model(), TrainConfig(), kind.Settings())
        for kind in (Joint, FedPer)
    )
    assert joint.fit(tiny_task(0), Round(1, 3)) == plain.fit(
        tiny_task(0), Round(1, 3)
    )
    assert all(
        torch.equal(value, weights(plain)[name])
        for name, value in weights(joint).items()
    )


@pytest.mark.parametrize(
    ("budget", "expected"), [(1.0, 20), (1.5, 30), (9.0, 40)]
)
def test_as_many_samples_as_the_budget_allows(
    tiny_model, tiny_task, budget, expected
):
    learner = Joint(tiny_model(), SGD, JointSettings(budget=budget))
    learner.fit(tiny_task(0), Round(1, 0))
    learner.end_task(tiny_task(0), Round(0, 0))
    sizes, tasks = [], set()
    plain = learner.gradient

    def watched(batch):
        sizes.append(len(batch.index))
        tasks.update((batch.y // 2).tolist())
        return plain(batch)

    learner.gradient = watched
    learner.fit(tiny_task(1), Round(1, 1))
    assert sum(sizes) == expected
    assert tasks == {0, 1}


def test_the_bound_passes_over_everything_and_the_equal_one_does_not(
    tiny_model, tiny_task
):
    """Samples of a round, where each task has 20."""
    for kind, expected in ((Joint, [20, 40, 60]), (JointEqual, [20, 20, 20])):
        learner = kind(tiny_model(), SGD, kind.Settings())
        for number, count in enumerate(expected):
            samples = learner.training_data(tiny_task(number), Round(1, 0))
            assert len(samples) == count
            learner.fit(tiny_task(number), Round(1, 0))
            learner.end_task(tiny_task(number), Round(0, 0))


def test_nothing_is_forgotten_and_nothing_leaks(tiny_model, tiny_task):
    def client(between):
        learner = Joint(
            tiny_model(), TrainConfig(epochs=8, lr=0.02), JointSettings()
        )
        arrays, state = learner.send(), {}
        for number in range(3):
            between(learner)
            learner.load_state_dict(state)
            learner.receive(arrays)
            learner.fit(tiny_task(number), Round(1, number))
            report = learner.end_task(tiny_task(number), Round(0, number))
            arrays, state = learner.send(), learner.state_dict()
        assert report["knowledge-bytes"] == 3 * 20 * (4 * 4 + 8)
        tests = [tiny_task(number) for number in range(3)]
        scores = learner.score(
            [test.test for test in tests], [test.classes for test in tests], 64
        )
        return [right / total for right, total, _ in scores], weights(learner)

    def somebody_else(learner):
        learner.load_state_dict({})
        learner.fit(tiny_task(1, seed=3), Round(1, 5))
        learner.end_task(tiny_task(1, seed=3), Round(0, 5))

    accuracy, alone = client(lambda learner: None)
    assert min(accuracy) >= 0.9
    _, after_others = client(somebody_else)
    assert all(
        torch.equal(value, after_others[name]) for name, value in alone.items()
    )


def test_only_all_samples_are_joint():
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        JointSettings(memory=0.5)
