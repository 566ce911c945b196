"""Client states on machines that do not see the run folder.

The run folder of the driver's machine is the truth. A worker that sees it reads and writes states
there. Any other worker has a *scratch* folder of its own. The states that it lacks come with its
work, through Ray's object store, and what it writes goes back with its answers. So an answered
state is always in the run folder, whatever machine goes away.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from fedknow.client.state import State, StateLost, StateStore
from fedknow.client.state.codec import part_names
from fedknow.client.state.layout import PART_SUFFIX, client_in, locate
from fedknow.client.state.remote import open_states
from fedknow.protocols.files import write_atomic
from fedknow.simulations.engine.packing import Job

__all__ = ["Courier", "Files", "ScratchStore", "Started", "States"]

log = logging.getLogger(__name__)

Files = dict[str, np.ndarray]
"""Files of states by name; their bytes as uint8."""

MOST_BYTES = 2**28
"""Bytes of states that go along with one batch, unless a single client has more."""
_PREFIX = "fedknow-states-"


@dataclass(frozen=True)
class Started:
    """What a worker says when it is ready.

    Attributes
    ----------
    peak_memory_mb : float
        Peak of its memory so far, MB.
    machine : str
        Name of its machine.
    node : str
        Ray's id of that machine.
    is_private : bool
        Whether it does not see the run folder.
    """

    peak_memory_mb: float
    machine: str
    node: str
    is_private: bool


@dataclass(frozen=True)
class States:
    """Where client states lie.

    Attributes
    ----------
    place : str
        A folder on the driver's machine, or a storage URL.
    token : Path or None
        A file in it. Whoever does not see that is on a machine that does not see the folder; None:
        all see it.
    """

    place: str
    token: Path | None = None

    def store(self, memory_bytes: int, durable: bool) -> StateStore:
        """Return a worker's store: of this folder, or a scratch one."""
        # The driver has written this file: whoever sees it sees the folder.
        if self.token is not None and not self.token.exists():
            return ScratchStore(memory_bytes)
        return open_states(self.place, memory_bytes, durable)


class ScratchStore(StateStore):
    """States of a worker that does not see the run folder.

    Of each client it keeps the files of the latest version alone.

    Parameters
    ----------
    memory_bytes : int
        As in :class:`~fedknow.client.state.StateStore`.
    """

    def __init__(self, memory_bytes: int) -> None:
        place = Path(tempfile.gettempdir())
        _sweep(place)
        folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=place)
        super().__init__(folder, memory_bytes, durable=False)
        self._names: dict[int, set[str]] = {}
        self._written: list[str] = []

    def receive(self, files: Mapping[str, np.ndarray]) -> None:
        """Store the files that came with a batch."""
        for name, content in files.items():
            write_atomic(
                locate(self.folder, name), content.tobytes(), durable=False
            )
            self._note(name)

    def save(self, client: int, version: int, state: State) -> None:
        """Keep a state, and note its files; see :meth:`StateStore.save`."""
        super().save(client, version, state)
        path = self.path(client, version)
        part = path.with_name(path.name.partition(".")[0] + PART_SUFFIX)
        for written in (path, part):
            # A version has a part of its own only where much has not changed.
            if written.exists():
                self._written.append(written.name)
                self._note(written.name)

    def give_back(self) -> Files:
        """Return the files that were written since the last call."""
        files = {
            name: np.fromfile(locate(self.folder, name), np.uint8)
            for name in self._written
        }
        self._written = []
        return files

    def keep_only(self, versions: Mapping[int, int]) -> None:
        """Delete all files of some clients but those of one version each."""
        for client, version in versions.items():
            names = self._names.pop(client, set())
            path = self.path(client, version)
            required = {path.name} & names
            if required and any(name.endswith(PART_SUFFIX) for name in names):
                required |= part_names(path)
            for name in names - required:
                locate(self.folder, name).unlink()
            if required:
                self._names[client] = required

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)

    def _note(self, name: str) -> None:
        self._names.setdefault(int(client_in(name)), set()).add(name)


class Courier:
    """Knows which worker holds which states, and brings it those it lacks.

    Parameters
    ----------
    store : StateStore
        The run folder's states.
    has_other_machines : bool
        Whether some workers may not see that folder.
    url : str
        Where the states lie at a storage URL, which all machines reach; empty: in the folder.

    Attributes
    ----------
    states : States
        What workers need to know of the folder.
    has_other_machines : bool
        See the parameter.
    """

    def __init__(
        self, store: StateStore, has_other_machines: bool, url: str = ""
    ) -> None:
        self.has_other_machines = has_other_machines
        self._store = store
        self._held: dict[int, dict[int, int]] = {}
        self._private_nodes: set[str] = set()
        token = None
        if has_other_machines and not url:
            # The name is drawn: a copy of the folder on another machine has no such file.
            token = store.folder / f".seen-{secrets.token_hex(8)}"
            token.touch()
        self.states = States(url or str(store.folder), token)

    def close(self) -> None:
        """Take away the file by which workers recognize the folder."""
        if self.states.token is not None:
            self.states.token.unlink(missing_ok=True)

    def take_on(self, place: int, started: Started) -> None:
        """Note a new worker, and whether it sees the run folder."""
        if not started.is_private:
            self._held.pop(place, None)
            return
        self._held[place] = {}
        if started.node not in self._private_nodes:
            self._private_nodes.add(started.node)
            log.warning(
                "machine %s does not see %s: states of clients travel through Ray; a folder that "
                "all machines see is faster",
                started.machine,
                self._store.folder,
            )

    def pack(self, place: int, jobs: Sequence[Job]) -> tuple[Files, int]:
        """Read the states that a worker lacks for some jobs.

        Returns
        -------
        files : dict of str to ndarray
            Their files.
        fitting : int
            For how many of the jobs, from the first, there was room: one at least.
        """
        files: Files = {}
        held = self._held.get(place)
        # It reads the run folder itself.
        if held is None:
            return files, len(jobs)
        size = 0
        for count, job in enumerate(jobs):
            # A client without a version begins, and has no state to bring.
            if not job.version or held.get(job.client) == job.version:
                continue
            job_files = self._read(job)
            size += sum(content.nbytes for content in job_files.values())
            # A single client may be above the limit, or it could never travel.
            if size > MOST_BYTES and count:
                return files, count
            files |= job_files
        return files, len(jobs)

    def unpack(
        self,
        place: int,
        files: Mapping[str, np.ndarray],
        versions: Iterable[tuple[int, int]],
    ) -> None:
        """Write what a worker gave back into the run folder.

        Parameters
        ----------
        place : int
        files : mapping of str to ndarray
        versions : iterable of (int, int)
            Its clients, with the version that it now holds of each; 0: none, or none for certain.
        """
        # Parts first, so that a version never names a part that is not there.
        for name in sorted(
            files, key=lambda name: not name.endswith(PART_SUFFIX)
        ):
            content = files[name].tobytes()
            # Checkpoints wait for this disk.
            write_atomic(locate(self._store.folder, name), content, durable=False)
        if place in self._held:
            self._held[place].update(versions)

    def _read(self, job: Job) -> Files:
        path = self._store.path(job.client, job.version)
        try:
            names = [path.name, *part_names(path)]
            return {
                name: np.fromfile(path.with_name(name), np.uint8)
                for name in names
            }
        except (StateLost, FileNotFoundError):
            # The worker finds no state and answers that it is lost, as on any grid.
            return {}


def _sweep(place: Path) -> None:
    """Delete the scratch folders of processes that were killed."""
    for folder in place.glob(f"{_PREFIX}*"):
        process = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            # Another worker of this machine may be at it too.
            shutil.rmtree(folder, ignore_errors=True)
