"""The file of a state: safetensors, with a JSON tree in its header.

The header has one entry: a checksum of all that follows in it, a checksum of the tensors' bytes,
and JSON with the file's name, the tensors' types and shapes, and the tree. A state may leave
tensors in *parts*, which are files of their own that a tree names.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from fedknow.client.state.errors import StateError, StateLost
from fedknow.client.state.files import Files
from fedknow.client.state.tree import (
    Leaf,
    State,
    Tensors,
    is_apart,
    join,
    leaves,
    pack,
    tensor_name,
)

__all__ = [
    "checksum",
    "load_state",
    "part_names",
    "read",
    "save_state",
    "tensor_checksum",
    "write",
]

_PLAIN = Files()

_BOUND = "bound"
"""The header's entry; see :func:`_fold`."""
_UNBOUND = "state"
"""Its forerunner: one checksum, and a tree. Such a file may take the place of any other."""


def save_state(
    path: str | os.PathLike[str], state: State, durable: bool = True
) -> None:
    """Write a state to a file, whole or not at all.

    The tensors make a safetensors file; the rest is JSON in its header, with a CRC-32 of it and
    of the tensors' bytes. The JSON holds the file's name too, so a file that takes another
    one's place is no state.

    Parameters
    ----------
    path : str or PathLike
        The file; one that exists is replaced only once the new one is safe on disk.
    state : State
        Tensors may be of any type and shape, 0-d and empty ones included. Memory formats are
        not kept.
    durable : bool
        As in :func:`~fedknow.protocols.files.write_atomic`.

    Raises
    ------
    StateError
        If the state holds something that is no part of a :data:`State`, or the file cannot be
        written.
    """
    write(Path(path), *pack(state), durable)


def load_state(path: str | os.PathLike[str]) -> State:
    """Read a state that :func:`save_state` wrote.

    Raises
    ------
    StateLost
        If the file is missing, cannot be read, or is not what was written under this name.
    """
    state: State = join(*read(Path(path)))
    return state


def write(
    path: Path,
    tree: Any,
    tensors: Mapping[str, torch.Tensor],
    durable: bool,
    files: Files = _PLAIN,
) -> None:
    """Write a file with a tree and tensors.

    Raises
    ------
    StateError
        If it cannot be written; what was there before is intact.
    """
    # One entry: safetensors writes several in an order that changes from run to run.
    metadata = {_BOUND: _fold(path.name, tree, tensors)}
    try:
        files.write(path, save(dict(tensors), metadata), durable)
    except KeyError as error:
        raise StateError(
            f"{path}: a tensor of type {error} cannot be kept; safetensors has no such type"
        ) from None
    except OSError as error:
        raise StateError(
            f"{path}: the client's state cannot be written: {error.strerror or error}; "
            "the state before is intact"
        ) from error


def read(path: Path, files: Files = _PLAIN) -> tuple[Any, Tensors]:
    """Read a state with its parts.

    Returns
    -------
    tuple
        Its tree, and its tensors by :func:`~fedknow.client.state.tree.tensor_name`.

    Raises
    ------
    StateLost
        If a file is missing or not what was written.
    """
    tree, tensors = _read_file(path, files)
    by_part: dict[str, list[Leaf]] = {}
    for leaf in leaves(tree):
        if is_apart(leaf):
            by_part.setdefault(leaf[2], []).append(leaf)
        elif tensor_name(leaf) not in tensors:
            raise StateLost(
                f"{path}: not a readable client state: tensor {tensor_name(leaf)} is missing"
            )
    for name, part_leaves in by_part.items():
        tensors |= _read_part(path.with_name(name), part_leaves, files)
    return tree, tensors


def part_names(path: Path, files: Files = _PLAIN) -> frozenset[str]:
    """Give the names of the parts of a state.

    Raises
    ------
    StateLost
        If the file is missing or damaged.
    """
    tree, _ = _read_file(path, files, ())
    try:
        return frozenset(str(leaf[2]) for leaf in leaves(tree) if is_apart(leaf))
    except (TypeError, KeyError) as error:
        # In a file of an earlier version the tree alone has no checksum.
        raise StateLost(
            f"{path}: not a readable client state: {error}"
        ) from error


def checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Compute the CRC-32 of a text and of tensors, as 8 hexadecimal digits."""
    value = zlib.crc32(text.encode())
    for tensor in tensors.values():
        # PyTorch cannot view an empty tensor as bytes.
        if tensor.numel():
            value = zlib.crc32(
                tensor.reshape(-1).view(torch.uint8).numpy().data, value
            )
    return f"{value:08x}"


def tensor_checksum(tensor: torch.Tensor) -> str:
    """Compute the CRC-32 of one tensor's bytes."""
    return checksum("", {"": tensor})


def _read_part(path: Path, part_leaves: list[Leaf], files: Files) -> Tensors:
    """Read the tensors of a part that leaves name, and check them."""
    numbers = {str(leaf[1]) for leaf in part_leaves}
    _, stored = _read_file(path, files, numbers)
    tensors: Tensors = {}
    for leaf in part_leaves:
        tensor = stored.get(str(leaf[1]))
        if tensor is None or leaf[3] != tensor_checksum(tensor):
            raise StateLost(
                f"{path}: not a readable client state: a checksum is wrong"
            )
        tensors[tensor_name(leaf)] = tensor
    return tensors


def _read_file(
    path: Path, files: Files, names: Collection[str] | None = None
) -> tuple[Any, Tensors]:
    """Read a file's tree and its tensors, or those of some names."""
    try:
        # A sealed file has to be opened as a whole.
        if not files.can_map:
            metadata, tensors = _parse_safetensors(files.read(path), names)
        else:
            metadata, tensors = _read_safetensors(path, names)
        is_whole = names is None
        if _BOUND in metadata:
            return _unfold(
                path.name, metadata[_BOUND], tensors, is_whole
            ), tensors
        return _unfold_unbound(metadata[_UNBOUND], tensors, is_whole), tensors
    except FileNotFoundError:
        raise StateLost(
            f"{path}: no such client state; was the folder changed by hand?"
        ) from None
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise StateLost(
            f"{path}: not a readable client state: {error}"
        ) from error
    except RuntimeError as error:
        # It is torch's, where the system maps no more files: the file itself may be good.
        raise StateError(
            f"{path}: the client's state cannot be read: {error}"
        ) from error


def _read_safetensors(
    path: Path, names: Collection[str] | None
) -> tuple[dict[str, str], Tensors]:
    """Read a file's header and its tensors in the order of their numbers."""
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
        present = file.keys()
        selected = [name for name in present if names is None or name in names]
        tensors = {name: file.get_tensor(name) for name in selected}
    # The checksum goes over the bytes in this order; safetensors sorts by name.
    return metadata, {name: tensors[name] for name in sorted(tensors, key=int)}


def _parse_safetensors(
    data: bytes, names: Collection[str] | None
) -> tuple[dict[str, str], Tensors]:
    """Do as :func:`_read_safetensors` with a file's bytes."""
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    tensors = load(data)
    selected = [name for name in tensors if names is None or name in names]
    return metadata, {name: tensors[name] for name in sorted(selected, key=int)}


def _fold(name: str, tree: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    """Make the header's entry.

    It holds checksums of what follows and of the tensors' bytes, the file's name, the tensors'
    layout, and the tree.
    """
    text = json.dumps([name, _layout(tensors), tree])
    # Two checksums: the tree can be proved without reading the tensors.
    return f"{checksum(text, {})} {checksum('', tensors)} {text}"


def _unfold(
    name: str,
    entry: str,
    tensors: Mapping[str, torch.Tensor],
    is_whole: bool,
) -> Any:
    """Give the tree in a header's entry (see :func:`_fold`).

    Raises
    ------
    ValueError
        If the entry does not belong to a file of this name with these tensors.
    """
    head, body, text = entry.split(" ", 2)
    if head != checksum(text, {}):
        raise ValueError("its checksum is wrong")
    written, layout, tree = json.loads(text)
    # A file that was copied by hand to another name has right checksums all the same.
    if written != name:
        raise ValueError(
            f"it was written as {written}, so it holds another client or another version"
        )
    # The bytes of a tensor do not say of which type and shape it is.
    is_as_written = {key: layout.get(key) for key in tensors} == _layout(tensors)
    if not is_as_written or (is_whole and len(layout) != len(tensors)):
        raise ValueError("its tensors are not those that were written")
    if is_whole and body != checksum("", tensors):
        raise ValueError("its checksum is wrong")
    return tree


def _unfold_unbound(
    entry: str, tensors: Mapping[str, torch.Tensor], is_whole: bool
) -> Any:
    """Give the tree in the header's entry of an earlier version."""
    written, _, text = entry.partition(" ")
    if is_whole and written != checksum(text, tensors):
        raise ValueError("its checksum is wrong")
    return json.loads(text)


def _layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Any]]:
    return {
        key: [str(tensor.dtype), *tensor.shape] for key, tensor in tensors.items()
    }
