"""The entries of a model: those that travel, and those that stay."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedknow.client.learners.frames.settings import Exchange

__all__ = ["Entries", "Layout", "State", "Tensors"]

Tensors = dict[str, Tensor]
Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of tensors by name; -1 stands for any size."""
State = dict[str, Any]
"""Nested dict of tensors, JSON scalars and lists: what :func:`fedknow.client.state.save_state` can
store."""


class Entries:
    """Parameters to train and buffers of a model, by their names.

    Frozen parameters are left out: they are the same everywhere and for ever, so they neither
    travel nor are kept. A tensor with several names (tied weights) goes by the first.

    Parameters
    ----------
    model : nn.Module
        The model.
    exchange : {"all", "body", "none"}
        Which entries are averaged over clients.
    parts : sequence of str
        The model's modules that are exchanged with its body.

    Attributes
    ----------
    names : list of str
        Entries that travel or are kept, in the order of the state dict.
    counters : dict of str to Tensor
        Buffers of integers (BatchNorm's counters), as they were at first. From an average
        they would come back as fractions, so they do not travel. They start anew with each
        message, as they steer BatchNorm without momentum and must not tell who came before.
    fresh : dict of str to Tensor
        What a new client has of the entries that do not travel.
    """

    def __init__(
        self,
        model: nn.Module,
        exchange: Exchange,
        parts: Sequence[str] = ("body",),
    ) -> None:
        self._exchange = exchange
        self._parts = frozenset(parts)
        parameters = dict(model.named_parameters())
        self._frozen = {
            # Frozen parameters are the same everywhere: they neither travel nor are kept.
            n: p
            for n, p in parameters.items()
            if not p.requires_grad
        }
        buffers = dict(model.named_buffers()).keys()
        chosen = (parameters.keys() - self._frozen.keys()) | buffers
        # The state dict has the order that arrays are sent in.
        initial = {n: v for n, v in model.state_dict().items() if n in chosen}
        self.names = [
            n for n, value in initial.items() if value.is_floating_point()
        ]
        self.counters = {
            name: value.clone()
            for name, value in initial.items()
            if not value.is_floating_point()
        }
        self.fresh = {
            name: value.clone()
            for name, value in initial.items()
            if not self.travels(name)
        }
        # Where each entry lies: state_dict() walks through all modules, a tenth of a small
        # client's round.
        self._places = {name: _place(model, name) for name in initial}

    def travels(self, name: str) -> bool:
        """Whether an entry is averaged over clients."""
        if self._exchange == "body":
            return name.partition(".")[0] in self._parts
        return self._exchange == "all"

    def send(self) -> Tensors:
        """Copy the entries that travel."""
        return self._copies([name for name in self.names if self.travels(name)])

    def local_parameters(self) -> Tensors:
        """Copy the entries that a client keeps to itself."""
        return self._copies(
            [name for name in self.names if not self.travels(name)]
        )

    def receive(self, arrays: Tensors) -> None:
        """Put received entries into the model; others stay.

        Raises
        ------
        ValueError
            If a name is unknown or missing, or a shape is another one.
        """
        expected = {name for name in self.names if self.travels(name)}
        if arrays.keys() != expected:
            names = ", ".join(sorted(arrays.keys() ^ expected)[:5])
            raise ValueError(
                f"received parameters do not fit the model: {names} are missing or unknown"
            )
        self.load(arrays)

    def load(self, arrays: Tensors) -> None:
        """Put values into the model by name.

        Raises
        ------
        ValueError
            If a shape is another one.
        """
        with torch.no_grad():
            for name, value in arrays.items():
                entry = self[name]
                # copy_ would broadcast a smaller tensor without a word.
                if entry.shape != value.shape:
                    raise ValueError(
                        f"{name} has shape {tuple(value.shape)}, "
                        f"the model's is {tuple(entry.shape)}"
                    )
                # In place, as the optimizer and the model refer to this tensor.
                entry.copy_(value)

    @functools.cached_property
    def frozen_digest(self) -> str:
        """Digest of the frozen parameters; "" without any.

        All clients must share them without being sent them.
        """
        if not self._frozen:
            return ""
        digest = hashlib.sha256()
        for name, parameter in self._frozen.items():
            value = parameter.detach().cpu().contiguous()
            # Names and shapes too: equal bytes can be two different layers.
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, name: str) -> Tensor:
        """Return the parameter or buffer itself."""
        module, attribute = self._places[name]
        return cast(Tensor, getattr(module, attribute))

    def _copies(self, names: Sequence[str]) -> Tensors:
        with torch.no_grad():
            return {
                # Contiguous whatever the model's format, as arrays and states have rows in
                # order.
                name: self[name].clone(memory_format=torch.contiguous_format)
                for name in names
            }


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Find the module that has an entry, and the entry's name in it."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
