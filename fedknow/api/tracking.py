"""Trackers given as names or objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedknow.api.callbacks import Callback
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.server.run.events import Event
from fedknow.server.run.recorder import Subscriber
from fedknow.server.tracking import Tracker, following
from fedknow.simulations.compare import Watch

__all__ = ["Track", "followers", "split_trackers", "watch_each", "with_names"]

Track = str | Tracker | Sequence[str | Tracker]
"""Names with commas between them, a tracker, or several of either."""


def split_trackers(
    track: Track, callbacks: Iterable[Callable[[Event], None] | Tracker]
) -> tuple[list[str], dict[str, Tracker], list[Callable[[Event], None]]]:
    """Tell the names of trackers, trackers and callbacks from each other.

    Returns
    -------
    names : list of str
    trackers : dict
        By the names of their classes.
    callbacks : list of callable

    Raises
    ------
    ConfigError
        If something is none of them.
    """
    items: list[Any]
    if isinstance(track, str) or not isinstance(track, Sequence):
        items = [track]
    else:
        items = list(track)
    names: list[str] = []
    trackers: dict[str, Tracker] = {}
    subscribers: list[Callable[[Event], None]] = []
    for item in items:
        if isinstance(item, str):
            names += [name.strip() for name in item.split(",") if name.strip()]
        elif _is_tracker(item):
            # Two trackers of one class may go to two projects, so that each gets a name of its
            # own.
            trackers[_free(type(item).__name__, trackers)] = item
        else:
            raise ConfigError(
                f"track = {item!r:.80}: must be a name (fedknow list trackers), or an object "
                "with the methods start, log and finish"
            )
    for callback in callbacks:
        if isinstance(callback, Tracker):
            trackers[_free(type(callback).__name__, trackers)] = callback
        else:
            subscribers.append(callback)
    return names, trackers, subscribers


def with_names(changes: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Put the names of trackers into changes of a configuration."""
    if not names:
        return changes
    tracking = changes.get("tracking", {})
    settings = tracking if isinstance(tracking, dict) else {}
    return changes | {"tracking": {**settings, "to": list(names)}}


@contextmanager
def followers(
    trackers: dict[str, Tracker], config: ExperimentConfig, folder: Path
) -> Iterator[Sequence[Subscriber]]:
    """Have trackers that are objects follow a run."""
    untracked = config.untracked()
    with following(trackers, untracked, config.tracking, folder) as subscribers:
        yield subscribers


def watch_each(
    callbacks: Sequence[Callable[[Event], None]], trackers: dict[str, Tracker]
) -> Watch:
    """Have callbacks and trackers follow each of several runs in turn."""

    @contextmanager
    def watch(
        config: ExperimentConfig, title: str, folder: Path
    ) -> Iterator[Subscriber]:
        for callback in callbacks:
            if isinstance(callback, Callback):
                callback.folder = folder
        with followers(trackers, config, folder) as following:

            def tell(event: Event) -> None:
                # Callbacks last: one of them may stop the run.
                for subscriber in (*following, *callbacks):
                    subscriber(event)

            yield tell

    return watch


def _is_tracker(item: Any) -> bool:
    # A class has the methods too, but they are nobody's.
    return isinstance(item, Tracker) and not isinstance(item, type)


def _free(name: str, trackers: dict[str, Tracker]) -> str:
    """Give a name that is not taken."""
    number = 2
    candidate = name
    while candidate in trackers:
        candidate = f"{name}-{number}"
        number += 1
    return candidate
