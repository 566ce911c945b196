"""Compare several learners over several seeds, with one partition a seed."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedknow.client.data import make_benchmark
from fedknow.client.learners import resolve
from fedknow.client.state import StateError
from fedknow.protocols.bounds import check_between
from fedknow.protocols.config import ConfigError, ExperimentConfig, differences
from fedknow.server.checks.faults import RunError
from fedknow.server.reports.groups import Group
from fedknow.server.reports.page import write_report
from fedknow.server.run.events import Event
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.recorder import Subscriber
from fedknow.simulations.contenders import contenders, plan
from fedknow.simulations.engine.cluster import one_ray
from fedknow.simulations.fleet.devices import shipped_memory_limits
from fedknow.simulations.records import write_numbers
from fedknow.simulations.simulate import prepare, simulate

__all__ = ["MAX_SEEDS", "Comparison", "RunSeries", "Watch", "compare"]

MAX_SEEDS = 10_000
"""Runs of each learner: far more than anybody runs, and fewer than a folder can hold."""

Watch = Callable[
    [ExperimentConfig, str, Path], AbstractContextManager[Subscriber]
]
"""Makes the observer of a run.

Its arguments are the run's configuration, a title such as ``"fedknow seed 0 (1/6)"``, and the
run folder. It may end the run by an exception that it takes back: the other runs go on.
"""

RunState = Literal["new", "unfinished", "complete"]


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes
    ----------
    groups : list of Group
        One a learner, of the runs that ended, in the order of the learners.
    failures : dict
        Folder name of each run that failed, and why.
    left_out : dict
        Learners that ``all`` does not include here, and why.
    report : Path or None
        The comparing page; ``None`` if no run ended.
    """

    groups: list[Group]
    failures: dict[str, str]
    left_out: dict[str, str]
    report: Path | None


@dataclass(frozen=True)
class RunSeries:
    """The runs of a comparison: every method with every seed.

    Attributes
    ----------
    methods : list of str
        Such as ``"fedknow@rho=0.2"``.
    left_out : dict
        Learners that ``all`` does not include here, and why.
    plans : dict
        Configuration of each run by its run folder, seed by seed. So a comparison that is
        interrupted has all methods at the first seeds.
    """

    methods: list[str]
    left_out: dict[str, str]
    plans: dict[Path, ExperimentConfig]

    @classmethod
    def plan(
        cls,
        config: ExperimentConfig,
        learners: Sequence[str],
        seeds: int,
        out: Path,
    ) -> RunSeries:
        """Plan the runs; for the arguments see :func:`compare`."""
        methods, left_out = contenders(config, learners)
        check_between("--seeds", seeds, 1, MAX_SEEDS)
        plans = {}
        # Seed by seed: an interrupted comparison has whole seeds, which can be compared.
        for seed in range(config.seed, config.seed + seeds):
            for method in methods:
                # A method may hold characters that a folder's name cannot.
                folder = f"{re.sub(r'[^A-Za-z0-9._-]', '-', method)}-seed{seed}"
                plans[out / folder] = plan(config, method, seed)
        return cls(methods, left_out, plans)

    def run(self, watch: Watch | None, is_lean: bool = False) -> dict[str, str]:
        """Carry out the runs that are not complete.

        Parameters
        ----------
        watch : callable, optional
            Makes the observer of each run.
        is_lean : bool
            For many runs: no pages and plots are made, and only the numbers of a run that ended
            are stored.

        Returns
        -------
        dict
            Folder name of each run that failed, and why.

        Raises
        ------
        ConfigError
            Before anything is run, if a part of any run does not fit.
        """
        states = {path: _state(path, run) for path, run in self.plans.items()}
        # All states are read first, so that a folder with other settings stops the command
        # before any run.
        missing = [path for path, state in states.items() if state != "complete"]
        _check([self.plans[path] for path in missing])
        failures: dict[str, str] = {}
        with self._ray() if missing else nullcontext():
            for number, (path, run) in enumerate(self.plans.items(), start=1):
                if path not in missing:
                    continue
                title = path.name.replace("-seed", " seed ")
                title += f" ({number}/{len(self.plans)})"
                # Else the samples of the run before count in this one's peak of memory.
                gc.collect()
                watched = (
                    watch(run, title, path) if watch else nullcontext(_ignore)
                )
                is_resumed = states[path] == "unfinished"
                failure: str | None = None
                with watched as observer:
                    failure = _run(path, run, observer, is_resumed, is_lean)
                if failure is not None:
                    failures[path.name] = failure
        return failures

    def folders(self, failures: Mapping[str, str]) -> list[RunFolder]:
        """Open the runs that ended, learner by learner."""
        paths = list(self.plans)
        by_learner: list[Path] = []
        # Plans go seed by seed, so the runs of one learner stand this far apart.
        stride = len(self.methods)
        for start in range(stride):
            by_learner += paths[start::stride]
        ended = [path for path in by_learner if path.name not in failures]
        return [RunFolder.open(path) for path in ended]

    def _ray(self) -> AbstractContextManager[None]:
        """Start one Ray for all runs, if they need it: that takes seconds."""
        # The runs differ in learner and seed alone, so any of them names the engine.
        engine = next(iter(self.plans.values())).engine
        if engine.backend != "ray":
            return nullcontext()
        return one_ray(engine.address, code=engine.code)


def compare(
    config: ExperimentConfig,
    learners: Sequence[str],
    seeds: int,
    out: Path,
    watch: Watch | None = None,
) -> Comparison:
    """Run every learner with every seed, and compare them.

    For one seed all learners see the same partition and start from the same weights. Seeds
    count from ``config.seed``. The configured learner's settings go with its name; another
    learner has its defaults. Runs of an earlier call in ``out`` are read, or resumed.

    Parameters
    ----------
    config : ExperimentConfig
        All but learner and seed.
    learners : sequence of str
        Names, without repetition. Settings may follow a name: ``fedknow@rho=0.2+k=5``. For
        ``all`` see :func:`~fedknow.simulations.contenders.contenders`.
    seeds : int
        Runs of each learner.
    out : Path
        Gets a run folder ``<learner>-seed<seed>`` for each run, ``compare.json`` (means,
        intervals and every run's numbers), ``compare.csv`` (one line a run), ``report.html``
        and ``plots/``.
    watch : callable, optional
        Makes the observer of each run.

    Returns
    -------
    Comparison
        A run that fails is named in ``failures`` and does not stop the others.

    Raises
    ------
    ConfigError
        Before anything is run, if a learner, a model, a setting or a folder does not fit.
    """
    series = RunSeries.plan(config, learners, seeds, out)
    failures = series.run(watch)
    folders = series.folders(failures)
    # A page without a run would have nothing to compare.
    if not folders:
        return Comparison([], failures, series.left_out, None)
    groups = write_numbers(folders, out, failures, series.left_out)
    page = write_report(folders, out, series.left_out, shipped_memory_limits())
    return Comparison(groups, failures, series.left_out, page)


def _run(
    path: Path,
    config: ExperimentConfig,
    observer: Subscriber,
    is_resumed: bool,
    is_lean: bool,
) -> str | None:
    """Carry out one run.

    Returns
    -------
    str or None
        Why it failed.
    """
    try:
        simulate(
            config,
            path,
            resume=is_resumed,
            observers=[observer],
            report=not is_lean,
        )
    # Errors of the configuration pass through: all parts were built once before the first run.
    except (RunError, StateError) as error:
        # The other runs go on; the folder has the whole traceback.
        return str(error)
    if is_lean:
        # A search makes hundreds of runs, of which only numbers are needed.
        RunFolder.open(path).forget_models()
    return None


def _ignore(event: Event) -> None:
    """Watch nothing."""


def _check(plans: Sequence[ExperimentConfig]) -> None:
    """Build every part of every run once.

    A fault of the last run must not cost the hours of the others.
    """
    # Seed by seed, so that one benchmark at a time is in memory.
    for seed in sorted({run.seed for run in plans}):
        runs = [run for run in plans if run.seed == seed]
        # Learners do not change the data, so one benchmark serves all of them.
        benchmark = make_benchmark(runs[0])
        for run in runs:
            prepare(run, benchmark)


def _state(path: Path, run: ExperimentConfig) -> RunState:
    """Read how far a run is.

    Raises
    ------
    ConfigError
        If it was run with other settings.
    """
    # A folder without it is one that a refused run has left.
    if not (path / "config.toml").is_file():
        return "new"
    folder = RunFolder.open(path)
    # A finished run may lack a setting of a later version, which had its default then.
    recorded = resolve(folder.config) if folder.complete else folder.config
    # Absolute paths: the command may come from another folder this time.
    changes = differences(recorded.absolute(), run.absolute())
    if changes:
        text = f"{path} was run with other settings; choose another --out or delete it:"
        raise ConfigError("\n  ".join([text, *changes]))
    return "complete" if folder.complete else "unfinished"
