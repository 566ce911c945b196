"""Runs from Python, read from their folders."""

from __future__ import annotations

import copy
import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fedknow.api.deployed import DeployedModel
from fedknow.api.part_sources import warn_of_changes
from fedknow.api.parts import adopt
from fedknow.client.data import Benchmark, make_benchmark
from fedknow.client.data.local import LOCAL
from fedknow.client.learners import Learner, build_learner, resolve
from fedknow.client.state import State
from fedknow.client.state.remote import open_states
from fedknow.protocols.config import ConfigError
from fedknow.protocols.texts import counted
from fedknow.server.reports.run_plots import RUN_PLOTS
from fedknow.server.reports.summary import Summary, summarise
from fedknow.server.run.checkpoint import Checkpoint, load_checkpoint
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.states import states_place

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["Run", "load_run"]


def load_run(
    folder: str | os.PathLike[str],
    *,
    learner: Any = None,
    model: Any = None,
    data: Any = None,
) -> Run:
    """Read a run's folder, whether the run is finished or not.

    Parameters
    ----------
    folder : path
        The run folder.
    learner, model, data : class or object, optional
        What the run was given as a class or object of a notebook or script. A new process has
        to be given it again, where the run's models are wanted.

    Raises
    ------
    ConfigError
        If the folder holds no run, or a part is not one that the run was given so.

    Warns
    -----
    UserWarning
        When a model is built of a part whose source is not the one that the run recorded.

    Examples
    --------
    >>> import fedknow
    >>> fedknow.load_run("nowhere")
    Traceback (most recent call last):
    fedknow.protocols.config.errors.ConfigError: nowhere ...
    """
    run = Run(RunFolder.open(folder))
    parts = {"learner": learner, "model": model, "data": data}
    for section, part in parts.items():
        if part is not None:
            adopt(section, part, getattr(run.config, section).name)
    return run


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
        """Accuracy of the scored clients' models: float64 [client, seen, trained]."""
        return self.arrays["personal"]

    @property
    def global_accuracy(self) -> np.ndarray[Any, Any]:
        """Accuracy of the global model: float64 [client, seen, trained], 0 to 1."""
        return self.arrays["global"]

    @property
    def held_out_accuracy(self) -> dict[str, np.ndarray[Any, Any]]:
        """Global model's accuracy by person held out: float64 [seen, trained]."""
        return self.summary.people.by_name()

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
        summary = self.summary
        drawable = {p.name: p for p in RUN_PLOTS if p.has_data(summary)}
        if name not in drawable:
            raise ConfigError(
                f"name = {name!r}: this run has the plots {', '.join(drawable)}"
            )
        return drawable[name].plot(summary).figure()

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
        shared = {k: torch.tensor(np.asarray(v)) for k, v in arrays.items()}
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
        clients = self.arrays.get("clients", np.arange(len(weights))).tolist()
        shares = weights / max(weights.sum(), 1)
        for client, weight in zip(clients, shares, strict=True):
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
        warn_of_changes(self.path, self.config)
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
        store = open_states(states_place(self._folder), 0, durable=False)
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
