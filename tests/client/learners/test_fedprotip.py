"""FedProTIP: guesses by hand, and samples told by the directions of their features."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.fedprotip import (
    CLASSES,
    FEATURES,
    FedProtip,
    FedProtipSettings,
    relevance,
)
from fedknow.client.learners.frames.learner import Round
from fedknow.client.learners.frames.scoring import among
from fedknow.client.models import SplitModel
from fedknow.protocols.config import TrainConfig
from fedknow.protocols.messages import EXTRA, Arrays, Message
from fedknow.strategies.fedprotip import FedProtip as Server
from fedknow.strategies.fedprotip import references
from fedknow.strategies.paired import Setup

SGD = TrainConfig(
    epochs=1,
    batch_size=64,
    optimizer="sgd",
    lr=0.5,
    weight_decay=0.1,
    channels_last=False,
)


def plain(width=6, classes=6, **options):
    """A learner whose features are the samples."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(width, width, bias=False))
    nn.init.eye_(body[1].weight)
    model = SplitModel(body, nn.Linear(width, classes))
    return FedProtip(model, SGD, FedProtipSettings(**options))


def server_of(learner):
    server = Server(**learner.strategy_options(learner.settings))
    server.prepare(Setup(None, learner, None))
    return server


def task_of(number, x):
    classes = (2 * number, 2 * number + 1)
    y = 2 * number + torch.arange(len(x)) % 2
    split = Split(x.view(len(x), 1, 1, -1), y)
    seen = tuple(range(2 * number + 2))
    return TaskData(number, classes, seen, split, split, True)


def end(server, learner, *tasks):
    """All clients end a task, each with samples of its own."""
    replies = []
    for client, task in enumerate(tasks):
        shared = learner.share(task, Round(0, client), True)
        declared = learner.shares(True)
        assert declared.keys() == shared.keys()
        extra = Arrays((name, v.numpy()) for name, v in shared.items())
        content = {EXTRA: extra}
        replies.append(Message("train.end_task", client, "", content=content))
    server.aggregate_end_task(tasks[0].task, Arrays(), replies)


def receive(learner, server):
    extra = server.extra_to_score()
    learner.receive_extra({n: torch.tensor(a) for n, a in extra.items()})


def test_relevance_by_hand():
    """Axes as directions: two of the first task and one of the second."""
    a = relevance(
        torch.tensor([[2.0, 1.0, 2.0, 9.0]]), torch.eye(4)[:, :3], [2, 1]
    )
    expected = torch.tensor([5.0**0.5, 2.0]) / 3
    torch.testing.assert_close(a[0], expected)


def test_references_by_hand():
    """Energies of two tasks' samples along the first axis and the second."""
    moments = [torch.diag(torch.tensor(m).double()) for m in ([9, 4], [1, 16])]
    axes = list(torch.eye(2).double().split(1, 1))
    assert references(moments, axes).tolist() == [[3, 2], [1, 4]]


def test_answers_are_among_the_guessed_classes():
    z = torch.tensor([[1.0, 5.0, 3.0]])
    inside = torch.tensor([[True, False, True]])
    assert among(z, inside).tolist() == [[1.0, 0.0, 3.0]]


def draw(axes, count, seed):
    """Draw samples near some of the six axes."""
    draws = torch.Generator().manual_seed(seed)
    x = 0.02 * torch.randn(count, 6, generator=draws)
    x[:, axes] += torch.randn(count, len(axes), generator=draws)
    return x


def test_tasks_are_guessed_by_the_directions_of_their_features():
    learner = plain(directions=2, threshold=0.95)
    server = server_of(learner)
    assert server.extra_to_score() is None
    places = [[0, 1], [2, 3], [4, 5]]
    for number, axes in enumerate(places):
        clients = [
            task_of(number, draw(axes, 40, 10 * number + c)) for c in (0, 1)
        ]
        end(server, learner, *clients)
        receive(learner, server)
    tests = [task_of(t, draw(axes, 50, 90 + t)) for t, axes in enumerate(places)]
    head = learner.head
    with torch.no_grad():
        head.weight.zero_()
        # Untold, all samples would be of the last class.
        head.bias.copy_(torch.arange(6.0))
    scores = learner.score([t.test for t in tests], [range(6)] * 3, 16)
    # Within the right task one class of two is right.
    assert [right for right, _, _ in scores] == [25] * 3
    assert all(loss < 20 for _, _, loss in scores)


def test_references_are_those_of_the_features_themselves():
    """r_ut from second moments, against the mean over samples that Eq. (1) has."""
    learner = plain(directions=2)
    server = server_of(learner)
    samples = [draw([0, 1], 30, 1), draw([1, 2], 30, 2)]
    for number, x in enumerate(samples):
        end(server, learner, task_of(number, x))
    extra = server.extra_to_score()
    bases = np.split(extra["bases"], np.cumsum(extra["sizes"])[:-1], axis=1)
    for u, x in enumerate(samples):
        row = [np.sqrt(np.square(x.numpy() @ b).sum(1).mean()) for b in bases]
        row = np.array(row) / np.linalg.norm(row)
        told = extra["references"][u] / np.linalg.norm(extra["references"][u])
        np.testing.assert_allclose(told, row, atol=1e-5)
    gram = extra["bases"].T @ extra["bases"]
    np.testing.assert_allclose(gram, np.eye(4), atol=1e-5)


def test_training_moves_the_rows_of_the_task_alone(tiny_model, tiny_task):
    """Also where all classes seen compete in the end; a step against autograd."""
    learner = FedProtip(tiny_model(), SGD, FedProtipSettings())
    task = tiny_task(1, incremental=True)
    model = tiny_model()
    z = model(task.train.x)[:, 2:4]
    F.cross_entropy(z, task.train.y - 2).backward()
    learner.fit(task, Round(1, 1))
    moved = learner.head.weight.detach() - model.head.weight
    torch.testing.assert_close(moved, -0.5 * model.head.weight.grad)
    assert not moved[[0, 1, 4, 5]].any()


def test_what_is_sent(tiny_model, tiny_task):
    learner = FedProtip(tiny_model(), SGD, FedProtipSettings())
    task = tiny_task(1)
    assert learner.share(task, Round(1, 1), False) == {}
    shared = learner.share(task, Round(0, 1), True)
    with torch.no_grad():
        features = learner.body(task.train.x)
    rows, columns = torch.triu_indices(8, 8)
    moment = features.T @ features
    torch.testing.assert_close(shared[FEATURES], moment[rows, columns])
    assert shared[CLASSES].tolist() == [2, 3]


def test_impossible_shares_are_refused():
    learner = plain()
    shared = learner.share(task_of(0, draw([0, 1], 30, 1)), Round(0, 0), True)
    arrays = {name: value.numpy() for name, value in shared.items()}
    learner.check_share(arrays)
    for name, value, words in (
        (FEATURES, -arrays[FEATURES], "diagonal"),
        ("1", -arrays["1"], "diagonal"),
        (CLASSES, np.array([0, 6]), "0 to 5"),
        (CLASSES, np.array([0, 0]), "twice"),
    ):
        with pytest.raises(ValueError, match=words):
            learner.check_share(arrays | {name: value})


def test_the_server_takes_up_where_it_was():
    learner = plain(directions=2)
    server, other = server_of(learner), server_of(learner)
    end(server, learner, task_of(0, draw([0, 1], 30, 1)))
    other.load_state_dict(server.state_dict())
    for one in (server, other):
        end(one, learner, task_of(1, draw([2], 30, 2)))
    told, again = server.extra_to_score(), other.extra_to_score()
    assert all(np.array_equal(told[name], again[name]) for name in told)


def test_a_task_without_room_for_directions_is_no_fault():
    """Six features, of which the first task takes all."""
    learner = plain(directions=20)
    server = server_of(learner)
    end(server, learner, task_of(0, draw(list(range(6)), 40, 1)))
    end(server, learner, task_of(1, draw([2], 40, 2)))
    receive(learner, server)
    test = task_of(1, draw([2], 10, 3)).test
    [(_, total, loss)] = learner.score([test], [range(4)], 16)
    assert total == 10
    assert np.isfinite(loss)


@pytest.mark.parametrize("name", ["bases", "sizes", "references", "classes"])
def test_directions_that_do_not_fit_are_refused(name):
    learner = plain(directions=2)
    server = server_of(learner)
    end(server, learner, task_of(0, draw([0, 1], 30, 1)))
    extra = {n: torch.tensor(a) for n, a in server.extra_to_score().items()}
    with pytest.raises(ValueError, match="do not fit together"):
        learner.receive_extra(extra | {name: torch.ones(3).long()})
