"""Writing a run's checkpoints, and going on from one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from threading import Thread
from typing import Any

import numpy as np

from fedknow.protocols.config import ConfigError
from fedknow.protocols.messages import Arrays
from fedknow.server.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from fedknow.server.run.context import RunContext
from fedknow.server.run.evaluation import Scores
from fedknow.server.run.events import Warned
from fedknow.server.run.schedule import TaskSchedule
from fedknow.server.run.strategy_state import restore_strategy, strategy_state

__all__ = ["Resumption"]


class Resumption:
    """Writes a run's checkpoints, and takes the run back to the last of them.

    Parameters
    ----------
    run : RunContext
    schedule : TaskSchedule
    """

    def __init__(self, run: RunContext, schedule: TaskSchedule) -> None:
        self._run = run
        self._schedule = schedule
        self._deleting: Thread | None = None
        self._began = time.perf_counter()
        self._seconds_before = 0.0
        self._has_told_of_loss = False

    @property
    def digest(self) -> str:
        """Digest of which client holds what."""
        return _digest(self._run.parts.partition)

    def start_clock(self) -> None:
        """Begin to count the session's seconds."""
        self._began = time.perf_counter()

    def seconds(self) -> float:
        """Give the time that all sessions of the run have taken."""
        return self._seconds_before + time.perf_counter() - self._began

    def go_back(self) -> Checkpoint | None:
        """Take the run and its folder back to the last checkpoint.

        Gives ``None`` if there is none.

        Raises
        ------
        ConfigError
            If the run was begun with other data.
        CheckpointError, FolderDamaged
            If it cannot go on from there.
        """
        folder = self._run.folder
        checkpoint = load_checkpoint(folder.checkpoints)
        if checkpoint is None:
            # Without a checkpoint the run begins anew, and with it its events.
            folder.cut_back(0)
            return None
        # Checkpoints of earlier versions do not have the digest; partition.json tells it.
        begun_with = checkpoint.partition or _digest(
            self._run.parts.partition
            if folder.partition is None
            else folder.partition
        )
        if begun_with != self.digest:
            raise ConfigError(
                f"{folder.path} was started with other data: its clients held other samples "
                "(digest differs); use the same data, or choose another --out"
            )
        # After the check of the data, so that a refused resume changes nothing.
        folder.cut_back(checkpoint.position, checkpoint.chain)
        self._restore(checkpoint)
        return checkpoint

    def commit(self, task: int, round: int) -> None:
        """Make the round just finished the one that a resumed run goes on from."""
        run = self._run
        with run.calls.call("state_dict", task, round):
            state, lost = strategy_state(run.parts.strategy)
        # Once a run, and not at each checkpoint.
        if lost and not self._has_told_of_loss:
            reason = (
                f"strategy {run.calls.name}: not in checkpoints, so reset if resumed: "
                f"{', '.join(lost)}"
            )
            run.recorder.record(Warned(task=task, round=round, reason=reason))
            self._has_told_of_loss = True
        checkpoint = Checkpoint(
            task=task,
            round=round,
            server_round=run.state.server_round,
            arrays=run.state.arrays,
            strategy=state,
            scores=run.state.scores.raw(),
            # A copy: the grid's own goes on with the next wave.
            versions=dict(run.grid.versions),
            traffic=run.grid.traffic.counts(),
            position=run.folder.position(),
            seconds=self.seconds(),
            grid=run.grid.state(),
            arrivals=self._schedule.state(),
            client_memory=run.state.client_memory,
            chain=run.folder.chain,
            partition=self.digest,
        )
        self._deleting = save_checkpoint(run.folder.checkpoints, checkpoint)
        # Only now that it is on the disk, as an interruption reports this round.
        run.state.last_complete = (task, round)
        # After the checkpoint is safe: until then the older states are needed.
        run.grid.prune()

    def settle(self) -> None:
        """Wait until what does not count any more is deleted."""
        if self._deleting is not None:
            self._deleting.join()

    def _restore(self, checkpoint: Checkpoint) -> None:
        run = self._run
        state = run.state
        if _layout(checkpoint.arrays) != _layout(state.arrays):
            raise CheckpointError(
                f"{run.folder.checkpoints}: the checkpoint holds another model's parameters; "
                "use the model it was started with, or choose another --out"
            )
        # Only where no round has aggregated anything is the model still the one it began with.
        state.has_aggregated = any(
            not np.array_equal(array, state.arrays[name])
            for name, array in checkpoint.arrays.items()
        )
        state.arrays = checkpoint.arrays
        state.scores = Scores.from_raw(checkpoint.scores)
        run.grid.restore(checkpoint.versions, checkpoint.traffic)
        run.grid.restore_state(checkpoint.grid)
        self._schedule.restore(checkpoint.arrivals)
        with run.calls.call("load_state_dict", checkpoint.task, checkpoint.round):
            restore_strategy(run.parts.strategy, checkpoint.strategy)
        state.last_complete = (checkpoint.task, checkpoint.round)
        state.server_round = checkpoint.server_round
        state.client_memory = checkpoint.client_memory
        self._seconds_before = checkpoint.seconds
        self._mend_files()

    def _mend_files(self) -> None:
        """Rewrite files that are only written when a task ends.

        They may have been damaged since.
        """
        run = self._run
        scores = run.state.scores
        if np.isfinite(scores.weights).any():
            run.folder.write_accuracy(scores.arrays())
        if fleet := run.grid.fleet():
            run.folder.write_fleet(fleet)


def _layout(arrays: Arrays) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def _digest(partition: Mapping[str, Any]) -> str:
    stated = partition.get("digest")
    if stated:
        return str(stated)
    return hashlib.sha256(
        json.dumps(dict(partition), sort_keys=True).encode()
    ).hexdigest()
