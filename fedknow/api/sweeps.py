"""Searches from Python: settings are scored on held-out samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedknow.api.experiments import experiment
from fedknow.api.tracking import watch_each
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.server.run.events import Event
from fedknow.simulations.proposals import Sampler, Trial
from fedknow.simulations.space import read_space
from fedknow.simulations.sweep import (
    SweepRequest,
    best_trial,
    configure,
    sweep,
)

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["SearchResult", "search"]


class SearchResult:
    """What a search has found.

    Attributes
    ----------
    path : Path
        The folder of all runs.
    trials : list of Trial
        All tries in their order: number, settings, accuracy, forgetting, failure.

    Examples
    --------
    >>> import fedknow, tempfile
    >>> found = fedknow.search(
    ...     "digits", {"train.lr": [1e-2, 1e-3]}, sampler="grid", learner="local",
    ...     data={"clients": 2, "tasks": 1}, train={"rounds": 1},
    ...     engine={"backend": "inline"}, out=tempfile.mkdtemp(),
    ... )
    >>> found.config.train.lr in (1e-2, 1e-3), found.trials[0].failure
    (True, '')
    """

    def __init__(
        self,
        path: Path,
        trials: Sequence[Trial],
        config: ExperimentConfig,
    ) -> None:
        self.path = path
        self.trials = list(trials)
        self._config = config

    @property
    def best(self) -> Trial:
        """The best try: most accuracy, then least forgetting, then first.

        Raises
        ------
        ConfigError
            If all tries failed.
        """
        best = best_trial(self.trials)
        if best is None:
            reasons = {trial.failure for trial in self.trials}
            raise ConfigError(f"all tries failed: {'; '.join(sorted(reasons))}")
        return best

    @property
    def config(self) -> ExperimentConfig:
        """The experiment with the best settings, on all samples again."""
        return configure(self._config, self.best.settings, self._config.seed)

    def table(self) -> DataFrame:
        """Return a row for each try, with its settings, as a table of pandas.

        Raises
        ------
        ModuleNotFoundError
            If pandas is not installed.
        """
        import pandas  # optional: trials serve without it

        rows: list[dict[str, Any]] = []
        for trial in self.trials:
            row: dict[str, Any] = {"trial": trial.number, **trial.settings}
            row |= {
                "accuracy": trial.accuracy,
                "forgetting": trial.forgetting,
                "failure": trial.failure,
            }
            rows.append(row)
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        """Name the best settings and their accuracy."""
        best = best_trial(self.trials)
        if best is None:
            return (
                f"<SearchResult {self.path}: all {len(self.trials)} tries failed>"
            )
        settings = ", ".join(f"{k}={v}" for k, v in best.settings.items())
        accuracy = 100 * (best.accuracy or 0.0)
        return (
            f"<SearchResult {self.path}: {len(self.trials)} tries, best {settings} "
            f"with {accuracy:.1f} %>"
        )

    def _repr_html_(self) -> str:
        """Show the result in a notebook."""
        return f"<p><code>{escape(repr(self))}</code></p>"


def search(  # noqa: PLR0913  # a caller's keywords, each with its default
    base: str
    | os.PathLike[str]
    | Mapping[str, Any]
    | ExperimentConfig = "digits",
    space: Mapping[str, Any] | Sequence[str] = (),
    trials: int = 20,
    seeds: int = 1,
    *,
    sampler: Sampler = "tpe",
    out: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callable[[Event], None]] = (),
    **changes: Any,
) -> SearchResult:
    """Search the best settings, on training samples that are held out.

    Parameters
    ----------
    base : str, path, mapping or ExperimentConfig
        The experiment. Where ``data.holdout`` is 0, a fifth of the training samples is held out.
    space : mapping, or sequence of str
        Ranges by key: ``{"train.lr": "log:1e-4..1e-1", "train.epochs": "int:1..5",
        "train.optimizer": ["sgd", "adam"]}``; or ``KEY=RANGE`` each.
    trials : int
        How many settings to try.
    seeds : int
        Runs of each.
    sampler : {"tpe", "random", "grid"}
        ``tpe``: near what scored well; ``random``: anywhere; ``grid``: every combination. The
        first two need the extra ``search``.
    out : path, optional
        Folder of all runs; without it ``runs/NAME-sweep``. A search there goes on.
    callbacks : sequence of callable
        Called with each event of each run. One that raises :class:`fedknow.StopRun` stops the
        search, which can go on.
    **changes
        Settings over ``base``, as :func:`fedknow.experiment` takes them.

    Returns
    -------
    SearchResult

    Raises
    ------
    ConfigError
        Before anything is run, naming the key, the value, and what would be right.
    ModuleNotFoundError
        If the sampler needs Optuna, and it is not installed.

    Examples
    --------
    >>> import fedknow, tempfile
    >>> found = fedknow.search(
    ...     "digits", {"train.lr": [1e-7, 1e-2]}, sampler="grid", learner="fedavg",
    ...     data={"clients": 2, "tasks": 1}, train={"rounds": 1},
    ...     engine={"backend": "inline"}, out=tempfile.mkdtemp(),
    ... )
    >>> found.best.settings, len(found.trials)
    ({'train.lr': 0.01}, 2)
    """
    config = experiment(base, **changes)
    request = SweepRequest(read_space(space), trials, seeds, sampler)
    folder = (
        Path(out) if out is not None else Path("runs") / f"{config.name}-sweep"
    )

    watch = watch_each(callbacks, {})
    return SearchResult(folder, sweep(config, request, folder, watch), config)
