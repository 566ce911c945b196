"""A learner written from the README is trained as a built-in one is, and obeys each setting."""

import pytest
import torch
from torch.nn import functional as F

from fedknow.client.compute.cost import Meter
from fedknow.client.learners.baselines import Finetune
from fedknow.client.learners.frames.learner import Learner, LearnerSettings, Round
from fedknow.protocols.config import TrainConfig


class Smoothed(Learner):
    """As in the README, with no smoothing."""

    def loss(self, logits, batch):
        return F.cross_entropy(logits, batch.y, label_smoothing=0.0)


class Doubled(Learner):
    """Changes gradients, by twice nothing."""

    def gradient(self, batch):
        report = super().gradient(batch)
        for parameter in self.trainable.values():
            parameter.grad.mul_(1.0)
        return report


SETTINGS = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    "clipped": {"clip_norm": 0.01},
    "channels last": {"channels_last": True},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-2},
}


def trained(kind, model, task, mu=0.0, **settings):
    learner = kind(
        model, TrainConfig(batch_size=8, **settings), LearnerSettings()
    )
    with learner.meter.message():
        report = learner.fit(task, Round(1, 3, proximal_mu=mu))
    return learner.send(), report, learner.meter.cost


@pytest.mark.parametrize("kind", [Smoothed, Doubled])
@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize("name", SETTINGS)
def test_it_gives_the_numbers_of_the_built_in_one(
    tiny_model, tiny_task, kind, mu, name
):
    settings = SETTINGS[name]
    expected = trained(Finetune, tiny_model(), tiny_task(0), mu, **settings)
    found = trained(kind, tiny_model(), tiny_task(0), mu, **settings)
    assert all(
        torch.equal(value, found[0][name]) for name, value in expected[0].items()
    )
    assert found[1:] == expected[1:]


def test_each_setting_matters(tiny_model, tiny_task):
    runs = [
        trained(Smoothed, tiny_model(), tiny_task(0), mu, **settings)[0][
            "head.weight"
        ]
        for name, settings in SETTINGS.items()
        for mu in (0.0, 0.5)
        if name != "channels last"
    ]
    for i, weight in enumerate(runs):
        assert not any(torch.equal(weight, other) for other in runs[:i])


def test_the_loss_runs_in_full_precision(tiny_model, tiny_task):
    seen = []

    class Watched(Learner):
        def loss(self, logits, batch):
            seen.append((logits.dtype, logits.shape[1], batch.outputs.shape[1]))
            return super().loss(logits, batch)

    trained(Watched, tiny_model(), tiny_task(1), precision="bf16", epochs=1)
    assert set(seen) == {(torch.float32, 2, 6)}


def test_what_is_minimised_and_what_is_reported_may_differ(tiny_model, tiny_task):
    class Weighted(Learner):
        def loss(self, logits, batch):
            loss = super().loss(logits, batch)
            return 0 * loss, loss

    before = tiny_model().head.weight
    sent, report, _ = trained(Weighted, tiny_model(), tiny_task(0))
    assert torch.equal(sent["head.weight"], before)
    assert report["loss"] > 0.1


@pytest.mark.parametrize("kind", [Smoothed, Doubled])
def test_its_steps_are_counted_once(tiny_model, tiny_task, kind):
    learner = kind(
        tiny_model(), TrainConfig(batch_size=8, epochs=3), LearnerSettings()
    )
    counted = []
    plain = Meter.part

    def part(key=None):
        made = plain(learner.meter, key)
        if key is not None and key[0] == "step":
            counted.append(made.counted)
        return made

    learner.meter.part = part
    for round in (1, 2):
        with learner.meter.message():
            learner.fit(tiny_task(0), Round(round, round))
    # Two sizes of batch: 8 and 8 and 4 samples, in each of six epochs.
    assert len(counted) == 18
    assert sum(counted) == 2
