"""Deployed models of sensors, sound and text: the same answers as in the run."""

import numpy as np
import pytest
import torch

from fedknow.api.deployed import DeployedModel
from fedknow.api.inputs import as_input
from fedknow.client.data import Ragged, SampleSpec
from fedknow.client.data.samples import model_input
from fedknow.client.models import build_model
from fedknow.protocols.config import ConfigError, ModelConfig

TOKENS = SampleSpec("tokens", (5,), "int32", is_ragged=True, vocabulary=9)
SERIES = SampleSpec("series", (8, 2), "int16", is_ragged=True)
NUMBERS = ((3.0, -1.0), (2.0, 4.0))


def deployed(spec, mean=(), std=()):
    network = build_model(ModelConfig(name="transformer"), spec, 3, 0).eval()
    return network, DeployedModel(network, spec, mean, std, "abc")


def test_tokens_are_filled_up():
    network, model = deployed(TOKENS)
    x = np.array([[1, 8, 3]])
    expected = network(torch.tensor([[1, 8, 3, 0, 0]])).detach()
    np.testing.assert_allclose(model.logits(x), expected, rtol=1e-5)


def test_series_are_normalised_as_in_a_run():
    network, model = deployed(SERIES, *NUMBERS)
    rows = np.arange(12).reshape(1, 6, 2).astype(np.int16) + 1
    x = model_input(Ragged.join(list(rows)), SERIES, *NUMBERS)
    expected = network(x).detach()
    np.testing.assert_allclose(model.logits(rows), expected, rtol=1e-5)


@pytest.mark.parametrize("spec", [TOKENS, SERIES])
def test_torchscript_gives_the_same(tmp_path, spec):
    _, model = deployed(spec, *(NUMBERS if spec is SERIES else ()))
    x = spec.random(4)
    path = model.export(tmp_path / "model", to="torchscript")
    loaded = torch.jit.load(str(path))
    torch.testing.assert_close(loaded(x), model(x))
    assert model.description()["input"]["kind"] == spec.kind


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (np.array([[1, 9]]), "integers from 0 to 8"),
        (np.array([[0.5]]), "integers from 0 to 8"),
        (np.zeros((0, 5), int), "n at least 1"),
        (np.zeros((2, 5, 1), int), r"must be \[n, 5\]"),
    ],
)
def test_wrong_samples_are_refused(x, reason):
    with pytest.raises(ConfigError, match=reason):
        as_input(x, TOKENS)
