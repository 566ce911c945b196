"""States as JSON trees in which tensors are numbered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedknow.client.state.errors import StateError

__all__ = [
    "Leaf",
    "State",
    "Tensors",
    "is_apart",
    "join",
    "leaves",
    "pack",
    "place",
    "tensor_name",
    "tensors_in",
]

State = dict[str, Any]
"""A tree of dictionaries (with text as keys) and lists, whose leaves are ``torch.Tensor`` (dense,
on the CPU), ``numpy.ndarray`` (of a type that torch has too), ``None``, ``bool``, ``int``,
``float`` or ``str``. Tuples, bytes and NumPy scalars are refused.

A state is never changed once it was handed to a store or received from one: make a new one instead.
"""

Tensors = dict[str, torch.Tensor]
"""A state's tensors by :func:`tensor_name`."""

Leaf = list[Any]
"""A tensor's place in a state's tree.

Its kind and its number in the version's own file; or its kind, its number in a part, the part's
name and a CRC-32.
"""

# A leaf's kind. They are written to files, so that these words never change.
_TENSOR = "tensor"
_ARRAY = "array"
_LIST = "list"
"""In a JSON tree a list that begins so is a list; any other is a leaf."""

_PLAIN = (bool, int, float, str)


def pack(state: State) -> tuple[Any, Tensors]:
    """Take a state apart.

    Returns
    -------
    tuple
        A JSON tree in which tensors are numbered, and the tensors.

    Raises
    ------
    StateError
        Naming the entry that is no part of a :data:`State`.
    """
    if not isinstance(state, dict):
        raise StateError(f"a state is a dictionary, not a {type(state).__name__}")
    packer = _Packer()
    return packer.pack(state, ""), packer.tensors


class _Packer:
    """Numbers the tensors of one state.

    Attributes
    ----------
    tensors : dict of str to Tensor
        Those that were met.
    """

    def __init__(self) -> None:
        self.tensors: Tensors = {}
        self._storages: set[int] = set()

    def pack(self, value: Any, path: str) -> Any:
        """Give the JSON tree of a value; ``path`` is its place, for errors."""
        # The exact type counts: a NumPy scalar would come back as another type.
        if value is None or type(value) in _PLAIN:
            return value
        if isinstance(value, torch.Tensor):
            return self._pack_tensor(value, path)
        if isinstance(value, np.ndarray):
            return self._pack_array(value, path)
        if isinstance(value, list):
            items = [self.pack(v, f"{path}[{i}]") for i, v in enumerate(value)]
            return [_LIST, *items]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {
                key: self.pack(v, f"{path}[{key!r}]") for key, v in value.items()
            }
        raise StateError(
            f"state{path}: a {type(value).__name__} cannot be kept; use tensors, arrays, None, "
            "bool, int, float, str, lists or dictionaries with text as keys"
        )

    def _pack_tensor(self, tensor: torch.Tensor, path: str) -> Leaf:
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise StateError(
                f"state{path}: a {tensor.layout} tensor on {tensor.device}; "
                "keep dense ones on the CPU"
            )
        return self._number(tensor, _TENSOR)

    def _pack_array(self, array: np.ndarray, path: str) -> Leaf:
        try:
            # A copy, as the learner may go on to change its array.
            tensor = torch.from_numpy(np.array(array, order="C"))
        except (TypeError, ValueError):
            raise StateError(
                f"state{path}: an array of type {array.dtype} cannot be kept"
            ) from None
        return self._number(tensor, _ARRAY)

    def _number(self, tensor: torch.Tensor, kind: str) -> Leaf:
        # Without its graph, which would keep a step's tensors in memory.
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        is_dense = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
        # safetensors wants tensors dense and apart. A view would also keep all that it is a
        # view of in memory.
        if not is_dense or storage.data_ptr() in self._storages:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._storages.add(tensor.untyped_storage().data_ptr())
        number = len(self.tensors)
        self.tensors[str(number)] = tensor
        return [kind, number]


def join(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Put together what :func:`pack` took apart."""
    if isinstance(tree, dict):
        return {key: join(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        kind, *items = tree
        if kind == _LIST:
            return [join(item, tensors) for item in items]
        tensor = tensors[tensor_name(tree)]
        return tensor.numpy() if kind == _ARRAY else tensor
    return tree


def leaves(tree: Any) -> Iterator[Leaf]:
    """Go through the tensors' places in a tree."""
    if isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, list) and tree:
        if tree[0] == _LIST:
            for value in tree[1:]:
                yield from leaves(value)
        else:
            yield tree


def is_apart(leaf: Leaf) -> bool:
    """Say if the tensor lies in a part."""
    return len(leaf) > 2


def tensor_name(leaf: Leaf) -> str:
    """Name a tensor among those of its state: by number and part."""
    return "/".join(map(str, leaf[1:3]))


def place(tensors: Tensors, leaf: Leaf, target: Sequence[Any]) -> None:
    """Have a tensor lie elsewhere: its leaf and its name say so.

    Parameters
    ----------
    tensors : dict of str to Tensor
        In which the tensor gets its new name.
    leaf : list
        The tensor's leaf, which is changed.
    target : sequence
        What follows the kind in the new leaf.
    """
    tensor = tensors.pop(tensor_name(leaf))
    leaf[1:] = target
    tensors[tensor_name(leaf)] = tensor


def tensors_in(state: Any) -> Iterator[torch.Tensor | np.ndarray]:
    """Go through the tensors and arrays of a state."""
    if isinstance(state, torch.Tensor | np.ndarray):
        yield state
    elif isinstance(state, dict | list):
        for item in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(item)
