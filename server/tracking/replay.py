"""Runs sent to a tracker afterwards, or while another process runs them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from fedknow.protocols.errors import FAILED, FedknowError
from fedknow.protocols.plugins import PASSED_ON, explain
from fedknow.server.run.events import Event, RunEnded, RunInterrupted, parse
from fedknow.server.run.folder import RunFolder
from fedknow.server.tracking.numbers import RunNumbers
from fedknow.server.tracking.registry import check_trackers, make_tracker
from fedknow.server.tracking.tracker import Status, TrackedRun

__all__ = ["TrackingError", "track_run"]

_PAUSE = 1.0
"""Seconds between two looks at a run that is going on."""


class TrackingError(FedknowError):
    """A tracker failed while a run was sent to it."""

    exit_code = FAILED
    is_resumable = False


def track_run(
    path: Path,
    name: str,
    project: str = "",
    follow: bool = True,
) -> int:
    """Send a run to a tracker, from its first event on.

    Parameters
    ----------
    path : Path
        The run folder.
    name : str
        The tracker's.
    project : str
        Under which the tracker lists the run; empty: the experiment's name.
    follow : bool
        Stay with a run that is going on until it ends.

    Returns
    -------
    int
        Events that had numbers.

    Raises
    ------
    ConfigError
        If there is no run or no such tracker.
    TrackingError
        If the tracker fails.
    """
    folder = RunFolder.open(path)
    check_trackers([name])
    tracker = make_tracker(name)
    run = TrackedRun(
        name=path.resolve().name,
        project=project or folder.config.name,
        folder=path,
        config=folder.config,
    )
    numbers = RunNumbers()
    status: Status = "failed"
    count = 0
    try:
        tracker.start(run)
        for event in _events(folder, follow):
            if values := numbers.read(event):
                tracker.log(numbers.step, values, event.time)
                count += 1
            status = _status(event)
        tracker.finish(status)
    except (FedknowError, *PASSED_ON):
        raise
    except BaseException as error:  # a library may raise anything
        raise TrackingError(f"tracker {name} failed: {explain(error)}") from error
    return count


def _status(event: Event) -> Status:
    """Say how a run ended whose last event is this one."""
    if isinstance(event, RunEnded):
        return "complete"
    return "interrupted" if isinstance(event, RunInterrupted) else "failed"


def _events(folder: RunFolder, follow: bool) -> Iterator[Event]:
    """Yield all events, and those of a run that is going on as they come."""
    seen = 0
    position = -1
    while True:
        # Asked first: a run that ends after this still has its last events read.
        is_over = not (follow and folder.is_in_use)
        if folder.position() != position:
            position = folder.position()
            events = folder.events()
            yield from map(parse, events[seen:])
            # A run that was resumed meanwhile repeats its last rounds.
            seen = len(events)
        if is_over:
            return
        time.sleep(_PAUSE)
