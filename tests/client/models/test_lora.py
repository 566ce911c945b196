"""Adapters: Eq. (3) by hand, and which layers have one."""

import pytest
import torch
from torch import nn

from fedknow.client.data import SampleSpec
from fedknow.client.models import build_model
from fedknow.client.models.lora import Adapted, adapt
from fedknow.protocols.config import ConfigError, ModelConfig


def test_update_of_a_linear_layer_by_hand():
    layer = nn.Linear(2, 2, bias=False)
    adapted = Adapted(layer, rank=1, alpha=3.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        adapted.a.weight.copy_(torch.tensor([[1.0, 2.0]]))
        adapted.b.weight.copy_(torch.tensor([[10.0], [0.0]]))
    # A x = 1 + 4 = 5; B A x = (50, 0); times alpha / r = 3.
    outputs = adapted(torch.tensor([[1.0, 2.0]]))
    assert outputs.tolist() == [[151.0, 2.0]]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 3),
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Conv2d(2, 3, 1),
        nn.Conv2d(2, 3, 3, padding=2, dilation=2),
    ],
)
def test_an_adapter_is_a_low_rank_change_of_the_weights(layer):
    torch.manual_seed(0)
    is_linear = isinstance(layer, nn.Linear)
    x = torch.randn(5, 4) if is_linear else torch.randn(5, 2, 6, 6)
    adapted = Adapted(layer, rank=2, alpha=4.0)
    assert torch.equal(adapted(x), layer(x))
    nn.init.normal_(adapted.b.weight)
    a, b = adapted.a.weight.flatten(1), adapted.b.weight.flatten(1)
    expected = adapted(x)
    with torch.no_grad():
        layer.weight.add_((4.0 / 2 * b @ a).view_as(layer.weight))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_which_layers_have_one():
    body = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 8, 1),
        nn.TransformerEncoderLayer(8, 2),
        nn.Sequential(nn.Linear(8, 8)),
    )
    adapt(body, 2, 4.0, "mine")
    adapted = {n for n, m in body.named_modules() if isinstance(m, Adapted)}
    assert adapted == {"1", "3.0"}


def test_nothing_to_adapt():
    with pytest.raises(ConfigError, match=r"no nn\.Linear"):
        adapt(nn.Sequential(nn.Flatten()), 2, 4.0, "linear")


def test_a_network_begins_as_it_was():
    settings = {"name": "mobilenet_v2", "width": 0.25}
    plain = build_model(ModelConfig(**settings), (3, 32, 32), 10, seed=0)
    lora = ModelConfig(**settings, train="lora", lora_rank=2)
    model = build_model(lora, (3, 32, 32), 10, seed=0)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain.eval().body(x), model.body(x))
    free = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(
        n.startswith("head.") or n[-9:] in (".a.weight", ".b.weight")
        for n in free
    )


SAMPLES = (
    SampleSpec("series", (16, 3), "float32"),
    SampleSpec("waveform", (4000,), "int16", rate=8000),
    SampleSpec("tokens", (5,), "int32", vocabulary=9),
)
NETWORKS = [("cnn1d", sample) for sample in SAMPLES[:2]]
NETWORKS += [("gru", sample) for sample in SAMPLES]
NETWORKS += [("transformer", sample) for sample in SAMPLES]


@pytest.mark.parametrize(("name", "sample"), NETWORKS, ids=str)
def test_networks_of_sequences_train_their_adapters(name, sample):
    lora = ModelConfig(name=name, train="lora", lora_rank=2)
    model = build_model(lora, sample, 4, seed=0).eval()
    x = sample.random(3)
    plain = build_model(ModelConfig(name=name), sample, 4, seed=0).eval()
    assert torch.equal(plain.body(x), model.body(x))
    model(x).sum().backward()
    free = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in free.values())
    adapters = [p for n, p in free.items() if n.endswith(".b.weight")]
    assert any(p.grad.any() for p in adapters)
