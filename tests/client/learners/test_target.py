"""TARGET, both halves: the distillation by hand, images the teacher knows, and who is told what."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedknow.client.data.samples import SampleSpec
from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners import build_learner, resolve
from fedknow.client.learners.frames.learner import Batch, HeadSlice, Round
from fedknow.client.learners.frames.scoring import logits
from fedknow.client.learners.target import Target, TargetSettings, distillation
from fedknow.client.models import SplitModel
from fedknow.protocols.config import ConfigError, TrainConfig, read_config
from fedknow.protocols.messages import EXTRA, Arrays, Message
from fedknow.server.run.folder import RunFolder
from fedknow.simulations import simulate as simulations
from fedknow.simulations.simulate import simulate
from fedknow.strategies import build_strategy
from fedknow.strategies.paired import Setup
from fedknow.strategies.synthesis import (
    Generator,
    SynthesisEffort,
    statistics_gap,
    synthesize,
)

SGD = TrainConfig(
    epochs=1,
    batch_size=64,
    optimizer="sgd",
    lr=0.1,
    weight_decay=0.0,
    channels_last=False,
)


def test_distillation_by_hand():
    """Answers 1 : 3 at T = 1, learned as 1 : 1: cross-entropy log 2, whatever a class of no slice
    says."""
    z, target = (
        torch.tensor([[0.0, 9.0, 0.0]]),
        torch.tensor([[0.0, -5.0, math.log(3)]]),
    )
    assert distillation(
        z, target, [torch.tensor([0, 2])], 1.0
    ).item() == pytest.approx(math.log(2))
    # At T = 2 the answers are 1 : sqrt 3, and z = 2 log 4 softens to 1 : 4.
    z[0, 2] = 2 * math.log(4)
    p = math.sqrt(3) / (1 + math.sqrt(3))
    expected = -(1 - p) * math.log(1 / 5) - p * math.log(4 / 5)
    assert distillation(
        z, target, [torch.tensor([0, 2])], 2.0
    ).item() == pytest.approx(expected, rel=1e-5)
    both = distillation(z, target, [torch.tensor([0, 2]), torch.tensor([1])], 2.0)
    assert both.item() == pytest.approx(
        expected / 2, rel=1e-5
    )  # one class alone: nothing to tell apart


def linear(classes: int = 4) -> SplitModel:
    model = SplitModel(nn.Flatten(), nn.Linear(2, classes, bias=False))
    with torch.no_grad():
        model.head.weight.copy_(
            torch.tensor([[0.5, -1.0], [0.25, 0.75], [1.0, 0.5], [-0.5, 1.5]])[
                :classes
            ]
        )
    return model


def two_samples(number: int, incremental: bool) -> TaskData:
    x, y = (
        torch.tensor([[0.2, -1.0], [1.5, 1.0]]).view(-1, 1, 1, 2),
        torch.tensor([0, 1]) + 2 * number,
    )
    classes = (2 * number, 2 * number + 1)
    return TaskData(
        number,
        classes,
        tuple(range(2 * number + 2)),
        Split(x, y),
        Split(x, y),
        incremental,
    )


@pytest.mark.parametrize("incremental", [False, True])
def test_gradient_against_autograd_of_the_paper_s_loss(incremental):
    learner = Target(linear(), SGD, TargetSettings(distill=3.0))
    images = torch.tensor([[1.0, 0.5], [-0.5, 2.0]]).view(-1, 1, 1, 2)
    logits = torch.tensor([[0.3, -0.2], [1.0, 0.0]])
    pool = {
        "x": images,
        "logits": logits,
        "classes": torch.tensor([0, 1]),
        "slice": torch.tensor([0, 0]),
    }
    learner.receive_extra(pool)
    data = two_samples(1, incremental)
    learner.begin(data, Round(1, 0))
    head = HeadSlice(data.head, 4)
    batch = Batch(data.train.x, head.labels(data.train.y), torch.arange(2), head)
    loss, _ = learner.gradient(batch)

    w = learner.head.weight.detach().clone().requires_grad_()
    new = F.cross_entropy(data.train.x.flatten(1) @ w[2:].T, data.train.y - 2)
    kept = (
        -(
            (logits / 2).softmax(1)
            * (images.flatten(1) @ w[:2].T / 2).log_softmax(1)
        )
        .sum(1)
        .mean()
    )
    (new + 3.0 * kept).backward()
    assert torch.allclose(learner.head.weight.grad, w.grad, atol=1e-6)
    assert loss == pytest.approx(new.item(), rel=1e-5)
    with pytest.raises(ValueError, match="do not fit together"):
        learner.receive_extra({"x": images})


def moved(model, tiny_task, distill):
    """How far the first task's answers move while the second is learned, mean over test samples."""
    learner = Target(
        model,
        TrainConfig(epochs=5, batch_size=8, lr=1e-2),
        TargetSettings(distill=distill),
    )
    for number in range(3):
        learner.fit(tiny_task(0), Round(1 + number, number))
    x = tiny_task(0).test.x
    before = logits(learner, x, 64)[:, :2].softmax(1)
    pool = tiny_task(0, seed=1).train.x
    answers = logits(learner, pool, 64)[:, :2].clone()
    classes = torch.tensor([0, 1])
    learner.receive_extra(
        {
            "x": pool,
            "logits": answers,
            "classes": classes,
            "slice": torch.zeros(2).long(),
        }
    )
    for number in range(5):
        learner.fit(tiny_task(1), Round(1 + number, number))
    return (logits(learner, x, 64)[:, :2].softmax(1) - before).abs().mean().item()


def test_answers_are_kept(tiny_model, tiny_task):
    """Trained on another task, a model forgets the first one's answers less with the pool than
    without."""
    ratios = []
    for seed in range(3):
        without, kept = (
            moved(tiny_model(seed), tiny_task, distill) for distill in (0.0, 25.0)
        )
        ratios.append(kept / without)
    assert sum(ratios) / 3 < 0.5


def test_the_teacher_takes_images_for_what_they_were_made_for():
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 25, 16),
    )
    teacher = SplitModel(body, nn.Linear(16, 6))
    teacher(torch.randn(64, 1, 7, 7))
    teacher.eval().requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    slices = [torch.tensor([0, 1]), torch.tensor([3, 5])]
    images, labels = synthesize(
        teacher, (1, 7, 7), slices, SynthesisEffort(100, 60, 5, 2.0)
    )
    assert images.shape == (100, 1, 7, 7)
    assert set(labels.tolist()) == {0, 1, 3, 5}
    z = teacher(images)
    for part in slices:
        of = torch.isin(labels, part)
        told = part[z[of][:, part].argmax(1)]
        assert (told == labels[of]).float().mean() > 0.95
    assert all(
        torch.equal(value, before[name])
        for name, value in teacher.state_dict().items()
    )
    assert Generator((3, 9, 14))(torch.randn(2, 64)).shape == (2, 3, 9, 14)


def test_gap_between_statistics_by_hand():
    """Mean 1 and variance 4 against 0 and 1 of the samples: |0 - 1| + |1 - 4| = 4."""
    norm = nn.BatchNorm2d(1).eval()
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(4.0)
    with statistics_gap(norm) as gaps:
        norm(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
    assert [gap.item() for gap in gaps] == [4.0]
    assert not norm._forward_pre_hooks


BASE = {
    "data": {
        "clients": 3,
        "tasks": 3,
        "classes_per_task": 2,
        "classes_max": 2,
        "test_samples": 0.5,
    },
    "model": {"name": "cnn", "channels": 4, "hidden": 16},
    "train": {"rounds": 2, "epochs": 1, "batch_size": 16, "lr": 1e-2},
    "learner": {
        "name": "target",
        "samples": 32,
        "generator_steps": 2,
        "student_steps": 1,
    },
    "engine": {"backend": "inline"},
}


@pytest.mark.parametrize("scenario", ["class-incremental", "task-incremental"])
def test_each_client_is_told_once_a_task_and_bytes_are_counted(
    tmp_path, monkeypatch, scenario
):
    monkeypatch.setattr(simulations, "write_report", lambda *_: None)
    config = resolve(read_config(BASE, [f"data.scenario={scenario}"]))
    run = RunFolder.open(simulate(config, tmp_path / "run").folder)
    ends = [
        event["knowledge_bytes"]
        for event in run.events()
        if event["event"] == "task_end"
    ]
    # 32 images of 8 x 8, answers for the classes of past tasks, and for each class its label
    # and slice.
    pools = [32 * 4 * 64 + 32 * 4 * k + 8 * 2 * k for k in (2, 4)]
    assert ends == [0.0, *pools]


def test_a_resumed_strategy_goes_on_where_it_was(tiny_task):
    config = resolve(read_config(BASE))
    learner = build_learner(config, (1, 8, 8), 10)

    def made():
        strategy = build_strategy(config.strategy, 3)
        strategy.prepare(Setup(config, learner, _Stream()))
        return strategy

    first = made()
    arrays = Arrays(
        (name, value.numpy()) for name, value in learner.send().items()
    )
    replies = [
        Message(
            "train.end_task", node, "", content={EXTRA: Arrays({"classes": c})}
        )
        for node, c in enumerate(
            [torch.tensor([1, 0]).numpy(), torch.tensor([0, 1]).numpy()], start=2
        )
    ]
    assert first.extra(0, 0) is None
    first.aggregate_end_task(0, arrays, replies)
    second = made()
    second.load_state_dict(first.state_dict())
    pool, again = first.extra(1, 0), second.extra(1, 2)
    assert pool.keys() == again.keys() == {"x", "logits", "classes", "slice"}
    assert all((pool[name] == again[name]).all() for name in pool)
    assert pool["classes"].tolist() == [0, 1]
    assert first.extra(1, 1) is pool  # one object for all
    with pytest.raises(ConfigError, match=r"set learner\.name = 'target'"):
        first.prepare(
            Setup(
                config, build_learner(read_config({}), (1, 8, 8), 10), _Stream()
            )
        )


class _Stream:
    spec = SampleSpec("image", (1, 8, 8), "uint8")
