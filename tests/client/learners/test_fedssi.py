"""FedSSI: importance by hand, and what the path of the surrogate model adds up to."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.fedssi import FedSsi, FedSsiSettings
from fedknow.client.learners.frames.learner import Round
from fedknow.client.models import SplitModel
from fedknow.protocols.config import TrainConfig

SGD = TrainConfig(
    epochs=1,
    batch_size=64,
    optimizer="sgd",
    lr=1.0,
    weight_decay=0.0,
    channels_last=False,
)


def small():
    """x = 2 of label 0, under a head of zeros: p = (1/2, 1/2)."""
    model = SplitModel(nn.Flatten(), nn.Linear(1, 2))
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    split = Split(torch.full((1, 1, 1, 1), 2.0), torch.tensor([0]))
    return model, TaskData(0, (0, 1), (0, 1), split, split)


def test_importance_by_hand():
    """eta = 0.1. Gradients: weights (-1, 1), biases (-1/2, 1/2).

    Steps: (0.1, -0.1) and (0.05, -0.05). s: 0.1 each and 0.025 each. With epsilon = 0.09 Omega is
    0.1 / (0.01 + 0.09) = 1 and 0.025 / (0.0025 + 0.09).
    """
    model, task = small()
    options = FedSsiSettings(surrogate_lr=0.1, damping=0.09)
    omega = FedSsi(model, SGD, options).measure(task, Round(0, 1))
    assert omega["head.weight"].flatten().tolist() == pytest.approx([1, 1])
    assert omega["head.bias"].tolist() == pytest.approx([0.025 / 0.0925] * 2)


def test_two_steps_against_the_formulas(tiny_model, tiny_task):
    """Also the pull to the global model, which is nothing in the first step."""
    options = FedSsiSettings(
        surrogate_lr=0.1, surrogate_epochs=2, balance=0.2, damping=0.01
    )
    learner = FedSsi(tiny_model(), SGD, options)
    assert learner.pull == pytest.approx(2.0)
    learner.model.eval()
    task = tiny_task(0)
    omega = learner.measure(task, Round(0, 1))
    model = tiny_model()
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    s = {n: torch.zeros_like(p) for n, p in w.items()}
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(task.train.x)[:, :2], task.train.y).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                step = -0.1 * (p.grad + 2.0 * (p - w[name]))
                s[name] -= p.grad * step
                p += step
    for name, p in model.named_parameters():
        expected = s[name].clamp_min(0) / ((p - w[name]) ** 2 + 0.01)
        torch.testing.assert_close(
            omega[name], expected.detach(), atol=1e-6, rtol=1e-4
        )


def test_the_path_adds_up_to_what_the_loss_fell(tiny_model, tiny_task):
    """What synaptic intelligence is: sum_j s_j = L(w) - L(v), for small steps on all samples."""
    task = tiny_task(0)
    options = FedSsiSettings(
        surrogate_lr=1e-3, surrogate_epochs=300, balance=0.999
    )
    learner = FedSsi(tiny_model(), SGD, options)
    learner.model.eval()
    path, end = learner.follow(task, Round(0, 1))
    model = tiny_model()

    def loss():
        return F.cross_entropy(model(task.train.x)[:, :2], task.train.y).item()

    before = loss()
    model.load_state_dict(end)
    fell = before - loss()
    assert fell > 0.01
    assert sum(s.sum().item() for s in path.values()) == pytest.approx(
        fell, rel=0.02
    )


def test_a_global_surrogate_moves_less_than_a_local_one(tiny_model, tiny_task):
    moved = []
    for balance in (0.02, 0.5, 0.98):
        options = FedSsiSettings(
            balance=balance, surrogate_epochs=50, surrogate_lr=0.05
        )
        learner = FedSsi(tiny_model(), SGD, options)
        learner.model.eval()
        _, end = learner.follow(tiny_task(0), Round(0, 1))
        gaps = [(end[n] - p).norm() for n, p in learner.model.named_parameters()]
        moved.append(torch.stack(gaps).norm().item())
    assert moved == sorted(moved)
    assert moved[0] < moved[2] / 3


def test_measuring_leaves_the_model_alone_and_forgetting_costs(
    tiny_model, tiny_task
):
    learner = FedSsi(tiny_model(dropout=0.5, norm=True), SGD, FedSsiSettings())
    learner.fit(tiny_task(0), Round(1, 1))
    shared = learner.send()
    report = learner.end_task(tiny_task(0), Round(0, 1))
    after = learner.send()
    assert all(torch.equal(shared[n], after[n]) for n in shared)
    size = sum(p.nbytes for p in learner.model.parameters())
    assert report["knowledge-bytes"] == 2 * size
    assert learner.penalty() == 0
    learner.fit(tiny_task(1), Round(1, 2))
    assert learner.penalty() > 0


def test_state_on_disk_does_not_matter(
    tiny_model, tiny_task, assert_interruptions_do_not_matter
):
    train = TrainConfig(epochs=2, batch_size=8, lr=0.01)

    def build():
        model = tiny_model(dropout=0.5, norm=True)
        return FedSsi(model, train, FedSsiSettings())

    assert_interruptions_do_not_matter(build, tiny_task)
