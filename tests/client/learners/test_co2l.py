"""Co2L: both losses against loops, and what the two stages train."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedknow.client.learners.co2l import (
    Co2L,
    Co2LSettings,
    asymmetric_contrast,
    relation_distillation,
)
from fedknow.client.learners.frames.augment import view
from fedknow.client.learners.frames.learner import Round
from fedknow.client.models import SplitModel
from fedknow.client.models.cnn import cnn
from fedknow.protocols.config import TrainConfig

ADAM = TrainConfig(epochs=2, batch_size=10, lr=1e-2, channels_last=False)


def unit(*degrees: float) -> torch.Tensor:
    angle = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_contrast_by_hand():
    """Three views at 0, 90 and 0 degrees, classes a, b, a; only the first is an anchor; tau = 1.

    z_0.z_1 = 0 and z_0.z_2 = 1, so the loss is -log(e / (e + 1)).
    """
    z, y = unit(0, 90, 0), torch.tensor([0, 1, 0])
    loss = asymmetric_contrast(z, y, torch.tensor([True, False, False]), 1.0)
    assert loss.item() == pytest.approx(
        -math.log(math.e / (math.e + 1)), rel=1e-9
    )


def contrast_by_loops(z, y, anchor, tau):
    total = []
    for i in range(len(z)):
        if not anchor[i]:
            continue
        below = sum(
            math.exp(float(z[i] @ z[k]) / tau) for k in range(len(z)) if k != i
        )
        same = [j for j in range(len(z)) if j != i and y[j] == y[i]]
        total.append(
            -sum(
                math.log(math.exp(float(z[i] @ z[j]) / tau) / below) for j in same
            )
            / len(same)
        )
    return sum(total) / len(total)


def distillation_by_loops(z, past, kappa, past_kappa):
    def p(z, i, j, kappa):
        return math.exp(float(z[i] @ z[j]) / kappa) / sum(
            math.exp(float(z[i] @ z[k]) / kappa) for k in range(len(z)) if k != i
        )

    rows = [
        -sum(
            p(past, i, j, past_kappa) * math.log(p(z, i, j, kappa))
            for j in range(len(z))
            if j != i
        )
        for i in range(len(z))
    ]
    return sum(rows) / len(rows)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(2, 5),
    tau=st.floats(0.1, 2),
    past=st.floats(0.05, 2),
)
def test_losses_against_loops(seed, count, tau, past):
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        nn.functional.normalize(
            torch.randn(2 * count, 3, generator=generator, dtype=torch.float64),
            dim=1,
        )
        for _ in range(2)
    )
    y = torch.randint(0, 3, (count,), generator=generator).repeat(
        2
    )  # two views each
    anchor = (torch.arange(count) < 1 + count // 2).repeat(2)
    assert asymmetric_contrast(a, y, anchor, tau).item() == pytest.approx(
        contrast_by_loops(a, y, anchor, tau)
    )
    mine = relation_distillation(a, b, tau, past).item()
    assert mine == pytest.approx(distillation_by_loops(a, b, tau, past))
    # No model relates views better to the past model's than the past model itself, at the same
    # temperature.
    assert (
        relation_distillation(b, b, tau, tau)
        <= relation_distillation(a, b, tau, tau) + 1e-9
    )


def test_remembered_views_are_negatives_but_no_anchors():
    """Turning a remembered view towards an anchor of another class raises the loss; its own class
    pulls nothing."""
    y, anchor = (
        torch.tensor([0, 0, 7, 7]),
        torch.tensor([True, True, False, False]),
    )
    near, far = unit(0, 10, 20, 200), unit(0, 10, 120, 200)
    assert asymmetric_contrast(near, y, anchor, 0.5) > asymmetric_contrast(
        far, y, anchor, 0.5
    )
    relabelled = asymmetric_contrast(
        near, torch.tensor([0, 0, 7, 8]), anchor, 0.5
    )
    assert relabelled == asymmetric_contrast(near, y, anchor, 0.5)


def test_views():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 8, 8, generator=generator)
    whole = view(x, generator, crop=1.0, flip=False, jitter=0.0)
    assert torch.allclose(whole, x, atol=1e-5)
    mirrored = view(x, generator, crop=1.0, flip=True, jitter=0.0)
    flipped = torch.isclose(mirrored, x.flip(3), atol=1e-4).flatten(1).all(1)
    kept = torch.isclose(mirrored, x, atol=1e-4).flatten(1).all(1)
    assert (flipped ^ kept).all()
    assert 16 < flipped.sum() < 48
    ramp = torch.linspace(-1, 1, 16).expand(200, 1, 16, 16)
    crops = view(ramp, generator, crop=0.25, flip=False, jitter=0.0)
    spread = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    assert (spread > 2 * 0.5 - 0.15).all()  # sides of at least half the image's
    assert (spread < 2.01).all()
    assert spread.std() > 0.1
    jittered = view(
        torch.ones(200, 1, 2, 2), generator, crop=1.0, flip=False, jitter=0.4
    )[:, 0, 0, 0]
    assert jittered.min() >= 1 - 0.8
    assert jittered.max() <= 1 + 0.8
    again = [
        view(x, torch.Generator().manual_seed(3), 0.4, True, 0.4)
        for _ in range(2)
    ]
    assert torch.equal(*again)


def small(seed: int = 0) -> SplitModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body, features = cnn((1, 4, 4), channels=4, hidden=8)
        return SplitModel(body, nn.Linear(features, 6))


@pytest.fixture
def big_task(tiny_task):
    """The tiny tasks with images of 4 x 4."""

    def build(number, seed=0):
        task = tiny_task(number, samples=24, seed=seed)

        def grow(split):
            return replace(
                split, x=split.x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            )

        return replace(task, train=grow(task.train), test=grow(task.test))

    return build


def test_the_head_is_fitted_on_a_frozen_body_and_the_body_by_contrast(big_task):
    learner = Co2L(small(), ADAM, Co2LSettings(projection=8, flip=False))
    names = {name.split(".")[0] for name in learner.send()}
    assert names == {"body", "projection"}
    assert {name.split(".")[0] for name in learner.local_parameters()} == {"head"}
    before = {
        name: value.clone() for name, value in learner.model.state_dict().items()
    }
    report = learner.fit(big_task(0), Round(1, 0))
    after = learner.model.state_dict()
    assert all(
        not torch.equal(after[name], before[name])
        for name in before
        if "weight" in name
    )
    assert report["accuracy"] > 0.9
    [(right, total, _)] = learner.score([big_task(0).train], [(0, 1)], 16)
    assert right / total == pytest.approx(report["accuracy"])
    body = {
        name: value.clone() for name, value in learner.body.state_dict().items()
    }
    learner._fit_head(big_task(0), Round(1, 1))
    assert all(
        torch.equal(value, body[name])
        for name, value in learner.body.state_dict().items()
    )


def test_the_ratio_scales_the_contrast(big_task):
    """One step of plain descent on all samples; without a past model the contrast is the loss."""
    sgd = TrainConfig(
        epochs=1,
        batch_size=64,
        optimizer="sgd",
        lr=0.5,
        weight_decay=0.0,
        channels_last=False,
    )

    def moved(ratio):
        learner = Co2L(small(), sgd, Co2LSettings(flip=False, ratio=ratio))
        before = {name: value.clone() for name, value in learner.send().items()}
        learner.fit(big_task(0), Round(1, 0))
        after = learner.send()
        return {name: after[name] - before[name] for name in before}

    once, often = moved(1.0), moved(7.14)
    for name, step in once.items():
        assert torch.allclose(often[name], 7.14 * step, rtol=1e-2, atol=1e-6)
    assert any(step.abs().max() > 1e-5 for step in once.values())


def test_knowledge_is_samples_and_the_past_model(big_task):
    learner = Co2L(small(), ADAM, Co2LSettings(projection=8, memory=0.25))
    learner.fit(big_task(0), Round(1, 0))
    kept = learner.end_task(big_task(0), Round(0, 0))
    encoder = (
        sum(p.numel() for p in learner.body.parameters())
        + (8 * 8 + 8)
        + (8 * 8 + 8)
    )
    assert kept["knowledge-bytes"] == 6 * (16 * 4 + 8) + 4 * encoder
    past = learner.state_dict()["past"]
    assert all(
        torch.equal(past[f"0.{name}"], value)
        for name, value in learner.body.state_dict().items()
    )


def test_distillation_keeps_relations(big_task):
    """A heavy weight on them keeps the past model's relations between samples."""
    moved = []
    for distill in (0.0, 20.0):
        learner = Co2L(
            small(),
            ADAM,
            Co2LSettings(
                projection=8, distill=distill, past_temperature=0.2, memory=0.5
            ),
        )
        learner.fit(big_task(0), Round(1, 0))
        learner.end_task(big_task(0), Round(0, 0))
        for number in range(5):
            learner.fit(big_task(1), Round(1 + number, number))
        x = big_task(0).test.x
        with torch.no_grad():
            past, now = (
                learner._project(learner._past, x),
                learner._project(learner._encoder.eval(), x),
            )
        moved.append(
            relation_distillation(now, past, 0.2, 0.2)
            - relation_distillation(past, past, 0.2, 0.2)
        )
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("exchange", ["all", "body", "none"])
def test_interrupted_or_not_and_whoever_was_here_before(
    assert_interruptions_do_not_matter, big_task, exchange
):
    settings = Co2LSettings(exchange=exchange, memory=0.3, projection=8)
    assert_interruptions_do_not_matter(
        lambda: Co2L(small(), ADAM, settings), big_task
    )
