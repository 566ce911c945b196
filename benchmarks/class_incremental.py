"""Compare global models over all classes seen so far.

    python benchmarks/class_incremental.py pretrained --data-dir DIR
    python benchmarks/class_incremental.py --list

No sample comes with its task's name. There are ten tasks, ten clients, and Dirichlet splits of
0.5, 0.1 and 0.05. Settings are the defaults. The seeds are 2001 and on, with the classes in an
order of the seed. Given again, the command reads what is finished and goes on. After each
comparison the numbers are written to ``results/class_incremental_CASE.json``, of which
``page.py`` makes the table.

Accuracy is that of the global model on all test samples of all classes seen so far: pooled over
clients, and not a mean of clients' accuracies. *Final* is after the last task, *average* the mean
over what it was after each task.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

# First, as it sets the number of threads before torch is imported.
from _common import RESULTS, machine
from protocol import FIRST_SEED, commit, timed, write

from fedknow.server.reports.summary import summarise
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.compare import RunSeries
from fedknow.simulations.presets import load_preset

ALPHAS = (0.5, 0.1, 0.05)
FIGURES = ("bytes", "bytes_extra", "knowledge_bytes", "flops", "seconds")


@dataclass(frozen=True)
class Case:
    """Methods that share a preset and its settings.

    Attributes
    ----------
    preset : str
        The preset.
    methods : tuple of str
        As ``fedknow compare --learners`` takes them.
    settings : tuple of str
        Changes of the preset.
    seeds : int
        From 2001 on.
    """

    preset: str
    methods: tuple[str, ...]
    settings: tuple[str, ...] = ()
    seeds: int = 3


# A body alone would leave the heads at home, and there is one global model here.
WHOLE = "exchange=all"
CASES: dict[str, tuple[Case, ...]] = {
    "pretrained": (
        Case("cifar100-ci-pretrained", ("afcl",)),
        Case(
            "cifar100-ci-pretrained",
            ("stsa", "stsa@light=true"),
            ("model.random_features=2500",),
        ),
        Case(
            "cifar100-ci-pretrained",
            (
                "fedavg",
                f"er@{WHOLE}",
                f"derpp@{WHOLE}",
                f"glfc@{WHOLE}",
                f"lwf@{WHOLE}",
                f"ewc@{WHOLE}",
                f"mas@{WHOLE}",
                f"fedssi@{WHOLE}",
            ),
            ("train.rounds=5",),
        ),
    ),
}
"""The comparisons, by name."""


def main() -> None:
    """Run one comparison, or list all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", nargs="?", choices=list(CASES))
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/class-incremental")
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.list or args.case is None:
        for name, cases in CASES.items():
            print(name, json.dumps([asdict(case) for case in cases]))
        return
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for alpha in args.alphas:
        for place, case in enumerate(CASES[args.case]):
            out = args.runs / args.case / f"alpha-{alpha:g}" / str(place)
            series = plan(case, alpha, args.data_dir, out)
            failures |= series.run(timed, is_lean=True)
            rows += collect(series, alpha, failures)
            numbers = {
                "about": machine() | {"commit": commit()},
                "cases": [asdict(each) for each in CASES[args.case]],
                "rows": rows,
                "failures": failures,
            }
            write(args.results / f"class_incremental_{args.case}.json", numbers)


def plan(case: Case, alpha: float, data_dir: str, out: Path) -> RunSeries:
    """Plan the runs of a case with one split."""
    settings = [
        "data.class_order=shuffled",
        "engine.backend=inline",
        f"data.alpha={alpha}",
        f"seed={FIRST_SEED}",
        *case.settings,
    ]
    if data_dir:
        settings.append(f"data.dir={data_dir}")
    config = load_preset(case.preset, settings)
    return RunSeries.plan(config, list(case.methods), case.seeds, out)


def collect(
    series: RunSeries, alpha: float, failures: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Give the numbers of each run that ended."""
    stride = len(series.methods)
    for place, path in enumerate(series.plans):
        if path.name in failures:
            continue
        folder = RunFolder.open(path)
        measures = summarise(folder).measures()
        yield {
            "alpha": alpha,
            "method": series.methods[place % stride],
            "seed": series.plans[path].seed,
            **pooled(folder.accuracy()),
            **{key: finite(measures[key]) for key in FIGURES},
        }


def pooled(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Pool the global model's scores over clients.

    Parameters
    ----------
    arrays : dict of str to ndarray
        ``correct_global`` [client, seen, trained] and ``weights`` [client, seen]: samples that
        were told rightly, and all. A run whose parameters all travel has one scoring.

    Returns
    -------
    dict
        ``curve``, accuracy after each task; ``final`` and ``average`` of it; ``forgetting``, mean
        over earlier tasks of the best accuracy less the last.
    """
    name = "correct_global" if "correct_global" in arrays else "correct_personal"
    correct = np.nansum(arrays[name], axis=0)
    total = np.nansum(arrays["weights"], axis=0)
    tasks = len(total)
    curve = [
        float(correct[: task + 1, task].sum() / total[: task + 1].sum())
        for task in range(tasks)
    ]
    each = correct / total[:, None]
    lost = [
        float(each[task, task:].max() - each[task, -1])
        for task in range(tasks - 1)
    ]
    return {
        "curve": curve,
        "final": curve[-1],
        "average": float(np.mean(curve)),
        "forgetting": float(np.mean(lost)) if lost else None,
    }


def finite(value: float) -> float | None:
    """Give a number, or None for one that JSON does not have."""
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main()
