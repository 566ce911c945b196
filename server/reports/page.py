"""Reports: one HTML file that needs no network, and its plots as PNG beside it, for one run or for a comparison."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedknow.client.state import write_atomic
from fedknow.server.reports.groups import Group, group, ranked
from fedknow.server.reports.measures import MEASURES, duration, known, size
from fedknow.server.reports.summary import Summary, summarise
from fedknow.server.reports.tables import SPEEDS, Rows, fleet_parts
from fedknow.server.run_folder import RunFolder, running_out_of_disk

if TYPE_CHECKING:
    from fedknow.server.reports.plots import Plot

__all__ = ["Rows", "write_page", "write_report"]


def write_report(
    runs: Sequence[RunFolder],
    out: Path,
    left_out: Mapping[str, str] | None = None,
    rooms: Mapping[str, float] | None = None,
) -> Path:
    """Write ``<out>/report.html`` and ``<out>/plots/*.png`` about what is there, be the runs complete or not.

    Parameters
    ----------
    runs : sequence of RunFolder
        One: a report of that run. Several: methods side by side, runs that differ in nothing but the seed together.
    out : Path
        A folder; made if need be.
    left_out : mapping, optional
        Methods that a comparison does not include, and why.
    rooms : mapping, optional
        Bytes that training may take, by device: a comparison says which of them a method has room on; none: those of
        the runs' own fleets.

    Returns
    -------
    Path
        The HTML file: plots, tables, styles and all in one, with no reference to anything outside.

    Raises
    ------
    RunError
        If the disk is full; a report that was there before is left whole.
    """
    from fedknow.server.reports.plots import comparison_plots, run_plots  # matplotlib, which a run is not to wait for

    if not runs:
        raise ValueError("a report needs at least one run")
    summaries = [summarise(run) for run in runs]
    if len(summaries) == 1:
        plots = run_plots(summaries[0])
        page = _run_page(summaries[0], plots)
    else:
        groups = ranked(group(summaries))
        plots = comparison_plots(groups)
        page = _comparison_page(groups, plots, left_out or {}, rooms)
    with running_out_of_disk(out):
        (out / "plots").mkdir(parents=True, exist_ok=True)
        for plot in plots:
            write_atomic(out / "plots" / f"{plot.name}.png", plot.png())
        write_atomic(out / "report.html", page.encode())
    return out / "report.html"


def write_page(
    path: Path, title: str, parts: Sequence[tuple[str, Sequence[Plot] | Rows]], runs: Iterable[Summary]
) -> Path:
    """Write an HTML file of tables and plots, which go beside it as ``plots/*.png`` too.

    Parameters
    ----------
    path : Path
        The file.
    title : str
        Its heading.
    parts : sequence of (str, plots or table)
        Headings and what stands below each.
    runs : iterable of Summary
        What the numbers are from.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    RunError
        If the disk is full; a page that was there before is left whole.
    """

    def body(part: Sequence[Plot] | Rows) -> str:
        return _rows(part) if isinstance(part, Rows) else _figures(part)

    page = _page(title, [_section(heading, body(part)) if heading else body(part) for heading, part in parts], runs)
    with running_out_of_disk(path.parent):
        (path.parent / "plots").mkdir(parents=True, exist_ok=True)
        for _, part in parts:
            for plot in [] if isinstance(part, Rows) else part:
                write_atomic(path.parent / "plots" / f"{plot.name}.png", plot.png())
        write_atomic(path, page.encode())
    return path


def _run_page(run: Summary, plots: Sequence[Plot]) -> str:
    config = run.config
    where = f"{run.tasks} of {config.data.tasks} tasks"
    facts = [
        f"{config.data.clients} clients",
        where,
        f"{len(run.rounds)} rounds",
        f"data {config.data.name}, {config.data.scenario}",
        f"model {config.model.name}",
        f"strategy {config.strategy.name}",
        f"seed {config.seed}",
    ]
    values = run.measures()
    cards = [(measure.title, measure.text(values[measure.key])) for measure in known([values])]
    return _page(
        f"{config.name}: {config.learner.name}",
        [
            f'<p class="facts"><span class="status {run.status}">{run.status}</span> {escape(" · ".join(facts))}</p>',
            '<div class="cards">'
            + "".join(f"<div><b>{value}</b><span>{escape(title)}</span></div>" for title, value in cards)
            + "</div>",
            _figures(plots),
            _section("Task by task", _task_table(run)) if run.tasks else "",
            _section("Fleet", _fleet(run)) if run.fleet else "",
            _section("Messages", _traffic_table(run.traffic)) if run.traffic else "",
            _section("Failures and warnings", _troubles(run)),
            _section("What travels, and how much", _definitions(run.start)) if run.start else "",
            _section(
                "Configuration",
                f"<details open><summary>config.toml</summary><pre>{escape(config.to_toml())}</pre></details>",
            ),
        ],
        [run],
    )


def _comparison_page(
    groups: Sequence[Group], plots: Sequence[Plot], left_out: Mapping[str, str], rooms: Mapping[str, float] | None
) -> str:
    first = groups[0].runs[0].config
    several = min(len(members.runs) for members in groups) > 1
    facts = [
        f"{first.data.clients} clients",
        f"{first.data.tasks} tasks",
        f"data {first.data.name}, {first.data.scenario}",
        f"model {first.model.name}",
        "mean ± 95 % interval over seeds (Student's t)" if several else "one seed a method: no interval can be given",
    ]
    if any(run.status != "complete" for members in groups for run in members.runs):
        facts.append("unfinished runs count with what they have")
    return _page(
        f"{first.name}: {', '.join(members.label for members in groups)}",
        [
            f'<p class="facts">{escape(" · ".join(facts))}</p>',
            _section("Side by side", _comparison_table(groups)),
            _figures(plots),
            *(_section(heading, _rows(rows)) for heading, rows in fleet_parts(groups, rooms)),
            _section("Left out", _table(["", ""], [list(pair) for pair in left_out.items()])) if left_out else "",
            _section("Run by run", _runs_table(groups)),
            _section(
                "Failures and warnings",
                "".join(_troubles(run, True) for g in groups for run in g.runs) or "<p>None.</p>",
            ),
            _section(
                "Configuration",
                "".join(
                    f"<details><summary>{escape(members.label)}</summary>"
                    f"<pre>{escape(members.runs[0].config.to_toml())}</pre></details>"
                    for members in groups
                ),
            ),
        ],
        [run for members in groups for run in members.runs],
    )


def _task_table(run: Summary) -> str:
    names = ["when learned", "now", "forgotten"]
    head = ["Task", *names, *(f"global model: {name}" for name in names if run.global_model)]
    rows = []
    for task in range(run.tasks):
        row = [str(task + 1)]
        for scoring in (run.personal, run.global_model):
            if scoring is not None:
                learned, now = scoring.learned[task], scoring.now[task]
                row += [_percent(learned), _percent(now), _percent(learned - now) if task < run.tasks - 1 else "–"]
        rows.append(row)
    return _table(head, rows)


def _traffic_table(traffic: Mapping[str, Mapping[str, int]]) -> str:
    rows = [
        [kind, f"{count['messages']:,}", size(count["down"]), size(count["up"])]
        for kind, count in sorted(traffic.items())
    ]
    return _table(["Kind", "Messages", "Down", "Up"], rows)


SLOWEST = 10
"""Clients that the report of a fleet names."""


def _fleet(run: Summary) -> str:
    """Device by device, and who was slow or failed."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for client in run.fleet["clients"]:
        kinds.setdefault(client["device"], []).append(client)
    total = run.fleet["virtual_seconds"]
    counts = ("asked", "answered", "late", "lost", "out_of_memory")

    def row(name: str, clients: Sequence[Mapping[str, Any]]) -> list[str]:
        times = [
            sum(client[key] for client in clients) / len(clients) for key in ("computing", "transfer", "idle", "away")
        ]
        shares = [_percent(value / total if total else 0.0) for value in times]
        needed, joules = max(client["memory"] for client in clients), [client["joules"] for client in clients]
        numbers = [f"{sum(client[key] for client in clients):,}" for key in counts]
        return [name, *shares, size(needed), *numbers, "unknown" if None in joules else f"{sum(joules) / 1e3:,.1f} kJ"]

    head = [
        "computing",
        "messages",
        "idle",
        "away",
        "memory needed",
        *(key.replace("_", " ") for key in counts),
        "energy",
    ]
    slow = sorted(run.fleet["clients"], key=lambda client: -(client["computing"] + client["transfer"]))[:SLOWEST]
    computing, messages, waiting = (
        duration(run.fleet[f"{key}_seconds"]) for key in ("computing", "communication", "waiting")
    )
    return (
        f"<p>{escape(duration(total))} of virtual time until the last task ended, in which the server waited "
        f"{escape(computing)} for clients that computed, {escape(messages)} for messages under way and "
        f"{escape(waiting)} for clients that were away, a deadline or the next task. Computing, messages and idle are "
        "what devices did while they were there, in shares of all the time; away, they draw no energy that is counted, "
        f"and work that was given up counts as far as it had come. {SPEEDS}</p>"
        + _table(["Device", *head], [row(f"{name} ({len(clients)})", clients) for name, clients in kinds.items()])
        + "<h3>The slowest clients</h3>"
        + _table(["Client", *head], [row(f"{client['client']}: {client['device']}", [client]) for client in slow])
    )


def _comparison_table(groups: Sequence[Group]) -> str:
    shown = known(run.measures() for members in groups for run in members.runs)
    rows = [
        [members.label, str(len(members.runs)), *(members.estimate(m.key).text(m) for m in shown)] for members in groups
    ]
    return _table(["", "Seeds", *(measure.title for measure in shown)], rows)


def _runs_table(groups: Sequence[Group]) -> str:
    shown = known(run.measures() for members in groups for run in members.runs)
    head = ["Method", "Seed", "State", "Tasks", *(measure.title for measure in shown)]
    rows = []
    for members in groups:
        for run in members.runs:
            values = run.measures()
            tasks = f"{run.tasks}/{run.config.data.tasks}"
            numbers = [measure.text(values[measure.key]) for measure in shown]
            rows.append([members.label, str(run.config.seed), run.status, tasks, *numbers])
    return _table(head, rows)


def _troubles(run: Summary, name: bool = False) -> str:
    if not run.troubles:
        return "" if name else "<p>None.</p>"
    kinds: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for event in run.troubles:  # what differs in numbers alone is the same trouble again
        what = NUMBERS.sub("#", event["reason"])
        kinds.setdefault((event["event"], event.get("client"), event.get("fault"), what), []).append(event)
    items = [_trouble(events) for events in list(kinds.values())[:TROUBLES]]
    if left := sum(map(len, list(kinds.values())[TROUBLES:])):
        items.append(f"<li>{left:,} more; metrics.jsonl has all</li>")
    title = f"<h3>{escape(run.config.learner.name)}, seed {run.config.seed}</h3>" if name else ""
    return f"{title}<ul>{''.join(items)}</ul>"


TROUBLES = 200
"""Lines on a page about what failed in one run."""
NUMBERS = re.compile(r"\d[\d.,\s]*")


def _trouble(events: Sequence[Mapping[str, Any]]) -> str:
    """A line about one kind of failure or warning: who, what, how often, and when."""
    first, last = events[0], events[-1]
    said = [first["fault"]] if "fault" in first else []
    if len(events) > 1:
        said.append(f"{len(events):,} times")
    places = [f"task {event['task'] + 1}, round {event['round']}" for event in (first, last) if "task" in event]
    said += [" to ".join(dict.fromkeys(places)), last["reason"]]
    return f"<li><b>{escape(first['event'])}</b> {escape('; '.join(filter(None, said)))}</li>"


def _definitions(start: Mapping[str, Any]) -> str:
    left_out = ("event", "time", "versions")  # the versions stand at the foot of the page
    rows = [[key, str(value)] for key, value in start.items() if key not in left_out and value is not None]
    return _table(["", ""], rows)


def _figures(plots: Iterable[Plot]) -> str:
    return (
        '<div class="plots">'
        + "".join(
            f"<figure><figcaption><b>{escape(plot.title)}</b><br>{escape(plot.caption)}</figcaption>{plot.svg()}</figure>"
            for plot in plots
        )
        + "</div>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _rows(rows: Rows) -> str:
    return f'<p class="facts">{escape(rows.about)}</p>' * bool(rows.about) + _table(rows.head, rows.rows)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _page(title: str, parts: Iterable[str], runs: Iterable[Summary]) -> str:
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    # What each run was made with, which need not be what is installed where its report is written.
    made_with = {", ".join(f"{name} {v}" for name, v in run.start.get("versions", {}).items()) for run in runs} - {""}
    with_ = f"; run with {escape('; or with '.join(sorted(made_with)))}" if made_with else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<footer>Written {made}{with_}.</footer>\n"
        + "</main>\n</body>\n</html>\n"
    )


def _percent(value: float) -> str:
    return MEASURES[0].text(value)


CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2127; --soft: #5b6570; --line: #d9dee3; --card: #f5f7f9;
  --good: #00664b; --warn: #a34700 }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e4e8ec; --soft: #9aa5b1; --line: #333a42;
  --card: #1c2126; --good: #4cc9a0; --warn: #f0994d } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px }
h1 { font-size: 26px; margin: 0 0 4px }
h2 { font-size: 18px; margin: 36px 0 10px } h3 { font-size: 15px; margin: 14px 0 4px }
.facts, figcaption, footer, .cards span { color: var(--soft) }
.facts { margin: 0 0 20px }
.status { border: 1px solid currentColor; border-radius: 4px; padding: 0 6px; color: var(--warn) }
.status.complete { color: var(--good) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 10px }
.cards div { background: var(--card); border-radius: 8px; padding: 12px 14px }
.cards b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums }
.cards span { font-size: 13px }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 18px;
  margin-top: 24px }
figure { margin: 0; padding: 14px 16px; background: var(--card); border-radius: 8px }
figcaption { font-size: 13px; min-height: 60px } figcaption b { color: var(--ink); font-size: 15px }
figure svg { display: block; width: 100%; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page) }
th { white-space: normal; min-width: 86px }
th { font-weight: 600; font-size: 13px; color: var(--soft); vertical-align: bottom }
tbody tr:hover { background: var(--card) }
pre { background: var(--card); border-radius: 8px; padding: 14px; overflow-x: auto; font-size: 13px }
summary { cursor: pointer }
footer { margin-top: 40px; font-size: 13px }
@media print { figure { break-inside: avoid } }
"""
