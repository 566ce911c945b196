"""Cost of privacy: seconds and bytes of a round.

    python benchmarks/secure.py
    python benchmarks/secure.py --quick

Clients in one process train one step on a few samples, so that masks and noise are most of the
work. Updates are in the clear, masked, noised by each client, or their mean is by the server.
Seconds are processor time of all clients and the server together, the median of the rounds after
the first. Bytes are what a client sends and gets in a round.

AFCL shares its sums once a task. So it is run several times for a task of one round, and the
figures are those of a whole run: from its start to its end, scoring included.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from _common import RESULTS, write

from fedknow.protocols.config import read_config
from fedknow.simulations.simulate import simulate

KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "masks": {"privacy": {"secure": True}},
    "noise of clients": {"privacy": {"clip": 1.0, "noise": 20.0}},
    "noise of the server": {"strategy": {"name": "dp-gaussian", "noise": 20.0}},
}
"""Sections of the experiment, by how updates are protected."""
WIDTH = 1280
"""Features of AFCL's network, as many as MobileNetV2 has."""


@dataclass
class Rounds:
    """What is seen of an experiment's rounds, or of a whole one.

    Attributes
    ----------
    clients : int
        Clients of a round.
    marks : frozenset of str
        Events at which a part begins or ends.
    parameters : int
        Numbers that travel.
    moments : list of float
        Processor time when the run began, and after each round.
    traffic : dict
        Bytes so far, by kind.
    """

    clients: int
    marks: frozenset[str] = frozenset({"start", "round"})
    parameters: int = 0
    moments: list[float] = field(default_factory=list)
    traffic: dict[str, Any] = field(default_factory=dict)

    def watch(self, event: Any) -> None:
        """Take an event of the experiment."""
        if event.event == "start":
            self.parameters = event.travelling
        if event.event in self.marks:
            self.moments.append(time.process_time())
        if event.event in self.marks - {"start"}:
            self.traffic = event.traffic

    def seconds(self) -> list[float]:
        """Give the processor time of each round."""
        return [later - earlier for earlier, later in pairwise(self.moments)]

    def bytes(self, direction: str) -> float:
        """Give the bytes of a client in a round, ``up`` or ``down``."""
        total = sum(
            count[direction]
            for kind, count in self.traffic.items()
            if kind.startswith("train")
        )
        return total / self.clients / (len(self.moments) - 1)


def main() -> None:
    """Measure each size with each protection, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS / "secure.json")
    args = parser.parse_args()
    sizes = (
        [(3, "mlp")] if args.quick else [(10, "mlp"), (30, "mlp"), (10, "cnn6")]
    )
    cases = []
    for clients, model in sizes:
        for kind in KINDS:
            cases.append(case(clients, model, kind, args.rounds))
            print(cases[-1], flush=True)
    clients, width = (3, 64) if args.quick else (10, WIDTH)
    for kind in ("none", "masks"):
        cases.append(sums_case(clients, width, kind, args.rounds))
        print(cases[-1], flush=True)
    write(args.out, {"cases": cases}, rounds=args.rounds)


def case(clients: int, model: str, kind: str, rounds: int) -> dict[str, Any]:
    """Measure the rounds of one experiment."""
    settings = {
        "data": {"samples": 0.02},
        "model": model,
        "train": {"rounds": rounds, "epochs": 1, "batch_size": 64},
        "learner": "fedavg",
        **KINDS[kind],
    }
    seen = run(clients, settings)
    return result("fedavg", kind, seen, seen.seconds()[1:])


def sums_case(clients: int, width: int, kind: str, runs: int) -> dict[str, Any]:
    """Measure a task whose clients share sums, in several runs."""
    settings = {
        "model": {"name": "mlp", "hidden": width, "train": "head"},
        "train": {"rounds": 1},
        "learner": "afcl",
        **KINDS[kind],
    }
    marks = frozenset({"start", "end"})
    seen = [run(clients, settings, marks) for _ in range(runs)]
    each = [rounds.seconds()[0] for rounds in seen[1:]]
    return result("afcl", kind, seen[0], each)


def run(
    clients: int,
    settings: dict[str, Any],
    marks: frozenset[str] = Rounds.marks,
) -> Rounds:
    """Run an experiment of one task on the digits."""
    data = {"name": "digits", "tasks": 1, "clients": clients}
    config = read_config(
        {
            **settings,
            "data": data | settings.get("data", {}),
            "evaluation": {"global_model": False},
            "engine": {"backend": "inline"},
        }
    )
    seen = Rounds(clients, marks)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        simulate(config, out, observers=[seen.watch], report=False)
    return seen


def result(
    learner: str, kind: str, seen: Rounds, seconds: list[float]
) -> dict[str, Any]:
    """Make a line of the results."""
    return {
        "learner": learner,
        "clients": seen.clients,
        "parameters": seen.parameters,
        "protection": kind,
        "seconds": statistics.median(seconds),
        "up": seen.bytes("up"),
        "down": seen.bytes("down"),
    }


if __name__ == "__main__":
    main()
