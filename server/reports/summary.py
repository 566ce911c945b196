"""Numbers of a run, computed from its raw accuracies and its events."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedknow.protocols.config import ExperimentConfig
from fedknow.server.run import metrics
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.integrity import FolderDamaged

__all__ = ["People", "Scoring", "Summary", "summarise"]

Event = Mapping[str, Any]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Scoring:
    """One way of scoring every client.

    All numbers are fractions, NaN where nothing was measured.

    Attributes
    ----------
    matrix : float64 [seen, trained]
        Accuracy on each task after each task, weighted by the clients' test samples.
    average : float64 [trained]
        Average accuracy after each task (:func:`~fedknow.server.run.metrics.average_accuracy`).
    median, trimmed : float64 [trained]
        Averages of clients that one client moves little
        (:func:`~fedknow.server.run.metrics.median_accuracy`,
        :func:`~fedknow.server.run.metrics.trimmed_accuracy`).
    learned, current : float64 [seen]
        Accuracy on each task when it was learned, and after the newest task.
    forgetting, relative, backward, forward : float64 [trained]
        Absolute and relative forgetting, backward and forward transfer after each task; NaN after
        the first.
    """

    matrix: Array
    average: Array
    median: Array
    trimmed: Array
    learned: Array
    current: Array
    forgetting: Array
    relative: Array
    backward: Array
    forward: Array


@dataclass(frozen=True)
class People:
    """People who are held out.

    Attributes
    ----------
    names : tuple of str
    accuracy : float64 [person, seen, trained]
        Of the global model; NaN where a person has no sample.
    weights : float64 [person, seen]
        Samples.
    """

    names: tuple[str, ...] = ()
    accuracy: Array = field(default_factory=lambda: np.empty((0, 0, 0)))
    weights: Array = field(default_factory=lambda: np.empty((0, 0)))

    def by_name(self) -> dict[str, Array]:
        """Give each one's accuracy, float64 [seen, trained]."""
        return dict(zip(self.names, self.accuracy, strict=True))

    @property
    def average(self) -> Array:
        """Average accuracy after each task, float64 [trained]."""
        return metrics.average_accuracy(self.accuracy, self.weights)


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
        The run's ``round``, ``evaluation``, and ``failure``, ``forgotten``, ``membership`` or
        ``warning`` events, oldest first.
    knowledge_bytes : float
        What a client keeps about past tasks after the last task that ended, mean over clients.
    server_bytes : float
        Most that the server's half of the method kept of past tasks and of clients' data when a
        task ended.
    samples : float
        Samples that went forward to be learned from, over all clients, rounds and ends of tasks.
        Extra epochs, replayed samples and samples of a task's end count. NaN where clients did not
        say. Runs of earlier versions did not count those of a task's end, which are then left out.
    flops : float
        Floating point operations of clients' training and of what they do when a task ends, as
        clients count them; NaN where they did not.
    peak_memory_mb : float
        Largest resident memory of each process during the run, added up, MB. It is the machinery's
        as well as the method's. In a process of several runs, what earlier ones left is in it.
    client_memory_bytes : float
        Most memory that a client's training, or its end of a task, needed, as clients count it:
        weights, gradients, activations and what the method keeps. NaN where they did not.
    fleet : mapping
        What the clients' devices did up to the last task that ended (``fleet.json``); empty where
        they have none.
    people : People
        Those who are held out.
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
    people: People = field(default_factory=People)

    def bytes_of(self, start: str, end: str = "") -> int:
        """Count bytes both ways of some kinds of messages.

        Parameters
        ----------
        start, end : str
            How the kinds start and end, for example ``"train"`` and ``".extra"``.
        """
        return sum(
            count["down"] + count["up"]
            # Kinds such as train.extra are parts of the traffic that they begin with.
            for kind, count in self.traffic.items()
            if kind.startswith(start) and kind.endswith(end)
        )

    def measures(self) -> dict[str, float]:
        """Compute the run's measures by key; NaN where one does not exist."""
        personal = self.personal
        shared = self._global_measures()
        return {
            "accuracy": self._newest(personal.average),
            "accuracy_median": self._newest(personal.median),
            "accuracy_trimmed": self._newest(personal.trimmed),
            "accuracy_global": shared.get("accuracy", math.nan),
            "gap": shared.get("gap", math.nan),
            "accuracy_held_out": self._newest(self.people.average)
            if self.people.names
            else math.nan,
            "forgetting": self._newest(personal.forgetting),
            "forgetting_relative": self._newest(personal.relative),
            "backward_transfer": self._newest(personal.backward),
            "forward_transfer": self._newest(personal.forward),
            "forgetting_global": shared.get("forgetting", math.nan),
            "bytes": float(self.bytes_of("train")),
            # Most methods send nothing beside the model: their cells are empty, not zero.
            "bytes_extra": float(self.bytes_of("train", ".extra")) or math.nan,
            "bytes_evaluate": float(self.bytes_of("evaluate")),
            "knowledge_bytes": self.knowledge_bytes,
            "server_bytes": self.server_bytes,
            "samples": self.samples,
            "flops": self.flops,
            "seconds": self.seconds,
            "peak_memory_mb": self.peak_memory_mb,
            "client_memory_bytes": max(
                (float(client["memory"]) for client in self.clients),
                default=self.client_memory_bytes,
            ),
            "virtual_seconds": self.elapsed("virtual_seconds"),
            "communication_seconds": self.elapsed("communication_seconds"),
            "energy_joules": self.elapsed("energy_joules"),
        }

    def _global_measures(self) -> dict[str, float]:
        """Compute what needs a score of the global model; nothing without one."""
        scoring = self.global_model
        if scoring is None:
            return {}
        return {
            "accuracy": self._newest(scoring.average),
            "gap": self._newest(self.personal.average - scoring.average),
            "forgetting": self._newest(scoring.forgetting),
        }

    def _newest(self, values: Array) -> float:
        """Give the value after the newest task; NaN before any."""
        return float(values[self.tasks - 1]) if self.tasks else math.nan

    @property
    def clients(self) -> Sequence[Mapping[str, Any]]:
        """The account of each client's device; empty where they have none."""
        clients: Sequence[Mapping[str, Any]] = self.fleet.get("clients", ())
        return clients

    def elapsed(self, key: str) -> float:
        """Give what has passed on the virtual clock; NaN without one.

        Parameters
        ----------
        key : str
            Field of an event, such as ``"virtual_seconds"``.
        """
        # The clock never goes back, so the later of the two has the larger value.
        return _largest((*self.rounds[-1:], *self.evaluations[-1:]), key)


def summarise(run: RunFolder) -> Summary:
    """Read what a run folder holds, complete or not.

    Raises
    ------
    FolderDamaged
        If a file is not what the run wrote.
    """
    try:
        return _summary(run, run.accuracy(), run.events())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # Its checksums are right: this is no damage, but a mistake of ours.
        if run.fingerprint:
            raise
        reason = f"{type(error).__name__}: {error}"
        raise FolderDamaged(
            f"{run.path}: its events are not those of a run: {reason}"
        ) from error


def _summary(
    run: RunFolder, arrays: Mapping[str, Array], events: Sequence[Event]
) -> Summary:
    by_kind: dict[str, list[Event]] = {}
    for event in events:
        by_kind.setdefault(event["event"], []).append(event)
    rounds = by_kind.get("round", [])
    task_ends = by_kind.get("task_end", [])
    ends = by_kind.get("end", [])
    # Accuracies are [client, task, after task]. A finite column is a task that ended.
    is_scored = np.isfinite(arrays["personal"]).any(axis=(0, 1))
    tasks = int(is_scored.sum())
    has_global = bool(np.isfinite(arrays["global"]).any())
    return Summary(
        config=run.config,
        status=_status(by_kind),
        tasks=tasks,
        # A resumed run has several; what holds for all stands in the oldest.
        start=next(iter(by_kind.get("start", [])), {}),
        personal=_score(arrays, "personal", tasks),
        global_model=_score(arrays, "global", tasks) if has_global else None,
        traffic=_latest(events, "traffic", {}),
        rounds=rounds,
        evaluations=by_kind.get("evaluation", []),
        troubles=[
            event
            for event in events
            if event["event"] in ("failure", "forgotten", "membership", "warning")
        ],
        seconds=ends[0]["seconds"] if ends else _seconds(events),
        knowledge_bytes=_or_nan(_latest(task_ends, "knowledge_bytes", math.nan)),
        server_bytes=_largest(events, "server_bytes"),
        samples=_total(events, "samples", earlier=0.0),
        flops=_total(events, "flops", earlier=math.nan),
        peak_memory_mb=_largest(rounds, "peak_memory_mb"),
        client_memory_bytes=_largest(events, "client_memory_bytes"),
        fleet=_completed(run.fleet),
        people=_people(arrays, by_kind.get("people", [])),
    )


def _people(arrays: Mapping[str, Array], events: Sequence[Event]) -> People:
    """Read the results of people who are held out, if there are any."""
    if not events:
        return People()
    names = tuple(events[0]["people"])
    return People(names, arrays["held_out"], arrays["weights_held_out"])


def _status(kinds: Collection[str]) -> str:
    if "end" in kinds:
        return "complete"
    return "interrupted" if "interrupted" in kinds else "unfinished"


def _latest(events: Sequence[Event], key: str, default: Any) -> Any:
    """Give a field of the latest event that has it."""
    # Counts grow over the run, so the latest has all.
    return next(
        (event[key] for event in reversed(events) if key in event), default
    )


def _total(events: Sequence[Event], key: str, earlier: float) -> float:
    """Add up a field over rounds and ends of tasks.

    Ends of tasks in runs of earlier versions lack the field and count ``earlier``. The sum is
    NaN where clients did not always give it.
    """
    if not any(event["event"] == "round" for event in events):
        return math.nan
    # Runs of earlier versions counted less: a gap in a round makes the sum unknown.
    absent = {"round": math.nan, "task_end": earlier}
    counted = [event for event in events if event["event"] in absent]
    return sum(
        _or_nan(event.get(key, absent[event["event"]])) for event in counted
    )


def _completed(fleet: Mapping[str, Any]) -> Mapping[str, Any]:
    """Complete a fleet's account of an older run.

    Its time away stood with idle, and its waiting was left out.
    """
    if not fleet:
        return fleet
    waiting = (
        fleet["virtual_seconds"]
        - fleet["communication_seconds"]
        - fleet["computing_seconds"]
    )
    # Accounts of earlier versions have no time away.
    clients = [{"away": 0.0, **client} for client in fleet["clients"]]
    # A newer account has its own waiting time, which stands after ours and so wins.
    return {"waiting_seconds": max(0.0, waiting), **fleet, "clients": clients}


def _score(arrays: Mapping[str, Array], name: str, tasks: int) -> Scoring:
    # Tasks to come are NaN, and a mean over them would be, too.
    accuracy = arrays[name][:, :tasks, :tasks]
    weights = arrays["weights"][:, :tasks]
    untrained = arrays["untrained"][:, :tasks]
    matrix = metrics.task_accuracy(accuracy, weights)
    return Scoring(
        matrix=matrix,
        average=metrics.average_accuracy(accuracy, weights),
        median=metrics.median_accuracy(accuracy, weights),
        trimmed=metrics.trimmed_accuracy(accuracy, weights),
        learned=metrics.learned(accuracy, weights),
        current=matrix[:, -1] if tasks else np.array([]),
        forgetting=metrics.forgetting(accuracy, weights),
        relative=metrics.relative_forgetting(accuracy, weights),
        backward=metrics.backward_transfer(accuracy, weights),
        forward=metrics.forward_transfer(accuracy, weights, untrained),
    )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _largest(events: Iterable[Event], key: str) -> float:
    """Give a field's largest value; NaN if there is none, as in older runs."""
    values = [event.get(key) for event in events]
    present = [float(value) for value in values if value is not None]
    return max(present, default=math.nan)


def _seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Add up the time spent running.

    Each start or resumption counts up to the latest event before the next one.
    """
    total = 0.0
    start = 0.0
    latest = 0.0
    for event in events:
        # The pause between a crash and the resumption is no time of the run.
        if event["event"] == "start":
            total += latest - start
            start = event["time"]
        latest = event["time"]
    return total + latest - start
