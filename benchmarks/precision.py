"""Measure if bfloat16 keeps the accuracy.

The same experiments run with `train.precision` "fp32" and "bf16".

    FEDKNOW_DATA=DIR python benchmarks/precision.py
    FEDKNOW_DATA=DIR python benchmarks/precision.py --runs 2    # two runs more than the file has

Each learner and seed is run in both precisions, one after the other, in processes of their own.
Runs that the results have already are not made again, so a long series may be made in pieces;
`--fresh` forgets them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import RESULTS, give, measure, write

from fedknow.server.reports.measures import estimate
from fedknow.server.reports.summary import summarise
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.presets import load_preset
from fedknow.simulations.simulate import simulate

PRECISIONS = ("fp32", "bf16")
FIGURES = ("accuracy", "accuracy_global", "forgetting", "seconds")


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="cifar100-mini")
    parser.add_argument("--learners", nargs="+", default=["fedknow", "fedrep"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="changes of the preset",
    )
    parser.add_argument(
        "--runs", type=int, default=10**6, help="most runs to make now"
    )
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.json")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = read_options()
    if args.case:
        give(run(args.preset, args.case))
        return
    names = (
        json.loads(args.out.read_text())["results"]["runs"]
        if args.out.exists() and not args.fresh
        else []
    )
    have = {(run["seed"], run["learner"], run["precision"]) for run in names}
    pending = [
        case
        for case in itertools.product(
            range(args.seeds), args.learners, PRECISIONS
        )
        if case not in have
    ]
    for seed, learner, precision in pending[: args.runs]:
        changes = [
            f"learner={learner}",
            f"seed={seed}",
            f"train.precision={precision}",
            *args.set,
        ]
        figures = measure(
            [
                sys.executable,
                __file__,
                "--preset",
                args.preset,
                "--case",
                *changes,
            ]
        )
        names.append(
            {"learner": learner, "seed": seed, "precision": precision, **figures}
        )
        print(names[-1], flush=True)
        write(
            args.out,
            {"runs": names, "table": table(names)},
            preset=args.preset,
            changes=args.set,
        )
    for row in table(names):
        print(row)


def run(preset: str, changes: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        simulate(load_preset(preset, changes), Path(folder) / "run", report=False)
        figures = summarise(RunFolder.open(Path(folder) / "run")).measures()
    return {name: figures[name] for name in FIGURES}


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means and 95 % intervals over seeds.

    Of each precision, and of bf16 minus fp32 seed by seed.
    """
    rows: list[dict[str, Any]] = []
    for learner in dict.fromkeys(run["learner"] for run in runs):
        columns = []
        for precision in PRECISIONS:
            key = learner, precision
            columns.append(
                [r for r in runs if (r["learner"], r["precision"]) == key]
            )
            rows.append(
                {"learner": learner, "what": precision} | summary(columns[-1])
            )
        # The last seed's second run may be still to be made.
        pairs = list(zip(*columns, strict=False))
        differences = [difference(fp32, bf16) for fp32, bf16 in pairs]
        rows.append(
            {"learner": learner, "what": "bf16 - fp32"} | summary(differences)
        )
        speedups = [fp32["seconds"] / bf16["seconds"] for fp32, bf16 in pairs]
        rows[-1]["speedup"] = estimate(speedups).mean
    return rows


def difference(fp32: dict[str, Any], bf16: dict[str, Any]) -> dict[str, float]:
    """Return each figure of bf16 minus that of fp32."""
    return {name: bf16[name] - fp32[name] for name in FIGURES}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and half of the interval of each figure."""
    summaries = {}
    for name in FIGURES:
        figure = estimate(run[name] for run in runs)
        half = figure.half if figure.count > 1 else None
        summaries[name] = [figure.mean, half]
    return summaries


if __name__ == "__main__":
    main()
