"""The file that says which clients are at work, for those who watch a run.

::

    {"event": "devices", "names": [...]}                    one name a client
    {"event": "wave", "kind": "train", "task": 0, "round": 1, "clients": [...], "away": [...]}
    {"event": "answers", "done": [...], "failed": [...], "missed": [...]}
    {"event": "presence", "away": [...]}                    a client came or went

It is no result: no number of a run is in it, and nothing reads it but the live page.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from fedknow.protocols.messages import Message, client_of
from fedknow.server.grids.activity import Listener

__all__ = ["ACTIVITY", "ActivityLog"]

log = logging.getLogger(__name__)

ACTIVITY = "activity.jsonl"
QUIET_SECONDS = 0.5
"""Answers that come closer together than this share a line."""


class ActivityLog(Listener):
    """Appends what a grid does to ``activity.jsonl``.

    A disk that is full or broken costs the live page, and not the run: the log says so once.

    Parameters
    ----------
    folder : Path
        The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ACTIVITY
        # The thread of the gRPC server tells of clients that come and go.
        self._lock = threading.Lock()
        self._is_broken = False
        self._answers: dict[str, list[int]] = {}
        self._open = 0
        self._written = 0.0
        self._cut_half_line()

    def describe(self, devices: Sequence[str]) -> None:
        """Write which device each client has."""
        with self._lock:
            self._write({"event": "devices", "names": list(devices)})

    def send(
        self,
        work: Sequence[Message],
        absent: Collection[int],
        is_pushed: bool = False,
    ) -> None:
        """Write who is given work."""
        if not work:
            return
        config = work[0].config()
        keys = {"task": "task", "round": "round", "server_round": "server-round"}
        place = {name: config[key] for name, key in keys.items() if key in config}
        clients = sorted({client_of(message.node) for message in work})
        wave: dict[str, Any] = {"event": "wave", "kind": work[0].kind, **place}
        wave |= {"clients": clients, "away": sorted(absent)}
        if is_pushed:
            wave["is_pushed"] = True
        with self._lock:
            self._write_answers()
            # Pushed work joins what is under way, a wave begins anew.
            self._open = len(work) + (self._open if is_pushed else 0)
            self._write(wave)

    def answer(self, reply: Message) -> None:
        """Note an answer; it is written with others, a moment later at most."""
        outcome = "done" if reply.failure is None else "failed"
        with self._lock:
            self._note(outcome, [client_of(reply.node)])

    def miss(self, work: Sequence[Message]) -> None:
        """Note work that was given up."""
        with self._lock:
            self._note("missed", [client_of(message.node) for message in work])

    def presence(self, absent: Collection[int]) -> None:
        """Write who is absent."""
        with self._lock:
            self._write({"event": "presence", "away": sorted(absent)})

    def _note(self, outcome: str, clients: Sequence[int]) -> None:
        self._answers.setdefault(outcome, []).extend(clients)
        self._open -= len(clients)
        # The last answer of a wave is never kept back: long work may follow it.
        if self._open <= 0 or time.monotonic() - self._written > QUIET_SECONDS:
            self._write_answers()

    def _write_answers(self) -> None:
        if self._answers:
            self._write({"event": "answers", **self._answers})
            self._answers = {}

    def _write(self, line: dict[str, Any]) -> None:
        if self._is_broken:
            return
        self._written = time.monotonic()
        data = json.dumps({"time": round(time.time(), 3), **line}) + "\n"
        try:
            with self._path.open("ab") as file:
                file.write(data.encode())
        except OSError as error:
            self._break(error)

    def _cut_half_line(self) -> None:
        """Remove what a process that was killed left of a line."""
        try:
            data = self._path.read_bytes()
            # A run that was killed may have left half a line.
            size = data.rfind(b"\n") + 1
            if size < len(data):
                with self._path.open("ab") as file:
                    file.truncate(size)
        except FileNotFoundError:
            return
        except OSError as error:
            self._break(error)

    def _break(self, error: OSError) -> None:
        self._is_broken = True
        log.warning("%s is not written any more: %s", self._path, error)
