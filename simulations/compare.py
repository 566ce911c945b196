"""Several learners, several seeds, one partition a seed: a table with intervals, and a report."""

from __future__ import annotations

import csv
import gc
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedknow.client.data import make_benchmark
from fedknow.client.learners import resolve
from fedknow.client.state import StateError, write_atomic
from fedknow.protocols.bounds import check_between
from fedknow.protocols.config import ConfigError, ExperimentConfig, differences
from fedknow.server.checks.faults import RunError
from fedknow.server.reports.groups import Group, group
from fedknow.server.reports.measures import MEASURES
from fedknow.server.reports.page import write_report
from fedknow.server.reports.summary import Summary, summarise
from fedknow.server.run.events import Event
from fedknow.server.run.folder import RunFolder, running_out_of_disk
from fedknow.server.run.recorder import Subscriber
from fedknow.simulations.contenders import contenders, plan
from fedknow.simulations.engine.cluster import one_ray
from fedknow.simulations.fleet.devices import shipped_rooms
from fedknow.simulations.simulate import prepare, simulate

__all__ = [
    "MOST_SEEDS",
    "Comparison",
    "Watch",
    "compare",
    "left_out_before",
    "reading_a_summary",
    "write_numbers",
]

MOST_SEEDS = 10_000
"""Runs of each learner: far above what anybody has run, and below what a folder holds."""

Watch = Callable[[ExperimentConfig, str], AbstractContextManager[Subscriber]]
"""Given a run's configuration and a title such as ``"fedknow seed 0 (1/6)"``: who watches that run."""


@dataclass(frozen=True)
class Comparison:
    """What came of a comparison.

    Attributes
    ----------
    groups : list of Group
        One a learner, of the runs that ended, in the order the learners were given.
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


def compare(
    config: ExperimentConfig,
    learners: Sequence[str],
    seeds: int,
    out: Path,
    watch: Watch | None = None,
    lean: bool = False,
) -> Comparison:
    """Run every learner with every seed; what an earlier call left in ``out`` is read, or resumed.

    For one seed all learners see the same partition and start from the same weights. Seeds
    count from ``config.seed``. The configured learner's settings go with its name; another
    learner has its defaults.

    Parameters
    ----------
    config : ExperimentConfig
        All but learner and seed.
    learners : sequence of str
        Names, without repetition; settings of its own may follow a name:
        ``fedknow@rho=0.2+k=5``; ``all`` and what else
        :func:`~fedknow.simulations.contenders.contenders` knows.
    seeds : int
        How many.
    out : Path
        Gets a run folder ``<learner>-seed<seed>`` for each run, ``compare.json`` (means,
        intervals and every run's numbers), ``compare.csv`` (one line a run), ``report.html``
        and ``plots/``.
    watch : callable, optional
        Gives each run its observer.
    lean : bool
        For many runs: no pages and plots are made, and of a run that ended only its numbers are
        kept.

    Returns
    -------
    Comparison
        A run that fails is named in ``failures`` and does not stop the others.

    Raises
    ------
    ConfigError
        Before anything is run, if a learner, a model, a setting or a folder does not fit.
    """
    methods, left_out = contenders(config, learners)
    plans = _plan(config, methods, seeds, out)
    states = {path: _state(path, run) for path, run in plans.items()}
    failures: dict[str, str] = {}
    todo = [path for path, state in states.items() if state != "complete"]
    _check([plans[path] for path in todo])
    with (
        one_ray(config.engine.address)
        if todo and config.engine.backend == "ray"
        else nullcontext()
    ):
        for number, (path, run) in enumerate(plans.items(), start=1):
            if path not in todo:
                continue
            title = f"{path.name.replace('-seed', ' seed ')} ({number}/{len(plans)})"
            gc.collect()  # else the run before, its samples included, counts in this one's peak of memory
            with watch(run, title) if watch else nullcontext(_ignore) as observer:
                try:
                    simulate(
                        run,
                        path,
                        resume=states[path] == "unfinished",
                        observers=[observer],
                        report=not lean,
                    )
                except (RunError, StateError) as error:
                    failures[path.name] = str(error)
                else:
                    if lean:
                        RunFolder.open(path).forget_models()
    folders = [RunFolder.open(path) for path in plans if path.name not in failures]
    if not folders:
        return Comparison([], failures, left_out, None)
    # Plans go seed by seed, tables learner by learner.
    by_learner = sorted(
        folders, key=lambda folder: list(plans).index(folder.path) % len(methods)
    )
    groups = write_numbers(by_learner, out, failures, left_out)
    page = None if lean else write_report(by_learner, out, left_out, shipped_rooms())
    return Comparison(groups, failures, left_out, page)


def write_numbers(
    runs: Sequence[RunFolder],
    out: Path,
    failures: Mapping[str, str] | None = None,
    left_out: Mapping[str, str] | None = None,
) -> list[Group]:
    """Write ``compare.json`` and ``compare.csv`` about runs, in the order given; the groups that
    they fall into."""
    summaries = {run.path.name: summarise(run) for run in runs}
    groups = group(summaries.values())
    with running_out_of_disk(out):
        write_atomic(
            out / "compare.json",
            _as_json(groups, summaries, failures or {}, left_out or {}),
        )
        write_atomic(out / "compare.csv", _as_csv(summaries))
    return groups


def left_out_before(out: Path) -> dict[str, str]:
    """Who was left out of the comparison whose ``compare.json`` lies in a folder, and why.

    Raises
    ------
    ConfigError
        If the file is damaged.
    """
    path = out / "compare.json"
    if not path.is_file():
        return {}
    with reading_a_summary(path):
        left_out = json.loads(path.read_text("utf-8")).get("left_out", {})
        return {str(name): str(reason) for name, reason in left_out.items()}


@contextmanager
def reading_a_summary(path: Path) -> Iterator[None]:
    """Refuse a damaged file that is made of run folders, and can be made again.

    Raises
    ------
    ConfigError
        If what is in it cannot be read.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}); delete it and give the "
            "command again, which makes it anew from the runs beside it"
        ) from error


def _ignore(event: Event) -> None:
    """Watch nothing."""


def _plan(
    config: ExperimentConfig, methods: Sequence[str], seeds: int, out: Path
) -> dict[Path, ExperimentConfig]:
    """Run folder and configuration of each run; seed by seed, so that what is there early can be
    compared early."""
    check_between("--seeds", seeds, 1, MOST_SEEDS)
    return {
        out / f"{re.sub(r'[^A-Za-z0-9._-]', '-', method)}-seed{seed}": plan(
            config, method, seed
        )
        for seed in range(config.seed, config.seed + seeds)
        for method in methods
    }


def _check(plans: Sequence[ExperimentConfig]) -> None:
    """Build every part of every run once: what the last of them is refused for must not cost the
    others' hours."""
    for seed in sorted({run.seed for run in plans}):
        same = [run for run in plans if run.seed == seed]
        benchmark = make_benchmark(same[0])  # learners do not change the data
        for run in same:
            prepare(run, benchmark)


def _state(
    path: Path, run: ExperimentConfig
) -> Literal["new", "unfinished", "complete"]:
    if not (path / "config.toml").is_file():
        return "new"
    folder = RunFolder.open(path)
    # A setting that is newer than a finished run had its default there.
    before = resolve(folder.config) if folder.complete else folder.config
    changed = differences(before.absolute(), run.absolute())
    if changed:
        text = f"{path} was run with other settings; choose another --out or delete it:"
        raise ConfigError("\n  ".join([text, *changed]))
    return "complete" if folder.complete else "unfinished"


def _as_json(
    groups: Sequence[Group],
    runs: Mapping[str, Summary],
    failures: Mapping[str, str],
    left_out: Mapping[str, str],
) -> bytes:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    tree = {
        "name": groups[0].runs[0].config.name,
        "units": "fractions, bytes, seconds, MB; half_interval_95: half the width of Student's 95 % interval",
        "learners": {
            members.label: {
                measure.key: {
                    "mean": number(members.estimate(measure.key).mean),
                    "half_interval_95": number(members.estimate(measure.key).half),
                    "seeds": members.estimate(measure.key).count,
                }
                for measure in MEASURES
            }
            for members in groups
        },
        "runs": {
            name: {
                "learner": run.config.learner.name,
                "seed": run.config.seed,
                "partition": run.start.get("partition"),
                **{key: number(value) for key, value in run.measures().items()},
                "accuracy_after_each_task": [
                    number(value) for value in run.personal.average.tolist()
                ],
            }
            for name, run in runs.items()
        },
        "failures": dict(failures),
        "left_out": dict(left_out),
    }
    return json.dumps(tree, indent=1, allow_nan=False).encode() + b"\n"


def _as_csv(runs: Mapping[str, Summary]) -> bytes:
    """One line a run; fractions, bytes, seconds and MB as plain numbers, empty where there is none."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["run", "learner", "seed", *(measure.key for measure in MEASURES)])
    for name, run in runs.items():
        values = run.measures()
        numbers = [
            "" if math.isnan(values[measure.key]) else repr(values[measure.key])
            for measure in MEASURES
        ]
        table.writerow([name, run.config.learner.name, run.config.seed, *numbers])
    return text.getvalue().encode()
