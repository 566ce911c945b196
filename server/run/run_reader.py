"""Reading a run folder, whatever the state of its run."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from fedknow.protocols.config import ConfigError, ExperimentConfig, read_config
from fedknow.server.run.evaluation import Scores
from fedknow.server.run.integrity import (
    FolderDamaged,
    chain_start,
    is_last_event,
    open_arrays,
    open_json,
    open_text,
    read_lines,
)

__all__ = ["RunReader"]

CONFIG = "config.toml"
PARTITION = "partition.json"
METRICS = "metrics.jsonl"
ACCURACY = "accuracy.npz"
FLEET = "fleet.json"
RUN_ID = "run-id"
LOCK = ".lock"
FENCE_KEY = "fence-key"
ERROR = "error.log"

PUT_BACK = (
    "put it back from a copy, or run the experiment again with another --out"
)


class RunReader:
    """Reads one run's folder; make one with :meth:`open`.

    Attributes
    ----------
    path : Path
    config : ExperimentConfig
    fingerprint : str
        Checksum of ``config.toml``; empty in folders of earlier versions.
    """

    def __init__(
        self,
        path: Path,
        config: ExperimentConfig,
        fingerprint: str = "",
    ) -> None:
        self.path = path
        self.config = config
        self.fingerprint = fingerprint

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a run to read it, whether it is finished, unfinished or going on.

        Raises
        ------
        ConfigError
            If the folder holds no run, or its configuration is not what the run wrote.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise ConfigError(f"{path} holds no run (there is no {CONFIG} in it)")
        # Before the checksum, as a setting with a mistake is the likelier fault and has the
        # better message.
        config = read_config(path / CONFIG)
        try:
            _, fingerprint = open_text((path / CONFIG).read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"{path / CONFIG} was changed since the run was made: {error}"
            ) from None
        return cls(path, config, fingerprint=fingerprint)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoint"

    @property
    def clients(self) -> Path:
        """Folder of the clients' states; the grid's."""
        return self.path / "clients"

    @property
    def complete(self) -> bool:
        """Whether the run came to its end."""
        return is_last_event(self._events(), "end")

    @property
    def is_in_use(self) -> bool:
        """Whether a process is at work on the run."""
        try:
            lock = (self.path / LOCK).open("rb")
        except FileNotFoundError:
            return False
        with lock:
            try:
                # A shared lock, so that two who look do not see each other.
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    @property
    def partition(self) -> dict[str, Any] | None:
        """Which client holds what; ``None`` where a run has not got that far.

        Raises
        ------
        FolderDamaged
            If the file is not what the run wrote.
        """
        return self._json(PARTITION)

    @property
    def fleet(self) -> dict[str, Any]:
        """Devices' times, bytes and energy up to the last task that ended.

        Empty where clients have no devices.

        Raises
        ------
        FolderDamaged
            If the file is missing, or not what the run wrote.
        """
        fleet = self._json(FLEET)
        # The file is written when a task ends, so that only a finished run must have it.
        if fleet is None and self.config.fleet.devices and self.complete:
            raise FolderDamaged(f"{self.path / FLEET} is missing; {PUT_BACK}")
        return fleet or {}

    def events(self) -> list[dict[str, Any]]:
        """Read all events so far, oldest first.

        A last line that is only half written is left out.

        Raises
        ------
        FolderDamaged
            If a line is not what the run wrote.
        """
        with self._reading(METRICS):
            return [
                event
                for event, _ in read_lines(
                    self._events(), chain_start(self.fingerprint)
                )
            ]

    def _events(self) -> bytes:
        try:
            return (self.path / METRICS).read_bytes()
        except FileNotFoundError:
            return b""

    def _json(self, name: str) -> dict[str, Any] | None:
        with self._reading(name):
            try:
                data = (self.path / name).read_bytes()
            except FileNotFoundError:
                return None
            return open_json(data, self.fingerprint)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Turn what is wrong with a file's bytes into a sentence."""
        try:
            yield
        # Damaged JSON may be nested without end.
        except (ValueError, RecursionError) as error:
            raise FolderDamaged(
                f"{self.path / name} is not what the run wrote: {error}; {PUT_BACK}"
            ) from None

    def accuracy(self) -> dict[str, np.ndarray]:
        """Raw accuracies; all NaN where nothing has been scored yet.

        Returns
        -------
        dict
            float64 arrays, NaN where nothing was measured. ``personal`` and ``global`` [client,
            seen, trained]: the two scorings; ``correct_personal`` and ``correct_global``: the
            same as counts; ``weights`` [client, seen]: sizes of the test sets; ``untrained``
            [client, seen]: accuracy before any training (with ``evaluation.forward``);
            ``round_personal`` and ``round_global`` [evaluation, client, seen]: evaluations
            within tasks (with ``evaluation.every``), each described by a line of
            ``round_steps`` [evaluation, 3]: server round, task, round. With
            ``evaluation.clients``, int64 ``clients`` names the clients that have a row in these
            arrays; otherwise all have one, in order. Where people are held
            out (``data.held_out``): ``held_out`` [person, seen, trained], the global model's
            accuracy on them, ``correct_held_out``, the same as counts, and
            ``weights_held_out`` [person, seen], their samples.

        Raises
        ------
        FolderDamaged
            If the file is missing although clients were scored, or is not what the run wrote.
        """
        with self._reading(ACCURACY):
            try:
                data = (self.path / ACCURACY).read_bytes()
            except FileNotFoundError:
                # A run that has been scored must have the file; before that its absence is
                # normal.
                if any(event["event"] == "evaluation" for event in self.events()):
                    raise ValueError("it is missing") from None
                data_config = self.config.data
                return Scores(data_config.clients, data_config.tasks).arrays()
            return open_arrays(data, self.fingerprint)
