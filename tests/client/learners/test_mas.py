"""MAS: importance by hand and against per-sample gradients, how tasks add up, and that no label is
looked at."""

import pytest
import torch
from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.frames.learner import Round
from fedknow.client.learners.mas import Mas, MasSettings
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


def test_importance_and_penalty_by_hand():
    """One weight u = 2 in the body, v = (1, -1) in the head, no bias: ||F||^2 = 2 u^2 x^2.

    d/du = 4 u x^2 = 8 x^2 and d/dv = 2 v u^2 x^2 = (8, -8) x^2, by absolute value, means over x
    = 1 and x = -2. For the biases 2 v u x = (4, -4) x, whose absolute values do not cancel over
    samples of opposite sign.
    """
    model = SplitModel(
        nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False)), nn.Linear(1, 2)
    )
    with torch.no_grad():
        model.body[1].weight.fill_(2)
        model.head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model.head.bias.zero_()
    split = Split(
        torch.tensor([1.0, -2.0]).view(-1, 1, 1, 1), torch.tensor([0, 1])
    )
    learner = Mas(model, SGD, MasSettings(strength=0.5, exchange="none"))
    learner._trained_task = 0
    learner.end_task(TaskData(0, (0, 1), (0, 1), split, split), Round(0, 1))
    assert learner.importance["body.1.weight"].item() == 8 * (1 + 4) / 2
    assert learner.importance["head.weight"].flatten().tolist() == [20.0, 20.0]
    assert learner.importance["head.bias"].tolist() == [6.0, 6.0]
    with torch.no_grad():
        model.body[1].weight.fill_(2.5)
    assert learner.penalty() == pytest.approx(
        0.5 * 20 * 0.25
    )  # lambda Omega (w - w*)^2, without a half
    plain = SplitModel(
        nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False)), nn.Linear(1, 2)
    )
    plain.load_state_dict(model.state_dict())
    nn.functional.cross_entropy(plain(split.x), split.y).backward()
    learner.fit(TaskData(1, (0, 1), (0, 1), split, split), Round(1, 1))
    step = 0.1 * (plain.body[1].weight.grad.item() + 2 * 0.5 * 20 * 0.5)
    assert model.body[1].weight.item() == pytest.approx(2.5 - step)


@pytest.mark.parametrize("incremental", [False, True])
def test_importance_is_the_mean_absolute_value_of_per_sample_gradients(
    tiny_model, tiny_task, incremental
):
    task = tiny_task(1, samples=7, incremental=incremental)
    learner = Mas(
        tiny_model(norm=True, dropout=0.5), SGD, MasSettings(exchange="none")
    )
    learner.fit(task, Round(1, 1))
    learner.end_task(task, Round(0, 1))
    model = learner.model.eval()
    columns = slice(0, 4) if incremental else slice(2, 4)
    gradients = [
        torch.autograd.grad(
            model(x[None])[:, columns].square().sum(), list(model.parameters())
        )
        for x in task.train.x
    ]
    for parts, omega in zip(
        zip(*gradients, strict=True), learner.importance.values(), strict=True
    ):
        assert torch.allclose(
            torch.stack(parts).abs().mean(0), omega, rtol=1e-4, atol=1e-7
        )


def test_tasks_add_up_around_the_latest_model_and_labels_do_not_matter(
    tiny_model, tiny_task
):
    learner = Mas(tiny_model(), SGD, MasSettings(exchange="none"))
    learner._trained_task = 9  # nobody trains: the model stays as it is
    first, second = tiny_task(0), tiny_task(1)
    learner.end_task(first, Round(0, 1))
    one = learner.importance
    relabelled = Split(second.train.x, 5 - second.train.y)
    alone = Mas(tiny_model(), SGD, MasSettings(exchange="none"))
    alone._trained_task = 9
    alone.end_task(
        TaskData(1, second.classes, second.seen, relabelled, relabelled),
        Round(0, 1),
    )
    learner.end_task(second, Round(0, 1))
    for name, parameter in learner.model.named_parameters():
        assert torch.allclose(
            learner.importance[name], one[name] + alone.importance[name]
        )
        assert torch.equal(learner.anchor[name], parameter)
