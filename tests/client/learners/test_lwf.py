"""LwF: the distillation loss by hand, the step against plain autograd, the warm-up, and which
model is the old one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fedknow.client.learners.frames.learner import Round
from fedknow.client.learners.lwf import Lwf, LwfSettings, distillation
from fedknow.protocols.config import ConfigError, TrainConfig

SGD = TrainConfig(
    epochs=1,
    batch_size=64,
    optimizer="sgd",
    lr=0.5,
    weight_decay=0.0,
    channels_last=False,
)


def test_distillation_by_hand():
    """y' = y^(1/T) / sum y^(1/T): of probabilities (0.9, 0.1) at T = 2 it is (3/4, 1/4)."""
    recorded = torch.tensor([[0.9, 0.1]]).log()
    now = torch.tensor([[0.64, 0.36]]).log()  # (0.8, 0.6) / 1.4
    expected = -(
        0.75 * torch.tensor(0.8 / 1.4).log()
        + 0.25 * torch.tensor(0.6 / 1.4).log()
    )
    assert distillation(now, recorded, 2.0).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 5))
def test_nothing_pulls_where_the_answers_are_the_recorded_ones(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    z = old.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distillation(z, old, temperature), z)
    assert gradient.abs().max() < 1e-12
    other = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    assert distillation(other, old, temperature) >= distillation(
        old, old, temperature
    )


@pytest.mark.parametrize("incremental", [False, True])
def test_a_step_is_that_of_both_losses(tiny_model, tiny_task, incremental):
    """Two old tasks: a loss over each one's slice; when class-incremental, one over all classes
    seen before."""
    learner = Lwf(
        tiny_model(),
        SGD,
        LwfSettings(strength=0.7, temperature=3.0, exchange="none"),
    )
    tasks = [tiny_task(t, incremental=incremental) for t in range(3)]
    for t in (0, 1):
        learner.fit(tasks[t], Round(1, t))
        learner.end_task(tasks[t], Round(0, t))
    model = tiny_model()
    model.load_state_dict(learner.model.state_dict())
    x = tasks[2].train.x
    with torch.no_grad():  # the model has moved on since it was recorded
        learner.head.weight.add_(0.1)
    recorded, z = model(x).detach(), learner.model(x)
    slices = [slice(0, 4)] if incremental else [slice(0, 2), slice(2, 4)]
    current = slice(0, 6) if incremental else slice(4, 6)
    loss = F.cross_entropy(z[:, current], tasks[2].train.y - current.start)
    old = sum(
        -((recorded[:, s] / 3).softmax(1) * (z[:, s] / 3).log_softmax(1))
        .sum(1)
        .mean()
        for s in slices
    )
    expected = torch.autograd.grad(
        loss + 0.7 * old, list(learner.model.parameters())
    )
    before = [p.detach().clone() for p in learner.model.parameters()]
    report = learner.fit(tasks[2], Round(1, 2))
    for a, b, g in zip(before, learner.model.parameters(), expected, strict=True):
        assert torch.allclose(b, a - 0.5 * g, atol=1e-6)
    assert report["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert report["distillation"] == pytest.approx(old.item(), rel=1e-5)


def test_the_old_model_is_the_shared_one_with_the_own_head(tiny_model, tiny_task):
    learner = Lwf(tiny_model(), SGD, LwfSettings())
    learner.fit(tiny_task(0), Round(1, 1))
    state = learner.state_dict()
    shared = {name: value + 0.01 for name, value in learner.send().items()}
    learner.load_state_dict(state)
    learner.receive(shared)
    report = learner.end_task(tiny_task(0), Round(0, 1))
    assert all(
        torch.equal(learner.old[name], value)
        for name, value in (shared | state["kept"]).items()
    )
    assert report == {
        "knowledge-bytes": 4.0
        * sum(p.numel() for p in learner.model.parameters())
    }


def test_tasks_of_the_same_classes_are_distilled_once(tiny_model, tiny_task):
    learner = Lwf(tiny_model(), SGD, LwfSettings())
    for number in (0, 1):
        learner.end_task(tiny_task(number), Round(0, 1))
        learner.end_task(tiny_task(number), Round(0, 1))
    assert learner.slices == [[0, 1], [2, 3]]


def test_the_warm_up_trains_the_head_alone_when_a_task_is_first_met(
    tiny_model, tiny_task
):
    train = SGD.model_copy(update={"epochs": 2})
    for warmup_epochs in (1, 2):
        learner = Lwf(
            tiny_model(), train, LwfSettings(warmup_epochs=warmup_epochs)
        )
        body, head = learner.send(), learner.local_parameters()
        learner.fit(tiny_task(0), Round(1, 1))
        stays = all(
            torch.equal(body[name], value)
            for name, value in learner.send().items()
        )
        assert stays is (warmup_epochs == 2)
        assert not torch.equal(
            head["head.weight"], learner.local_parameters()["head.weight"]
        )
        body = learner.send()
        state = learner.state_dict()
        learner.load_state_dict(state)
        learner.fit(tiny_task(0), Round(2, 1))  # it knows the task by now
        assert not any(
            torch.equal(body[name], value)
            for name, value in learner.send().items()
        )


@pytest.mark.parametrize(
    ("epochs", "rounds", "most"), [(1, 3, 1), (2, 1, 1), (1, 1, 0)]
)
def test_a_warm_up_leaves_the_body_an_epoch(tiny_model, epochs, rounds, most):
    train = SGD.model_copy(update={"epochs": epochs, "rounds": rounds})
    Lwf(tiny_model(), train, LwfSettings(warmup_epochs=most))
    said = (
        rf"learner\.warmup_epochs = {most + 1}: .* train\.epochs = {epochs} and .* at "
        rf"most {most}"
    )
    with pytest.raises(ConfigError, match=said):
        Lwf(tiny_model(), train, LwfSettings(warmup_epochs=most + 1))


@pytest.mark.parametrize("was_chosen", [False, True])
@pytest.mark.parametrize("anchor", ["global", "local"])
def test_the_old_model_by_anchor_whether_chosen_or_not(
    tiny_model, tiny_task, anchor, was_chosen
):
    """The shared body is other than any that the client trained."""
    learner = Lwf(tiny_model(), SGD, LwfSettings(anchor=anchor))
    trained = None
    if was_chosen:
        learner.fit(tiny_task(0), Round(1, 0))
        trained = learner.send()
    shared = {name: value + 1 for name, value in learner.send().items()}
    learner.receive(shared)
    learner.end_task(tiny_task(0), Round(0, 9))
    # A client that was never chosen trains alone at the end, from the shared model.
    if trained is None:
        again = Lwf(tiny_model(), SGD, LwfSettings())
        again.receive(shared)
        again.fit(tiny_task(0), Round(0, 9))
        trained = again.send()
    expected = shared if anchor == "global" else trained
    assert all(
        torch.equal(learner.old[name], expected[name]) for name in expected
    )
    head = learner.local_parameters()
    assert all(torch.equal(learner.old[name], head[name]) for name in head)
    assert "local" not in learner.own_state()
