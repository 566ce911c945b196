"""Heads: the cosine one by hand, and who takes it."""

import pytest
import torch

from fedknow.client.learners import LEARNERS, build_learner
from fedknow.client.models.heads import CosineHead
from fedknow.protocols.config import ConfigError, read_config


def test_cosines_by_hand():
    head = CosineHead(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 0.0], [1.0, 1.0]]))
    logits = head(torch.tensor([[5.0, 0.0], [0.0, 2.0]]))
    root = 10 * 0.5**0.5
    torch.testing.assert_close(logits, torch.tensor([[10.0, root], [0.0, root]]))


@pytest.mark.parametrize("name", LEARNERS)
def test_taken_or_refused(name):
    config = read_config(
        {
            "model": {"name": "mlp", "head": "cosine"},
            "learner": name,
            "train": {"epochs": 2},
        }
    )
    if "cosine" in LEARNERS[name].heads:
        learner = build_learner(config, (1, 8, 8), 10)
        assert isinstance(learner.head, CosineHead)
    else:
        with pytest.raises(ConfigError, match=r"set model\.head = 'linear'"):
            build_learner(config, (1, 8, 8), 10)
