"""FedKNOW without names of tasks: the surest knowledge names them."""

import pytest
import torch
from torch import nn

from fedknow.client.learners.fedknow.inference import infer_tasks, sureness
from fedknow.client.learners.fedknow.knowledge import Knowledge
from fedknow.client.learners.fedknow.learner import FedKnow
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.client.learners.frames.learner import Round
from fedknow.client.models import SplitModel
from fedknow.protocols.config import TrainConfig


def test_sureness_by_hand():
    z = torch.tensor([[0.0, torch.log(torch.tensor(3.0)).item()], [2.0, 2.0]])
    assert sureness(z, "probability").tolist() == pytest.approx([0.75, 0.5])
    assert sureness(z, "energy").tolist() == pytest.approx([1.3862944, 2.6931472])


def knowledge_of(classes, slope):
    """A task whose logits are slope * x and 0, on one feature that is the sample."""
    return Knowledge(
        classes=classes,
        mask=torch.tensor([128], dtype=torch.uint8),
        values=torch.ones(1),
        unpruned={},
        head=(torch.tensor([[slope], [0.0]]), torch.zeros(2)),
    )


def test_answers_are_within_the_task_that_is_taken():
    """x = 3: the second task is surest. x = -2 likewise; class 4 is of no finished task."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False))
    model = SplitModel(body, nn.Linear(1, 5))
    scratch = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([9.0, 8.0, 2.0, 3.0, 1.0]))
    tasks = [knowledge_of((0, 1), 0.1), knowledge_of((2, 3), -1.0)]
    predictor = infer_tasks(model, scratch, tasks, "probability", lambda x: x)
    z = predictor(torch.tensor([3.0, -2.0]).view(2, 1, 1, 1))
    assert z.argmax(1).tolist() == [3, 3]
    assert z.detach().tolist() == [[0.0, -1.0, 2.0, 3.0, 1.0]] * 2


@pytest.mark.parametrize("measure", ["probability", "energy"])
def test_tasks_far_apart_are_told_apart(tiny_model, tiny_task, measure):
    """And the default scores as ever."""
    train = TrainConfig(epochs=20, batch_size=8, lr=0.02)
    scores = {}
    for infer in ("off", measure):
        options = FedKnowSettings(infer_task=infer, rho=1.0, exchange="none")
        learner = FedKnow(tiny_model(), train, options)
        for number in (0, 1):
            task = tiny_task(number, incremental=True)
            learner.fit(task, Round(1, number))
            learner.end_task(task, Round(0, number))
        state = learner.state_dict()
        tasks = [tiny_task(t, incremental=True) for t in (0, 1)]
        scores[infer] = learner.score(
            [task.test for task in tasks], [range(4)] * 2, 8
        )
        assert learner.state_dict().keys() == state.keys()
    for (right, total, loss), told in zip(
        scores[measure], scores["off"], strict=True
    ):
        assert total == told[1]
        assert 0 <= right <= total
        assert loss < 1e4
