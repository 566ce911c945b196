"""Run one of the paper's experiments and write its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedknow.client.learners import resolve
from fedknow.protocols.bounds import check_between
from fedknow.server.reports.blocks import Section, Table
from fedknow.server.reports.fleet import fleet_parts
from fedknow.server.reports.groups import Group
from fedknow.server.reports.page import write_page
from fedknow.server.reports.summary import summarise
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.compare import MOST_SEEDS, Comparison, Watch, compare
from fedknow.simulations.contenders import plan
from fedknow.simulations.fleet.devices import shipped_rooms
from fedknow.simulations.paper.page import preface, results
from fedknow.simulations.paper.protocol import Variant, entry, paper_table, variants
from fedknow.simulations.paper.published import Result, published_values

__all__ = ["Outcome", "run_paper"]


@dataclass(frozen=True)
class Outcome:
    """What came of an experiment.

    Attributes
    ----------
    page : Path or None
        Its page; ``None`` if no run ended.
    failures : mapping
        Why runs failed, by variant and run.
    """

    page: Path | None
    failures: Mapping[str, str]


def run_paper(
    experiment: str,
    out: Path,
    data: str = "",
    scale: float = 1.0,
    learners: Sequence[str] = (),
    seeds: int = 1,
    changes: Sequence[str] = (),
    watch: Watch | None = None,
) -> Outcome:
    """Run an experiment and write ``paper.html`` and ``plots/`` to ``out``.

    Parameters
    ----------
    experiment : str
        Such as ``"5.1"``.
    out : Path
        A folder, which gets a comparison a variant too.
    data, scale, changes
        As of :func:`~fedknow.simulations.paper.variants`.
    learners : sequence of str
        Methods as :func:`~fedknow.simulations.compare.compare` knows them; empty: the
        experiment's.
    seeds : int
        How many.
    watch : callable, optional
        Gives each run its observer.

    Raises
    ------
    ConfigError
        Before anything is run.
    """
    check_between("--seeds", seeds, 1, MOST_SEEDS)
    spec = entry(paper_table()["experiments"], experiment, "experiment")
    methods = list(learners) or list(spec["learners"])
    chosen = variants(experiment, data, scale, changes)
    for variant in chosen:
        for method in methods:
            plan(variant.config, method, variant.config.seed)
    sections = [preface(experiment, chosen)]
    failures: dict[str, str] = {}
    ended: list[Group] = []
    for variant in chosen:
        result = compare(variant.config, methods, seeds, out / variant.name, watch)
        failures |= {
            f"{variant.name}/{run}": reason for run, reason in result.failures.items()
        }
        groups = _by_method(variant, methods, result.groups)
        ended += groups.values()
        sections += _sections(experiment, variant, groups, result, out / variant.name)
    if not ended:
        return Outcome(None, failures)
    if failures:
        rows = [[name, reason] for name, reason in failures.items()]
        table = Table("Runs that failed", ["Run", "Why"], rows, prose=(1,))
        sections.append(Section("Failed", [table]))
    title = f"FedKNOW paper, {experiment}: {spec['title']}"
    runs = [run for group in ended for run in group.runs]
    return Outcome(write_page(out / "paper.html", title, sections, runs), failures)


def _sections(
    experiment: str,
    variant: Variant,
    groups: Mapping[str, Group],
    comparison: Comparison,
    folder: Path,
) -> list[Section]:
    """Show what a variant came to, the runs that did not end included."""
    begun = [
        folder / run
        for run in comparison.failures
        if (folder / run / "config.toml").is_file()
    ]
    failed = [(path.name, summarise(RunFolder.open(path))) for path in begun]
    sections = []
    if groups:
        published = published_values(experiment, variant.name)
        sections += results(Result(experiment, variant, groups, published))
    title = f"{variant.name}: "
    return sections + fleet_parts(list(groups.values()), shipped_rooms(), failed, title)


def _by_method(
    variant: Variant, methods: Sequence[str], groups: Sequence[Group]
) -> dict[str, Group]:
    """Give the groups by the names they were asked for; a method whose runs all failed has none."""
    planned = {
        method: plan(variant.config, method, variant.config.seed).learner
        for method in methods
    }
    return {
        method: Group(method, group.runs)
        for method, learner in planned.items()
        for group in groups
        if resolve(group.runs[0].config).learner == learner
    }
