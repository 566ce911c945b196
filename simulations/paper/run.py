"""Run one of the paper's experiments and write its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedknow.client.learners import resolve
from fedknow.protocols.bounds import check_between
from fedknow.protocols.config import ExperimentConfig
from fedknow.server.reports.blocks import Section, Table
from fedknow.server.reports.fleet import fleet_parts
from fedknow.server.reports.groups import Group
from fedknow.server.reports.page import write_page
from fedknow.server.reports.summary import Summary, summarise
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.compare import MAX_SEEDS, Comparison, Watch, compare
from fedknow.simulations.contenders import plan
from fedknow.simulations.fleet.devices import shipped_memory_limits
from fedknow.simulations.paper.page import preface, results
from fedknow.simulations.paper.protocol import (
    Variant,
    entry,
    paper_table,
    variants,
)
from fedknow.simulations.paper.published import Result, published_values

__all__ = ["Outcome", "PaperRequest", "run_paper"]


@dataclass(frozen=True)
class PaperRequest:
    """The part of the paper's experiments that is to be run.

    Attributes
    ----------
    experiment : str
        Such as ``"5.1"``.
    data, scale, changes
        See :func:`~fedknow.simulations.paper.variants`.
    learners : sequence of str
        Methods as for :func:`~fedknow.simulations.compare.compare`; empty: the experiment's.
    seeds : int
        Runs of each method.
    """

    experiment: str
    data: str = ""
    scale: float = 1.0
    changes: Sequence[str] = ()
    learners: Sequence[str] = ()
    seeds: int = 1

    def variants(self) -> list[Variant]:
        """List the comparisons of the experiment."""
        return variants(self.experiment, self.data, self.scale, self.changes)

    def methods(self) -> list[str]:
        """List the methods to run.

        Raises
        ------
        ConfigError
            If there is no such experiment.
        """
        spec = entry(paper_table()["experiments"], self.experiment, "experiment")
        # The user's choice comes before the paper's.
        return list(self.learners) or list(spec["learners"])


@dataclass(frozen=True)
class Outcome:
    """The result of an experiment.

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
    request: PaperRequest, out: Path, watch: Watch | None = None
) -> Outcome:
    """Run an experiment and write ``paper.html`` and ``plots/`` to ``out``.

    Parameters
    ----------
    request : PaperRequest
        The experiment, its methods and its size.
    out : Path
        A folder, which gets a comparison a variant too.
    watch : callable, optional
        Makes the observer of each run.

    Raises
    ------
    ConfigError
        Before anything is run.
    """
    check_between("--seeds", request.seeds, 1, MAX_SEEDS)
    methods = request.methods()
    chosen = request.variants()
    # A setting that does not fit the last variant must not cost the hours of the others.
    for variant in chosen:
        _plans(variant, methods)
    sections = [preface(request.experiment, chosen)]
    failures: dict[str, str] = {}
    ended: list[Group] = []
    for variant in chosen:
        folder = out / variant.name
        comparison = compare(
            variant.config, methods, request.seeds, folder, watch
        )
        for run, reason in comparison.failures.items():
            # Variants have runs of the same names.
            failures[f"{variant.name}/{run}"] = reason
        # Two methods may be one learner with other settings.
        groups = _by_method(variant, methods, comparison.groups)
        ended += groups.values()
        sections += _sections(
            request.experiment, variant, groups, comparison, folder
        )
    # Nothing ran to its end, and a page would be empty.
    if not ended:
        return Outcome(None, failures)
    if failures:
        sections.append(_failed_section(failures))
    spec = paper_table()["experiments"][request.experiment]
    title = f"FedKNOW paper, {request.experiment}: {spec['title']}"
    runs: list[Summary] = []
    for group in ended:
        runs += group.runs
    return Outcome(
        write_page(out / "paper.html", title, sections, runs), failures
    )


def _sections(
    experiment: str,
    variant: Variant,
    groups: Mapping[str, Group],
    comparison: Comparison,
    folder: Path,
) -> list[Section]:
    """Show the results of a variant, the runs that did not end included."""
    failed = []
    for run in comparison.failures:
        path = folder / run
        # A run that was refused before its start has no folder.
        if (path / "config.toml").is_file():
            failed.append((path.name, summarise(RunFolder.open(path))))
    sections = []
    if groups:
        published = published_values(experiment, variant.name)
        sections += results(Result(experiment, variant, groups, published))
    title = f"{variant.name}: "
    return sections + fleet_parts(
        list(groups.values()), shipped_memory_limits(), failed, title
    )


def _failed_section(failures: Mapping[str, str]) -> Section:
    rows = [[name, reason] for name, reason in failures.items()]
    table = Table("Runs that failed", ["Run", "Why"], rows, prose=(1,))
    return Section("Failed", [table])


def _plans(
    variant: Variant, methods: Sequence[str]
) -> dict[str, ExperimentConfig]:
    """Return the configuration of each method's first run."""
    seed = variant.config.seed
    return {method: plan(variant.config, method, seed) for method in methods}


def _by_method(
    variant: Variant, methods: Sequence[str], groups: Sequence[Group]
) -> dict[str, Group]:
    """Return the groups by the names that the methods were asked for by.

    A method whose runs all failed has none.
    """
    named: dict[str, Group] = {}
    for method, planned in _plans(variant, methods).items():
        for group in groups:
            # Runs do not record that name, so their settings tell the method.
            if resolve(group.runs[0].config).learner == planned.learner:
                named[method] = Group(method, group.runs)
    return named
