"""AGS-CL against sums a person can do, and what defines it: exact zeros, exact freezing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.agscl import AgsCl, AgsClSettings, shrink
from fedknow.client.learners.frames.learner import Round
from fedknow.client.models import SplitModel
from fedknow.client.models.cnn import cnn
from fedknow.client.models.resnet import resnet18
from fedknow.protocols.config import ConfigError, TrainConfig

SGD = TrainConfig(
    epochs=1,
    batch_size=64,
    optimizer="sgd",
    lr=0.1,
    weight_decay=0.0,
    channels_last=False,
)


def two_nodes() -> SplitModel:
    """Two inputs, two nodes, two classes; the head starts at zero, so that the body has no
    gradient at first."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU())
    model = SplitModel(body, nn.Linear(2, 4))
    with torch.no_grad():
        body[1].weight.copy_(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        model.head.weight.zero_()
        model.head.bias.zero_()
    return model


def task(number: int, x: torch.Tensor) -> TaskData:
    y = torch.arange(len(x)) % 2 + 2 * number
    classes = (2 * number, 2 * number + 1)
    return TaskData(
        number, classes, tuple(range(2 * number + 2)), Split(x, y), Split(x, y)
    )


def deep(seed: int = 0) -> SplitModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body, features = cnn((1, 8, 8), channels=4, hidden=8)
        return SplitModel(body, nn.Linear(features, 6))


def images(number: int, seed: int = 0) -> TaskData:
    generator = torch.Generator().manual_seed(10 * seed + number)
    return task(number, torch.randn(20, 1, 8, 8, generator=generator))


@given(
    row=st.lists(st.floats(-5, 5), min_size=3, max_size=3),
    towards=st.lists(st.floats(-5, 5), min_size=3, max_size=3),
    threshold=st.floats(0, 5),
)
def test_shrink_minimises_its_objective(row, towards, threshold):
    """prox(v) = argmin_u 1/2 |u - v|^2 + threshold |u - towards|: no point nearby is better."""
    v, a = torch.tensor([row, towards], dtype=torch.float64)
    u = shrink(v[None], a[None], torch.tensor([threshold], dtype=torch.float64))[
        0
    ]

    def value(u):
        return 0.5 * (u - v).square().sum() + threshold * (u - a).norm()

    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 0.1, 1.0):
        for step in torch.randn(20, 3, dtype=torch.float64, generator=generator):
            assert value(u) <= value(u + scale * step) + 1e-9


def test_first_round_by_hand():
    """No importance: |(3, 4)| = 5 loses lr mu = 0.5, |(0.3, 0.4)| = 0.5 vanishes."""
    learner = AgsCl(two_nodes(), SGD, AgsClSettings(mu=5.0))
    x = torch.ones(4, 1, 1, 2)
    report = learner.fit(task(0, x), Round(1, 0))
    assert torch.allclose(learner.body[1].weight[0], torch.tensor([2.7, 3.6]))
    assert torch.equal(learner.body[1].weight[1], torch.zeros(2))
    assert report["important"] == 0.0
    kept = learner.end_task(task(0, x), Round(0, 0))
    omega = learner.state_dict()["nodes"]["0"]["importance"]
    assert omega.tolist() == pytest.approx([6.3, 0.0])  # 2.7 + 3.6 after ReLU
    assert kept["knowledge-bytes"] == 4 * (
        2 + 2
    )  # two importances, one node's two weights
    assert learner.head.weight[:2, 1].tolist() == [0.0, 0.0]


def test_second_task_by_hand():
    """Importance 6.3 under lambda: the node moves only beyond lr lambda Omega from its anchor;
    decay by eta."""
    learner = AgsCl(
        two_nodes(), SGD, AgsClSettings(mu=5.0, lam=1.0, rho=1.0, eta=0.5)
    )
    x = torch.ones(4, 1, 1, 2)
    learner.fit(task(0, x), Round(1, 0))
    learner.end_task(task(0, x), Round(0, 0))
    anchor = learner.body[1].weight[0].detach().clone()
    learner.begin(task(1, x), Round(1, 0))
    assert torch.equal(
        learner.body[1].weight[1], torch.tensor([0.3, 0.4])
    )  # the empty node starts anew
    with torch.no_grad():
        learner.body[1].weight[0] += torch.tensor(
            [0.6, 0.8]
        )  # away by 1; the threshold is 0.1 * 6.3 = 0.63
    learner._proximal_step()
    assert torch.allclose(
        learner.body[1].weight[0], anchor + 0.37 * torch.tensor([0.6, 0.8])
    )
    learner._proximal_step()
    assert torch.equal(learner.body[1].weight[0], anchor)
    learner.end_task(task(1, 2 * x), Round(0, 0))
    assert learner._importance[0][0] > 0.5 * 6.3


def test_important_nodes_are_frozen_and_get_nothing_from_unimportant_ones():
    """With a large lambda what past tasks compute is bit for bit what it was, whatever later tasks
    train."""
    train = SGD.model_copy(update={"epochs": 3, "batch_size": 8})
    learner = AgsCl(
        deep(), train, AgsClSettings(mu=1.0, lam=1e4, exchange="none")
    )
    first = images(0)
    learner.fit(first, Round(1, 1))
    learner.end_task(first, Round(0, 2))
    used = learner._importance[-1] > 0
    assert 0 < used.float().mean() < 1
    learner.begin(
        images(1), Round(1, 3)
    )  # from here on the second task; the cut comes first
    with torch.no_grad():
        before = learner.body.eval()(first.test.x)[:, used]
    report = learner.fit(images(1), Round(1, 3))
    with torch.no_grad():
        after = learner.body.eval()(first.test.x)[:, used]
    assert torch.equal(before, after)
    assert 0 < report["important"] < 1
    for below, layer, above in zip(
        learner._importance,
        learner._layers[1:],
        learner._importance[1:],
        strict=False,
    ):
        weight = layer.weight.detach().unflatten(1, (len(below), -1)).flatten(2)
        assert not weight[above > 0][:, below == 0].any()


def test_mean_activation_against_a_loop():
    learner = AgsCl(deep(), SGD, AgsClSettings())
    x = images(0).train.x
    means = learner._mean_activations(x)
    with torch.no_grad():
        for i in range(4):
            filters = torch.stack(
                [
                    learner.body[:2](x[j : j + 1])[0, i].mean()
                    for j in range(len(x))
                ]
            )
            assert means[0][i] == pytest.approx(filters.mean().item(), rel=1e-5)
    assert [len(layer) for layer in means] == [4, 8, 8]


@pytest.mark.parametrize("exchange", ["all", "body", "none"])
def test_interrupted_or_not_and_whoever_was_here_before(
    assert_interruptions_do_not_matter, exchange
):
    settings = AgsClSettings(exchange=exchange, mu=1.0)
    assert_interruptions_do_not_matter(
        lambda: AgsCl(deep(), SGD, settings), images
    )


def test_models_without_a_chain_of_rectified_nodes_are_refused(tiny_model):
    body, features = resnet18((1, 8, 8), width=0.1)
    with pytest.raises(ConfigError, match="no use for BatchNorm2d in its place"):
        AgsCl(SplitModel(body, nn.Linear(features, 4)), SGD, AgsClSettings())
    with pytest.raises(ConfigError, match="no use for Linear in its place"):
        AgsCl(tiny_model(), SGD, AgsClSettings())
