"""Reports: one HTML file that needs no network, and plots as PNG files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedknow.protocols.files import write_atomic
from fedknow.protocols.hostile import hostile_clients
from fedknow.protocols.texts import counted
from fedknow.server.reports.blocks import (
    Block,
    Cards,
    Facts,
    Figures,
    Folded,
    Section,
    Text,
)
from fedknow.server.reports.contrasts import contrast_table
from fedknow.server.reports.fleet import fleet_of_run, fleet_parts
from fedknow.server.reports.groups import Group, group, interval_note, ranked
from fedknow.server.reports.measures import available_measures
from fedknow.server.reports.summary import Summary, summarise
from fedknow.server.reports.tables import (
    comparison_tables,
    people_table,
    property_table,
    runs_table,
    task_table,
    traffic_table,
    troubles,
)
from fedknow.server.run.disk import running_out_of_disk
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.integrity import FolderDamaged

if TYPE_CHECKING:
    from fedknow.protocols.config import ExperimentConfig
    from fedknow.server.reports.plots import Plot

__all__ = ["write_page", "write_report", "write_split"]

MOST_NAMED = 4
"""Methods that a title names; of more it gives the number."""
AT_THE_FOOT = ("event", "time", "versions")
"""Fields of a start that need no line of their own: the versions stand at the foot."""


def write_report(
    runs: Sequence[RunFolder],
    out: Path,
    left_out: Mapping[str, str] | None = None,
    memory_limits: Mapping[str, float] | None = None,
) -> Path:
    """Write ``<out>/report.html`` and ``<out>/plots/*.png``.

    The runs need not be complete.

    Parameters
    ----------
    runs : sequence of RunFolder
        One: a report of that run. Several: methods side by side; runs that differ in nothing but
        the seed stand together.
    out : Path
        A folder; made if need be.
    left_out : mapping, optional
        Methods that a comparison does not include, and why.
    memory_limits : mapping, optional
        Bytes that training may take, by device. A comparison says which of these devices a method
        has room on; none: those of the runs' own fleets.

    Returns
    -------
    Path
        The HTML file. Plots, tables and styles are in it, and it refers to nothing outside.

    Raises
    ------
    RunError
        If the disk is full; a report that was there before is left whole.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    summaries = [summarise(run) for run in runs]
    # A comparison of one has nothing to compare.
    if len(summaries) == 1:
        title, sections = _run_page(summaries[0], _split_of(runs[0]))
    else:
        title, sections = _comparison_page(
            group(summaries), left_out or {}, memory_limits
        )
    return write_page(out / "report.html", title, sections, summaries)


def write_split(
    path: Path, config: ExperimentConfig, partition: Mapping[str, Any]
) -> Path:
    """Write a page that shows a split, and its plot as ``plots/split.png``.

    Parameters
    ----------
    path : Path
        The HTML file.
    config : ExperimentConfig
        What the split was made with.
    partition : mapping
        What ``Partition.summary`` gave.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    RunError
        If the disk is full; a page that was there before is left whole.
    """
    # Here, as a run is not to wait for matplotlib to be imported.
    from fedknow.server.reports.splits import split_blocks

    data = config.data
    facts = [
        counted(partition.get("total", len(partition["clients"])), "client"),
        f"data {data.name}, {data.scenario}",
        f"split file {data.split}"
        if data.split
        else f"partition {data.partition}",
        f"seed {config.seed}",
        f"digest {partition['digest']}",
    ]
    sections = [
        Section("", [Facts(facts), *split_blocks(partition)]),
        Section("Configuration", [Folded("config.toml", config.to_toml())]),
    ]
    return write_page(path, f"{config.name}: who holds what", sections, [])


def write_page(
    path: Path, title: str, sections: Sequence[Section], runs: Iterable[Summary]
) -> Path:
    """Write an HTML file of sections, and their plots as ``plots/*.png``.

    Parameters
    ----------
    path : Path
        The file.
    title : str
        Its heading.
    sections : sequence of Section
        What stands on it.
    runs : iterable of Summary
        The runs behind the numbers.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    RunError
        If the disk is full; a page that was there before is left whole.
    """
    # Here, as a run is not to wait for Jinja to be imported.
    from fedknow.server.reports.render import render

    page = render(title, sections, _footer(runs))
    with running_out_of_disk(path.parent):
        (path.parent / "plots").mkdir(parents=True, exist_ok=True)
        for plot in _plots(sections):
            # Before the page, which is then never newer than its plots.
            write_atomic(path.parent / "plots" / f"{plot.name}.png", plot.png())
        write_atomic(path, page.encode())
    return path


def _plots(sections: Iterable[Section]) -> list[Plot]:
    plots: list[Plot] = []
    for block in chain.from_iterable(section.blocks for section in sections):
        if isinstance(block, Figures):
            plots += block.plots
    return plots


def _footer(runs: Iterable[Summary]) -> str:
    """Say when the page was written, and what its runs were made with.

    That need not be what is installed where the page is written.
    """
    # Runs of earlier versions do not say what they were made with.
    versions = {_versions(run) for run in runs} - {""}
    written = f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if not versions:
        return f"{written}."
    return f"{written}; run with {'; or with '.join(sorted(versions))}."


def _versions(run: Summary) -> str:
    pairs = run.start.get("versions", {}).items()
    return ", ".join(f"{name} {number}" for name, number in pairs)


def _split_of(run: RunFolder) -> list[Block]:
    """Show who holds what; nothing where a run has not got that far."""
    from fedknow.server.reports.splits import split_blocks

    try:
        partition = run.partition
    except FolderDamaged as error:
        # No number of the report is from this file, so that the others can be shown.
        return [Text(str(error))]
    return split_blocks(partition) if partition else []


def _special_facts(run: Summary) -> list[str]:
    """Say who attacks, and what noise promises, where there is any."""
    config = run.config
    facts = []
    if config.attack:
        hostile = counted(len(hostile_clients(config)), "client")
        facts.append(f"attack {config.attack.name} by {hostile}")
    if run.rounds and "epsilon" in run.rounds[-1]:
        epsilon = run.rounds[-1]["epsilon"]
        facts.append(
            f"epsilon {epsilon:.3g} for delta {_delta(config):g}, each client"
        )
    return facts


def _delta(config: ExperimentConfig) -> float:
    """Give the delta that a run's epsilon is for."""
    # Noise of the server's has its own.
    if config.strategy.name == "dp-gaussian":
        return float(config.strategy.options.get("delta", 1e-5))
    return config.privacy.delta


def _run_page(run: Summary, split: Sequence[Block]) -> tuple[str, list[Section]]:
    # Here, as a run is not to wait for matplotlib to be imported.
    from fedknow.server.reports.plots import draw_plots
    from fedknow.server.reports.run_plots import RUN_PLOTS

    config = run.config
    facts = [
        counted(config.data.clients, "client"),
        f"{run.tasks} of {counted(config.data.tasks, 'task')}",
        counted(len(run.rounds), "round"),
        f"data {config.data.name}, {config.data.scenario}",
        f"model {config.model.name}",
        f"strategy {config.strategy.name}",
        f"seed {config.seed}",
    ]
    facts += _special_facts(run)
    values = run.measures()
    cards = [
        (measure.text(values[measure.key]), measure.title)
        for measure in available_measures([values])
    ]
    start = {
        key: value
        for key, value in run.start.items()
        if key not in AT_THE_FOOT and value is not None
    }
    overview: list[Block] = [
        Facts(facts, run.status),
        Cards(cards),
        Figures(draw_plots(RUN_PLOTS, run)),
    ]
    travels = property_table("Facts of the start", ("Property", "Value"), start)
    sections: list[tuple[str, Sequence[Block]]] = [
        ("", overview),
        ("Task by task", [task_table(run)] if run.tasks else []),
        ("People held out", [people_table(run)] if run.people.names else []),
        ("Who holds what", split),
        ("Fleet", fleet_of_run(run) if run.fleet else []),
        ("Messages", [traffic_table(run.traffic)] if run.traffic else []),
        ("Failures and warnings", [troubles(run) or Text("None.")]),
        ("What travels, and how much", [travels] if start else []),
        (
            "Configuration",
            [Folded("config.toml", config.to_toml(), is_open=True)],
        ),
    ]
    return f"{config.name}: {config.learner.name}", _filled(sections)


def _filled(sections: Iterable[tuple[str, Sequence[Block]]]) -> list[Section]:
    return [Section(heading, blocks) for heading, blocks in sections if blocks]


def _comparison_page(
    methods: Sequence[Group],
    left_out: Mapping[str, str],
    memory_limits: Mapping[str, float] | None,
) -> tuple[str, list[Section]]:
    from fedknow.server.reports.comparison_plots import COMPARISON_PLOTS
    from fedknow.server.reports.plots import draw_plots

    groups = ranked(methods)
    # The one named in front is what others are compared with.
    differences = contrast_table(groups, methods[0].label)
    reasons = property_table("Methods left out", ("Method", "Why"), left_out)
    runs = list(chain.from_iterable(members.runs for members in groups))
    configurations = [
        Folded(members.label, members.runs[0].config.to_toml())
        for members in groups
    ]
    sections = [
        Section("", [_comparison_facts(groups, runs)]),
        Section("Side by side", comparison_tables(groups)),
        *([Section("Differences", [differences])] if differences else []),
        Section("", [Figures(draw_plots(COMPARISON_PLOTS, groups))]),
        *fleet_parts(groups, memory_limits),
        *([Section("Left out", [reasons])] if left_out else []),
        Section("Run by run", runs_table(groups)),
        Section("Failures and warnings", _all_troubles(runs)),
        Section("Configuration", configurations),
    ]
    labels = [members.label for members in groups]
    # A browser's tab has no room for a dozen names.
    is_short = len(labels) <= MOST_NAMED
    names = ", ".join(labels) if is_short else f"{len(labels)} methods"
    return f"{runs[0].config.name}: {names}", sections


def _comparison_facts(groups: Sequence[Group], runs: Sequence[Summary]) -> Facts:
    config = runs[0].config
    facts = [
        counted(config.data.clients, "client"),
        counted(config.data.tasks, "task"),
        f"data {config.data.name}, {config.data.scenario}",
        f"model {config.model.name}",
        interval_note(groups),
    ]
    if any(run.status != "complete" for run in runs):
        # A reader would otherwise take them for complete.
        facts.append("unfinished runs count with what they have")
    return Facts(facts)


def _all_troubles(runs: Iterable[Summary]) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        title = f"{run.config.learner.name}, seed {run.config.seed}"
        # Runs without trouble have no list at all.
        bullets = troubles(run, title)
        if bullets:
            blocks.append(bullets)
    return blocks or [Text("None.")]
