"""Two names: the paper's method, and what was found better."""

import torch

from fedknow.client.learners.fedknow.learner import FedKnow
from fedknow.client.learners.fedknow.plus import FedKnowPlus
from fedknow.client.learners.fedknow.settings import (
    FedKnowPlusSettings,
    FedKnowSettings,
)
from fedknow.client.learners.frames.learner import Round
from fedknow.protocols.config import TrainConfig

TRAIN = TrainConfig(epochs=2, batch_size=8, lr=0.01)


def live(client, tiny_task):
    """Train on three tasks, two rounds each; return the body after the last."""
    for number in range(3):
        for round in (1, 2):
            client.receive(client.send())
            client.fit(tiny_task(number), Round(round, 10 * number + round))
        client.end_task(tiny_task(number), Round(0, 90 + number))
    return client.send()


def test_fedknow_has_the_papers_values():
    settings = FedKnowSettings()
    assert settings.margin == 0
    assert settings.integrator == "qp"
    assert settings.post_aggregation == "first-epoch"
    assert (settings.temperature, settings.labels) == (2.0, "soft")
    assert (settings.rho, settings.k) == (0.1, 10)
    assert settings.exchange == "body"


def test_the_plus_differs_in_the_three_settings_that_its_docstring_names():
    paper = FedKnowSettings().model_dump()
    plus = FedKnowPlusSettings().model_dump()
    differing = {key for key in paper if paper[key] != plus[key]}
    assert differing == {"margin", "temperature", "post_aggregation"}
    for key in differing:
        assert f"``{key} = " in FedKnowPlus.__doc__


def test_the_paper_with_these_three_is_the_plus(tiny_model, tiny_task):
    same = {"margin": 0.5, "temperature": 1.0, "post_aggregation": "off"}
    a = live(FedKnow(tiny_model(), TRAIN, FedKnowSettings(**same)), tiny_task)
    b = live(FedKnowPlus(tiny_model(), TRAIN, FedKnowPlusSettings()), tiny_task)
    paper = live(FedKnow(tiny_model(), TRAIN, FedKnowSettings()), tiny_task)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], paper[name]) for name in a)
