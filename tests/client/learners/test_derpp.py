"""DER++: the step by hand, and what each of its three losses asks for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.derpp import Derpp, DerppSettings, distance
from fedknow.client.learners.frames.learner import Round
from fedknow.client.learners.frames.scoring import predict
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


def test_distance_by_hand():
    """One sample with two columns of three: (1 + 9) / 2; another with one: 4."""
    z = torch.tensor([[1.0, 3.0, 7.0], [5.0, 0.0, 2.0]])
    recorded = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    known = torch.tensor([[True, True, False], [False, False, True]])
    assert distance(z, recorded, known).item() == pytest.approx((5 + 4) / 2)


def test_a_step_by_hand():
    """Logits of zero, recorded ones of (2, 0), alpha = 0.5 and beta = 0.25.

    The old sample x = 3 of label 1 is in the slice (0, 1), the new one x = 2 of label 2 in (2, 3).
    New: dL/dz = (-1/2, 1/2). Distance: alpha (z - z') = (-1, 0). Label: beta (1/2, -1/2).
    """
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

    options = DerppSettings(memory=1.0, alpha=0.5, beta=0.25)
    learner = Derpp(model, SGD, options)
    learner.memory.store(task(0, 3.0, 1), 1, seed=0)
    learner.recorded[0] = {
        "columns": torch.tensor([0, 1]),
        "logits": torch.tensor([[2.0, 0.0]]),
    }
    report = learner.fit(task(1, 2.0, 2), Round(1, 1))
    assert model.head.bias.tolist() == pytest.approx([0.875, 0.125, 0.5, -0.5])
    assert model.head.weight.flatten().tolist() == pytest.approx(
        [2.625, 0.375, 1.0, -1.0]
    )
    assert report["loss"] == pytest.approx(0.6931472)


@pytest.mark.parametrize("incremental", [False, True])
def test_a_step_is_that_of_three_losses(tiny_model, tiny_task, incremental):
    new, old = (tiny_task(t, incremental=incremental) for t in (1, 0))
    options = DerppSettings(
        memory=0.5, memory_batch=1000, alpha=0.3, beta=0.7, exchange="all"
    )
    learner = Derpp(tiny_model(), SGD, options)
    learner.end_task(old, Round(0, 3))
    stored, entry = learner.memory.tasks[0], learner.recorded[0]
    start = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
    # Recorded logits are the present ones, so move them for the distance to have a gradient.
    entry["logits"] = entry["logits"] + 1
    model = tiny_model()
    model.load_state_dict(start)
    end = 4
    first = 0 if incremental else 2
    z, past = model(new.train.x), model(stored.x)
    past_slice = past[:, :end] if incremental else past[:, :2]
    loss = (
        F.cross_entropy(z[:, first:end], new.train.y - first)
        + 0.3 * F.mse_loss(past[:, :2], entry["logits"])
        + 0.7 * F.cross_entropy(past_slice, stored.y)
    )
    loss.backward()
    learner.fit(new, Round(1, 1))
    for name, parameter in model.named_parameters():
        after = dict(learner.model.named_parameters())[name]
        expected = start[name] - parameter.grad
        torch.testing.assert_close(after.detach(), expected, atol=1e-6, rtol=1e-5)


def test_logits_are_those_of_the_model_that_the_task_ended_with(
    tiny_model, tiny_task
):
    """Of the shared body, under the client's own head, in the slice in use."""
    learner = Derpp(tiny_model(dropout=0.5), SGD, DerppSettings(memory=1.0))
    task = tiny_task(1)
    learner.fit(task, Round(1, 1))
    shared = {name: value * 0.5 for name, value in learner.send().items()}
    learner.receive(shared)
    report = learner.end_task(task, Round(0, 1))
    entry = learner.recorded[1]
    assert entry["columns"].tolist() == [2, 3]
    learner.model.eval()
    z = predict(learner, learner.model, task.train.x, 7)[:, 2:4]
    torch.testing.assert_close(entry["logits"], z)
    sample = task.train.x[0].nbytes + 8 + 2 * 4
    assert report["knowledge-bytes"] == 20 * sample


def test_answers_as_recorded_pull_nowhere(tiny_model, tiny_task):
    """With alpha alone, a model that answers as recorded takes plain steps."""
    moved = []
    for alpha in (0.0, 100.0):
        options = DerppSettings(memory=1.0, alpha=alpha, beta=0.0)
        learner = Derpp(tiny_model(), SGD, options)
        learner.end_task(tiny_task(0), Round(0, 1))
        learner.fit(tiny_task(1), Round(1, 1))
        moved.append(learner.send())
    plain, pulled = moved
    for name, value in plain.items():
        torch.testing.assert_close(value, pulled[name], atol=1e-5, rtol=1e-5)


def test_both_draws_have_the_size_asked_for(tiny_model, tiny_task, monkeypatch):
    options = DerppSettings(memory=1.0, memory_batch=3)
    train = SGD.model_copy(update={"batch_size": 10})
    learner = Derpp(tiny_model(), train, options)
    learner.end_task(tiny_task(0), Round(0, 1))
    drawn = []
    plain = learner._places
    monkeypatch.setattr(
        learner, "_places", lambda *a: drawn.append(plain(*a)) or drawn[-1]
    )
    learner.fit(tiny_task(1), Round(1, 1))
    assert [len(places) for places in drawn] == [3] * 4
    assert not torch.equal(drawn[0], drawn[1])


def test_state_on_disk_does_not_matter(
    tiny_model, tiny_task, assert_interruptions_do_not_matter
):
    train = TrainConfig(epochs=2, batch_size=8, lr=0.01)

    def build():
        model = tiny_model(dropout=0.5, norm=True)
        return Derpp(model, train, DerppSettings())

    assert_interruptions_do_not_matter(build, tiny_task)
