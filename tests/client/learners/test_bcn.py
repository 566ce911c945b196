"""BCN against formulas written out for a linear model, and the two players' directions."""

import numpy as np
import pytest
import torch
from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.bcn import Bcn, BcnSettings
from fedknow.client.learners.er import ExperienceReplay, ExperienceReplaySettings
from fedknow.client.learners.frames.learner import Batch, HeadSlice, Round
from fedknow.client.models import SplitModel
from fedknow.protocols.config import TrainConfig

SGD = TrainConfig(
    epochs=1,
    batch_size=64,
    optimizer="sgd",
    lr=0.1,
    weight_decay=0.0,
    channels_last=False,
)


def linear_model() -> SplitModel:
    model = SplitModel(nn.Flatten(), nn.Linear(2, 4, bias=False))
    with torch.no_grad():
        model.head.weight.copy_(
            torch.tensor([[0.5, -1.0], [0.25, 0.75], [1.0, 0.5], [-0.5, 1.5]])
        )
    return model


def task(number: int, x: list[list[float]]) -> TaskData:
    images = torch.tensor(x).view(-1, 1, 1, 2)
    y = torch.arange(len(x)) % 2 + 2 * number
    classes = (2 * number, 2 * number + 1)
    return TaskData(
        number,
        classes,
        tuple(range(2 * number + 2)),
        Split(images, y),
        Split(images, y),
    )


OLD, NEW = task(0, [[1.0, 0.5], [-0.5, 2.0]]), task(1, [[0.2, -1.0], [1.5, 1.0]])


def by_hand(w, beta, zeta, epsilon, theta_lr):
    """dH/dW of a linear softmax model with two slices of the head, all formulas written out."""
    x = np.concatenate(
        [NEW.train.x.numpy().reshape(-1, 2), OLD.train.x.numpy().reshape(-1, 2)]
    ).astype(float)
    y = np.concatenate([NEW.train.y.numpy(), OLD.train.y.numpy()])
    mask = np.array([[0, 0, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2)

    def error(w, x):
        e = np.exp(x @ w.T) * mask
        return e / e.sum(1, keepdims=True) - np.eye(4)[y]

    def gradient(w, x):
        return error(w, x).T @ x / len(x)

    worse = x
    for _ in range(zeta):
        g = error(w, worse) @ w
        worse = worse + epsilon * g / np.linalg.norm(g, axis=1, keepdims=True)
    better = w
    for _ in range(zeta):
        better = better - theta_lr * gradient(better, x)
    return (beta - 2) * gradient(w, x) + gradient(better, x) + gradient(w, worse)


def started(kind, settings):
    """A learner that keeps all of a finished task and is about to see a new one."""
    learner = kind(linear_model(), SGD, settings)
    initial = {
        name: value.clone() for name, value in learner.model.state_dict().items()
    }
    learner.fit(OLD, Round(1, 0))
    learner.end_task(OLD, Round(0, 0))
    learner.model.load_state_dict(initial)
    learner.begin(NEW, Round(1, 1))
    return learner


def whole_batch(data: TaskData) -> Batch:
    head = HeadSlice(data.head, 4)
    return Batch(
        data.train.x,
        head.labels(data.train.y),
        torch.arange(len(data.train)),
        head,
    )


@pytest.mark.parametrize(
    "settings", [{}, {"beta": 3.5, "zeta": 3, "epsilon": 0.2, "theta_lr": 0.3}]
)
def test_gradient_against_the_formulas(settings):
    settings = BcnSettings(memory=1.0, **settings)
    learner = started(Bcn, settings)
    w = learner.head.weight.detach().double().numpy().copy()
    loss, hits = learner.gradient(whole_batch(NEW))
    expected = by_hand(
        w, settings.beta, settings.zeta, settings.epsilon, settings.theta_lr
    )
    assert learner.head.weight.grad.numpy() == pytest.approx(
        expected, rel=1e-4, abs=1e-6
    )
    z = torch.from_numpy(w).float() @ NEW.train.x.flatten(1).T
    assert loss == pytest.approx(
        nn.functional.cross_entropy(z.T[:, 2:], NEW.train.y - 2).item(), rel=1e-5
    )
    assert hits == int((z.T[:, 2:].argmax(1) == NEW.train.y - 2).sum())


def test_the_players_push_the_cost_their_ways(tiny_model, tiny_task):
    learner = Bcn(
        tiny_model(),
        SGD,
        BcnSettings(memory=0.5, zeta=3, epsilon=0.05, theta_lr=0.05),
    )
    assert learner.fit(tiny_task(0), Round(1, 0))["ascent"] == 0.0
    learner.end_task(tiny_task(0), Round(0, 0))
    report = learner.fit(tiny_task(1), Round(1, 1))
    assert report["ascent"] > 0.01
    assert report["descent"] > 0.001


def test_players_that_stand_still_leave_beta_times_experience_replay():
    """With steps of next to nothing x' = x and theta_B = theta, and dH = beta dJ."""
    bcn = started(
        Bcn, BcnSettings(memory=1.0, beta=1.5, epsilon=1e-7, theta_lr=1e-7)
    )
    er = started(ExperienceReplay, ExperienceReplaySettings(memory=1.0))
    bcn.gradient(whole_batch(NEW))
    er.gradient(whole_batch(NEW))
    assert torch.allclose(
        bcn.head.weight.grad, 1.5 * er.head.weight.grad, atol=1e-6
    )


@pytest.mark.parametrize("exchange", ["all", "body", "none"])
def test_interrupted_or_not_and_whoever_was_here_before(
    assert_interruptions_do_not_matter, tiny_model, tiny_task, exchange
):
    train = SGD.model_copy(
        update={"batch_size": 8, "optimizer": "adam", "lr": 1e-2}
    )
    settings = BcnSettings(exchange=exchange, memory=0.3)
    assert_interruptions_do_not_matter(
        lambda: Bcn(tiny_model(), train, settings), tiny_task
    )
