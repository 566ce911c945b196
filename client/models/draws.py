"""PyTorch's global generator, for one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["own_draws"]

# Reentrant: a user's builder may itself build a model.
_IN_USE = threading.RLock()


@contextmanager
def own_draws(seed: int) -> Iterator[None]:
    """Seed PyTorch's global generator, have it alone, and leave it as it was.

    All threads of a process share it. Of two that build a model at once, each would draw
    from what the other seeded, and the last to end would leave it in any state.

    Parameters
    ----------
    seed : int
        Fixes the draws.
    """
    # No GPU is touched.
    with _IN_USE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
