"""The experiments of the FedKNOW paper: each runs a comparison and ends in a page beside the paper's values.

What an experiment is and what the paper found stands in ``paper.toml``. ``scale`` shrinks the training by that factor,
and the page says what was shrunk by how much.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedknow.protocols.config import ConfigError, ExperimentConfig, closest, differences, parse_override, read_config
from fedknow.server.plots import COLOURS, GREY, MARKERS, Plot
from fedknow.server.report import Rows, write_page
from fedknow.server.summary import Group
from fedknow.simulations.compare import Watch, compare
from fedknow.simulations.contenders import plan

__all__ = ["Outcome", "Variant", "experiments", "run_paper", "variants"]

Tree = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One comparison of an experiment.

    Attributes
    ----------
    name : str
        What tells it from the experiment's others; the data set's name where there are none.
    config : ExperimentConfig
        As it is run.
    paper : ExperimentConfig
        As the paper has it: unscaled, without changes.
    """

    name: str
    config: ExperimentConfig
    paper: ExperimentConfig


@dataclass(frozen=True)
class Outcome:
    """What came of an experiment: its page (None if no run ended) and, by variant and run, why runs failed."""

    page: Path | None
    failures: Mapping[str, str]


def experiments() -> dict[str, str]:
    """The paper's experiments, with a line about each."""
    return {name: tree["title"] for name, tree in _table()["experiments"].items()}


def variants(
    experiment: str, data: str = "", scale: float = 1.0, changes: Sequence[str] = (), seed: int = 0
) -> list[Variant]:
    """The comparisons of an experiment.

    ``scale`` is the share of the paper's training that is left. Rounds of a task and epochs of a round shrink by its
    root each; where both have come to one, clients and tasks shrink likewise, to no fewer than two.

    Parameters
    ----------
    experiment : str
        Such as ``"5.1"``.
    data : str
        A data set of the paper; empty: the experiment's own.
    scale : float
        Above 0, at most 1.
    changes : sequence of str
        ``key=value``, applied last.
    seed : int
        The seed.

    Raises
    ------
    ConfigError
        If there is no such experiment or data set, the scale is out of range, or a change is refused.
    """
    table = _table()
    of = _named(table["experiments"], experiment, "experiment")
    data = data or of["data"]
    work = _named(table["workloads"], data, "--data")
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale {scale:g}: give a number above 0, at most 1")
    found = []
    for name, special in of.get("variants", {"all": {}}).items():
        model = special.get("model", work["model"])
        model_name = model if isinstance(model, str) else model["name"]
        full: Tree = {
            "name": f"paper-{experiment}-{data}",
            "seed": seed,
            "data": {"name": data, "clients": table["clients"], **work["data"], **special.get("data", {})},
            "model": model,
            "train": {"rounds": table["rounds"], **table["networks"].get(model_name, table["networks"]["others"])},
            "learner": {"name": "fedknow", **table["learner"]["fedknow"]},
            "strategy": {"name": "fedavg", "fraction": table["fraction"]},
        }
        small = _scaled(full, scale)
        if "fleet" in of:
            for tree in (full, small):
                tree["fleet"] = {**table["links"], "devices": table["fleets"][of["fleet"]]}
        found.append(
            Variant(
                data if name == "all" else name,
                read_config(_shared(small, changes), changes, f"experiment {experiment}"),
                read_config(_shared(full, ()), (), f"experiment {experiment}"),
            )
        )
    return found


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
    """Run an experiment and write ``paper.html`` and ``plots/`` to ``out``, which gets a comparison a variant.

    Parameters
    ----------
    learners : sequence of str
        Methods as :func:`~fedknow.simulations.compare.compare` knows them; empty: the experiment's.

    Raises
    ------
    ConfigError
        Before anything is run.
    """
    of = _named(_table()["experiments"], experiment, "experiment")
    methods = list(learners) or list(of["learners"])
    chosen = variants(experiment, data, scale, changes)
    for variant in chosen:
        for method in methods:
            plan(variant.config, method, variant.config.seed)
    parts: list[tuple[str, Sequence[Plot] | Rows]] = [("", _preface(experiment, chosen))]
    failures: dict[str, str] = {}
    ended: list[Group] = []
    for variant in chosen:
        result = compare(variant.config, methods, seeds, out / variant.name, watch)
        failures |= {f"{variant.name}/{run}": reason for run, reason in result.failures.items()}
        if result.groups:
            ended += result.groups
            parts += _results(experiment, variant, _by_method(variant, methods, result.groups))
    if failures:
        parts.append(("Failed", Rows(["Run", "Why"], [[name, reason] for name, reason in failures.items()])))
    if not ended:
        return Outcome(None, failures)
    title = f"FedKNOW paper, {experiment}: {of['title']}"
    page = write_page(out / "paper.html", title, parts, [run for group in ended for run in group.runs])
    return Outcome(page, failures)


# --- configurations ---------------------------------------------------------------------------------------------------


def _table() -> Tree:
    return tomllib.loads((files("fedknow.simulations") / "paper.toml").read_text("utf-8"))


def _named(table: Mapping[str, Tree], name: str, what: str) -> Tree:
    if name not in table:
        raise ConfigError(f"{what} {name!r}: there is none{closest(name, table)}; known: {', '.join(table)}")
    return table[name]


def _scaled(full: Tree, scale: float) -> Tree:
    def shrunk(tree: Tree, keys: tuple[str, str], factor: float, least: int) -> tuple[Tree, float]:
        smaller = {key: min(tree[key], max(least, round(tree[key] * math.sqrt(factor)))) for key in keys}
        return tree | smaller, math.prod(smaller.values()) / math.prod(tree[key] for key in keys)

    train, done = shrunk(full["train"], ("rounds", "epochs"), scale, least=1)
    data = full["data"]
    if train["rounds"] == train["epochs"] == 1:
        data, _ = shrunk(data, ("clients", "tasks"), min(1.0, scale / done), least=2)
    return full | {"train": train, "data": data}


def _shared(tree: Tree, changes: Iterable[str]) -> Tree:
    """With clients' shares disjoint where there are enough for all: a class makes ten of a tenth of its samples."""
    data = {**tree["data"], **{path[-1]: value for path, value in map(parse_override, changes) if path[0] == "data"}}
    classes = data.get("classes_per_task", 5)
    enough = data["clients"] * data.get("classes_max", min(5, classes)) <= 10 * classes
    return tree | {"data": {"share": "disjoint" if enough else "overlapping", **tree["data"]}}


# --- the page ---------------------------------------------------------------------------------------------------------


def _preface(experiment: str, chosen: Sequence[Variant]) -> Rows:
    """What of the paper's experiment was run, variant by variant."""
    rows = []
    for variant in chosen:
        for section, key in (("train", "rounds"), ("train", "epochs"), ("data", "clients"), ("data", "tasks")):
            here, there = (getattr(getattr(config, section), key) for config in (variant.config, variant.paper))
            rows.append([variant.name, f"{section}.{key}", str(here), str(there), f"{here / there:.0%}"])
        shown = {row[1] for row in rows}
        others = [_changed(line) for line in differences(variant.paper, variant.config)]
        rows += [[variant.name, *cells] for cells in others if cells[0] not in shown]
    return Rows(["", "", "Here", "Paper", "Share"], rows, _differences(experiment, chosen[0].config))


def _changed(line: str) -> list[str]:
    """A line of :func:`~fedknow.protocols.config.differences` as cells."""
    key, _, values = line.partition(": was ")
    there, _, here = values.partition(", now ")
    return [key, here, there, ""]


def _differences(experiment: str, config: ExperimentConfig) -> str:
    table = _table()
    own = table["experiments"][experiment]["data"]
    notes = [
        "Values called the paper's were read off its figures, to about 0.01.",
        "Rounds are those of a task, epochs those of a round.",
        f"Clients' shares of the samples are {config.data.share}.",
        table["workloads"][config.data.name].get("differs", ""),
    ]
    if experiment.startswith(("5.3", "5.5", "5.6")) and config.data.name != own:
        notes.append(f"The paper's values are those on {own}, these runs are on {config.data.name}.")
    return " ".join(note for note in notes if note)


def _by_method(variant: Variant, methods: Sequence[str], groups: Sequence[Group]) -> dict[str, Group]:
    """The groups under the names they were asked for by; a method whose runs all failed has none."""
    planned = {method: plan(variant.config, method, variant.config.seed).learner for method in methods}
    return {
        method: group
        for method, learner in planned.items()
        for group in groups
        if group.runs[0].config.learner == learner
    }


def _results(experiment: str, variant: Variant, groups: Mapping[str, Group]) -> list[tuple[str, Sequence[Plot] | Rows]]:
    of = _table()["experiments"][experiment]
    rates = of.get("rates", [])
    values: dict[str, Tree] = {}
    for source in (of.get("as_in", experiment), experiment):  # what two experiments share stands with the first
        for method, found in _table()["values"][source].get(variant.name, {}).items():
            values[method] = values.get(method, {}) | found
    parts: list[tuple[str, Sequence[Plot] | Rows]] = [
        (variant.name, _side_by_side(variant, groups, values)),
        ("", _plots(variant, groups, values)),
    ]
    if rates:
        parts.append(("Hours of communication at other rates", _at_rates(variant, groups, values, rates)))
    return parts


def _side_by_side(variant: Variant, groups: Mapping[str, Group], values: Mapping[str, Tree]) -> Rows:
    rows = []
    for method, group in groups.items():
        there = values.get(method, {})
        rows.append(
            [
                method,
                _percent(group.estimate("accuracy").mean),
                _percent(there.get("accuracy", [math.nan])[-1]),
                _percent(group.estimate("forgetting_relative").mean),
                _percent(there.get("forgetting", math.nan)),
                _number(_hours(group, 1000)),
                _number(_hours(group, 1000, variant)),
                _number(there.get("communication_hours", math.nan)),
            ]
        )
    head = ["", "Accuracy", "paper", "Forgotten, relative", "paper"]
    head += ["Hours at 1 MB/s", "as many rounds as the paper", "paper"]
    return Rows(
        head,
        rows,
        "After the last task. Hours: training traffic of the mean client, down and then up. The second number is for "
        "as many rounds and tasks as the paper's: too small for a method that sends more with each task. The paper's "
        "hours seem to hold the scoring of all clients in every round, which ours leave out.",
    )


def _at_rates(variant: Variant, groups: Mapping[str, Group], values: Mapping[str, Tree], rates: Sequence[int]) -> Rows:
    rows = []
    for method, group in groups.items():
        rows.append([method, *(_number(_hours(group, rate, variant)) for rate in rates)])
        if "hours_at_rates" in values.get(method, {}):
            rows.append([f"{method}, paper", *map(_number, values[method]["hours_at_rates"])])
    return Rows(
        ["", *(f"{rate:,} kB/s" for rate in rates)],
        rows,
        "From the bytes of the same runs, at the paper's rounds and tasks: a slower link changes no accuracy.",
    )


def _hours(group: Group, rate: float, as_in: Variant | None = None) -> float:
    """Hours that the mean client's link is busy with training at ``rate`` kB/s; of as many rounds as the paper's."""
    hours = []
    for run in group.runs:
        rounds = tasks = 1.0
        if as_in is not None:
            tasks = as_in.paper.data.tasks / run.config.data.tasks
            rounds = as_in.paper.train.rounds / run.config.train.rounds
        once = run.bytes_of("train.end_task")
        sent = tasks * (rounds * (run.bytes_of("train") - once) + once)
        hours.append(sent / run.config.data.clients / (1000 * rate) / 3600)
    return float(np.mean(hours))


def _plots(variant: Variant, groups: Mapping[str, Group], values: Mapping[str, Tree]) -> list[Plot]:
    def style(index: int) -> Tree:
        coloured = index < len(COLOURS)
        return {"color": COLOURS[index] if coloured else GREY, "marker": MARKERS[index] if coloured else "", "ms": 4}

    def accuracy(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="tasks learned", ylabel="average accuracy (%)", ylim=(0, 100))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for index, (method, group) in enumerate(groups.items()):
            mean = 100 * group.curve("average")[0]
            axes.plot(np.arange(1, len(mean) + 1), mean, label=method, **style(index))
            there = values.get(method, {})
            if "accuracy" in there:
                axes.plot(there["tasks"], [100 * value for value in there["accuracy"]], ls=":", **style(index))
        axes.legend(fontsize=8)

    def forgetting(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="tasks learned", ylabel="relative forgetting (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for index, (method, group) in enumerate(groups.items()):
            mean = 100 * group.curve("relative")[0]
            axes.plot(np.arange(1, len(mean) + 1), mean, label=method, **style(index))
            there = values.get(method, {})
            if "forgetting" in there:
                axes.plot(there["tasks"][-1:], [100 * there["forgetting"]], ls="", **style(index) | {"marker": "x"})
        axes.legend(fontsize=8)

    def over_time(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="virtual time (h)", ylabel="average accuracy (%)", ylim=(0, 100))
        for index, (method, group) in enumerate(groups.items()):
            events = [event for event in group.runs[0].evaluations if event.get("virtual_seconds") is not None]
            hours = [event["virtual_seconds"] / 3600 for event in events]
            axes.plot(hours, [100 * event["accuracy"] for event in events], label=method, **style(index))
        axes.legend(fontsize=8)

    def hours(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="hours of communication at 1 MB/s")
        bars = axes.barh(list(groups), [_hours(group, 1000) for group in groups.values()], color=COLOURS[0], height=0.5)
        axes.bar_label(bars, fmt="{:,.2g}", padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.2)

    high = max(3.6, 0.3 * len(groups) + 1)
    prefix = f"{variant.name}-"
    plots = [
        Plot(f"{prefix}accuracy", "Accuracy over tasks", "Lines: here. Dotted: the paper's.", accuracy, height=high),
        Plot(
            f"{prefix}forgetting", "Forgetting", "Share of what was learned. x: the paper's.", forgetting, height=high
        ),
        Plot(f"{prefix}hours", "Communication", "Training traffic of the mean client, as run.", hours, height=high),
    ]
    if any("virtual_seconds" in event for group in groups.values() for event in group.runs[0].evaluations):
        plots.insert(
            1, Plot(f"{prefix}time", "Accuracy over virtual time", "On this fleet; first seed.", over_time, height=high)
        )
    return plots


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.3g}"
