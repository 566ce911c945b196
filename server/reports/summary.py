"""What a run came to, computed from its raw accuracies and its events; tables, reports and comparisons show it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedknow.protocols.config import ExperimentConfig
from fedknow.server import metrics
from fedknow.server.run_folder import RunFolder

__all__ = ["Scoring", "Summary", "summarise"]

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
        """Compute the run's measures by key; NaN where one does not exist."""
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
                (float(client["memory"]) for client in self.clients),
                default=self.client_memory_bytes,
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
            (event["knowledge_bytes"] for event in reversed(events) if event["event"] == "task_end"),
            math.nan,
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
    accuracy, weights, untrained = (
        accuracy[:, :tasks, :tasks],
        weights[:, :tasks],
        untrained[:, :tasks],
    )
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
