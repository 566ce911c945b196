"""Tensors that are mostly zeros, in a form that is small to keep."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedknow.client.learners.frames.learner import State, Tensors

__all__ = ["pack", "packed_bytes", "unpack"]


def pack(tensors: Mapping[str, Tensor]) -> State:
    """Pack sparse tensors: shape, places and values, by name.

    Places are those of entries that are not zero: one bit each, most significant first.
    """
    packed: State = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().flatten()
        # A -0.0 counts as zero here, which no method tells apart.
        is_nonzero = flat != 0
        packed[name] = {
            "shape": list(tensor.shape),
            # One bit an entry: places as int64 would take more from one entry in 64 on.
            "there": torch.from_numpy(np.packbits(is_nonzero.cpu().numpy())),
            "values": flat[is_nonzero],
        }
    return packed


def unpack(packed: State) -> Tensors:
    """Undo :func:`pack`: new tensors, contiguous."""
    tensors: Tensors = {}
    for name, entry in packed.items():
        shape = [int(size) for size in entry["shape"]]
        flat = entry["values"].new_zeros(int(np.prod(shape, dtype=np.int64)))
        is_nonzero = np.unpackbits(entry["there"].cpu().numpy(), count=len(flat))
        flat[torch.from_numpy(is_nonzero).bool().to(flat.device)] = entry[
            "values"
        ]
        tensors[name] = flat.view(shape)
    return tensors


def packed_bytes(packed: State) -> int:
    """Size of what :func:`pack` gave, in bytes."""
    return sum(
        int(entry["there"].nbytes + entry["values"].nbytes)
        for entry in packed.values()
    )
