"""One run as the page is told of it, by messages made from its folder."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedknow.protocols.config import ConfigError, ExperimentConfig, read_config
from fedknow.server.run.integrity import open_json, open_text
from fedknow.server.run.pace import Pace
from fedknow.server.watch.locks import is_locked
from fedknow.server.watch.tail import Tail

__all__ = ["Message", "RunView", "encoded"]

Message = dict[str, Any]

FRESH_SECONDS = 60.0
"""A record that grew so lately belongs to a run that goes on, whatever the locks say.

The process may be on another machine, whose locks cannot be seen here.
"""

FIELDS: dict[str, tuple[str, ...]] = {
    "start": (
        "clients",
        "tasks",
        "rounds",
        "learner",
        "strategy",
        "resumed_from",
    ),
    "round": (
        *("task", "round", "clients", "loss", "accuracy", "failures", "seconds"),
        *("peak_memory_mb", "virtual_seconds", "energy_joules"),
    ),
    "evaluation": (
        *(
            "task",
            "round",
            "accuracy",
            "accuracy_global",
            "forgetting",
            "per_task",
        ),
        *("virtual_seconds",),
    ),
    "task_end": ("task", "knowledge_bytes", "server_bytes"),
    "failure": ("client", "task", "round", "fault", "reason"),
    "warning": ("task", "round", "clients", "reason"),
    "forgotten": ("client", "task", "round", "reason"),
    "interrupted": ("task", "round"),
    "end": ("seconds", "accuracy", "accuracy_global", "forgetting"),
}
"""Values of each kind of event that the page shows; the rest stays here."""


class RunView:
    """What there is to tell of one run folder.

    Parameters
    ----------
    path : Path
        The run folder; its configuration is there.
    name : str
        By which messages name the run.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._config: ExperimentConfig | None = None
        self._fingerprint = ""
        self._config_state: tuple[int, int] | None = None
        self._fleet_state: tuple[int, int] | None = None
        self._activity = Tail(path / "activity.jsonl")
        self._state = ""
        self._fault = ""
        self._begin()

    def poll(self) -> list[Message]:
        """Tell what is new since the last call."""
        # First: all other files are read as the configuration says.
        messages = [*self._poll_config()]
        if self._config is not None:
            messages += self._poll_record()
            messages += self._poll_fleet()
            messages += self._poll_activity()
        messages += self._poll_state()
        return [{"run": self._name, **message} for message in messages]

    def _begin(self) -> None:
        """Forget the record; it is read from its beginning."""
        self._record = Tail(self._path / "metrics.jsonl", self._fingerprint)
        self._server_round = 0
        self._last_event = ""
        self._pace = None if self._config is None else Pace(self._config)

    def _poll_config(self) -> Iterator[Message]:
        file = self._path / "config.toml"
        state = _state_of(file)
        if state is None or state == self._config_state:
            return
        # Before it is read: a damaged file is told of once, and not at every look.
        self._config_state = state
        try:
            config = read_config(file)
            _, self._fingerprint = open_text(file.read_text("utf-8"))
        except (ConfigError, ValueError, OSError) as error:
            yield {
                "type": "fault",
                "reason": f"config.toml cannot be read: {error}",
            }
            return
        is_another = self._config is not None
        self._config = config
        self._begin()
        # Another run took the folder's place, and the page must forget the one before.
        if is_another:
            yield {"type": "reset"}
        yield _description(config, self._path)

    def _poll_record(self) -> Iterator[Message]:
        news = self._record.read()
        # A resumed run cuts back its events: the page begins again with those that are left.
        if news.is_anew:
            self._server_round = 0
            self._last_event = ""
            self._pace = Pace(self._config) if self._config else None
            yield {"type": "reset"}
        for event in news.events:
            shown = self._shown(event)
            if shown is not None:
                yield shown
        # Told once, and once more when it is gone.
        if news.fault != self._fault:
            self._fault = news.fault
            yield {"type": "fault", "reason": news.fault}

    def _shown(self, event: Mapping[str, Any]) -> Message | None:
        """Choose what the page shows of an event; ``None`` if nothing."""
        kind = event["event"]
        self._last_event = kind
        # A later version may write kinds that this page does not know.
        if kind not in FIELDS:
            return None
        message = {"type": kind, "time": event.get("time")}
        message |= {key: event[key] for key in FIELDS[kind] if key in event}
        if "traffic" in event:
            message["traffic"] = _bytes_by_purpose(event["traffic"])
        if kind == "round":
            self._server_round = event["server_round"]
            message |= self._progress(event)
        # Evaluations do not say the server's round, which is where they stand on the curve.
        message["at"] = self._server_round
        return message

    def _progress(self, event: Mapping[str, Any]) -> Message:
        if self._pace is None:
            return {}
        self._pace.add(
            event["server_round"],
            event.get("virtual_seconds"),
            event.get("time", math.nan),
        )
        seconds = self._pace.seconds_left()
        return {
            "share": self._pace.position / self._pace.total,
            # JSON has no infinity, which stands for "not known yet".
            "seconds_left": seconds if math.isfinite(seconds) else None,
        }

    def _poll_fleet(self) -> Iterator[Message]:
        file = self._path / "fleet.json"
        state = _state_of(file)
        if state is None or state == self._fleet_state:
            return
        self._fleet_state = state
        try:
            fleet = open_json(file.read_bytes(), self._fingerprint)
        except (ValueError, OSError) as error:
            yield {
                "type": "fault",
                "reason": f"fleet.json cannot be read: {error}",
            }
            return
        yield {"type": "fleet", "clients": fleet.get("clients", [])}

    def _poll_activity(self) -> Iterator[Message]:
        """Pass on who is at work; a damaged file costs no more than that."""
        for line in self._activity.read().events:
            yield {**line, "type": line["event"]}

    def _poll_state(self) -> Iterator[Message]:
        """Tell of the run's state, where it is another than before."""
        state = self._find_state()
        if state != self._state:
            self._state = state
            yield {"type": "state", "state": state}

    def _find_state(self) -> str:
        # Before the lock, which a finished run holds while it writes its report.
        if self._last_event == "end":
            return "complete"
        # The lock ends with the process, however that ends; events cannot tell of a kill.
        if is_locked(self._path / ".lock"):
            return "running"
        if self._last_event == "interrupted":
            return "interrupted"
        try:
            changed = (self._path / "metrics.jsonl").stat().st_mtime
        except FileNotFoundError:
            return "starting"
        return "running" if time.time() - changed < FRESH_SECONDS else "stopped"


def _description(config: ExperimentConfig, path: Path) -> Message:
    """Describe an experiment."""
    return {
        "type": "run",
        "folder": str(path),
        "experiment": config.name,
        "data": config.data.name,
        "clients": config.data.clients,
        "tasks": config.data.tasks,
        "rounds": config.train.rounds,
        "learner": config.learner.name,
        "strategy": config.strategy.name,
        "model": config.model.name,
        "seed": config.seed,
        "is_fleet": bool(config.fleet.devices),
    }


def _bytes_by_purpose(traffic: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Add traffic up by direction and purpose."""
    totals = {"up": 0, "down": 0, "scoring": 0}
    for kind, counts in traffic.items():
        # Scoring is measurement: it is no traffic of the method.
        if kind.startswith("evaluate"):
            totals["scoring"] += counts["up"] + counts["down"]
        else:
            totals["up"] += counts["up"]
            totals["down"] += counts["down"]
    return totals


def _state_of(file: Path) -> tuple[int, int] | None:
    """Describe a file so that a change shows; ``None`` where there is none."""
    try:
        state = os.stat(file)
    except FileNotFoundError:
        return None
    # The inode too: a file that is replaced twice within a clock's tick has the same time.
    return state.st_ino, state.st_mtime_ns


def encoded(message: Message) -> str:
    """Write a message as one line of JSON, without numbers that JSON has not."""
    return json.dumps(message, allow_nan=False, separators=(",", ":"))
