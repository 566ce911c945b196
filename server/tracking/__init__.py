"""Trackers: programs that store and draw the numbers of many runs.

A tracker follows a run's events without touching the run (:mod:`~.follower`). It is a small
class (:class:`Tracker`), and one file here is one tracker.
"""

from fedknow.server.tracking.follower import following
from fedknow.server.tracking.registry import (
    check_trackers,
    describe_tracker,
    list_trackers,
)
from fedknow.server.tracking.replay import TrackingError, track_run
from fedknow.server.tracking.session import tracking
from fedknow.server.tracking.tracker import TrackedRun, Tracker

__all__ = [
    "TrackedRun",
    "Tracker",
    "TrackingError",
    "check_trackers",
    "describe_tracker",
    "following",
    "list_trackers",
    "track_run",
    "tracking",
]
