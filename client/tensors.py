"""Arrays of messages as tensors, and back."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from fedknow.client.learners.frames.learner import Tensors
from fedknow.protocols.messages import Arrays

__all__ = ["as_arrays", "as_tensors"]


def as_tensors(arrays: Arrays, is_only_read: bool = False) -> Tensors:
    """Give arrays as tensors on the same memory.

    Parameters
    ----------
    arrays : Arrays
        Of a message.
    is_only_read : bool
        Nobody writes to the tensors. Otherwise read-only arrays, which others may share, are
        copied.

    Returns
    -------
    dict of str to Tensor
        On the CPU.
    """
    return {
        name: torch.from_numpy(
            # Copies only what cannot be written to: one message's arrays go to many clients.
            array if is_only_read else np.require(array, requirements="W")
        )
        for name, array in arrays.items()
    }


def as_arrays(tensors: Tensors) -> Arrays:
    """Give tensors on the CPU as arrays on the same memory."""
    return Arrays((name, tensor.numpy()) for name, tensor in tensors.items())


# PyTorch warns of read-only arrays once a process. Ours are not written to, so the warning is
# spent here, where nobody sees it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(1), np.uint8))
