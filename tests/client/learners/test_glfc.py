"""GLFC: weights and a step by hand, and what its two losses hold."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners import resolve
from fedknow.client.learners.frames.learner import Round
from fedknow.client.learners.glfc import Glfc, GlfcSettings, compensation
from fedknow.client.models import SplitModel
from fedknow.protocols.config import ConfigError, TrainConfig, read_config

SGD = TrainConfig(
    epochs=1,
    batch_size=64,
    optimizer="sgd",
    lr=1.0,
    weight_decay=0.0,
    channels_last=False,
)


def logit(p):
    return torch.tensor(p).logit()


def test_weights_by_hand():
    """Pulls 0.5 and 0.1 of old samples, 0.6 of the new one: over 0.3 and over 0.6."""
    z = logit([[0.5, 0.2, 0.3], [0.2, 0.9, 0.3], [0.2, 0.2, 0.4]])
    is_old = torch.tensor([True, True, False])
    weights = compensation(z, torch.tensor([0, 1, 2]), is_old)
    assert weights.tolist() == pytest.approx([5 / 3, 1 / 3, 1.0])
    # One group alone, and one that is told perfectly.
    alone = compensation(z[:2], torch.tensor([0, 1]), is_old[:2])
    assert alone.tolist() == pytest.approx([5 / 3, 1 / 3])
    sure = torch.full((2, 1), 200.0)
    told = compensation(sure, torch.tensor([0, 0]), is_old[:2])
    assert told.tolist() == [1.0, 1.0]


def test_a_step_by_hand():
    """One new sample x = 2 of label 2 under a head of zeros; the old model says 3/4 and 1/4.

    Both terms: (p - target) / 3 by the logits. Compensated: weight 1, target (0, 0, 1). Distilled:
    target (3/4, 1/4, 1).
    """
    model = SplitModel(nn.Flatten(), nn.Linear(1, 3))
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    options = GlfcSettings(compensate=0.5, distill=0.25, memory=1.0)
    learner = Glfc(model, SGD, options)
    learner.old = {
        "head.weight": torch.zeros(3, 1),
        "head.bias": logit([0.75, 0.25, 0.5]),
    }
    learner.old_classes = [0, 1]
    split = Split(torch.full((1, 1, 1, 1), 2.0), torch.tensor([2]))
    task = TaskData(1, (2,), (0, 1, 2), split, split, True)
    learner.fit(task, Round(1, 1))
    gradient = [
        (0.5 * 0.5 + 0.25 * (0.5 - 0.75)) / 3,
        (0.5 * 0.5 + 0.25 * (0.5 - 0.25)) / 3,
        (0.5 * -0.5 + 0.25 * -0.5) / 3,
    ]
    assert model.head.bias.tolist() == pytest.approx([-g for g in gradient])
    assert model.head.weight.flatten().tolist() == pytest.approx(
        [-2 * g for g in gradient]
    )


def test_a_step_is_on_the_union_of_task_and_memory(tiny_model, tiny_task):
    """Against autograd, with samples stored of the first task and the old model's answers."""
    options = GlfcSettings(memory=0.5, exchange="all")
    learner = Glfc(tiny_model(), SGD, options)
    first, second = (tiny_task(t, incremental=True) for t in (0, 1))
    learner.end_task(first, Round(0, 3))
    stored = learner.memory.tasks[0]
    old = tiny_model()
    old.load_state_dict(learner.old)
    model = tiny_model()
    model.load_state_dict(learner.model.state_dict())
    x = torch.cat([stored.x, second.train.x])
    y = torch.cat([stored.y, second.train.y])
    z = model(x)[:, :4]
    target = F.one_hot(y, 4).float()
    weights = compensation(z, y, y < 2)
    each = F.binary_cross_entropy_with_logits(z, target, reduction="none")
    mixed = target.clone()
    mixed[:, :2] = old(x)[:, :2].sigmoid().detach()
    distilled = F.binary_cross_entropy_with_logits(z, mixed)
    (0.5 * (weights * each.mean(1)).mean() + 0.5 * distilled).backward()
    learner.fit(second, Round(1, 1))
    after = dict(learner.model.named_parameters())
    for name, parameter in model.named_parameters():
        expected = parameter - parameter.grad
        torch.testing.assert_close(after[name], expected, atol=1e-5, rtol=1e-5)


def test_distillation_holds_old_answers(tiny_model, tiny_task):
    """With lambda_2 large, answers to old classes stay nearer to the old model's."""
    gaps = []
    train = TrainConfig(epochs=30, batch_size=64, lr=0.01)
    for distill in (0.0, 20.0):
        options = GlfcSettings(memory=0.1, distill=distill, exchange="all")
        learner = Glfc(tiny_model(), train, options)
        first, second = (tiny_task(t, incremental=True) for t in (0, 1))
        learner.fit(first, Round(1, 1))
        learner.end_task(first, Round(0, 1))
        learner.model.eval()
        before = learner.model(second.test.x)[:, :2].sigmoid().detach()
        learner.fit(second, Round(1, 2))
        learner.model.eval()
        after = learner.model(second.test.x)[:, :2].sigmoid().detach()
        gaps.append((after - before).abs().mean().item())
    assert gaps[1] < gaps[0] / 2


def test_what_is_kept_is_counted(tiny_model, tiny_task):
    learner = Glfc(tiny_model(), SGD, GlfcSettings(memory=0.5))
    report = learner.end_task(tiny_task(0, incremental=True), Round(0, 1))
    model = sum(p.nbytes for p in learner.model.parameters())
    assert report == {"knowledge-bytes": 10 * (16 + 8) + model}


def test_tasks_with_names_are_refused():
    with pytest.raises(ConfigError, match="'glfc' is not made for"):
        resolve(read_config({}, ["learner=glfc"]))


def test_state_on_disk_does_not_matter(
    tiny_model, tiny_task, assert_interruptions_do_not_matter
):
    train = TrainConfig(epochs=2, batch_size=8, lr=0.01)

    def build():
        model = tiny_model(dropout=0.5, norm=True)
        return Glfc(model, train, GlfcSettings())

    assert_interruptions_do_not_matter(
        build, lambda t, seed=0: tiny_task(t, seed=seed, incremental=True)
    )
