"""What a program can do while a run goes on: callbacks.

A callback sees each event after it has been recorded. It cannot change a number. It can stop
the run, which then can be resumed.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Literal

from fedknow.protocols.config import ConfigError
from fedknow.server.run.events import (
    ClientFailed,
    Evaluated,
    Event,
    RoundEnded,
    RunEnded,
    RunStarted,
    TaskEnded,
    Warned,
)

__all__ = ["Callback", "EarlyStopping", "KeepBest", "StopRun"]


class StopRun(KeyboardInterrupt):
    """Raised in a callback to stop the run, as Ctrl-C does.

    The run keeps its last complete round and can be resumed.

    Examples
    --------
    >>> import fedknow
    >>> class OneRound(fedknow.Callback):
    ...     def on_round_end(self, event):
    ...         raise fedknow.StopRun
    """


class Callback:
    """Follows a run; override the methods you need.

    Each method gets one event, whose attributes :mod:`fedknow.server.run.events` lists. Tasks
    count from 0, rounds from 1.

    Attributes
    ----------
    folder : Path
        The run folder; set when the run starts.

    Examples
    --------
    >>> import fedknow
    >>> class Losses(fedknow.Callback):
    ...     def __init__(self):
    ...         self.losses = []
    ...     def on_round_end(self, event):
    ...         self.losses.append(event.loss)
    """

    folder: Path

    def on_event(self, event: Event) -> None:
        """Follow any event, before the method for its kind."""

    def on_start(self, event: RunStarted) -> None:
        """Follow the start of the run, or of its resumption."""

    def on_round_end(self, event: RoundEnded) -> None:
        """Follow a round whose updates are aggregated."""

    def on_evaluation_end(self, event: Evaluated) -> None:
        """Follow an evaluation of all clients."""

    def on_task_end(self, event: TaskEnded) -> None:
        """Follow the end of a task."""

    def on_failure(self, event: ClientFailed) -> None:
        """Follow a client's failure."""

    def on_warning(self, event: Warned) -> None:
        """Follow a warning."""

    def on_end(self, event: RunEnded) -> None:
        """Follow the end of the run."""

    def __call__(self, event: Event) -> None:
        """Pass an event to the methods above."""
        self.on_event(event)
        if isinstance(event, RunStarted):
            self.on_start(event)
        elif isinstance(event, RoundEnded):
            self.on_round_end(event)
        elif isinstance(event, Evaluated):
            self.on_evaluation_end(event)
        elif isinstance(event, TaskEnded):
            self.on_task_end(event)
        elif isinstance(event, ClientFailed):
            self.on_failure(event)
        elif isinstance(event, Warned):
            self.on_warning(event)
        elif isinstance(event, RunEnded):
            self.on_end(event)


class EarlyStopping(Callback):
    """Stop a run whose measure has not improved for some evaluations.

    Parameters
    ----------
    measure : str
        A number of the evaluation's event: ``accuracy``, ``accuracy_global``, ``forgetting``.
    patience : int
        Evaluations without improvement after which the run stops. Within tasks they happen
        where ``evaluation.every`` says so.
    min_delta : float
        The least change that counts as an improvement.
    mode : {"max", "min"}
        Whether larger or smaller is better.

    Raises
    ------
    ConfigError
        If ``patience`` is below 1 or ``mode`` is another word.

    Examples
    --------
    >>> import fedknow
    >>> fedknow.EarlyStopping("forgetting", patience=2, mode="min").patience
    2
    """

    def __init__(
        self,
        measure: str = "accuracy",
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        if patience < 1:
            raise ConfigError(f"patience = {patience}: must be at least 1")
        if mode not in ("max", "min"):
            raise ConfigError(f"mode = {mode!r}: must be 'max' or 'min'")
        self.measure = measure
        self.patience = patience
        self.min_delta = min_delta
        self.mode = mode
        self._reset(-1)

    def _reset(self, task: int) -> None:
        self._task = task
        self._best = -math.inf
        self._waited = 0

    def on_start(self, event: RunStarted) -> None:
        """Begin anew."""
        self._reset(-1)

    def on_evaluation_end(self, event: Evaluated) -> None:
        """Compare with the best so far; stop where patience is over."""
        if (
            event.task != self._task
        ):  # a new task makes the average fall: no reason to stop
            self._reset(event.task)
        value = _number(event, self.measure)
        # Only the sign differs, so that one comparison serves both.
        score = value if self.mode == "max" else -value
        if score > self._best + self.min_delta:
            self._best = score
            self._waited = 0
            return
        self._waited += 1
        if self._waited >= self.patience:
            raise StopRun(
                f"{self.measure} has not improved for {self._waited} evaluations "
                f"of task {self._task + 1}"
            )


class KeepBest(Callback):
    """Keep the global model of the best evaluation.

    It lies in ``best/`` of the run folder.

    ``best/arrays.safetensors`` holds its parameters by name; :meth:`fedknow.Run.model` gives
    it with ``best=True``.

    Parameters
    ----------
    measure : str
        A number of the evaluation's event.
    mode : {"max", "min"}
        Whether larger or smaller is better.

    Examples
    --------
    >>> import fedknow
    >>> fedknow.KeepBest().measure
    'accuracy_global'
    """

    def __init__(
        self,
        measure: str = "accuracy_global",
        mode: Literal["max", "min"] = "max",
    ) -> None:
        self.measure = measure
        self.mode = mode
        self.best = -math.inf
        self._is_pending = False

    def on_start(self, event: RunStarted) -> None:
        """Begin anew."""
        self.best = -math.inf
        self._is_pending = False

    def on_event(self, event: Event) -> None:
        """Copy the checkpoint that follows the best evaluation.

        The checkpoint of a round is written after its evaluation, and before the next event.
        """
        if self._is_pending and not isinstance(event, TaskEnded):
            self._copy()
            self._is_pending = False

    def on_evaluation_end(self, event: Evaluated) -> None:
        """Note whether this evaluation is the best so far."""
        value = _number(event, self.measure)
        score = value if self.mode == "max" else -value
        if score > self.best:
            self.best = score
            self._is_pending = True

    def _copy(self) -> None:
        checkpoints = self.folder / "checkpoint"
        # The checkpoint that counts: a newer folder may still be half written.
        latest = (checkpoints / "latest").read_text("utf-8").strip()
        target = self.folder / "best"
        # A copy outside of the checkpoints, which the next one deletes.
        target.mkdir(exist_ok=True)
        shutil.copyfile(
            checkpoints / latest / "arrays.safetensors",
            target / "arrays.safetensors",
        )


def _number(event: Evaluated, measure: str) -> float:
    value = getattr(event, measure, None)
    if not isinstance(value, float):
        raise ConfigError(
            f"measure = {measure!r}: an evaluation has the numbers accuracy, accuracy_global "
            "and forgetting"
        )
    # What was not measured is no improvement.
    return -math.inf if math.isnan(value) else value
