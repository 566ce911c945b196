"""What a run came to, computed from its raw accuracies and its events; tables, reports and comparisons show it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
from scipy.special import stdtrit  # Student's t; scipy.stats takes half a second longer to import

from fedknow.client.learners import learner_class, list_learners, resolve
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.server import metrics
from fedknow.server.run_folder import RunFolder

__all__ = [
    "MEASURES",
    "Estimate",
    "Group",
    "Measure",
    "Scoring",
    "Summary",
    "duration",
    "estimate",
    "group",
    "known",
    "ranked",
    "size",
    "summarise",
]

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Scoring:
    """One way of scoring every client; all numbers are fractions, NaN where nothing was measured.

    Attributes
    ----------
    matrix : float64 [seen, trained]
        Accuracy on each task after each task, weighted by the clients' test samples.
    average : float64 [trained]
        Average accuracy after each task (:func:`~fedknow.server.metrics.average_accuracy`).
    learned, now : float64 [seen]
        Accuracy on each task when it was learned, and after the last task that was.
    forgetting, relative, backward, forward : float64 [trained]
        Absolute and relative forgetting, backward and forward transfer after each task; NaN after the first.
    """

    matrix: Array
    average: Array
    learned: Array
    now: Array
    forgetting: Array
    relative: Array
    backward: Array
    forward: Array


@dataclass(frozen=True)
class Summary:
    """One run.

    Attributes
    ----------
    tasks : int
        Tasks that were learned and scored so far.
    status : str
        ``"complete"``, ``"interrupted"`` or ``"unfinished"``.
    global_model : Scoring or None
        The purely global model's scores; ``None`` where it was not scored.
    traffic : mapping
        ``{kind: {"down", "up", "messages"}}``, bytes and counts.
    rounds, evaluations, troubles : sequence of dict
        The run's ``round``, ``evaluation``, and ``failure`` or ``warning`` events, oldest first.
    knowledge_bytes : float
        What a client keeps about past tasks after the last task that ended, mean over clients.
    server_bytes : float
        Most that the server's half of the method kept of past tasks and of clients' data when a task ended.
    samples : float
        Samples that went forward to be learned from, all clients, rounds and ends of tasks together: extra epochs,
        replayed samples and what is learned from when a task ends count; NaN where clients did not say. Runs of earlier
        versions did not say the last, which is then left out.
    flops : float
        Floating point operations of clients' training and of what they do when a task ends, as clients count them; NaN
        where they did not.
    peak_memory_mb : float
        Largest resident memory of each process during the run, added up, MB. It is the machinery's as well as the
        method's, and in a process that does several runs what earlier ones left is in it.
    client_memory_bytes : float
        Most memory that a client's training, or its end of a task, needed: weights, gradients, activations and what
        the method keeps, as clients count it; NaN where they did not.
    fleet : mapping
        What the clients' devices did up to the last task that ended (``fleet.json``); empty where they have none.
    """

    config: ExperimentConfig
    status: str
    tasks: int
    start: Mapping[str, Any]
    personal: Scoring
    global_model: Scoring | None
    traffic: Mapping[str, Mapping[str, int]]
    rounds: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    troubles: Sequence[Mapping[str, Any]]
    seconds: float
    knowledge_bytes: float
    server_bytes: float
    samples: float
    flops: float
    peak_memory_mb: float
    client_memory_bytes: float
    fleet: Mapping[str, Any] = field(default_factory=dict)

    def bytes_of(self, start: str, end: str = "") -> int:
        """Bytes moved both ways in messages whose kind starts and ends so: ``"train"``, ``"evaluate"``."""
        return sum(
            count["down"] + count["up"]
            for kind, count in self.traffic.items()
            if kind.startswith(start) and kind.endswith(end)
        )

    def measures(self) -> dict[str, float]:
        """The run's numbers by the keys of :data:`MEASURES`; NaN where one does not exist."""
        last = self.tasks - 1
        global_model = self.global_model

        def at(values: Array) -> float:
            return float(values[last]) if last >= 0 else math.nan

        return {
            "accuracy": at(self.personal.average),
            "accuracy_global": at(global_model.average) if global_model else math.nan,
            "gap": at(self.personal.average - global_model.average) if global_model else math.nan,
            "forgetting": at(self.personal.forgetting),
            "forgetting_relative": at(self.personal.relative),
            "backward_transfer": at(self.personal.backward),
            "forward_transfer": at(self.personal.forward),
            "forgetting_global": at(global_model.forgetting) if global_model else math.nan,
            "bytes": float(self.bytes_of("train")),
            "bytes_extra": float(self.bytes_of("train", ".extra")) or math.nan,
            "bytes_evaluate": float(self.bytes_of("evaluate")),
            "knowledge_bytes": self.knowledge_bytes,
            "server_bytes": self.server_bytes,
            "samples": self.samples,
            "flops": self.flops,
            "seconds": self.seconds,
            "peak_memory_mb": self.peak_memory_mb,
            "client_memory_bytes": max(
                (float(client["memory"]) for client in self.clients), default=self.client_memory_bytes
            ),
            **{key: self.elapsed(key) for key in ("virtual_seconds", "communication_seconds", "energy_joules")},
        }

    @property
    def clients(self) -> Sequence[Mapping[str, Any]]:
        """What each client's device did, where they have any."""
        found: Sequence[Mapping[str, Any]] = self.fleet.get("clients", ())
        return found

    def elapsed(self, key: str) -> float:
        """What has passed on the virtual clock (``"virtual_seconds"``, ``"computing_seconds"``, ...); NaN without."""
        events = [event for event in (*self.rounds[-1:], *self.evaluations[-1:]) if event.get(key) is not None]
        return max((float(event[key]) for event in events), default=math.nan)


@dataclass(frozen=True)
class Measure:
    """A number of a run: its key, what to call it, and the scales it is written in, smallest first."""

    key: str
    title: str
    scales: tuple[tuple[float, str], ...]
    short: str = ""
    """Heading of a narrow column; a measure without one is left to the wide tables."""

    @property
    def percent(self) -> bool:
        """Whether it is a share of something."""
        return self.scales is _PERCENT

    def text(self, value: float, half: float = math.nan, unit: bool = True) -> str:
        """``value`` or ``value ± half`` as a person reads it, in one unit; a dash where there is none."""
        if math.isnan(value):
            return "–"
        scale, name = next((pair for pair in reversed(self.scales) if abs(value) >= pair[0]), self.scales[0])
        margin = "" if math.isnan(half) else f" ± {half / scale:,.1f}"
        return f"{value / scale:,.1f}{margin}{f' {name}' if unit else ''}"


_PERCENT = ((0.01, "%"),)
_BYTES = ((1e3, "kB"), (1e6, "MB"), (1e9, "GB"))
_COUNTS = ((1e3, "k"), (1e6, "M"))
_SECONDS = ((1.0, "s"), (60.0, "min"), (3600.0, "h"))

MEASURES = (
    Measure("accuracy", "Average accuracy", _PERCENT, "accuracy"),
    Measure("accuracy_global", "Average accuracy, global model", _PERCENT, "global"),
    Measure("gap", "Personal minus global", _PERCENT),
    Measure("forgetting", "Forgetting", _PERCENT, "forgotten"),
    Measure("forgetting_relative", "Forgetting, relative", _PERCENT, "relative"),
    Measure("forgetting_global", "Forgetting, global model", _PERCENT),
    Measure("backward_transfer", "Backward transfer", _PERCENT),
    Measure("forward_transfer", "Forward transfer", _PERCENT),
    Measure("bytes", "Training traffic", _BYTES, "traffic"),
    Measure("bytes_extra", "of it beside the model", _BYTES),
    Measure("bytes_evaluate", "Traffic of scoring", _BYTES),
    Measure("knowledge_bytes", "Kept about past tasks, a client", _BYTES, "kept"),
    Measure("server_bytes", "Kept on the server about past tasks, at most", _BYTES),
    Measure("samples", "Samples learned from, extra epochs and replay included", _COUNTS, "samples"),
    Measure("flops", "Operations of clients' training", ((1e9, "G"), (1e12, "T"), (1e15, "P"))),
    Measure("seconds", "Time", _SECONDS, "time"),
    Measure("peak_memory_mb", "Peak memory, all processes of the run", ((1.0, "MB"),)),
    Measure("client_memory_bytes", "Most memory that a client's training needed", _BYTES),
    Measure("virtual_seconds", "Virtual time on the fleet", _SECONDS, "virtual"),
    Measure("communication_seconds", "of it, waiting for messages under way", _SECONDS),
    Measure("energy_joules", "Energy, all devices", ((1.0, "J"), (1e3, "kJ"), (1e6, "MJ"))),
)


def known(values: Iterable[Mapping[str, float]]) -> list[Measure]:
    """The measures that at least one of these runs has (:meth:`Summary.measures`)."""
    runs = list(values)
    return [measure for measure in MEASURES if any(not math.isnan(run[measure.key]) for run in runs)]


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds; ``half`` is half the width of its 95 % interval, NaN with fewer than two values."""

    mean: float
    half: float
    count: int

    def text(self, measure: Measure) -> str:
        """``mean ± half`` in the measure's unit."""
        return measure.text(self.mean, self.half)


def estimate(values: Iterable[float]) -> Estimate:
    """Mean and Student's 95 % interval of independent values; NaNs are left out.

    ``half = t(0.975, n - 1) * s / sqrt(n)`` with the sample standard deviation ``s``.
    """
    known = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
    if known.size == 0:
        return Estimate(math.nan, math.nan, 0)
    if known.size == 1:
        return Estimate(float(known[0]), math.nan, 1)
    half = stdtrit(known.size - 1, 0.975) * known.std(ddof=1) / math.sqrt(known.size)
    return Estimate(float(known.mean()), float(half), known.size)


def summarise(run: RunFolder) -> Summary:
    """What a run folder holds, complete or not."""
    arrays, events = run.accuracy(), run.events()
    personal, shared = arrays["personal"], arrays["global"]
    others = arrays["weights"], arrays["untrained"]
    tasks = int(np.isfinite(personal).any(axis=(0, 1)).sum())
    rounds = [event for event in events if event["event"] == "round"]
    kinds = {event["event"] for event in events}
    traffic: Mapping[str, Mapping[str, int]] = next(
        (event["traffic"] for event in reversed(events) if "traffic" in event), {}
    )
    return Summary(
        config=run.config,
        status="complete" if "end" in kinds else "interrupted" if "interrupted" in kinds else "unfinished",
        tasks=tasks,
        start=next((event for event in events if event["event"] == "start"), {}),
        personal=_score(personal, *others, tasks),
        global_model=_score(shared, *others, tasks) if np.isfinite(shared).any() else None,
        traffic=traffic,
        rounds=rounds,
        evaluations=[event for event in events if event["event"] == "evaluation"],
        troubles=[event for event in events if event["event"] in ("failure", "warning")],
        seconds=next((event["seconds"] for event in events if event["event"] == "end"), _seconds(events)),
        knowledge_bytes=next(
            (event["knowledge_bytes"] for event in reversed(events) if event["event"] == "task_end"), math.nan
        ),
        server_bytes=_most(event.get("server_bytes") for event in events),
        samples=sum(_or_nan(event.get("samples")) for event in rounds)
        + sum(_or_nan(event.get("samples", 0.0)) for event in events if event["event"] == "task_end")
        if rounds
        else math.nan,
        flops=sum(_or_nan(event.get("flops")) for event in events if event["event"] in ("round", "task_end"))
        if rounds
        else math.nan,
        peak_memory_mb=max((event["peak_memory_mb"] for event in rounds), default=math.nan),
        client_memory_bytes=_most(event.get("client_memory_bytes") for event in events),
        fleet=_whole(run.fleet),
    )


def _whole(fleet: Mapping[str, Any]) -> Mapping[str, Any]:
    """A fleet's account, with what older runs' files did not have: time away stood with idle, and waiting was left."""
    if not fleet:
        return fleet
    waiting = fleet["virtual_seconds"] - fleet["communication_seconds"] - fleet["computing_seconds"]
    clients = [{"away": 0.0, **client} for client in fleet["clients"]]
    return {"waiting_seconds": max(0.0, waiting), **fleet, "clients": clients}


def _score(accuracy: Array, weights: Array, untrained: Array, tasks: int) -> Scoring:
    accuracy, weights, untrained = accuracy[:, :tasks, :tasks], weights[:, :tasks], untrained[:, :tasks]
    matrix = metrics.task_accuracy(accuracy, weights)
    return Scoring(
        matrix=matrix,
        average=metrics.average_accuracy(accuracy, weights),
        learned=metrics.learned(accuracy, weights),
        now=matrix[:, -1] if tasks else np.array([]),
        forgetting=metrics.forgetting(accuracy, weights),
        relative=metrics.relative_forgetting(accuracy, weights),
        backward=metrics.backward_transfer(accuracy, weights),
        forward=metrics.forward_transfer(accuracy, weights, untrained),
    )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _most(values: Iterable[float | None]) -> float:
    """The largest number; NaN where there is none, as in runs of earlier versions."""
    return max((float(value) for value in values if value is not None), default=math.nan)


def _seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Time spent running: from each start (or resumption) to the last event before the next."""
    total = began = last = 0.0
    for event in events:
        if event["event"] == "start":
            total, began = total + last - began, event["time"]
        last = event["time"]
    return total + last - began


@dataclass(frozen=True)
class Group:
    """The runs of one method, one a seed."""

    label: str
    runs: Sequence[Summary]

    def estimate(self, key: str) -> Estimate:
        """One of :data:`MEASURES` over the group's runs."""
        return estimate(run.measures()[key] for run in self.runs)

    def curve(self, pick: str, global_model: bool = False) -> tuple[Array, Array]:
        """Mean and half interval, float64 [trained] each, of a field of :class:`Scoring` such as ``"average"``.

        A run that has not come to a task does not count there.
        """
        scorings = [run.global_model if global_model else run.personal for run in self.runs]
        curves = [getattr(scoring, pick) for scoring in scorings if scoring is not None]
        points = [estimate(values) for values in zip_longest(*curves, fillvalue=math.nan)]
        return np.array([point.mean for point in points]), np.array([point.half for point in points])


def group(runs: Iterable[Summary]) -> list[Group]:
    """Runs that differ in the seed alone, together; labelled by what tells the groups apart, in order of appearance."""
    groups: list[list[Summary]] = []
    for run in runs:
        for members in groups:
            if _method(members[0]) == _method(run):
                members.append(run)
                break
        else:
            groups.append([run])
    return [
        Group(label, members)
        for label, members in zip(_labels([members[0] for members in groups]), groups, strict=True)
    ]


def ranked(groups: Iterable[Group]) -> list[Group]:
    """The groups with the most accurate first; those without a score last."""

    def place(members: Group) -> tuple[bool, float]:
        mean = members.estimate("accuracy").mean
        return math.isnan(mean), -mean

    return sorted(groups, key=place)


def _method(run: Summary) -> dict[str, Any]:
    config = run.config
    if config.learner.name in list_learners():
        with suppress(ConfigError):  # what is refused by now is told as it was run
            config = resolve(config)  # a setting that the learner did not have yet is at its default
    fields = _flat(config.digest_fields())
    return {key: value for key, value in fields.items() if key not in ("seed", "name")}


def _labels(firsts: Sequence[Summary]) -> list[str]:
    """The learner's name; the strategy's where it differs; further settings where these two are not enough.

    What more than half of the groups of that name have goes without saying.
    """
    methods = [_method(run) for run in firsts]
    chosen = [m["strategy.name"] if m["strategy.name"] != _counterpart(m["learner.name"]) else "" for m in methods]
    several = len(set(chosen) - {""}) > 1
    names = [
        m["learner.name"] + (f" + {strategy}" if several and strategy else "")
        for m, strategy in zip(methods, chosen, strict=True)
    ]
    labels = []
    for name, method in zip(names, methods, strict=True):
        rivals = [other for other_name, other in zip(names, methods, strict=True) if other_name == name]
        telling = [key for key in method if 2 * sum(other.get(key) == method[key] for other in rivals) <= len(rivals)]
        settings = ", ".join(f"{key.removeprefix('learner.')}={method[key]}" for key in telling)
        labels.append(f"{name} ({settings})" if settings else name)
    return labels


def _counterpart(learner: str) -> str:
    """The strategy that comes with one of our learners and need not be told; empty where none does."""
    return learner_class(learner).strategy if learner in list_learners() else ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def size(count: float) -> str:
    """Bytes as a person reads them: ``size(1_234_567) == "1.2 MB"`` (powers of 1000)."""
    return Measure("", "", _BYTES).text(count) if count >= 1000 else f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as a person reads them: ``"8.3 s"``, ``"2 min 5 s"``, ``"3 h 20 min"``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
