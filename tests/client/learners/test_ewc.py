"""EWC and online EWC: Fisher information against per-sample gradients, the penalty by hand and as
a sum of terms."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.ewc import (
    Ewc,
    EwcSettings,
    OnlineEwc,
    OnlineEwcSettings,
)
from fedknow.client.learners.frames.learner import Diverged, Round
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
FEW = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def one_weight() -> SplitModel:
    """One input, a body of one weight, which is 2, and a head of zeros for two classes."""
    model = SplitModel(
        nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False)), nn.Linear(1, 2)
    )
    with torch.no_grad():
        model.body[1].weight.fill_(2)
        model.head.weight.zero_()
        model.head.bias.zero_()
    return model


def samples(task: int, *pairs: tuple[float, int]) -> TaskData:
    """A task of samples (x, y); all tasks have the same two classes."""
    split = Split(
        torch.tensor([x for x, _ in pairs]).view(-1, 1, 1, 1),
        torch.tensor([y for _, y in pairs]),
    )
    return TaskData(task, (0, 1), (0, 1), split, split)


@pytest.mark.parametrize("labels", ["sampled", "expected", "data"])
def test_fisher_information_and_step_by_hand(labels):
    """At logits of zero either label gives the same squares: (1/2 * 2 x)^2 for the head, with
    features 2 x.

    Samples x = 1 and x = 3: F = mean(1, 9) = 5 for each weight of the head and 1/4 for each
    bias. (The square of the batch's mean gradient would be ((-1 + 3) / 2)^2 = 1 and 0.)
    """
    learner = Ewc(
        one_weight(),
        SGD,
        EwcSettings(strength=2.0, labels=labels, exchange="none"),
    )
    learner._trained_task = (
        0  # as if it had been trained; the model stays where it is
    )
    report = learner.end_task(samples(0, (1.0, 0), (3.0, 1)), Round(0, 1))
    assert learner.importance["head.weight"].flatten().tolist() == [5.0, 5.0]
    assert learner.importance["head.bias"].tolist() == [0.25, 0.25]
    assert learner.importance["body.1.weight"].item() == 0.0
    assert report == {"knowledge-bytes": 2 * 5 * 4.0}
    with torch.no_grad():
        learner.head.weight.copy_(torch.tensor([[1.0], [1.0]]))
    # lambda / 2 * F * (w - w*)^2 = 5 for each of two weights; its gradient lambda F (w - w*) = 10.
    assert learner.penalty() == pytest.approx(10.0)
    learner.fit(samples(1, (1.0, 0)), Round(1, 1))
    # Features 2, p = 1/2: the loss itself has the gradient -1 and 1 for the head's weights; the
    # step is lr = 0.1.
    assert learner.head.weight.flatten().tolist() == pytest.approx(
        [1 - 0.1 * (10 - 1), 1 - 0.1 * (10 + 1)]
    )
    assert learner.counts()["penalty"] == pytest.approx(
        2 * 5 * 0.1**2 + 2 * 0.25 * 0.05**2
    )


@pytest.mark.parametrize("incremental", [False, True])
def test_fisher_information_is_the_mean_square_of_per_sample_gradients(
    tiny_model, tiny_task, incremental
):
    task = tiny_task(1, samples=7, incremental=incremental)
    slice_ = slice(0, 4) if incremental else slice(2, 4)

    def log_p(model, x):
        return model(x)[:, slice_].log_softmax(1)

    for labels in ("data", "expected"):
        learner = Ewc(
            tiny_model(norm=True, dropout=0.5),
            SGD,
            EwcSettings(labels=labels, exchange="none"),
        )
        learner.fit(task, Round(1, 1))
        learner.end_task(task, Round(0, 1))
        model = learner.model.eval()
        expected = [torch.zeros_like(p) for p in model.parameters()]
        for x, y in zip(task.train.x, task.train.y, strict=True):
            p = log_p(model, x[None])[0].exp().detach()
            for label in range(len(p)):
                weight = (
                    p[label]
                    if labels == "expected"
                    else float(label == y - slice_.start)
                )
                gradient = torch.autograd.grad(
                    log_p(model, x[None])[0, label], list(model.parameters())
                )
                for total, part in zip(expected, gradient, strict=True):
                    total += weight * part**2 / 7
        for total, fisher in zip(
            expected, learner.importance.values(), strict=True
        ):
            assert torch.allclose(fisher, total, rtol=1e-4, atol=1e-9)


def test_sampled_labels_come_to_the_expectation(tiny_model, tiny_task):
    """The mean over many draws of sampled labels, against the exact sum over labels."""
    task = tiny_task(0, samples=6)
    repeated = Split(task.train.x.repeat(400, 1, 1, 1), task.train.y.repeat(400))
    many = TaskData(0, task.classes, task.seen, repeated, repeated)
    exact, drawn = (
        Ewc(tiny_model(), SGD, EwcSettings(labels=labels, exchange="none"))
        for labels in ("expected", "sampled")
    )
    exact._trained_task = drawn._trained_task = 0
    exact.end_task(task, Round(0, 1))
    drawn.end_task(many, Round(0, 1))
    a, b = (
        torch.cat([f.flatten() for f in learner.importance.values()])
        for learner in (exact, drawn)
    )
    assert (a - b).norm() / a.norm() < 0.05


def test_online_penalty_by_hand():
    """Two tasks, gamma = 1/2. The first: F = 5 for each weight of the head, as above. The second,
    x = 2 at a head of ones: logits are equal again, features 4, F = (1/2 * 4)^2 = 4. So F* =
    5/2 + 4 = 13/2, around the head of ones.

    With the head at 3 the penalty is 2 * lambda / 2 * 13/2 * 2^2 = 104 at lambda = 4, of slope
    4 * 13/2 * 2 = 52 a weight; two penalties of separate tasks would have 2 (5/2 * 3^2 + 4 *
    2^2) * 2 = 154.
    """
    options = OnlineEwcSettings(strength=4.0, gamma=0.5, exchange="none")
    learner = OnlineEwc(one_weight(), SGD, options)
    learner._trained_task = (
        0  # as if it had been trained; the model stays where it is
    )
    learner.end_task(samples(0, (1.0, 0), (3.0, 1)), Round(0, 1))
    with torch.no_grad():
        learner.head.weight.fill_(1)
    learner._trained_task = 1
    learner.end_task(samples(1, (2.0, 0)), Round(0, 1))
    assert learner.importance["head.weight"].flatten().tolist() == [6.5, 6.5]
    assert learner.importance["head.bias"].tolist() == [0.375, 0.375]  # 1/8 + 1/4
    assert learner.anchor["head.weight"].flatten().tolist() == [1.0, 1.0]
    with torch.no_grad():
        learner.head.weight.fill_(3)
    assert learner.penalty() == pytest.approx(104.0)
    learner.fit(samples(2, (1.0, 0)), Round(1, 1))
    # Features 2, p = 1/2: the loss itself has the slopes -1 and 1; the step is lr = 0.1.
    assert learner.head.weight.flatten().tolist() == pytest.approx(
        [3 - 0.1 * (52 - 1), 3 - 0.1 * (52 + 1)]
    )


@given(seed=st.integers(0, 1000), tasks=st.integers(2, 4))
@FEW
def test_one_penalty_stands_for_all_tasks_penalties(tiny_model, seed, tasks):
    """EWC's gradient is that of one term for each task, though two models are kept."""
    generator = torch.Generator().manual_seed(seed)
    learner = Ewc(tiny_model().double(), SGD, EwcSettings(strength=3.0))
    shapes = {name: p.shape for name, p in learner.model.named_parameters()}

    def draw():
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }

    terms = [
        ({n: v.clamp(min=0) for n, v in draw().items()}, draw())
        for _ in range(tasks)
    ]
    for fisher, anchor in terms:
        learner.importance, learner.anchor = learner.merge(fisher, anchor)
    w = draw()
    for name in shapes:
        separate = sum(
            fisher[name] * (w[name] - anchor[name]) for fisher, anchor in terms
        )
        assert torch.allclose(
            learner.importance[name] * (w[name] - learner.anchor[name]),
            separate,
            atol=1e-9,
        )


def test_online_ewc_decays_and_anchors_at_the_latest_model(tiny_model, tiny_task):
    learner = OnlineEwc(
        tiny_model(), SGD, OnlineEwcSettings(gamma=0.5, exchange="none")
    )
    kept = []
    for t in range(3):
        learner.fit(tiny_task(t), Round(1, t))
        learner.end_task(tiny_task(t), Round(0, t))
        fresh = OnlineEwc(tiny_model(), SGD, OnlineEwcSettings(exchange="none"))
        fresh.model.load_state_dict(learner.model.state_dict())
        fresh._trained_task = t
        fresh.end_task(tiny_task(t), Round(0, t))
        kept.append(fresh.importance)
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(learner.anchor[name], parameter)
        assert torch.allclose(
            learner.importance[name],
            0.25 * kept[0][name] + 0.5 * kept[1][name] + kept[2][name],
        )


def test_a_huge_lambda_holds_what_matters(tiny_model, tiny_task):
    drift = {}
    for strength in (0.0, 1e4):
        train = SGD.model_copy(
            update={"optimizer": "adam", "lr": 1e-3, "epochs": 20}
        )
        learner = Ewc(
            tiny_model(),
            train,
            EwcSettings(strength=strength, labels="expected", exchange="none"),
        )
        for t in range(2):
            learner.fit(tiny_task(t), Round(1, t))
            if t == 0:
                learner.end_task(tiny_task(t), Round(0, t))
        x = tiny_task(0).test.x
        old = F.cross_entropy(learner.model(x)[:, :2], tiny_task(0).test.y).item()
        drift[strength] = (learner.penalty() if strength else None, old)
    assert drift[1e4][1] < drift[0.0][1]


def test_too_large_a_lambda_is_named_when_training_diverges(
    tiny_model, tiny_task
):
    train = SGD.model_copy(update={"epochs": 50})
    learner = Ewc(tiny_model(), train, EwcSettings(strength=1e9, exchange="none"))
    learner.fit(tiny_task(0), Round(1, 1))
    learner.end_task(tiny_task(0), Round(0, 1))
    with pytest.raises(
        Diverged,
        match=r"lower train\.lr = 0\.1 .* or lower learner\.strength = 1e\+09",
    ):
        learner.fit(tiny_task(1), Round(1, 1))


@pytest.mark.parametrize("anchor", ["global", "local"])
def test_the_anchor_is_the_shared_or_the_own_body_under_the_own_head(
    tiny_model, tiny_task, anchor
):
    learner = Ewc(tiny_model(), SGD, EwcSettings(anchor=anchor))
    learner.fit(tiny_task(0), Round(1, 1))
    own, head, state = (
        learner.send(),
        learner.local_parameters(),
        learner.state_dict(),
    )
    shared = {name: value + 0.01 for name, value in own.items()}
    learner.load_state_dict({})
    learner.load_state_dict(state)
    learner.receive(shared)
    learner.end_task(tiny_task(0), Round(0, 1))
    expected = (shared if anchor == "global" else own) | head
    assert learner.anchor.keys() == expected.keys()
    assert all(
        torch.equal(learner.anchor[name], value)
        for name, value in expected.items()
    )
    assert learner.state_dict()["local"] == {}


def test_a_client_never_chosen_anchors_at_the_shared_model_under_a_trained_head(
    tiny_model, tiny_task
):
    learner = Ewc(tiny_model(), SGD, EwcSettings())
    shared, head = learner.send(), learner.local_parameters()
    learner.end_task(tiny_task(0), Round(0, 1))
    assert all(
        torch.equal(learner.anchor[name], value) for name, value in shared.items()
    )
    assert not torch.equal(learner.anchor["head.weight"], head["head.weight"])
