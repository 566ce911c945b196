"""The trackers that a configuration names, around its run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedknow.protocols.config import ExperimentConfig, TrackingConfig
from fedknow.server.run.recorder import Subscriber
from fedknow.server.tracking.follower import following, former_ids
from fedknow.server.tracking.registry import (
    NONE,
    check_trackers,
    is_tracker,
    make_tracker,
)

__all__ = ["tracking"]


@contextmanager
def tracking(
    config: ExperimentConfig,
    section: TrackingConfig,
    folder: Path,
    is_resumed: bool = False,
) -> Iterator[Sequence[Subscriber]]:
    """Have the configured trackers follow a run.

    Parameters
    ----------
    config : ExperimentConfig
        The run's, with every setting.
    section : TrackingConfig
        Which trackers there shall be.
    folder : Path
        The run folder.
    is_resumed : bool
        Whether the run goes on; without names of its own it goes on with the trackers it had.

    Yields
    ------
    sequence of callable
        Subscribers for the run's events.

    Raises
    ------
    ConfigError
        Before the run, if a tracker does not exist or lacks its package.
    """
    names = list(dict.fromkeys(section.to))
    if not names and is_resumed:
        # Trackers given as objects have no name to make them by again.
        names = [name for name in former_ids(folder) if is_tracker(name)]
    check_trackers(names)
    trackers = {name: make_tracker(name) for name in names if name != NONE}
    with following(trackers, config, section, folder) as followers:
        yield followers
