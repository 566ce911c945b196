"""Networks of other libraries, with stand-ins for those that are not installed."""

import sys

import pytest
import torch

from fedknow.client.data.samples import SampleSpec
from fedknow.client.models import build_model
from fedknow.protocols.config import ConfigError, ModelConfig

IMAGES = SampleSpec("image", (3, 16, 16), "uint8")
TOKENS = SampleSpec("tokens", (6,), "int64", vocabulary=30)
TIMM = """
from torch import nn

def create_model(name, pretrained, num_classes, in_chans, width=4):
    if name == "flatless":
        return nn.Conv2d(in_chans, width, 3)
    if name != "tiny":
        raise RuntimeError(f"Unknown model ({name})")
    assert num_classes == 0
    last = nn.AdaptiveAvgPool2d(1)
    network = nn.Sequential(
        nn.Conv2d(in_chans, width, 3), nn.ReLU(), last, nn.Flatten()
    )
    if pretrained:
        nn.init.ones_(network[0].weight)
    return network
"""
TORCHVISION = """
from torch import nn

class models:
    @staticmethod
    def get_model(name, weights):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(768, 5), nn.ReLU(), nn.Linear(5, 1000)
        )
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Put modules on the path under the names of libraries."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


def build(sample, **settings):
    return build_model(ModelConfig(**settings), sample, 7, seed=1)


def test_a_network_without_its_classifier_gets_a_head(stand_in):
    stand_in("timm", TIMM)
    model = build(IMAGES, name="timm:tiny", width=6)
    assert (model.head.in_features, model.head.out_features) == (6, 7)
    assert model(IMAGES.random(3)).shape == (3, 7)
    again = build(IMAGES, name="timm:tiny", width=6)
    torch.testing.assert_close(
        model.state_dict(), again.state_dict(), rtol=0, atol=0
    )


def test_weights_of_the_hub_are_the_librarys_affair(stand_in):
    stand_in("timm", TIMM)
    model = build(IMAGES, name="timm:tiny", weights="hub", train="head", neck=4)
    frozen = model.body.frozen[0].weight
    assert (frozen == 1).all()
    assert not frozen.requires_grad
    assert model.head.in_features == 4


def test_images_are_scaled_where_that_is_asked_for(stand_in):
    stand_in("timm", TIMM)
    sizes = []
    model = build(IMAGES, name="timm:tiny", resize=32)
    model.body.network[0].register_forward_pre_hook(
        lambda _, inputs: sizes.append(inputs[0].shape[-1])
    )
    model(IMAGES.random(2))
    assert sizes == [32]


def test_a_classifier_by_any_name_is_taken_off(stand_in):
    stand_in("torchvision", TORCHVISION)
    model = build(IMAGES, name="torchvision:any")
    assert model.head.in_features == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "timm:huge"}, r"Unknown model \(huge\)"),
        ({"name": "timm:tiny", "widht": 3}, "widht"),
        ({"name": "timm:flatless"}, r"does not give features \[n, f\]"),
    ],
)
def test_what_the_library_does_not_know_is_refused(stand_in, settings, message):
    stand_in("timm", TIMM)
    with pytest.raises(ConfigError, match=message):
        build(IMAGES, **settings)


def test_samples_of_another_kind_are_refused(stand_in):
    with pytest.raises(ConfigError, match="timm takes samples of kind image"):
        build(TOKENS, name="timm:tiny")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named"),
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "RuntimeError: operator torchvision::nms does not exist",
        ),
    ],
)
def test_a_broken_library_is_refused_with_the_reason(stand_in, text, reason):
    stand_in("torchvision", text)
    with pytest.raises(ConfigError, match=reason) as refused:
        build(IMAGES, name="torchvision:resnet18")
    assert "pip install '.[torchvision]'" in str(refused.value)
    assert f"made for torch {torch.__version__}" in str(refused.value)


def test_a_text_network_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    config.save_pretrained(tmp_path / "tiny")
    model = build(TOKENS, name=f"hf:{tmp_path / 'tiny'}").eval()
    short = torch.tensor([[3, 4, 0, 0, 0, 0]])
    with torch.no_grad():
        features = model.body(short)
        # Padding has no part in the mean.
        expected = model.body(short[:, :2])
    assert features.shape == (1, 8)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
