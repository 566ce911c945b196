"""FLCN: the penalty of a step against the formula, the samples given away, and importance against
its definition."""

import numpy as np
import pytest
import torch
from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.baselines import Finetune
from fedknow.client.learners.flcn import Flcn, FlcnSettings
from fedknow.client.learners.frames.learner import Round
from fedknow.client.models import SplitModel
from fedknow.protocols.config import TrainConfig
from fedknow.strategies.flcn import Sample, importance

SGD = TrainConfig(
    epochs=2,
    batch_size=8,
    optimizer="sgd",
    lr=0.1,
    weight_decay=0.0,
    channels_last=False,
)
WEIGHT = np.array([[0.5, -1.0], [0.25, 0.75], [1.0, 0.5], [-0.5, 1.5]])
X = np.array([[1.0, 0.5], [-0.5, 2.0], [2.0, -1.0]])
Y = np.array([2, 3, 3])


def linear_model():
    model = SplitModel(nn.Flatten(), nn.Linear(2, 4, bias=False))
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor(WEIGHT))
    return model


def task(number=1):
    split = Split(
        torch.tensor(X, dtype=torch.float32).view(-1, 1, 1, 2), torch.tensor(Y)
    )
    return TaskData(number, (2, 3), (0, 1, 2, 3), split, split)


def error(weight):
    """softmax over the slice minus the truth, float [samples, classes]."""
    e = np.exp(X @ weight.T) * np.array([0, 0, 1, 1])
    return e / e.sum(1, keepdims=True) - np.eye(4)[Y]


def test_two_steps_by_hand():
    """The first step has no penalty, for w = w_G; the second has 2 lambda Omega (w - w_G)."""
    omega = np.arange(8.0).reshape(4, 2) / 4
    learner = Flcn(linear_model(), SGD, FlcnSettings(strength=3.0))
    learner.receive_extra(
        {"head.weight": torch.tensor(omega, dtype=torch.float32)}
    )
    learner.fit(task(), Round(1, 0))
    w = WEIGHT - 0.1 * error(WEIGHT).T @ X / 3
    w = w - 0.1 * (error(w).T @ X / 3 + 2 * 3.0 * omega * (w - WEIGHT))
    assert learner.send()["head.weight"].numpy() == pytest.approx(w, rel=1e-5)


def test_without_proxy_data_it_is_fedavg():
    learner = Flcn(linear_model(), SGD, FlcnSettings(strength=1e6))
    plain = Finetune(linear_model(), SGD, Finetune.Settings())
    for one in (learner, plain):
        one.fit(task(), Round(1, 0))
    assert torch.equal(learner.send()["head.weight"], plain.send()["head.weight"])


def test_importance_by_its_definition():
    """d log p(y | x) / dW of a linear model is (e_y - p) x^T, in the sample's slice of the head."""
    learner = Flcn(linear_model(), SGD, FlcnSettings())
    samples = [
        Sample(x, int(y), (2, 3)) for x, y in zip(task().train.x, Y, strict=True)
    ]
    expected = np.mean(
        [np.outer(e, x) ** 2 for e, x in zip(error(WEIGHT), X, strict=True)],
        axis=0,
    )
    assert importance(learner, samples)["head.weight"].numpy() == pytest.approx(
        expected, rel=1e-5
    )


def test_samples_are_given_once_a_task(tiny_model, tiny_task):
    learner = Flcn(tiny_model(), TrainConfig(), FlcnSettings(proxy=0.2))
    data = tiny_task(1)
    learner.fit(data, Round(1, 3))
    shared = learner.share(data, Round(1, 3), ended=False)
    layout = learner.shares(ended=False)
    assert {
        name: (str(value.numpy().dtype), value.dim())
        for name, value in shared.items()
    } == {name: (dtype, len(shape)) for name, (dtype, shape) in layout.items()}
    assert len(shared["y"]) == 4
    assert sorted(shared["y"].tolist()) == [2, 2, 3, 3]
    assert shared["classes"].tolist() == [2, 3]
    assert all(
        any(torch.equal(x, other) for other in data.train.x) for x in shared["x"]
    )
    state = learner.state_dict()
    learner.load_state_dict({})  # another client, which has given nothing yet
    assert learner.share(data, Round(1, 3), ended=False)
    learner.load_state_dict(state)
    assert learner.share(data, Round(2, 4), ended=False) == {}
    assert learner.share(tiny_task(2), Round(1, 5), ended=False)
    assert learner.share(tiny_task(3), Round(0, 5), ended=True) == {}


def test_importance_does_not_leak_to_the_next_client(tiny_model, tiny_task):
    fresh = Flcn(tiny_model(), SGD, FlcnSettings())
    used = Flcn(tiny_model(), SGD, FlcnSettings())
    arrays = used.send()
    used.receive_extra(
        {name: torch.ones_like(p) for name, p in used.model.named_parameters()}
    )
    used.fit(tiny_task(1), Round(1, 1))
    used.load_state_dict({})
    used.receive(arrays)
    for learner in (fresh, used):
        learner.fit(tiny_task(0), Round(1, 2))
    assert all(
        torch.equal(value, used.send()[name])
        for name, value in fresh.send().items()
    )


def test_importance_that_does_not_fit_is_refused(tiny_model):
    learner = Flcn(tiny_model(), SGD, FlcnSettings())
    with pytest.raises(ValueError, match="1 tensor do not fit"):
        learner.receive_extra({"head.weight": torch.zeros(3)})
