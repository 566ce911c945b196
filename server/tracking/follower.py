"""Trackers beside a run: a thread each, which the run never waits for.

A run puts its events into a queue of bounded length and goes on. Whatever a tracker does in its
thread (raise, block, be slow) costs one warning, and at the end of the run at most
``tracking.wait`` seconds.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fedknow.protocols.config import ExperimentConfig, TrackingConfig
from fedknow.protocols.files import write_atomic
from fedknow.protocols.plugins import explain
from fedknow.server.run.events import Event, RunEnded, RunInterrupted, RunStarted
from fedknow.server.run.recorder import Subscriber
from fedknow.server.tracking.numbers import RunNumbers
from fedknow.server.tracking.tracker import Status, TrackedRun, Tracker

__all__ = ["Follower", "following", "former_ids", "store_id"]

log = logging.getLogger(__name__)

QUEUE_SIZE = 1000
"""Events that may wait for a tracker: hours of rounds, and a few megabytes."""

_IDS = "tracking.json"
"""File of the run folder with the identifiers that trackers gave the run."""
# Several trackers of one run write the file.
_ids_lock = threading.Lock()


class Follower:
    """Passes a run's events to one tracker, in a thread of its own.

    Parameters
    ----------
    name : str
        The tracker's, for warnings.
    tracker : Tracker
    run : TrackedRun
        ``step`` is set when the run starts.
    size : int
        Events that may wait.
    """

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        run: TrackedRun,
        size: int = QUEUE_SIZE,
    ) -> None:
        self.name = name
        self._tracker = tracker
        self._run = run
        self._size = size
        self._numbers = RunNumbers()
        self._events: deque[Event] = deque()
        self._status: Status | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._work,
            name=f"fedknow-tracker-{name}",
            # A tracker that blocks for ever must not keep the process.
            daemon=True,
        )
        self._has_warned = False
        self._is_lost = False

    def __call__(self, event: Event) -> None:
        """Take an event; it never waits and never raises."""
        if isinstance(event, RunStarted) and not self._thread.ident:
            self._run = replace(self._run, step=event.resumed_from or 0)
            # Not before: now there is a run folder to store something in.
            self._thread.start()
        if self._is_lost:
            return
        with self._changed:
            is_full = len(self._events) >= self._size
            if not is_full:
                self._events.append(event)
                self._changed.notify()
        if is_full:
            self._warn("is too slow and lacks numbers of this run")

    def end(self, status: Status) -> None:
        """Say how the run ended; the tracker may finish when it has taken all."""
        with self._changed:
            self._status = status
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait for the tracker to finish, for so many seconds at most."""
        if not self._thread.ident:
            return
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            # The thread may stay at work; nobody hears of it from now on.
            self._is_lost = True
            self._warn("did not take all numbers in time (tracking.wait)")

    def _work(self) -> None:
        """Serve the tracker; the body of the thread."""
        try:
            self._start()
            while (event := self._next()) is not None:
                if numbers := self._numbers.read(event):
                    self._tracker.log(self._numbers.step, numbers, event.time)
            assert self._status is not None
            self._tracker.finish(self._status)
        # A library may even raise SystemExit; nothing of it concerns the run.
        except BaseException as error:
            # Whoever did not finish in time has been warned of already.
            is_news = not self._is_lost
            self._is_lost = True
            if is_news:
                self._warn(f"failed: {explain(error)}")

    def _start(self) -> None:
        # Even without an id: a resumed run finds its trackers by these names.
        store_id(self._run.folder, self.name, self._run.former)
        if identifier := self._tracker.start(self._run):
            store_id(self._run.folder, self.name, identifier)

    def _next(self) -> Event | None:
        """Wait for an event; ``None`` where the run has ended."""
        with self._changed:
            while not self._events and self._status is None:
                self._changed.wait()
            return self._events.popleft() if self._events else None

    def _warn(self, text: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "tracker %s %s; the run is not affected, and `fedknow track %s --to %s` "
                "sends all of it later",
                *(self.name, text, self._run.folder, self.name),
            )


class _Ending:
    """Sees how a run ends."""

    status: Status | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunEnded):
            self.status = "complete"
        elif isinstance(event, RunInterrupted):
            self.status = "interrupted"


@contextmanager
def following(
    trackers: Mapping[str, Tracker],
    config: ExperimentConfig,
    section: TrackingConfig,
    folder: Path,
) -> Iterator[Sequence[Subscriber]]:
    """Have trackers follow a run.

    Parameters
    ----------
    trackers : mapping
        Trackers by their names.
    config : ExperimentConfig
        The run's.
    section : TrackingConfig
        The project and the seconds to wait; not its names.
    folder : Path
        The run folder, which need not exist yet.

    Yields
    ------
    sequence of callable
        Subscribers for the run's events.
    """
    if not trackers:
        yield []
        return
    run = TrackedRun(
        name=folder.resolve().name,
        project=section.project or config.name,
        folder=folder,
        config=config,
    )
    # A resumed run goes on in the tracker's own run, and makes no second one.
    former = former_ids(folder)
    followers = [
        Follower(name, tracker, replace(run, former=former.get(name, "")))
        for name, tracker in trackers.items()
    ]
    ending = _Ending()
    try:
        yield [ending, *followers]
    finally:
        for follower in followers:
            follower.end(ending.status or "failed")
        # They finish side by side: all together wait no longer than one.
        deadline = time.monotonic() + section.wait
        for follower in followers:
            follower.join(deadline - time.monotonic())


def former_ids(folder: Path) -> dict[str, str]:
    """Read the identifiers that trackers gave a run, by the trackers' names."""
    path = folder / _IDS
    if not path.is_file():
        return {}
    ids: dict[str, str] = json.loads(path.read_text("utf-8"))
    return ids


def store_id(folder: Path, name: str, identifier: str) -> None:
    """Write down the identifier that a tracker gave a run."""
    with _ids_lock:
        ids = former_ids(folder) | {name: identifier}
        write_atomic(folder / _IDS, json.dumps(ids, indent=1).encode())
