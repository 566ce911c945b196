"""The states of many clients, in a folder and in memory."""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedknow.client.compute.heap import release_freed_memory
from fedknow.client.state.codec import read, tensor_checksum, write
from fedknow.client.state.errors import StateError
from fedknow.client.state.files import Files
from fedknow.client.state.layout import (
    PART_SUFFIX,
    VERSION_SUFFIX,
    version_path,
)
from fedknow.client.state.memory import StateMemory
from fedknow.client.state.pruning import Pruning
from fedknow.client.state.tree import (
    Leaf,
    State,
    Tensors,
    is_apart,
    join,
    leaves,
    pack,
    place,
    tensor_name,
)

__all__ = ["StateStore"]

_LEAST_PART_BYTES = 2**16
"""Unchanged tensors of a state get a file of their own from this size on."""
_SAVES_PER_TRIM = 16
"""Saved states after which memory is given back.

That takes milliseconds, in the time that so many clients trained.
"""


class StateStore:
    """The states of many clients: files, and the latest states in memory.

    A state's version is a number its owner chooses (:class:`~fedknow.client.host.Host`); 0 is a
    fresh client, whose state is empty and has no file. The files are the truth: several stores,
    in several processes, may share a folder as long as one client is in one process's hands at
    a time.

    What a method keeps of past tasks stays as it is for the rest of the run, so tensors that a
    state has in common with the one it came from, if they are 64 KiB or more, are written once
    more, to a part that the states to come name: saving costs what has changed. A part of which
    less than half is still named is written anew. (Arrays of NumPy are copied and written each
    time.)

    Parameters
    ----------
    folder : str or PathLike
        Where the files lie; made if missing.
    memory_bytes : int
        Budget for states kept in memory, in bytes of tensors; 0 keeps none.
    durable : bool
        Make a saved state safe against loss of power at once, and not only after
        :func:`~fedknow.protocols.files.sync_disk`.
    files : Files, optional
        How files are written and read; by default in the clear.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        memory_bytes: int,
        durable: bool = True,
        files: Files | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.durable = durable
        self._memory = StateMemory(memory_bytes)
        self._stored: dict[int, dict[int, _Stored]] = {}
        self._files = files or Files()
        self._pruning = Pruning(self.folder, self._files)
        self._saves = 0
        try:
            self._files.make_folder(self.folder)
        except OSError as error:
            raise StateError(
                f"{folder}: cannot be made: {error.strerror}"
            ) from error

    def load(self, client: int, version: int) -> State:
        """Give the state of a client at a version.

        Raises
        ------
        StateLost
            If that version was not saved, or its file is damaged.
        """
        # Version 0 is a client that has not worked yet.
        if version == 0:
            self._stored.pop(client, None)
            return {}
        at_hand = self._memory.get(client, version)
        if at_hand is not None:
            return at_hand
        tree, tensors = read(self.path(client, version), self._files)
        state: State = join(tree, tensors)
        self._remember(client, version, state)
        self._note_stored(client, tree, tensors)
        return state

    def save(self, client: int, version: int, state: State) -> None:
        """Keep a client's state under a version.

        Other versions of it stay on disk until :meth:`prune`.

        Raises
        ------
        StateError
            As :func:`~fedknow.client.state.codec.save_state`.
        """
        tree, tensors = pack(state)
        self._pruning.touch([client])
        path = self.path(client, version)
        if path.parent != self.folder:
            self._files.make_folder(path.parent)
        # Before the main file, so that a version never names a part that is not there.
        self._set_apart(path, tree, tensors, self._stored.get(client, {}))
        in_file = [
            tensor_name(leaf) for leaf in leaves(tree) if not is_apart(leaf)
        ]
        contents = {name: tensors[name] for name in in_file}
        write(path, tree, contents, self.durable, self._files)
        # What memory holds is what the file would give: dense copies of views, fresh containers.
        self._remember(client, version, join(tree, tensors))
        if client in self._memory:
            self._note_stored(client, tree, tensors)
        else:
            # The state was too large for the memory, so nobody holds these tensors.
            self._stored.pop(client, None)
        self._saves += 1
        if self._saves % _SAVES_PER_TRIM == 0:
            release_freed_memory()

    def touch(self, clients: Iterable[int] | None) -> None:
        """Note clients that may get a new version; ``None``: any may."""
        self._pruning.touch(clients)

    def prune(self, versions: Mapping[int, int]) -> None:
        """Delete the files of all versions but those given, in the background.

        See :meth:`fedknow.client.state.pruning.Pruning.prune`.
        """
        self._pruning.prune(versions)

    def settle(self) -> None:
        """Wait until :meth:`prune` is through.

        Raises
        ------
        StateError
            If a file could not be deleted.
        """
        self._pruning.settle()

    def retain(self, client: int | None, versions: Collection[int]) -> None:
        """Delete all files but those of some versions of one client.

        Parameters
        ----------
        client : int or None
            None: delete all files.
        versions : collection of int
            What stays.

        Raises
        ------
        StateError
            If a file cannot be deleted.
        """
        names = set()
        if client is not None:
            names = {
                self.path(client, version).name for version in versions if version
            }
        self._pruning.delete_except(names, self._files.list(self.folder))

    def path(self, client: int, version: int) -> Path:
        """Give the file of one version (:mod:`fedknow.client.state.layout`)."""
        return version_path(self.folder, client, version)

    def _note_stored(
        self,
        client: int,
        tree: Any,
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        """Note where the tensors lie that a client's next state may share.

        Few bytes are not worth it.
        """
        all_leaves = list(leaves(tree))
        if _is_small(tensors) and not any(map(is_apart, all_leaves)):
            self._stored.pop(client, None)
            return
        pairs = [(tensors[tensor_name(leaf)], leaf) for leaf in all_leaves]
        self._stored[client] = {
            # By place in memory, as comparing the bytes of all tensors would take too long.
            tensor.data_ptr(): _Stored(tensor, leaf)
            for tensor, leaf in pairs
            if tensor.numel()
        }

    def _set_apart(
        self,
        path: Path,
        tree: Any,
        tensors: Tensors,
        stored: Mapping[int, _Stored],
    ) -> None:
        """Put what has not changed since last time into a part.

        The tree then says what lies in which part.
        """
        if not stored:
            return
        unchanged, by_part = _sort_out(tree, tensors, stored)
        for part, pairs in by_part.items():
            used = sum(tensors[tensor_name(leaf)].nbytes for leaf, _ in pairs)
            # Most of the part is of no use any more, or it is lost: it is written anew.
            if 2 * used < self._files.size(path.with_name(part)):
                unchanged += [leaf for leaf, _ in pairs]
                continue
            for leaf, stored_leaf in pairs:
                place(tensors, leaf, stored_leaf[1:])
        contents = _part_contents(unchanged, tensors)
        if not _is_small(contents):
            target = path.with_name(_part_name(path))
            write(target, [], contents, self.durable, self._files)
            _place_apart(target.name, unchanged, tensors)

    def _remember(self, client: int, version: int, state: State) -> None:
        """Keep a state in memory, and let go of those used longest ago."""
        for dropped in self._memory.put(client, version, state):
            # Nobody holds these tensors now.
            self._stored.pop(dropped, None)


class _Stored:
    """A tensor that lies in a file, as long as somebody holds it."""

    __slots__ = "leaf", "tensor"

    def __init__(self, tensor: torch.Tensor, leaf: Leaf) -> None:
        # A weak reference: what only this note holds is not worth its memory.
        self.tensor = weakref.ref(tensor)
        self.leaf = leaf

    def is_same(self, tensor: torch.Tensor) -> bool:
        """Say if a tensor at the same place in memory is this one."""
        held = self.tensor()
        if held is None:
            return False
        return (held.data_ptr(), held.shape, held.dtype) == (
            tensor.data_ptr(),
            tensor.shape,
            tensor.dtype,
        )


def _sort_out(
    tree: Any, tensors: Mapping[str, torch.Tensor], stored: Mapping[int, _Stored]
) -> tuple[list[Leaf], dict[str, list[tuple[Leaf, Leaf]]]]:
    """Find the tensors of a state that the client's last state had, too.

    Returns
    -------
    tuple
        The leaves of those that lay in the version's own file; and by part the leaves of those
        that lay in it, with their leaves of last time.
    """
    unchanged: list[Leaf] = []
    by_part: dict[str, list[tuple[Leaf, Leaf]]] = {}
    for leaf in leaves(tree):
        tensor = tensors[tensor_name(leaf)]
        earlier = stored.get(tensor.data_ptr())
        if earlier is None or not earlier.is_same(tensor):
            continue
        if not is_apart(earlier.leaf):
            unchanged.append(leaf)
        # The contract forbids to write to a state, and the checksum sees to it.
        elif earlier.leaf[3] == tensor_checksum(tensor):
            by_part.setdefault(earlier.leaf[2], []).append((leaf, earlier.leaf))
    return unchanged, by_part


def _part_name(path: Path) -> str:
    """Name the part of a version."""
    return path.name.removesuffix(VERSION_SUFFIX) + PART_SUFFIX


def _part_contents(unchanged: Sequence[Leaf], tensors: Tensors) -> Tensors:
    """Give the tensors of a part by their names in it."""
    return {tensor_name(leaf): tensors[tensor_name(leaf)] for leaf in unchanged}


def _place_apart(part: str, unchanged: Sequence[Leaf], tensors: Tensors) -> None:
    """Have leaves name the part that their tensors were written to."""
    for leaf in unchanged:
        code = tensor_checksum(tensors[tensor_name(leaf)])
        place(tensors, leaf, [leaf[1], part, code])


def _is_small(tensors: Mapping[str, torch.Tensor]) -> bool:
    return sum(tensor.nbytes for tensor in tensors.values()) < _LEAST_PART_BYTES
