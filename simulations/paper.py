"""The experiments of the FedKNOW paper: each runs a comparison and ends in a page beside the paper's values.

What an experiment is and what the paper found stands in ``paper.toml``. ``scale`` shrinks the training by about that
factor, and the page says what was shrunk by how much, and what share of the paper's training that comes to.
"""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedknow.client.learners import resolve
from fedknow.protocols.config import ConfigError, ExperimentConfig, closest, differences, parse_override, read_config
from fedknow.server.reports.groups import Group
from fedknow.server.reports.measures import size
from fedknow.server.reports.page import write_page
from fedknow.server.reports.plots import COLOURS, GREY, MARKERS, Plot
from fedknow.server.reports.summary import Array, Summary, summarise
from fedknow.server.reports.tables import Rows, fleet_parts
from fedknow.server.run_folder import RunFolder
from fedknow.simulations.compare import Watch, compare
from fedknow.simulations.contenders import plan
from fedknow.simulations.fleet.devices import assign, shipped_rooms

__all__ = ["Outcome", "Variant", "experiments", "mixed", "run_paper", "variants"]

Tree = dict[str, Any]
Part = tuple[str, Sequence[Plot] | Rows]

SCALED = (("train", "rounds"), ("train", "epochs"), ("data", "clients"), ("data", "tasks"))
"""What an experiment is scaled by: rounds of a task and epochs of a round, then clients and tasks."""


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

    @property
    def scaled(self) -> dict[str, tuple[int, int]]:
        """How many of what is scaled there are, here and in the paper."""
        return {
            f"{section}.{key}": (
                getattr(getattr(self.config, section), key),
                getattr(getattr(self.paper, section), key),
            )
            for section, key in SCALED
        }

    @property
    def share(self) -> float:
        """Of the paper's training: the product of the shares of rounds, epochs, clients and tasks."""
        return math.prod(here / there for here, there in self.scaled.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{here} of {there} {key.partition('.')[2]}" for key, (here, there) in self.scaled.items())
        fleet = ", ".join(f"{count} {device}" for device, count in _devices(self.config).items()) or "no fleet"
        return f"{self.name}: {_share(self.share)} of the paper's training ({parts}) on {fleet}"


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

    ``scale`` is the share of the paper's training that is to be left. Rounds of a task and epochs of a round shrink by
    its root each; where both have come to one, clients and tasks shrink likewise, to no fewer than two. As these are
    whole numbers, what is left is another share: :attr:`Variant.share`. A fleet keeps its mix (:func:`mixed`).

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

        def config(tree: Tree, changes: Sequence[str]) -> ExperimentConfig:
            where = f"experiment {experiment}"
            clients = read_config(tree, changes, where).data.clients
            fleet = {"fleet": {**table["links"], "devices": mixed(table["fleets"][of["fleet"]], clients)}}
            return read_config(_shared(tree, changes) | fleet, changes, where)

        found.append(Variant(data if name == "all" else name, config(_scaled(full, scale), changes), config(full, ())))
    return found


def mixed(devices: Sequence[str], clients: int) -> list[str]:
    """As many devices as there are clients, in the proportions of a list: as it is where it goes into their number.

    Otherwise there is at least one of each kind, the rarest left out where clients are too few, and each further one is
    of the kind that lacks most of its share.

    Parameters
    ----------
    devices : sequence of str
        The whole fleet, or what is repeated in it.
    clients : int
        How many there are to be.

    Returns
    -------
    list of str
        To be repeated until every client has one.
    """
    if clients % len(devices) == 0:
        return list(devices)
    whole = Counter(devices)
    taken = Counter({kind: 1 for kind, _ in whole.most_common(clients)})

    def lacks(kind: str) -> float:
        return whole[kind] * clients / len(devices) - taken[kind]

    while taken.total() < clients:
        taken[max(whole, key=lacks)] += 1
    return [kind for kind in whole for _ in range(taken[kind])]


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
    parts: list[Part] = [("", _preface(experiment, chosen))]
    failures: dict[str, str] = {}
    ended: list[Group] = []
    for variant in chosen:
        result = compare(variant.config, methods, seeds, out / variant.name, watch)
        failures |= {f"{variant.name}/{run}": reason for run, reason in result.failures.items()}
        begun = [path for run in result.failures if (path := out / variant.name / run / "config.toml").is_file()]
        failed = [(path.parent.name, summarise(RunFolder.open(path.parent))) for path in begun]
        groups = _by_method(variant, methods, result.groups)
        if groups:
            ended += groups.values()
            parts += _results(experiment, variant, groups)
        parts += fleet_parts(list(groups.values()), shipped_rooms(), failed)
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
        for key, (here, there) in variant.scaled.items():
            rows.append([variant.name, key, str(here), str(there), _share(here / there)])
        rows.append([variant.name, "training: these four multiplied", "", "", _share(variant.share)])
        ours, papers = _devices(variant.config), _devices(variant.paper)
        for device in papers | ours:
            rows.append([variant.name, f"clients on {device}", str(ours[device]), str(papers[device]), ""])
        shown = {*variant.scaled, "fleet.devices"}
        others = [_changed(line) for line in differences(variant.paper, variant.config)]
        rows += [[variant.name, *cells] for cells in others if cells[0] not in shown]
    return Rows(["", "", "Here", "Paper", "Share"], rows, _differences(experiment, chosen[0].config))


def _devices(config: ExperimentConfig) -> Counter[str]:
    """How many clients have which device."""
    return Counter(assign(config.fleet, config.data.clients, config.seed) if config.fleet.devices else ())


def _changed(line: str) -> list[str]:
    """A line of :func:`~fedknow.protocols.config.differences` as cells."""
    key, _, values = line.partition(": was ")
    there, _, here = values.partition(", now ")
    return [key, here, there, ""]


def _differences(experiment: str, config: ExperimentConfig) -> str:
    table = _table()
    of = table["experiments"][experiment]
    notes = [
        "Values called the paper's were read off its figures, to about 0.01.",
        "Rounds are those of a task, epochs those of a round.",
        f"Clients' shares of the samples are {config.data.share}.",
        table["workloads"][config.data.name].get("differs", ""),
        of.get("note", ""),
    ]
    if experiment.startswith(("5.3", "5.5", "5.6")) and config.data.name != of["data"]:
        notes.append(f"The paper's values are those on {of['data']}, these runs are on {config.data.name}.")
    return " ".join(note for note in notes if note)


def _by_method(variant: Variant, methods: Sequence[str], groups: Sequence[Group]) -> dict[str, Group]:
    """The groups under the names they were asked for by; a method whose runs all failed has none."""
    planned = {method: plan(variant.config, method, variant.config.seed).learner for method in methods}
    return {
        method: Group(method, group.runs)
        for method, learner in planned.items()
        for group in groups
        if resolve(group.runs[0].config).learner == learner
    }


def _results(experiment: str, variant: Variant, groups: Mapping[str, Group]) -> list[Part]:
    of = _table()["experiments"][experiment]
    values: dict[str, Tree] = {}
    for source in (of.get("as_in", experiment), experiment):  # what two experiments share stands with the first
        for method, found in _table()["values"][source].get(variant.name, {}).items():
            values[method] = values.get(method, {}) | found
    parts: list[Part] = [
        (variant.name, _side_by_side(variant, groups, values)),
        ("Hours", _all_hours(variant, groups, values)),
        ("", _plots(variant, groups, values)),
    ]
    if any("task_hours" in there for there in values.values()):
        parts.append(("Hours of single tasks", _single_tasks(variant, groups, values)))
    if rates := of.get("rates"):
        parts.append(("Hours of communication at other rates", _at_rates(variant, groups, values, rates)))
    return parts


def _side_by_side(variant: Variant, groups: Mapping[str, Group], values: Mapping[str, Tree]) -> Rows:
    rows = []
    for method, group in groups.items():
        there = values.get(method, {})
        after = _after(there, group)
        rows.append(
            [
                method,
                str(after),
                _percent(_at(group, "average", after)),
                _papers(there, "accuracy", after),
                _percent(_at(group, "relative", after)),
                _papers(there, "forgetting", after),
                size(group.estimate("knowledge_bytes").mean),
            ]
        )
    for method, there in values.items():
        if not method.islower():  # one that is not run here
            last = there["tasks"][-1]
            papers = [_papers(there, key, last) for key in ("accuracy", "forgetting")]
            rows.append([method, str(last), "–", papers[0], "–", papers[1], "–"])
    return Rows(
        ["", "After tasks", "Accuracy", "paper", "Forgotten, relative", "paper", "Kept about past tasks, a client"],
        rows,
        "After the most tasks that both have; where the paper's value is after another number of tasks, it says so. "
        f"Here there are {variant.config.data.tasks}, in the paper {_last(values, variant)}. Kept: knowledge, "
        "importances and stored samples, after the last task here.",
    )


def _all_hours(variant: Variant, groups: Mapping[str, Group], values: Mapping[str, Tree]) -> Rows:
    rows = []
    tasks = variant.paper.data.tasks / variant.config.data.tasks
    for method, group in groups.items():
        there = values.get(method, {})
        rows.append(
            [
                method,
                _number(_hours(group, 1000)),
                _number(_hours(group, 1000, variant)),
                _number(there.get("communication_hours", math.nan)),
                _number(_mean(_virtual(run).sum() for run in group.runs)),
                _number(tasks * _mean(_virtual(run, variant).sum() for run in group.runs)),
                _number(there.get("hours", math.nan)),
            ]
        )
    more = "as much training as the paper"
    return Rows(
        ["", "Communication at 1 MB/s", more, "paper", "Virtual, on the fleet", more, "paper"],
        rows,
        "Communication: training traffic of the mean client, down and then up; the paper's seems to hold the scoring "
        "of all clients in every round, which ours leaves out. Virtual: until the last task ended. As much training as "
        "the paper: what messages and waiting took, multiplied for as many rounds and tasks, and what computing took, "
        "for as many epochs too; too small where tasks are fewer than the paper's and a method's work grows with each, "
        "too large for a method that sends something once a task, such as fedweit.",
    )


def _single_tasks(variant: Variant, groups: Mapping[str, Group], values: Mapping[str, Tree]) -> Rows:
    """Virtual hours that single tasks took, those of which the paper has them."""
    papers = {method: _by_task(there, "task_hours") for method, there in values.items()}
    tasks = sorted({task for found in papers.values() for task in found})
    rows = []
    for method, group in groups.items():
        ours = [_virtual(run, variant) for run in group.runs]
        means = [_mean(hours[task - 1] if task <= len(hours) else math.nan for hours in ours) for task in tasks]
        rows.append([method, *map(_number, means)])
    rows += [
        [f"{method}, paper", *(_number(found.get(task, math.nan)) for task in tasks)]
        for method, found in papers.items()
        if found and (method in groups or not method.islower())
    ]
    return Rows(
        ["", *(f"task {task}" for task in tasks)],
        rows,
        "Virtual hours on the fleet, at as many rounds and epochs as the paper's.",
    )


def _by_task(there: Tree, key: str) -> dict[int, float]:
    """The paper's values by the number of tasks learned; those that are fewer are of the last of them."""
    values = there.get(key, [])
    return dict(zip(there["tasks"][-len(values) :], values, strict=True)) if values else {}


def _after(there: Tree, group: Group) -> int:
    """After how many tasks a method is compared: the most for which the paper has a value, of those learned here."""
    done = min(run.tasks for run in group.runs)
    return max((task for task in there.get("tasks", ()) if task <= done), default=done)


def _papers(there: Tree, key: str, after: int) -> str:
    """The paper's value after so many tasks; where it has none, its last one and after how many tasks that is."""
    values = _by_task(there, key)
    if after in values or not values:
        return _percent(values.get(after, math.nan))
    last = max(values)
    return f"{_percent(values[last])} after {last}"


def _last(values: Mapping[str, Tree], variant: Variant) -> int:
    return max((task for there in values.values() for task in there.get("tasks", ())), default=variant.paper.data.tasks)


def _at(group: Group, pick: str, after: int) -> float:
    curve = group.curve(pick)
    return float(curve[after - 1]) if 0 < after <= len(curve) else math.nan


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
    """Hours that the mean client's link is busy with training at ``rate`` kB/s; of as many rounds as the paper's.

    Further rounds bring what rounds bring on average, and beside the model what the last round of each task brought, as
    some of that goes to a client once a task.
    """
    hours = []
    for run in group.runs:
        sent = float(run.bytes_of("train"))
        if as_in is not None:
            here, there = as_in.scaled["train.rounds"]
            extra, last = _extra(run)
            usual = (sent - run.bytes_of("train.end_task") - extra) / here
            sent = (sent + (there - here) * (usual + last)) * as_in.paper.data.tasks / run.config.data.tasks
        hours.append(sent / run.config.data.clients / (1000 * rate) / 3600)
    return float(np.mean(hours))


def _extra(run: Summary) -> tuple[float, float]:
    """Bytes beside the model in all rounds, and in the last round of each task."""
    counts = [event["traffic"].get("train.extra", {"down": 0, "up": 0}) for event in run.rounds]
    steps = np.diff([float(count["down"] + count["up"]) for count in counts], prepend=0.0)
    last = {event["task"]: step for event, step in zip(run.rounds, steps, strict=True)}
    return float(steps.sum()), float(sum(last.values()))


def _virtual(run: Summary, as_in: Variant | None = None) -> Array:
    """Virtual hours that each task took, float64 [tasks], one NaN without a fleet; of the paper's rounds and epochs.

    What is done when a task is over is done once, however many rounds it has.
    """
    ends = {event["task"]: event for event in run.evaluations if "virtual_seconds" in event}
    if not ends:
        return np.array([math.nan])
    last = {event["task"]: event for event in run.rounds}
    moments = [event for task, end in ends.items() for event in (last.get(task, end), end)]
    passed = [[event[key] / 3600 for key in ("virtual_seconds", "computing_seconds")] for event in moments]
    total, computing = np.diff(passed, axis=0, prepend=0.0).reshape(len(ends), 2, 2).transpose(2, 1, 0)
    rounds = epochs = 1.0
    if as_in is not None:
        rounds, epochs = (there / here for here, there in list(as_in.scaled.values())[:2])
    training, afterwards = rounds * (total[0] - computing[0] + epochs * computing[0]), total[1]
    return np.asarray(training + afterwards)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _plots(variant: Variant, groups: Mapping[str, Group], values: Mapping[str, Tree]) -> list[Plot]:
    def style(index: int) -> Tree:
        coloured = index < len(COLOURS)
        return {"color": COLOURS[index] if coloured else GREY, "marker": MARKERS[index] if coloured else "", "ms": 4}

    def accuracy(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="tasks learned", ylabel="average accuracy (%)", ylim=(0, 100))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for index, (method, group) in enumerate(groups.items()):
            mean = 100 * group.curve("average")
            axes.plot(np.arange(1, len(mean) + 1), mean, label=method, **style(index))
            there = values.get(method, {})
            if "accuracy" in there:
                axes.plot(there["tasks"], [100 * value for value in there["accuracy"]], ls=":", **style(index))
        axes.legend(fontsize=8)

    def forgetting(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="tasks learned", ylabel="relative forgetting (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for index, (method, group) in enumerate(groups.items()):
            mean = 100 * group.curve("relative")
            axes.plot(np.arange(1, len(mean) + 1), mean, label=method, **style(index))
            if there := _by_task(values.get(method, {}), "forgetting"):
                papers = [100 * value for value in there.values()]
                axes.plot(list(there), papers, ls=":", **style(index) | {"marker": "x"})
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
        bars = axes.barh(
            list(groups), [_hours(group, 1000, variant) for group in groups.values()], 0.5, color=COLOURS[0]
        )
        axes.bar_label(bars, fmt="{:,.2g}", padding=4)
        theirs = [values.get(method, {}).get("communication_hours", math.nan) for method in groups]
        axes.plot(theirs, range(len(groups)), "x", color=COLOURS[1], ms=8, label="paper")
        axes.invert_yaxis()
        axes.margins(x=0.2)
        if not all(map(math.isnan, theirs)):
            axes.legend(fontsize=8)

    high = max(3.6, 0.3 * len(groups) + 1)
    prefix = f"{variant.name}-"
    plots = [
        Plot(f"{prefix}accuracy", "Accuracy over tasks", "Lines: here. Dotted: the paper's.", accuracy, height=high),
        Plot(
            f"{prefix}forgetting", "Forgetting", "Share of what was learned. x: the paper's.", forgetting, height=high
        ),
        Plot(
            f"{prefix}hours",
            "Communication",
            "Training traffic of the mean client, of as much as the paper's.",
            hours,
            height=high,
        ),
    ]
    if any("virtual_seconds" in event for group in groups.values() for event in group.runs[0].evaluations):
        plots.insert(
            1, Plot(f"{prefix}time", "Accuracy over virtual time", "On this fleet; first seed.", over_time, height=high)
        )
    return plots


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def _share(value: float) -> str:
    return f"{100 * value:.3g}%"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.3g}"
