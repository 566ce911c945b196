"""What a client keeps between messages: on disk, versioned, without pickle."""

from __future__ import annotations

import ctypes
import json
import math
import os
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedknow.client.compute.heap import give_back
from fedknow.protocols.errors import FedknowError

__all__ = [
    "State",
    "StateError",
    "StateLost",
    "StateStore",
    "load_state",
    "save_state",
    "sync_disk",
    "write_atomic",
]

State = dict[str, Any]
"""A tree of dictionaries (with text as keys) and lists, whose leaves are ``torch.Tensor`` (dense,
on the CPU), ``numpy.ndarray`` (of a type that torch has too), ``None``, ``bool``, ``int``,
``float`` or ``str``. Tuples, bytes and NumPy scalars are refused.

A state is never changed once it was handed to a store or received from one: make a new one instead.
"""

_TENSOR, _ARRAY, _LIST = "tensor", "array", "list"
_BOUND = "bound"
"""Entry of a file's header; see :func:`_fold`."""
_UNBOUND = "state"
"""Its forerunner: one checksum, and a tree. Such a file may take the place of any other."""
_WHOLE, _PART, _ANY = ".safetensors", ".part.safetensors", "*.safetensors*"
_Leaf = list[Any]
"""A tensor's place in a state's tree: kind and number in the version's own file, or also name of a
part, and CRC-32."""
_APART = 2**16
"""Bytes of tensors that have not changed from which on they get a file of their own."""
_TRIM = 16
"""Saved states after which memory is given back: milliseconds in the time that so many clients
trained."""


class StateError(FedknowError, RuntimeError):
    """A client's state that cannot be kept or read; the text names the file or the entry and what
    is wrong."""


class StateLost(StateError):
    """A client's state that was kept and is not there, or not as it was."""

    is_resumable = False


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
        As in :func:`write_atomic`.

    Raises
    ------
    StateError
        If the state holds something that is no part of a :data:`State`, or the file cannot be
        written.
    """
    _write(Path(path), *_pack(state), durable)


def load_state(path: str | os.PathLike[str]) -> State:
    """Read a state that :func:`save_state` wrote.

    Raises
    ------
    StateLost
        If the file is missing, cannot be read, or is not what was written under this name.
    """
    state: State = _join(*_read(Path(path)))
    return state


def write_atomic(path: Path, data: bytes, durable: bool = True) -> None:
    """Write a file whole or not at all: a neighbour is written and renamed.

    Parameters
    ----------
    path : Path
        The file.
    data : bytes
        What it is to hold.
    durable : bool
        Whether it is to be safe against loss of power from now on, its name included, which
        takes a disk some milliseconds. Otherwise it is after :func:`sync_disk`, and until then
        only against the end of the process.

    Raises
    ------
    OSError
        If the file cannot be written (a full disk, for example); what was there before is intact.
    """
    neighbour = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(neighbour, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(neighbour, path)
    except BaseException:
        neighbour.unlink(missing_ok=True)
        raise
    if durable:
        _sync(path.parent)


def sync_disk(folder: Path) -> None:
    """Make all that was written to the file system of a folder safe against loss of power: many
    files at once.

    Raises
    ------
    OSError
        If something could not be written.
    """
    system = ctypes.CDLL(None, use_errno=True)
    if not hasattr(
        system, "syncfs"
    ):  # it is Linux's; elsewhere all file systems are synced
        os.sync()
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if system.syncfs(descriptor):
            raise OSError(
                ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder)
            )
    finally:
        os.close(descriptor)


class StateStore:
    """The states of many clients: files in a folder, and the latest ones in memory as far as they fit.

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
        Whether a saved state is safe against loss of power at once, or only after
        :func:`sync_disk`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], memory_bytes: int, durable: bool = True
    ) -> None:
        self.folder = Path(folder)
        self.durable = durable
        self.memory_bytes = memory_bytes
        self._memory: OrderedDict[int, tuple[int, State, int]] = OrderedDict()
        self._used = 0
        self._known: dict[int, dict[int, _Known]] = {}
        self._named: dict[str, tuple[int, frozenset[str]]] = {}
        # One a store: a process that forks keeps no thread, so a shared one would wait for ever
        # in the child.
        self._background = ThreadPoolExecutor(1, "fedknow-prune")
        self._deleting: Future[None] | None = None
        self._saved = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(f"{folder}: cannot be made: {error.strerror}") from error

    def load(self, client: int, version: int) -> State:
        """The state of a client at a version.

        Raises
        ------
        StateLost
            If that version was not saved, or its file is damaged.
        """
        if version == 0:
            self._known.pop(client, None)
            return {}
        if client in self._memory and self._memory[client][0] == version:
            self._memory.move_to_end(client)
            return self._memory[client][1]
        tree, tensors = _read(self.path(client, version))
        state: State = _join(tree, tensors)
        self._remember(client, version, state)
        self._know(client, tree, tensors)
        return state

    def save(self, client: int, version: int, state: State) -> None:
        """Keep a client's state under a version; other versions of it stay on disk until
        :meth:`prune`.

        Raises
        ------
        StateError
            As :func:`save_state`.
        """
        tree, tensors = _pack(state)
        path = self.path(client, version)
        self._set_apart(path, tree, tensors, self._known.get(client, {}))
        own = [_name(leaf) for leaf in _leaves(tree) if not _is_apart(leaf)]
        _write(path, tree, {name: tensors[name] for name in own}, self.durable)
        # What memory holds is what the file would give: dense copies of views, fresh containers.
        self._remember(client, version, _join(tree, tensors))
        if client in self._memory:
            self._know(client, tree, tensors)
        else:
            self._known.pop(client, None)  # nobody holds these tensors
        self._saved += 1
        if self._saved % _TRIM == 0:
            give_back()

    def prune(self, keep: Mapping[int, int]) -> None:
        """Delete the files of all present versions but those given, by client.

        A disk may take milliseconds for each, so it is done in the background; :meth:`settle`
        waits for it.

        Raises
        ------
        StateError
            If a file could not be deleted the last time.
        """
        self.settle()
        kept = {
            self.path(client, version).name
            for client, version in keep.items()
            if version
        }
        # What is there now: files that come later are no business of this call's.
        self._deleting = self._background.submit(
            self._delete_but, kept, list(self.folder.glob(_ANY))
        )

    def settle(self) -> None:
        """Wait until :meth:`prune` is through.

        Raises
        ------
        StateError
            If a file could not be deleted.
        """
        if self._deleting is not None:
            deleting, self._deleting = self._deleting, None
            deleting.result()

    def _delete_but(self, kept: Collection[str], present: Sequence[Path]) -> None:
        """Delete what is present but some versions' files and the parts that these name.

        A version that is kept need not be among what is present: on a disk of many machines a
        listing may be late.
        """
        divided = {_owner(path.name) for path in present if path.name.endswith(_PART)}
        named: dict[str, tuple[int, frozenset[str]]] = {}
        doubtful: set[str] = set()
        for name in kept:
            if _owner(name) in divided:
                try:
                    written = (self.folder / name).stat().st_mtime_ns
                    found = self._named.get(name)
                    named[name] = (
                        found
                        if found and found[0] == written
                        else (written, _parts(self.folder / name))
                    )
                except (OSError, StateLost):  # which is for whoever asks for it to say
                    doubtful.add(_owner(name))
        self._named = named
        needed = set(kept).union(*(parts for _, parts in named.values()))
        try:
            for path in present:
                if path.name not in needed and not (
                    path.name.endswith(_PART) and _owner(path.name) in doubtful
                ):
                    path.unlink()
        except OSError as error:
            raise StateError(
                f"{self.folder}: old client states cannot be deleted: {error}"
            ) from error

    def retain(self, client: int | None, versions: Collection[int]) -> None:
        """Delete all files but those of some versions of one client; ``None``: all files.

        Raises
        ------
        StateError
            If a file cannot be deleted.
        """
        kept = (
            set()
            if client is None
            else {self.path(client, version).name for version in versions if version}
        )
        self._delete_but(kept, list(self.folder.glob(_ANY)))

    def path(self, client: int, version: int) -> Path:
        """The file of one version."""
        return self.folder / f"{client:06d}-{version:x}{_WHOLE}"

    def _know(
        self, client: int, tree: Any, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Note where the tensors lie that a client's next state may share with this one, if they
        are worth it."""
        leaves = list(_leaves(tree))
        if _small(tensors) and not any(map(_is_apart, leaves)):
            self._known.pop(client, None)
            return
        pairs = [(tensors[_name(leaf)], leaf) for leaf in leaves]
        self._known[client] = {
            tensor.data_ptr(): _Known(tensor, leaf)
            for tensor, leaf in pairs
            if tensor.numel()
        }

    def _set_apart(
        self,
        path: Path,
        tree: Any,
        tensors: dict[str, torch.Tensor],
        known: Mapping[int, _Known],
    ) -> None:
        """Put what has not changed since last time into a part, and have the tree say what lies in
        which."""
        settled: list[_Leaf] = []
        lying: dict[str, list[tuple[_Leaf, _Leaf]]] = {}
        for leaf in _leaves(tree) if known else ():
            tensor = tensors[_name(leaf)]
            before = known.get(tensor.data_ptr())
            if before is None or not before.is_of(tensor):
                continue
            if not _is_apart(before.leaf):
                settled.append(leaf)
            elif before.leaf[3] == _checksum(
                "", {"": tensor}
            ):  # nobody has written to it, against the contract
                lying.setdefault(before.leaf[2], []).append((leaf, before.leaf))
        for part, pairs in lying.items():
            needed = sum(tensors[_name(leaf)].nbytes for leaf, _ in pairs)
            if 2 * needed < _size(
                path.with_name(part)
            ):  # most of it is of no use any more, or it is lost
                settled += [leaf for leaf, _ in pairs]
            else:
                for leaf, before_leaf in pairs:
                    _place(tensors, leaf, before_leaf[1:])
        unchanged = {_name(leaf): tensors[_name(leaf)] for leaf in settled}
        if _small(unchanged):
            return
        part = path.name.removesuffix(_WHOLE) + _PART
        _write(path.with_name(part), [], unchanged, self.durable)
        for leaf in settled:
            _place(
                tensors,
                leaf,
                [leaf[1], part, _checksum("", {"": tensors[_name(leaf)]})],
            )

    def _remember(self, client: int, version: int, state: State) -> None:
        if client in self._memory:
            self._used -= self._memory.pop(client)[2]
        size = sum(array.nbytes for array in _arrays(state))
        if size > self.memory_bytes or self.memory_bytes == 0:
            return
        self._memory[client] = version, state, size
        self._used += size
        while self._used > self.memory_bytes:
            oldest, (_, _, size) = self._memory.popitem(last=False)
            self._known.pop(oldest, None)
            self._used -= size


def _pack(state: State) -> tuple[Any, dict[str, torch.Tensor]]:
    """Take a state apart: a JSON tree in which tensors are numbered, and the tensors."""
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()

    def place(tensor: torch.Tensor, kind: str) -> list[Any]:
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        # safetensors wants tensors dense and apart; a view would also keep all that it is a
        # view of in memory.
        if (
            not tensor.is_contiguous()
            or storage.nbytes() != tensor.nbytes
            or storage.data_ptr() in storages
        ):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[str(len(tensors))] = tensor
        return [kind, len(tensors) - 1]

    def split(value: Any, where: str) -> Any:
        if value is None or type(value) in (
            bool,
            int,
            float,
            str,
        ):  # not a NumPy scalar, which would come back as another type
            return value
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.device.type != "cpu":
                raise StateError(
                    f"state{where}: a {value.layout} tensor on {value.device}; keep dense ones on the CPU"
                )
            return place(value, _TENSOR)
        if isinstance(value, np.ndarray):
            try:
                return place(torch.from_numpy(np.array(value, order="C")), _ARRAY)
            except (TypeError, ValueError):
                raise StateError(
                    f"state{where}: an array of type {value.dtype} cannot be kept"
                ) from None
        if isinstance(value, list):
            return [
                _LIST,
                *(split(item, f"{where}[{index}]") for index, item in enumerate(value)),
            ]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {
                key: split(item, f"{where}[{key!r}]") for key, item in value.items()
            }
        raise StateError(
            f"state{where}: a {type(value).__name__} cannot be kept; use tensors, arrays, None, bool, int, float, str, "
            "lists or dictionaries with text as keys"
        )

    if not isinstance(state, dict):
        raise StateError(f"a state is a dictionary, not a {type(state).__name__}")
    return split(state, ""), tensors


def _join(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Put together what :func:`_pack` took apart."""
    if isinstance(tree, dict):
        return {key: _join(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        kind, *items = tree
        if kind == _LIST:
            return [_join(item, tensors) for item in items]
        tensor = tensors[_name(tree)]
        return tensor.numpy() if kind == _ARRAY else tensor
    return tree


def _leaves(tree: Any) -> Iterator[_Leaf]:
    """The tensors' places in a tree."""
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, list) and tree:
        if tree[0] == _LIST:
            for value in tree[1:]:
                yield from _leaves(value)
        else:
            yield tree


def _is_apart(leaf: _Leaf) -> bool:
    """Whether the tensor lies in a part."""
    return len(leaf) > 2


def _name(leaf: _Leaf) -> str:
    """A tensor's name among those of its state: its number, and the part it is in."""
    return "/".join(map(str, leaf[1:3]))


def _place(tensors: dict[str, torch.Tensor], leaf: _Leaf, where: Sequence[Any]) -> None:
    """Have a tensor lie elsewhere: its leaf and its name say so."""
    tensor = tensors.pop(_name(leaf))
    leaf[1:] = where
    tensors[_name(leaf)] = tensor


def _owner(name: str) -> str:
    """The client of a file."""
    return name.partition("-")[0]


def _size(path: Path) -> float:
    """Bytes of a file; infinity: it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return math.inf


def _small(tensors: Mapping[str, torch.Tensor]) -> bool:
    return sum(tensor.nbytes for tensor in tensors.values()) < _APART


class _Known:
    """A tensor that lies in a file, as long as somebody holds it."""

    __slots__ = "leaf", "tensor"

    def __init__(self, tensor: torch.Tensor, leaf: _Leaf) -> None:
        self.tensor, self.leaf = weakref.ref(tensor), leaf

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor at the same place in memory is this one."""
        mine = self.tensor()
        if mine is None:
            return False
        return (mine.data_ptr(), mine.shape, mine.dtype) == (
            tensor.data_ptr(),
            tensor.shape,
            tensor.dtype,
        )


def _read(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A state's tree, and its tensors by :func:`_name`."""
    tree, tensors = _open(path)
    elsewhere: dict[str, list[_Leaf]] = {}
    for leaf in _leaves(tree):
        if _is_apart(leaf):
            elsewhere.setdefault(leaf[2], []).append(leaf)
        elif _name(leaf) not in tensors:
            raise StateLost(
                f"{path}: not a readable client state: tensor {_name(leaf)} is missing"
            )
    for part, leaves in elsewhere.items():
        _, found = _open(path.with_name(part), {str(leaf[1]) for leaf in leaves})
        for leaf in leaves:
            tensor = found.get(str(leaf[1]))
            if tensor is None or leaf[3] != _checksum("", {"": tensor}):
                raise StateLost(
                    f"{path.with_name(part)}: not a readable client state: a checksum is wrong"
                )
            tensors[_name(leaf)] = tensor
    return tree, tensors


def _open(
    path: Path, names: Collection[str] | None = None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Read a file's tree and its tensors, or those of some names."""
    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            tensors = {
                name: file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118  # not a mapping
                if names is None or name in names
            }
            tensors = {name: tensors[name] for name in sorted(tensors, key=int)}
        if _BOUND in about:
            return _unfold(path.name, about[_BOUND], tensors, names is None), tensors
        checksum, _, text = about[_UNBOUND].partition(" ")
        if names is None and checksum != _checksum(text, tensors):
            raise ValueError("its checksum is wrong")
        return json.loads(text), tensors
    except FileNotFoundError:
        raise StateLost(
            f"{path}: no such client state; was the folder changed by hand?"
        ) from None
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise StateLost(f"{path}: not a readable client state: {error}") from error
    except RuntimeError as error:  # torch's, where the system maps no more files
        raise StateError(
            f"{path}: the client's state cannot be read: {error}"
        ) from error


def _unfold(
    name: str, entry: str, tensors: Mapping[str, torch.Tensor], is_whole: bool
) -> Any:
    """The tree in a header's entry (see :func:`_fold`), if it belongs to a file of this name and
    these tensors.

    Raises
    ------
    ValueError
        If it does not.
    """
    head, body, text = entry.split(" ", 2)
    if head != _checksum(text, {}):
        raise ValueError("its checksum is wrong")
    written, layout, tree = json.loads(text)
    if written != name:
        raise ValueError(
            f"it was written as {written}, so it holds another client or another version"
        )
    # The bytes of a tensor do not say of which type and shape it is.
    if {key: layout.get(key) for key in tensors} != _layout(tensors) or (
        is_whole and len(layout) != len(tensors)
    ):
        raise ValueError("its tensors are not those that were written")
    if is_whole and body != _checksum("", tensors):
        raise ValueError("its checksum is wrong")
    return tree


def _fold(name: str, tree: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    """A header's entry: checksums of what follows and of the tensors' bytes, the file's name,
    layout and tree."""
    text = json.dumps([name, _layout(tensors), tree])
    return f"{_checksum(text, {})} {_checksum('', tensors)} {text}"


def _layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Any]]:
    return {key: [str(tensor.dtype), *tensor.shape] for key, tensor in tensors.items()}


def _parts(path: Path) -> frozenset[str]:
    """Names of the parts of a state."""
    tree, _ = _open(path, ())
    try:
        return frozenset(str(leaf[2]) for leaf in _leaves(tree) if _is_apart(leaf))
    except (
        TypeError,
        KeyError,
    ) as error:  # a file of an earlier version, whose tree alone is not checked
        raise StateLost(f"{path}: not a readable client state: {error}") from error


def _write(
    path: Path, tree: Any, tensors: Mapping[str, torch.Tensor], durable: bool
) -> None:
    # One entry: safetensors writes several in an order that changes from run to run.
    about = {_BOUND: _fold(path.name, tree, tensors)}
    try:
        write_atomic(path, save(dict(tensors), about), durable)
    except KeyError as error:
        raise StateError(
            f"{path}: a tensor of type {error} cannot be kept; safetensors has no such type"
        ) from None
    except OSError as error:
        raise StateError(
            f"{path}: the client's state cannot be written: {error.strerror or error}; the state before is intact"
        ) from error


def _sync(folder: Path) -> None:
    """Make sure that a folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    value = zlib.crc32(text.encode())
    for tensor in tensors.values():
        if tensor.numel():
            value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _arrays(value: Any) -> Iterator[torch.Tensor | np.ndarray]:
    if isinstance(value, torch.Tensor | np.ndarray):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _arrays(item)
