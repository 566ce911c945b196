"""Re-Fed: scores against formulas written out for a linear model, and what is cached."""

import numpy as np
import pytest
import torch
from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.frames.learner import Round
from fedknow.client.learners.frames.rehearsal import Memory, Stored
from fedknow.client.learners.refed import ReFed, ReFedSettings
from fedknow.client.models import SplitModel
from fedknow.protocols.config import TrainConfig

SGD = TrainConfig(
    epochs=1,
    batch_size=8,
    optimizer="sgd",
    lr=0.1,
    weight_decay=0.0,
    channels_last=False,
)
WEIGHT = torch.tensor([[0.5, -1.0], [0.25, 0.75], [1.0, 0.5], [-0.5, 1.5]])


def linear_model() -> SplitModel:
    model = SplitModel(nn.Flatten(), nn.Linear(2, 4, bias=False))
    with torch.no_grad():
        model.head.weight.copy_(WEIGHT)
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


@pytest.mark.parametrize("balance", [0.2, 0.5, 0.9])
def test_importance_against_the_formulas(balance):
    """Gradient of sample i of a linear softmax model: (p_i - e_i) x_i^T."""
    data = task(0, [[1.0, 0.5], [-0.5, 2.0], [2.0, -1.0], [0.1, 0.2]])
    memory = Memory()
    memory.store(data, len(data.train), 0)
    learner = ReFed(
        linear_model(),
        SGD,
        ReFedSettings(balance=balance, pim_steps=3, pim_lr=0.5),
    )
    score = learner.importance(memory.all(data, 4))

    x, y = data.train.x.numpy().reshape(-1, 2).astype(float), data.train.y.numpy()
    w = WEIGHT.double().numpy()
    v, q, expected = w, (1 - balance) / (2 * balance), np.zeros(4)
    for step in (1, 2, 3):
        e = np.exp(x @ v.T) * np.array([1, 1, 0, 0])
        error = e / e.sum(1, keepdims=True) - np.eye(4)[y]
        expected += (
            np.linalg.norm(error, axis=1) * np.linalg.norm(x, axis=1) / step
        )
        v = v - 0.5 * (error.T @ x / 4 + q * (v - w))
    assert score.numpy() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(
        learner.head.weight, WEIGHT
    )  # the informative model is a copy


def test_the_best_of_all_samples_are_cached(tiny_model, tiny_task):
    """The cache has the best of old and new samples, within the budget."""
    learner = ReFed(tiny_model(), SGD, ReFedSettings(memory=0.2, pim_steps=2))
    seen = 0
    for number in range(3):
        data = tiny_task(number)
        learner.fit(data, Round(1, number))
        candidates = Memory(learner.memory.tasks)
        candidates.store(data, len(data.train), 0)
        everything = candidates.all(data, 6)
        score = learner.importance(everything)
        report = learner.end_task(data, Round(0, number))
        seen += len(data.train)
        cached = torch.cat(
            [stored.x for _, stored in sorted(learner.memory.tasks.items())]
        )
        assert len(cached) == round(0.2 * seen)
        assert report["knowledge-bytes"] == len(cached) * (4 * 4 + 8)
        best = everything.x[score.topk(len(cached)).indices.sort().values]
        assert torch.equal(cached, best)


def test_a_task_whose_samples_matter_least_has_none_left():
    """Samples of zero pull on nothing (no bias), so the other task takes the whole cache."""
    learner = ReFed(
        linear_model(),
        SGD.model_copy(update={"lr": 1e-6}),
        ReFedSettings(memory=0.5, memory_floor=0),
    )
    dull, bright = (
        task(0, [[0.0, 0.0], [0.0, 0.0]]),
        task(1, [[1.0, 0.0], [0.0, 2.0]]),
    )
    learner.fit(dull, Round(1, 0))
    learner.end_task(dull, Round(0, 0))
    assert list(learner.memory.tasks) == [0]
    learner.fit(bright, Round(1, 0))
    learner.end_task(bright, Round(0, 0))
    assert list(learner.memory.tasks) == [1]
    assert len(learner.memory) == 2
    learner.fit(task(0, [[1.0, 1.0], [0.5, 0.5]]), Round(1, 1))


def test_a_step_is_on_the_union_of_task_and_cache():
    """Eq. 6, one batch: the mean gradient over all samples, each by the classes of its own task,
    and each once."""
    learner = ReFed(linear_model(), SGD, ReFedSettings(memory=0.25))
    first, second = (
        task(0, [[1.0, 0.5], [-0.5, 2.0], [2.0, -1.0], [0.1, 0.2]]),
        task(1, [[0.5, 1.5], [1.0, -1.0]]),
    )
    learner.memory.tasks[0] = Stored(
        (0, 1), first.train.x[2:3], first.train.y[2:3]
    )
    w = learner.head.weight.detach().double().numpy().copy()
    with learner.meter.message():
        report = learner.fit(second, Round(1, 0))
        assert learner.meter.samples == 3
    x = np.array([[2.0, -1.0], [0.5, 1.5], [1.0, -1.0]])
    slices, gradient = (
        np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]),
        np.zeros((4, 2)),
    )
    for image, seen, label in zip(x, slices, (0, 2, 3), strict=True):
        e = np.exp(w @ image) * seen
        gradient += np.outer(e / e.sum() - np.eye(4)[label], image) / 3
    assert learner.head.weight.detach().numpy() == pytest.approx(
        w - 0.1 * gradient, abs=1e-6
    )
    assert report["loss"] > 0


@pytest.mark.parametrize("exchange", ["all", "body", "none"])
def test_interrupted_or_not_and_whoever_was_here_before(
    assert_interruptions_do_not_matter, tiny_model, tiny_task, exchange
):
    settings = ReFedSettings(exchange=exchange, memory=0.3)
    assert_interruptions_do_not_matter(
        lambda: ReFed(tiny_model(norm=True), SGD, settings), tiny_task
    )
