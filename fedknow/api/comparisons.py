"""Comparisons from Python: several methods, several seeds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedknow.api.callbacks import StopRun
from fedknow.api.experiments import experiment
from fedknow.api.parts import named
from fedknow.api.runs import Run, load_run
from fedknow.api.tracking import (
    Track,
    split_trackers,
    watch_each,
    with_names,
)
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.server.reports.comparison_plots import COMPARISON_PLOTS
from fedknow.server.reports.groups import Group
from fedknow.server.run.events import Event
from fedknow.server.run.recorder import Subscriber
from fedknow.server.tracking import Tracker
from fedknow.simulations.compare import Comparison
from fedknow.simulations.compare import compare as run_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["ComparedRuns", "compare"]


class ComparedRuns:
    """What came of a comparison.

    Attributes
    ----------
    path : Path
        The folder of all runs, with ``compare.json`` and ``report.html``.
    groups : list of Group
        The runs of each method.
    failures : dict
        Folder name of each run that failed, and why.

    Examples
    --------
    >>> import fedknow, tempfile
    >>> compared = fedknow.compare(
    ...     "digits", ["local"], seeds=1, data={"clients": 2, "tasks": 1},
    ...     train={"rounds": 1}, engine={"backend": "inline"}, out=tempfile.mkdtemp(),
    ... )
    >>> compared.groups[0].label, len(compared.groups[0].runs)
    ('local', 1)
    """

    def __init__(self, path: Path, comparison: Comparison) -> None:
        self.path = path
        self.groups: list[Group] = list(comparison.groups)
        self.failures = dict(comparison.failures)
        self.left_out = dict(comparison.left_out)

    @property
    def runs(self) -> dict[str, Run]:
        """All finished runs, by the names of their folders."""
        # A folder without a configuration is no run.
        folders = sorted(path.parent for path in self.path.glob("*/config.toml"))
        return {folder.name: load_run(folder) for folder in folders}

    def table(self) -> DataFrame:
        """Return a row for each run, with its measures, as a table of pandas.

        Raises
        ------
        ModuleNotFoundError
            If pandas is not installed.
        """
        import pandas  # optional: groups and runs serve without it

        rows: list[dict[str, Any]] = []
        for group in self.groups:
            for run in group.runs:
                row = {"method": group.label, "seed": run.config.seed}
                rows.append(row | run.measures())
        return pandas.DataFrame(rows)

    def plot(self, name: str = "accuracy") -> Figure:
        """Draw one of the comparing page's plots as a figure of matplotlib.

        Raises
        ------
        ConfigError
            If there is no such plot, or the runs have not the numbers for it.
        """
        drawable = {
            spec.name: spec
            for spec in COMPARISON_PLOTS
            if spec.has_data(self.groups)
        }
        if name not in drawable:
            raise ConfigError(
                f"name = {name!r}: this comparison has the plots {', '.join(drawable)}"
            )
        return drawable[name].plot(self.groups).figure()

    def __repr__(self) -> str:
        """Name the methods and their accuracies."""
        texts = [
            f"{group.label} {100 * group.estimate('accuracy').mean:.1f} %"
            for group in self.groups
        ]
        return f"<ComparedRuns {self.path}: {', '.join(texts)}>"

    def _repr_html_(self) -> str:
        """Show the comparison in a notebook."""
        from fedknow.api.html import comparison_html

        return comparison_html(self.groups)


def compare(  # noqa: PLR0913  # a caller's keywords, each with its default
    base: str
    | os.PathLike[str]
    | Mapping[str, Any]
    | ExperimentConfig = "digits",
    learners: Sequence[Any] = ("fedavg", "fedknow"),
    seeds: int = 3,
    *,
    out: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callable[[Event], None] | Tracker] = (),
    track: Track = (),
    **changes: Any,
) -> ComparedRuns:
    """Run several methods with several seeds, and put them side by side.

    Parameters
    ----------
    base : str, path, mapping or ExperimentConfig
        The experiment, all but learner and seed.
    learners : sequence of str or class
        Names (``"fedknow@rho=0.2"`` has settings), and classes derived from
        :class:`fedknow.Learner`.
    seeds : int
        Runs of each method.
    out : path, optional
        Folder of all runs; without it ``runs/NAME-compare``. Runs that are finished there are
        read, unfinished ones go on.
    callbacks : sequence of callable
        Called with each event of each run. One that raises :class:`fedknow.StopRun` stops that
        run alone, which counts with what it has.
    track : str, tracker or sequence
        Trackers that follow each run, one after the other, as for :func:`fedknow.simulate`.
    **changes
        Settings over ``base``, as :func:`fedknow.experiment` takes them.

    Returns
    -------
    ComparedRuns

    Raises
    ------
    ConfigError
        Before anything is run, naming the key, the value, and what would be right.

    Examples
    --------
    >>> import fedknow, tempfile
    >>> compared = fedknow.compare(
    ...     "digits", ["fedavg"], seeds=1, data={"clients": 2, "tasks": 1},
    ...     train={"rounds": 1}, engine={"backend": "inline"}, out=tempfile.mkdtemp(),
    ... )
    >>> list(compared.runs), compared.failures
    (['fedavg-seed0'], {})
    """
    to, trackers, subscribers = split_trackers(track, callbacks)
    config = experiment(base, **with_names(changes, to))
    names = [named("learner", learner) for learner in learners]
    folder = (
        Path(out) if out is not None else Path("runs") / f"{config.name}-compare"
    )
    watch_run = watch_each(subscribers, trackers)

    @contextmanager
    def watch(
        run: ExperimentConfig, title: str, path: Path
    ) -> Iterator[Subscriber]:
        # A stopped run counts with what it has; the others go on.
        with suppress(StopRun), watch_run(run, title, path) as observer:
            yield observer

    return ComparedRuns(folder, run_all(config, names, seeds, folder, watch))
