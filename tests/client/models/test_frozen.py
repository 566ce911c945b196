"""Frozen parts: what is trained, modes, features, and copies."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedknow.client.data.samples import as_spec
from fedknow.client.learners.frames.exchange import Entries
from fedknow.client.models import build_model
from fedknow.client.models.frozen import Backbone, freeze, is_held
from fedknow.protocols.config import ConfigError, ModelConfig

RGB = (3, 32, 32)


def build(name="mobilenet_v2", shape=RGB, **options):
    # A quarter of the width suffices.
    options = {"width": 0.25} | options if name != "mlp" else options
    return build_model(ModelConfig(name=name, **options), shape, 10, seed=3)


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def images(count=4, shape=RGB, seed=0):
    return torch.randn(
        count, *shape, generator=torch.Generator().manual_seed(seed)
    )


def test_all_is_the_network_as_it_was():
    plain = build_model(
        ModelConfig(name="mobilenet_v2", width=0.25), RGB, 10, seed=3
    )
    assert build(train="all").state_dict().keys() == plain.state_dict().keys()


def test_head_alone():
    model = build(train="head")
    assert trainable(model) == {"head.weight", "head.bias"}
    assert Entries(model, "all").names == ["head.weight", "head.bias"]


def test_last_blocks():
    # ReLUs and normalisations are no blocks of their own.
    model = build("mlp", (1, 4, 4), layers=3, hidden=8, train="last:2")
    assert trainable(model) == {
        "body.trained.0.weight", "body.trained.0.bias",
        "body.trained.2.weight", "body.trained.2.bias",
        "head.weight", "head.bias",
    }  # fmt: skip
    last = build(train="last:1")
    assert {name.split(".")[0] for name in trainable(last)} == {"body", "head"}
    assert isinstance(last.body.trained[0], nn.Conv2d)
    assert isinstance(last.body.trained[1], nn.BatchNorm2d)


def test_blocks_of_a_network_that_is_no_sequence():
    model = build("densenet121", RGB, train="last:1", width=0.25)
    free = trainable(model) - {"head.weight", "head.bias"}
    assert free
    assert len(free) < sum(1 for _ in model.body.parameters()) / 2


def test_a_neck_is_shared_with_the_body():
    model = build(train="head", neck=5)
    assert trainable(model) == {
        "body.trained.1.0.weight", "body.trained.1.0.bias",
        "head.weight", "head.bias",
    }  # fmt: skip
    assert model(images()).shape == (4, 10)
    assert build("mlp", RGB, neck=5).head.in_features == 5


@pytest.mark.parametrize("train", ["head", "last:1", "lora"])
def test_frozen_parts_stay_in_evaluation_mode(train):
    model = build(train=train)
    model.train()
    # Learners switch normalisations by themselves, too.
    held = [module for module in model.modules() if is_held(module)]
    for module in held:
        module.train(True)
    assert held
    assert not any(module.training for module in held)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    model(images())
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(name.endswith("running_mean") for name in frozen)


@given(st.integers(1, 6), st.integers(0, 5))
@settings(max_examples=10, deadline=None)
def test_features_do_not_depend_on_the_batch(count, seed):
    body = build(train="head").body
    x = images(6, seed=seed)
    together = body(x)
    parts = [body(part) for part in torch.split(x, count)]
    assert torch.equal(torch.cat(parts), together)


def test_samples_or_features():
    body = build(train="last:2").body
    x = images()
    features = body.features(x)
    body.eval()
    assert features.shape[1:] == body.feature_shape
    assert torch.equal(body(features), body(x))
    assert not features.requires_grad


def test_copies_share_what_is_frozen():
    model = build(train="last:1")
    twin = copy.deepcopy(model)
    assert twin.body.frozen is model.body.frozen
    with torch.no_grad():
        twin.head.weight.zero_()
        for parameter in twin.body.trained.parameters():
            parameter.zero_()
    assert model.head.weight.any()
    assert model.body(images()).any()


def test_a_copy_of_an_adapted_network_is_held_too():
    twin = copy.deepcopy(build(train="lora"))
    twin.train()
    norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_buffers_of_integers_stay_buffers():
    norm = nn.BatchNorm2d(3)
    freeze(norm)
    assert [name for name, _ in norm.named_buffers()] == ["num_batches_tracked"]
    assert not any(p.requires_grad for p in norm.parameters())


def test_no_graph_reaches_the_frozen_part():
    backbone = Backbone(nn.Flatten(), nn.Linear(4, 2), as_spec((1, 2, 2)))
    x = torch.randn(3, 1, 2, 2, requires_grad=True)
    backbone(x).sum().backward()
    assert x.grad is None
    assert backbone.trained.weight.grad is not None


def test_too_few_blocks():
    with pytest.raises(ConfigError, match="has 3 blocks, and one at least"):
        build("mlp", (1, 4, 4), layers=3, train="last:3")


@pytest.mark.parametrize("value", ["last:0", "some", "last:", "HEAD"])
def test_unknown_parts(value):
    with pytest.raises(ValueError, match="train"):
        ModelConfig(train=value)


def test_defaults_are_not_written():
    assert ModelConfig().model_dump() == {"name": "cnn"}
    written = ModelConfig(name="cnn", hidden=3, train="head").model_dump()
    assert written == {"name": "cnn", "hidden": 3, "train": "head"}
    assert ModelConfig.model_validate(written).options == {"hidden": 3}
