"""Count how often FedKNOW's constraints act in the runs of the protocol.

    python benchmarks/protocol_counts.py

It reads the run folders that ``protocol.py`` left, and averages the counts of all rounds in
which there are past tasks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

from _common import RESULTS, write
from protocol import STREAMS

from fedknow.server.reports.summary import Summary, summarise
from fedknow.server.run.folder import RunFolder

COUNTS = ("signature-tasks", "violated", "active", "opposed")


def main() -> None:
    """Write the counts of each stream and method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/protocol"))
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "protocol_steps.json"
    )
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for stream in STREAMS:
        by_learner: dict[str, list[dict[str, float]]] = {}
        for path in sorted((args.runs / stream / "runs").glob("fedknow*")):
            run = summarise(RunFolder.open(path))
            # A run that is still going on would count with what it has.
            if run.status == "complete":
                name = f"{run.config.learner.name} {_variant(run)}".strip()
                by_learner.setdefault(name, []).append(counts(run))
        for name, runs in by_learner.items():
            rows.append({"stream": stream, "method": name, "runs": len(runs)})
            for key in COUNTS:
                rows[-1][key] = fmean(run[key] for run in runs)
    write(args.out, {"table": rows})


def _variant(run: Summary) -> str:
    integrator = run.config.learner.options["integrator"]
    return "" if integrator == "qp" else f"integrator={integrator}"


def counts(run: Summary) -> dict[str, float]:
    """Average a run's counts over the rounds that have past tasks."""
    rounds = [each["metrics"] for each in run.rounds if each["task"]]
    averages = {}
    for key in COUNTS:
        # A method without constraints counts none.
        averages[key] = fmean(each.get(key, 0.0) for each in rounds)
    return averages


if __name__ == "__main__":
    main()
