"""Runs from Python: simulate one, or read one that was made before."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fedknow.api.callbacks import Callback, StopRun
from fedknow.api.deployed import DeployedModel
from fedknow.api.experiments import experiment
from fedknow.api.part_sources import PartsRecorder
from fedknow.api.tracking import Track, followers, split_trackers, with_names
from fedknow.client.data import Benchmark, make_benchmark
from fedknow.client.data.local import LOCAL
from fedknow.client.learners import Learner, build_learner, resolve
from fedknow.client.state import State, StateStore
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.texts import counted
from fedknow.server.reports.run_plots import RUN_PLOTS
from fedknow.server.reports.summary import Summary, summarise
from fedknow.server.run.checkpoint import Checkpoint, load_checkpoint
from fedknow.server.run.events import Event
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.recorder import Subscriber
from fedknow.server.tracking import Tracker
from fedknow.simulations.simulate import simulate as run_experiment

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["Run", "load_run", "simulate"]


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


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Read a run's folder, whether the run is finished or not.

    Raises
    ------
    ConfigError
        If the folder holds no run.

    Examples
    --------
    >>> import fedknow
    >>> fedknow.load_run("nowhere")
    Traceback (most recent call last):
    fedknow.protocols.config.errors.ConfigError: nowhere ...
    """
    return Run(RunFolder.open(folder))


class Run:
    """One run: its numbers, its plots and its models.

    Attributes
    ----------
    path : Path
        The run folder.
    config : ExperimentConfig
        The complete configuration.

    Examples
    --------
    >>> import fedknow, tempfile
    >>> run = fedknow.simulate(
    ...     "digits", learner="local", data={"clients": 2, "tasks": 1}, train={"rounds": 1},
    ...     engine={"backend": "inline"}, out=tempfile.mkdtemp(),
    ... )
    >>> run.matrix().shape, len(run.table("round")), run.model(client=0).training
    ((1, 1), 1, False)
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.path = folder.path
        self.config = folder.config

    @cached_property
    def summary(self) -> Summary:
        """The run's numbers, as the report has them."""
        return summarise(self._folder)

    @property
    def status(self) -> str:
        """The run's state: ``complete``, ``interrupted`` or ``unfinished``."""
        return self.summary.status

    @cached_property
    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """All raw arrays (:meth:`fedknow.server.run.folder.RunFolder.accuracy`)."""
        return self._folder.accuracy()

    @property
    def accuracy(self) -> np.ndarray[Any, Any]:
        """Accuracy of the clients' models: float64 [client, seen, trained]."""
        return self.arrays["personal"]

    @property
    def global_accuracy(self) -> np.ndarray[Any, Any]:
        """Accuracy of the global model: float64 [client, seen, trained], 0 to 1."""
        return self.arrays["global"]

    @property
    def measures(self) -> dict[str, float]:
        """The run's measures by key, such as ``accuracy`` and ``forgetting``."""
        return self.summary.measures()

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first."""
        return self._folder.events()

    def matrix(self, global_model: bool = False) -> np.ndarray[Any, Any]:
        """Return accuracy on each task after each: float64 [seen, trained]."""
        scoring = (
            self.summary.global_model if global_model else self.summary.personal
        )
        if scoring is None:
            raise ConfigError(
                "the global model was not scored: evaluation.global_model = false"
            )
        return scoring.matrix

    def table(self, kind: str = "round") -> DataFrame:
        """Return the events of one kind as a table of pandas, a row each.

        Raises
        ------
        ModuleNotFoundError
            If pandas is not installed.
        """
        import pandas  # optional: arrays and lists serve without it

        rows = [event for event in self.events if event["event"] == kind]
        # The kind is the same in all rows, and the checksum is the file's own affair.
        return pandas.DataFrame(rows).drop(
            columns=["event", "crc32"], errors="ignore"
        )

    def plot(self, name: str = "accuracy") -> Figure:
        """Draw one of the report's plots as a figure of matplotlib.

        Parameters
        ----------
        name : str
            ``accuracy``, ``forgetting``, ``matrix``, ``tasks``, ``rounds``, ...

        Raises
        ------
        ConfigError
            If there is no such plot, or the run has not the numbers for it.
        """
        drawable = {
            spec.name: spec for spec in RUN_PLOTS if spec.has_data(self.summary)
        }
        if name not in drawable:
            raise ConfigError(
                f"name = {name!r}: this run has the plots {', '.join(drawable)}"
            )
        return drawable[name].plot(self.summary).figure()

    def model(self, client: int | None = None, best: bool = False) -> nn.Module:
        """Build the global model, or one client's with what it keeps to itself.

        Parameters
        ----------
        client : int, optional
            Which client, from 0; without it the global model. Parameters that clients keep to
            themselves, such as a head, are averaged for it over clients, weighted by their test
            samples, as the scoring of the global model does.
        best : bool
            With the global parameters that :class:`fedknow.KeepBest` kept, not the last ones.

        Returns
        -------
        nn.Module
            In evaluation mode, on the CPU. Its input is normalised as the run's data set is.

        Raises
        ------
        ConfigError
            If the run has no checkpoint yet, or no such client or best model.
        """
        checkpoint = self._checkpoint()
        learner = self._learner()
        arrays = self._best() if best else checkpoint.arrays
        shared = {
            name: torch.tensor(np.asarray(value))
            for name, value in arrays.items()
        }
        if client is not None:
            learner.load_state_dict(self._state(client, checkpoint))
        elif local := self._mean_kept(checkpoint):
            learner.load_local_parameters(local)
        # After the state: what travels is the server's.
        learner.receive(shared)
        return copy.deepcopy(learner.model).eval()

    def deployed(
        self, client: int | None = None, best: bool = False
    ) -> DeployedModel:
        """Build a model that takes plain images, ready to be exported.

        Parameters
        ----------
        client, best
            As for :meth:`model`.

        Returns
        -------
        DeployedModel
            It exports, evaluates and predicts without the run's data set.
        """
        network = self.model(client, best)
        dataset = self._benchmark.dataset
        classes = self._benchmark.classes
        return DeployedModel(
            network,
            dataset.spec,
            dataset.mean,
            dataset.std,
            dataset.class_names[:classes],
        )

    @cached_property
    def _benchmark(self) -> Benchmark:
        if self.config.data.name == LOCAL:
            raise ConfigError(
                "data.name = 'local': the data are with real clients, so the run does not know "
                "their images; build the model by fedknow.client.learners.build_learner"
            )
        return make_benchmark(resolve(self.config))

    def _mean_kept(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Average what clients keep to themselves, weighted by their test samples."""
        scored = np.isfinite(self.accuracy[:, :, checkpoint.task])
        # The weights of the run's own scoring of the global model, so that both have the same
        # head.
        weights = (np.nan_to_num(self.arrays["weights"]) * scored).sum(1)
        total: dict[str, torch.Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        for client, weight in enumerate(weights / max(weights.sum(), 1)):
            local = self._state(client, checkpoint).get("kept", {})
            for name, value in local.items():
                dtypes[name] = value.dtype
                # In double precision, so that the order of clients does not matter.
                part = value.double() * weight
                total[name] = total[name] + part if name in total else part
        return {name: value.to(dtypes[name]) for name, value in total.items()}

    def _checkpoint(self) -> Checkpoint:
        checkpoint = load_checkpoint(self._folder.checkpoints)
        if checkpoint is None:
            raise ConfigError(
                f"{self.path} has no checkpoint: its first round is not complete"
            )
        return checkpoint

    def _learner(self) -> Learner:
        benchmark = self._benchmark
        return build_learner(
            resolve(self.config), benchmark.spec, benchmark.classes
        )

    def _best(self) -> dict[str, Any]:
        from safetensors.numpy import load_file

        path = self.path / "best" / "arrays.safetensors"
        if not path.is_file():
            raise ConfigError(
                f"{self.path} has no best model; run it with callbacks=[fedknow.KeepBest()]"
            )
        return load_file(path)

    def _state(self, client: int, checkpoint: Checkpoint) -> State:
        clients = self.config.data.clients
        if not 0 <= client < clients:
            raise ConfigError(
                f"client = {client}: the run has {counted(clients, 'client')}, from 0"
            )
        # Only read, so that no memory is set aside for states.
        store = StateStore(self._folder.clients, 0, durable=False)
        return store.load(client, checkpoint.versions.get(client, 0))

    def __repr__(self) -> str:
        """Name the run and its state."""
        accuracy = self.measures["accuracy"]
        return (
            f"<Run {self.path}: {self.config.name} with {self.config.learner.name}, "
            f"{self.status}, accuracy {100 * accuracy:.1f} %>"
        )

    def _repr_html_(self) -> str:
        """Show measures and the accuracy matrix in a notebook."""
        from fedknow.api.html import run_html

        return run_html(self.summary, str(self.path))


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
