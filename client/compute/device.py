"""Where a learner computes, and what crosses over to it.

Messages, states and whatever is kept on disk are on the CPU. A learner works on one device: its
model is there from the beginning, and what a message and a client's state hold is brought there
before the work and back after it.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fedknow.client.data.stream import Split, TaskData
from fedknow.protocols.config import ConfigError, check_device

__all__ = ["DeviceTransfer", "find_device"]

_Tree = TypeVar("_Tree")


def find_device(name: str, key: str = "engine.device") -> torch.device:
    """Find the device of a name: ``cpu``, ``cuda``, ``cuda:1``, ``auto``.

    ``auto`` is a GPU where torch sees one.

    On a GPU float32 is float32 from then on: by default PyTorch takes convolutions in TF32
    there, of 10 bits.

    Parameters
    ----------
    name : str
        The name.
    key : str
        What errors call the setting.

    Raises
    ------
    ConfigError
        If it is no such name, or torch does not see that GPU here.
    """
    check_device(name, key)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind == "cuda" and int(number or 0) >= (
        count := torch.cuda.device_count()
    ):
        seen = ", ".join(f"'cuda:{i}'" for i in range(count)) or "no GPU"
        raise ConfigError(
            f"{key} = {name!r}: torch {torch.__version__} sees {seen} here; set {key} to "
            f"'cpu' or 'auto'"
        )
    if kind == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


class DeviceTransfer:
    """The transfer of tensors between the CPU and a learner's device.

    Where the device is the CPU, all is left as it is.

    Parameters
    ----------
    device : torch.device
        The learner's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._came: MutableMapping[Tensor, tuple[Tensor, int]] = (
            WeakTensorKeyDictionary()
        )

    def enter(self, tree: _Tree) -> _Tree:
        """Nested dictionaries and lists with their tensors on the device."""
        return (
            tree if self.device.type == "cpu" else self._walk(tree, inward=True)
        )

    def leave(self, tree: _Tree) -> _Tree:
        """Bring tensors to the CPU.

        A tensor that came in and was not written to is given back as the very same object.
        """
        return (
            tree if self.device.type == "cpu" else self._walk(tree, inward=False)
        )

    def enter_split(self, split: Split) -> Split:
        """Bring samples to the device."""
        return (
            split
            if self.device.type == "cpu"
            else Split(split.x.to(self.device), split.y.to(self.device))
        )

    def enter_task(self, data: TaskData) -> TaskData:
        """Bring a task's training samples to the device."""
        return (
            data
            if self.device.type == "cpu"
            else replace(data, train=self.enter_split(data.train))
        )

    def _walk(self, tree: Any, inward: bool) -> Any:
        if isinstance(tree, Tensor):
            return self._brought(tree) if inward else self._returned(tree)
        if isinstance(tree, dict):
            return {key: self._walk(value, inward) for key, value in tree.items()}
        return (
            [self._walk(value, inward) for value in tree]
            if isinstance(tree, list)
            else tree
        )

    def _brought(self, tensor: Tensor) -> Tensor:
        moved = tensor.to(self.device)
        # PyTorch counts a tensor's changes in place, which shows whether it is still the copy.
        self._came[moved] = tensor, moved._version
        return moved

    def _returned(self, tensor: Tensor) -> Tensor:
        # A client's store writes again only what is another tensor than before.
        original, version = self._came.get(tensor, (None, 0))
        return (
            tensor.detach().cpu()
            if original is None or version != tensor._version
            else original
        )
