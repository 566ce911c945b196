"""APFL: one step of both models and of the share against the formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.apfl import Apfl, ApflSettings
from fedknow.client.learners.frames.learner import Round
from fedknow.client.learners.frames.scoring import logits
from fedknow.client.models import SplitModel
from fedknow.protocols.config import TrainConfig

SGD = TrainConfig(
    epochs=1,
    batch_size=8,
    optimizer="sgd",
    lr=0.5,
    weight_decay=0.0,
    channels_last=False,
)
BODY = np.array([[0.5, -1.0], [0.25, 0.75]])
HEAD = np.array([[1.0, 0.5], [-0.5, 1.5]])
X = np.array([[1.0, 0.5], [-0.5, 2.0], [2.0, -1.0]])
Y = np.array([0, 1, 1])


def linear_model():
    model = SplitModel(
        nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)),
        nn.Linear(2, 2, bias=False),
    )
    with torch.no_grad():
        model.body[1].weight.copy_(torch.tensor(BODY))
        model.head.weight.copy_(torch.tensor(HEAD))
    return model


def task():
    split = Split(
        torch.tensor(X, dtype=torch.float32).view(-1, 1, 1, 2), torch.tensor(Y)
    )
    return TaskData(0, (0, 1), (0, 1), split, split)


def gradients(body, head):
    """Of the mean cross-entropy of softmax(head body x)."""
    features = X @ body.T
    e = np.exp(features @ head.T)
    error = (e / e.sum(1, keepdims=True) - np.eye(2)[Y]) / len(Y)
    return (error @ head).T @ X, error.T @ features


def received(learner, shift):
    """The shared model is no longer the personal one."""
    learner.receive(
        {name: value + shift for name, value in learner.send().items()}
    )


def test_one_step_by_hand():
    learner = Apfl(linear_model(), SGD, ApflSettings(alpha=0.25, alpha_lr=0.2))
    received(learner, 0.1)
    v, w = (BODY, HEAD), (BODY + 0.1, HEAD + 0.1)
    m = [0.25 * a + 0.75 * b for a, b in zip(v, w, strict=True)]
    at_w, at_m = gradients(*w), gradients(*m)
    learner.fit(task(), Round(1, 0))
    for sent, old, g in zip(learner.send().values(), w, at_w, strict=True):
        assert sent.numpy() == pytest.approx(old - 0.5 * g, rel=1e-5)
    own = learner.state_dict()["own"]
    for new, old, g in zip(own.values(), v, at_m, strict=True):
        assert new.numpy() == pytest.approx(old - 0.5 * 0.25 * g, rel=1e-5)
    slope = sum(((a - b) * g).sum() for a, b, g in zip(v, w, at_m, strict=True))
    assert learner.alpha == pytest.approx(0.25 - 0.2 * slope, rel=1e-5)
    assert learner.counts() == {"alpha": learner.alpha}


def test_the_share_moves_once_a_round_and_not_out_of_bounds():
    many = SGD.model_copy(update={"epochs": 4})
    once, more = (
        Apfl(linear_model(), train, ApflSettings(alpha=0.5))
        for train in (SGD, many)
    )
    for learner in (once, more):
        received(learner, 0.1)
        learner.fit(task(), Round(1, 0))
    assert once.alpha == more.alpha != 0.5
    far = Apfl(linear_model(), SGD, ApflSettings(alpha=0.5, alpha_lr=1e4))
    received(far, 0.1)
    far.fit(task(), Round(1, 0))
    assert far.alpha in (0.0, 1.0)
    fixed = Apfl(linear_model(), SGD, ApflSettings(alpha=0.5, adaptive=False))
    received(fixed, 0.1)
    fixed.fit(task(), Round(1, 0))
    assert fixed.alpha == 0.5


def test_the_personal_model_is_what_a_client_keeps():
    learner = Apfl(linear_model(), SGD, ApflSettings())
    assert learner.end_task(task(), Round(0, 0)) == {
        "knowledge-bytes": 4.0 * (BODY.size + HEAD.size)
    }
    assert learner.has_trained(0)


@settings(deadline=None, max_examples=20)
@given(alpha=st.floats(0, 1))
def test_predictions_mix_the_parameters(alpha):
    learner = Apfl(linear_model(), SGD, ApflSettings(alpha=alpha))
    received(learner, 0.3)
    body, head = (a + (1 - alpha) * 0.3 for a in (BODY, HEAD))
    z = logits(learner, task().train.x, 2).numpy()
    assert z == pytest.approx(X @ body.T @ head.T, rel=1e-4, abs=1e-5)
    learner.load_local_parameters(learner.local_parameters())
    assert logits(learner, task().train.x, 2).numpy() == pytest.approx(
        X @ (BODY + 0.3).T @ (HEAD + 0.3).T, rel=1e-4, abs=1e-5
    )


def test_running_statistics_of_either_model_are_its_own(tiny_model, tiny_task):
    learner = Apfl(tiny_model(norm=True), TrainConfig(), ApflSettings())
    received(learner, 0.5)
    learner.fit(tiny_task(0), Round(1, 0))
    name = "body.3.running_mean"
    assert not torch.equal(
        learner.send()[name], learner.state_dict()["own"][name]
    )
    assert (
        learner.model.state_dict()["body.3.num_batches_tracked"] == 4
    )  # two epochs of two batches, shared model only


def test_state_comes_back_and_nothing_leaks(tiny_model, tiny_task):
    def ends(between):
        learner = Apfl(
            tiny_model(norm=True, dropout=0.3), TrainConfig(), ApflSettings()
        )
        arrays = learner.send()
        state = {}
        for number in (1, 2):
            between(learner)
            learner.load_state_dict(state)
            learner.receive(arrays)
            learner.fit(tiny_task(0), Round(number, number))
            arrays, state = learner.send(), learner.state_dict()
        return [
            *arrays.values(),
            *state["own"].values(),
            torch.tensor(state["alpha"]),
        ]

    def somebody_else(learner):
        learner.load_state_dict({})
        received(learner, 0.2)
        learner.fit(tiny_task(1, seed=5), Round(1, 9))
        learner.load_local_parameters(learner.local_parameters())

    assert all(
        torch.equal(a, b)
        for a, b in zip(
            ends(lambda learner: None), ends(somebody_else), strict=True
        )
    )
