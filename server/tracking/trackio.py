"""trackio: a run in a local store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedknow.server.tracking.tracker import Status, TrackedRun, settings

__all__ = ["Trackio"]


class Trackio:
    """Writes to trackio's store, in ``TRACKIO_DIR`` or where trackio has it."""

    _run: Any

    def start(self, run: TrackedRun) -> str:
        """Begin a run, or go on with the former one."""
        # Imported late: it takes seconds.
        import trackio

        self._run = trackio.init(
            project=run.project,
            name=run.name,
            config=settings(run.config),
            resume="allow" if run.former else "never",
            # No page beside a notebook's cell, and none of the machine's own numbers.
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return str(self._run.name)

    def log(self, step: int, numbers: Mapping[str, float], time: float) -> None:
        """Store numbers with their step; trackio notes the time itself."""
        self._run.log(dict(numbers), step=step)

    def finish(self, status: Status) -> None:
        """Store how the run ended, and what is left."""
        self._run.log({"status": status})
        self._run.finish()
