"""Run an experiment from Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedknow.api.callbacks import Callback, StopRun
from fedknow.api.experiments import experiment
from fedknow.api.part_sources import PartsRecorder, warn_of_changes
from fedknow.api.runs import Run, load_run
from fedknow.api.tracking import Track, followers, split_trackers, with_names
from fedknow.protocols.config import ExperimentConfig
from fedknow.server.run.events import Event
from fedknow.server.run.recorder import Subscriber
from fedknow.server.tracking import Tracker
from fedknow.simulations.simulate import simulate as run_experiment

__all__ = ["simulate"]


def simulate(  # noqa: PLR0913  # a caller's keywords, each with its default
    base: str
    | os.PathLike[str]
    | Mapping[str, Any]
    | ExperimentConfig = "digits",
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    callbacks: Sequence[Callable[[Event], None] | Tracker] = (),
    track: Track = (),
    report: bool = False,
    **changes: Any,
) -> Run:
    """Run an experiment with virtual clients.

    Parameters
    ----------
    base : str, path, mapping or ExperimentConfig
        A preset's name, a TOML file, a table like one, or a configuration.
    out : path, optional
        The run folder; without it ``runs/NAME-LEARNER-seedN``, with a number where that is taken.
    resume : bool
        Go on with the unfinished run in ``out``.
    callbacks : sequence of callable
        Called with each event; see :class:`fedknow.Callback`. Trackers may stand here too.
    track : str, tracker or sequence
        Trackers that follow the run: ``"mlflow"``, ``"tensorboard,wandb"``, or objects with the
        methods of :class:`fedknow.server.tracking.Tracker`.
    report : bool
        Whether to write ``report.html`` and its plots.
    **changes
        Settings over ``base``, as :func:`fedknow.experiment` takes them.

    Returns
    -------
    Run
        The finished run, or one that a callback stopped (:attr:`Run.status`).

    Raises
    ------
    ConfigError
        Before the run, naming the key, the value, and what would be right.
    RunError
        If the run fails; what it earned until then is kept and can be resumed.

    Examples
    --------
    >>> import fedknow, tempfile
    >>> small = {"clients": 3, "tasks": 2}
    >>> run = fedknow.simulate(
    ...     "digits", data=small, train={"rounds": 1}, learner="fedavg",
    ...     engine={"backend": "inline"}, out=tempfile.mkdtemp(),
    ... )
    >>> run.status, run.accuracy.shape
    ('complete', (3, 2, 2))
    """
    names, trackers, subscribers = split_trackers(track, callbacks)
    config = experiment(base, **with_names(changes, names))
    folder = Path(out) if out is not None else _new_folder(config)
    for callback in subscribers:
        if isinstance(callback, Callback):
            callback.folder = folder
    if resume:
        warn_of_changes(folder, config)
    recording = PartsRecorder(folder, config)
    with (
        suppress(StopRun),  # the folder has the event, and can be resumed
        followers(trackers, config, folder) as following,
    ):
        # The user's come last: one of them may stop the run, and all others have seen the
        # event.
        observers: list[Subscriber] = [recording, *following, *subscribers]
        run_experiment(config, folder, resume, observers, report)
    return load_run(folder)


def _new_folder(config: ExperimentConfig) -> Path:
    """Choose a run folder that is not taken."""
    learner = "".join(
        c if c.isalnum() or c in "._-" else "-" for c in config.learner.name
    )
    base = Path("runs") / f"{config.name}-{learner}-seed{config.seed}"
    candidate = base
    number = 2
    # A run is never written over.
    while candidate.exists():
        candidate = base.with_name(f"{base.name}-{number}")
        number += 1
    return candidate
