"""Time small runs in two versions of fedknow, in turn.

    python benchmarks/versions.py --before DIR/.venv/bin/python

DIR is a checkout of an earlier commit with fedknow installed in an environment of its own. Each
version runs the same experiments in one process, several times; the figure is the smallest
processor time, which other work on the machine disturbs least. The cases are those of the aims
a, b and c in ``docs/evidence/benchmarks.md``, made small: steps of FedKNOW, a run of few
clients with a small network, and many clients with little work each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

from _common import RESULTS, give, in_turn, ratio, write

SMALL = {"engine": {"backend": "inline"}, "seed": 0}
FEDKNOW: dict[str, Any] = {
    **SMALL,
    "data": {"name": "_random_pictures:make", "tasks": 3, "clients": 1},
    "model": "cnn6",
    "train": {"rounds": 1, "epochs": 1, "batch_size": 40},
    # The method's values before it was named so, so that both do the same steps.
    "learner": {
        "name": "fedknow",
        "margin": 0.0,
        "temperature": 2.0,
        "post_aggregation": "first-epoch",
    },
}
CASES: dict[str, dict[str, Any]] = {
    "a, FedKNOW": FEDKNOW,
    # Steps of a kind are counted once, which weighs less among more of them.
    "a, four epochs": {
        **FEDKNOW,
        "train": {"rounds": 1, "epochs": 4, "batch_size": 40},
    },
    "b, MLP": {
        **SMALL,
        "data": {
            "name": "digits",
            "tasks": 1,
            "clients": 10,
            "partition": "iid",
        },
        "model": "mlp",
        "train": {
            "rounds": 25,
            "epochs": 1,
            "batch_size": 10,
            "optimizer": "sgd",
        },
        "learner": "fedavg",
    },
    "b, CNN": {
        **SMALL,
        "data": {
            "name": "digits",
            "tasks": 1,
            "clients": 10,
            "partition": "iid",
        },
        "model": "cnn",
        "train": {"rounds": 8, "epochs": 1, "batch_size": 16},
        "learner": "fedavg",
    },
    "c, 100 clients": {
        **SMALL,
        "data": {"name": "digits", "tasks": 1, "clients": 100},
        "model": "mlp",
        "train": {"rounds": 8, "epochs": 1, "batch_size": 64, "optimizer": "sgd"},
        "learner": "fedavg",
    },
}
"""Settings of each run; the others are the defaults."""


def main() -> None:
    """Run all cases with both versions, print a table and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", help="the earlier version's python")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5, help="in each process")
    parser.add_argument("--out", type=Path, default=RESULTS / "versions.json")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        give(smallest(json.loads(args.case[0]), int(args.case[1])))
        return
    if not args.before:
        parser.error("--before is missing")
    rows = {}
    for name, settings in CASES.items():
        rows[name] = row = compare(settings, args)
        print(
            f"{name:16} {row['before']:.3f} {row['now']:.3f} {row['ratio']:.3f}"
        )
    write(args.out, rows)


def compare(settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measure one case with both versions in turn."""
    words = [__file__, "--case", json.dumps(settings), str(args.runs)]
    cases = {"before": [args.before, *words], "now": [sys.executable, *words]}
    runs = in_turn(cases, args.repeats)
    accuracies = {run["accuracy"] for run in chain.from_iterable(runs.values())}
    if len(accuracies) > 1:
        raise SystemExit(f"the versions do not agree: accuracies {accuracies}")
    earlier, current = (shortest(runs[version]) for version in ("before", "now"))
    return {
        "before": earlier,
        "now": current,
        "ratio": current / earlier,
        "median of ratios": ratio(runs["now"], runs["before"], "seconds"),
        "runs": runs,
    }


def shortest(runs: list[dict[str, Any]]) -> float:
    """Return the smallest time of all processes of a version."""
    return min(run["seconds"] for run in runs)


def smallest(settings: dict[str, Any], runs: int) -> dict[str, Any]:
    """Give the smallest processor time of some runs, the first left out."""
    import tempfile

    from fedknow.protocols.config import read_config
    from fedknow.simulations.simulate import simulate

    config = read_config(settings, [], called="the case")
    seconds = []
    for _ in range(runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            result = simulate(config, Path(folder) / "run", report=False)
            seconds.append(time.process_time() - began)
    return {"seconds": min(seconds[1:]), "accuracy": result.summary["accuracy"]}


if __name__ == "__main__":
    main()
