"""FedProx: its mu reaches the strategy, and from there the clients; the term by hand, and where it
pulls."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners import resolve
from fedknow.client.learners.baselines import FedPer, FedProx
from fedknow.client.learners.frames.learner import Round
from fedknow.client.models import SplitModel
from fedknow.protocols.config import ConfigError, TrainConfig, read_config
from fedknow.strategies import build_strategy

TWO_STEPS = TrainConfig(
    epochs=2,
    batch_size=64,
    optimizer="sgd",
    lr=0.5,
    weight_decay=0.0,
    channels_last=False,
)


@pytest.mark.parametrize("mu", [0.0, 1.0, 4.0])
def test_proximal_term_by_hand(mu):
    """One weight w, which is 1 in the global model; a head that stands still has the logits (w -
    1, 1 - w) at x = 1.

    The loss of class 0 is log(1 + e^(-2 (w - 1))), its slope -2 / (1 + e^(2 (w - 1))). First
    step: the slope is -1, and there is no pull at w = w_G: w = 1 + 1/2. Second step: the slope
    is -2 / (1 + e), the pull mu (w - w_G) = mu / 2: w = 3/2 + 1 / (1 + e) - mu / 4.
    """
    body, head = nn.Linear(1, 1, bias=False), nn.Linear(1, 2)
    nn.init.ones_(body.weight)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        head.bias.copy_(torch.tensor([-1.0, 1.0]))
    head.requires_grad_(False)
    sample = Split(torch.ones(1, 1), torch.tensor([0]))
    learner = FedProx(SplitModel(body, head), TWO_STEPS, FedProx.Settings())
    learner.fit(
        TaskData(0, (0, 1), (0, 1), sample, sample), Round(1, 0, proximal_mu=mu)
    )
    assert body.weight.item() == pytest.approx(
        1.5 + 1 / (1 + math.e) - mu / 4, rel=1e-6
    )


@pytest.mark.parametrize("kind", [FedProx, FedPer])
@given(seed=st.integers(0, 1000), mu=st.floats(0.01, 10))
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_what_was_received_pulls_and_what_is_personal_is_left_alone(
    tiny_model, tiny_task, kind, seed, mu
):
    """Two steps with the term are two steps without it, less lr mu (w_1 - w_G) where w travels."""

    def trained(epochs, mu):
        train = TWO_STEPS.model_copy(update={"epochs": epochs})
        learner = kind(tiny_model(seed=seed).double(), train, kind.Settings())
        task = tiny_task(0, seed=seed)
        split = Split(task.train.x.double(), task.train.y)
        learner.fit(
            TaskData(0, task.classes, task.seen, split, split),
            Round(1, 1, proximal_mu=mu),
        )
        return {
            name: (p.detach(), learner.entries.travels(name))
            for name, p in learner.model.named_parameters()
        }

    start, one, plain, near = (
        trained(0, 0.0),
        trained(1, mu),
        trained(2, 0.0),
        trained(2, mu),
    )
    for name, (value, travels) in near.items():
        pull = 0.5 * mu * (one[name][0] - start[name][0]) if travels else 0.0
        assert torch.allclose(value, plain[name][0] - pull, atol=1e-12), name


def test_mu_reaches_the_strategy():
    config = read_config(
        {},
        ["learner=fedprox", "learner.proximal_mu=0.5", "strategy.fraction=0.25"],
    )
    resolved = resolve(config)
    assert resolved.strategy.model_dump() == {
        "name": "fedprox",
        "fraction": 0.25,
        "proximal_mu": 0.5,
    }
    assert resolve(resolved) == resolved
    strategy = build_strategy(resolved.strategy)
    assert (strategy.proximal_mu, strategy.fraction_train) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["strategy=fedadam"],
            [
                "strategy.name = 'fedadam'",
                "learner.name = 'fedprox'",
                "leave strategy.name out",
            ],
        ),
        (
            ["strategy=fedprox", "strategy.proximal_mu=2"],
            ["strategy.proximal_mu = 2", "learner.proximal_mu = 0.01"],
        ),
    ],
)
def test_what_contradicts_is_refused(changes, words):
    with pytest.raises(ConfigError) as error:
        resolve(read_config({}, ["learner=fedprox", *changes]))
    assert all(word in str(error.value) for word in words)
