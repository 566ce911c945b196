"""Experience replay: the step by hand, and how much of the memory it trains on."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.er import ExperienceReplay, ExperienceReplaySettings
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


def test_a_step_by_hand():
    """The mean over a new sample in its slice and an old one in its own, at logits of zero."""
    model = SplitModel(
        nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False)), nn.Linear(1, 4)
    )
    with torch.no_grad():
        model.body[1].weight.fill_(1)
        model.head.weight.zero_()
        model.head.bias.zero_()

    def task(number, x, y):
        split = Split(torch.full((1, 1, 1, 1), x), torch.tensor([y]))
        classes = (2 * number, 2 * number + 1)
        return TaskData(
            number, classes, tuple(range(2 * number + 2)), split, split
        )

    learner = ExperienceReplay(model, SGD, ExperienceReplaySettings(memory=1.0))
    learner.memory.store(task(0, 3.0, 1), 1, seed=0)
    report = learner.fit(task(1, 2.0, 2), Round(1, 1))
    # Half of each sample's gradient, (p - onehot) x, with p = 1/2 in the slice.
    assert model.head.weight.flatten().tolist() == pytest.approx(
        [-0.75, 0.75, 0.5, -0.5]
    )
    assert model.head.bias.tolist() == pytest.approx([-0.25, 0.25, 0.25, -0.25])
    assert model.body[1].weight.item() == 1  # the head was zero
    assert report["loss"] == pytest.approx(0.6931472)


@pytest.mark.parametrize("incremental", [False, True])
def test_the_gradient_is_that_of_batch_and_memory_together(
    tiny_model, tiny_task, incremental
):
    new, old = (tiny_task(t, incremental=incremental) for t in (1, 0))
    learner = ExperienceReplay(
        tiny_model(), SGD, ExperienceReplaySettings(memory=0.5, memory_batch=1000)
    )
    learner.memory.store(old, 10, seed=0)
    stored = learner.memory.tasks[0]
    model = tiny_model()
    slices = ((0, 4), (0, 4)) if incremental else ((0, 2), (2, 4))
    losses = [
        F.cross_entropy(model(x)[:, a:b], y - a, reduction="none")
        for (a, b), x, y in (
            (slices[0], stored.x, stored.y),
            (slices[1], new.train.x, new.train.y),
        )
    ]
    torch.cat(losses).mean().backward()
    learner.fit(new, Round(1, 1))
    for (name, after), before in zip(
        learner.model.named_parameters(), model.parameters(), strict=True
    ):
        assert torch.allclose(after, before - before.grad, atol=1e-6), name


def test_as_many_stored_samples_as_the_batch_has_unless_told_otherwise(
    tiny_model, tiny_task, monkeypatch
):
    for memory_batch, expected in ((0, 4), (7, 7), (1000, 20)):
        options = ExperienceReplaySettings(memory=1.0, memory_batch=memory_batch)
        learner = ExperienceReplay(
            tiny_model(), SGD.model_copy(update={"batch_size": 4}), options
        )
        learner.memory.store(tiny_task(0), 20, seed=0)
        drawn = []
        plain = learner.draw
        monkeypatch.setattr(
            learner,
            "draw",
            lambda *a, drawn=drawn, plain=plain: (
                drawn.append(plain(*a)) or drawn[-1]
            ),
        )
        learner.fit(tiny_task(1), Round(1, 1))
        assert [len(replay) for replay in drawn] == [expected] * 5
        if expected < 20:
            assert (
                len({tuple(replay.x[:, 0, 0, 0].tolist()) for replay in drawn})
                == 5
            )  # drawn anew each time


def test_ring_and_reservoir(tiny_model, tiny_task):
    task = tiny_task(0, samples=40)
    skewed = Split(task.train.x[:24], torch.tensor([0] * 20 + [1] * 4))
    task = TaskData(0, task.classes, task.seen, skewed, skewed)
    for keep, rare in (("ring", 4), ("reservoir", None)):
        learner = ExperienceReplay(
            tiny_model(), SGD, ExperienceReplaySettings(memory=1 / 3, keep=keep)
        )
        assert learner.end_task(task, Round(0, 5)) == {
            "knowledge-bytes": 8 * 24.0
        }
        count = int((learner.memory.tasks[0].y == 1).sum())
        assert count == rare if rare else count < 4
