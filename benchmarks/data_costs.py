"""Memory and time of the four presets with data of other kinds.

    python benchmarks/data_costs.py --data-dir DIR
    python benchmarks/data_costs.py har-wharf clinc150 --data-dir DIR

Each run is a process of its own with one thread and an empty cache. Its peak of resident memory
is that of the whole process: Python, the libraries, the data and the clients, one after another.
Seconds depend on what else the machine does; seconds of the processor do less.
Given again, the command measures the named presets anew and keeps what it knows of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import RESULTS, give, machine, measure
from protocol import FIRST_SEED, experiment

import fedknow
from fedknow.server.grids.process_memory import process_peak_mb

PRESETS = ("har-wharf", "speech-digits", "clinc150", "cifar100-pretrained")
LEARNERS = ("fedavg", "fedknow")
KEPT = ("seconds", "client_memory_bytes", "accuracy")
"""Figures of a run's report, beside the peak of its process."""


def main() -> None:
    """Measure the presets, or one run for :func:`main`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--data-dir", default=os.environ.get("FEDKNOW_DATA", ""))
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--out", type=Path, default=RESULTS / "data_costs.json")
    parser.add_argument("--learner", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.learner:
        give(run(args.presets[0], args.learner, args.data_dir, args.seed))
        return
    costs = _measured(args.out)
    for preset in args.presets:
        # Only when a preset is whole: its machine and date hold for all of its rows.
        runs = {
            learner: _in_new_process(preset, learner, args.data_dir, args.seed)
            for learner in LEARNERS
        }
        costs[preset] = {"about": _origin(), "seed": args.seed, "runs": runs}
        _write(args.out, costs)


def run(
    preset: str, learner: str, data_dir: str, seed: int
) -> dict[str, float | None]:
    """Run one learner in this process, and read what it took.

    Returns
    -------
    dict
        Figures of :data:`KEPT`; ``peak_memory_mb``, MB (1e6 bytes); and ``cpu_seconds``, the
        process's own time of all processors, imports included.
    """
    config = fedknow.experiment(
        experiment(preset, data_dir, seed), learner=learner
    )
    with tempfile.TemporaryDirectory() as place:
        measures = fedknow.simulate(config, out=Path(place) / "run").measures
        return {
            **{key: measures[key] for key in KEPT},
            "peak_memory_mb": process_peak_mb(),
            "cpu_seconds": time.process_time(),
        }


def _in_new_process(
    preset: str, learner: str, data_dir: str, seed: int
) -> dict[str, Any]:
    """Run one learner in a fresh process, which finds nothing in its cache."""
    command = [sys.executable, Path(__file__).name, preset]
    command += ["--learner", learner, "--seed", str(seed)]
    # From this folder on, as the process starts in another one.
    command += ["--data-dir", os.path.abspath(data_dir) if data_dir else ""]
    with tempfile.TemporaryDirectory() as cache:
        figures = measure(command, FEDKNOW_CACHE=cache)
    print(preset, learner, json.dumps(figures), flush=True)
    return figures


def _origin() -> dict[str, Any]:
    # Without the folder: it is of one machine alone.
    command = "python benchmarks/data_costs.py --data-dir DIR"
    return machine() | {"command": command}


def _measured(path: Path) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    if path.is_file():
        measured = json.loads(path.read_text("utf-8"))["presets"]
    return measured


def _write(path: Path, costs: dict[str, Any]) -> None:
    in_order = {name: costs[name] for name in PRESETS if name in costs}
    text = json.dumps({"presets": in_order}, indent=1, allow_nan=False)
    path.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
