"""Compare synchronous and asynchronous strategies in virtual time.

500 phones and Jetsons come and go.

    FEDKNOW_DATA=DIR python benchmarks/asynchronous.py
    python benchmarks/asynchronous.py --data digits --clients 50 --rounds 4    # a quick look

A stream of two tasks on CIFAR-100, FedAvg clients with 50 images of each, links of 250 kB/s
whose rates differ, devices that are there for ten minutes and away for ten on average. Every
contender may have a tenth of the clients at work at once, and takes as many answers in all:
``synchronous`` waits for the last of a round, ``over-committed`` asks 1.3 times as many and
takes the first, ``semisync`` waits as long as the median synchronous round took, and
``fedbuff`` makes a step of every fifth of a round's answers. ``hours`` are virtual. Accuracy is
looked at during the tasks; hours ``to`` an accuracy are counted from the beginning of the task
to when 95 % of what the synchronous run had at its end is reached.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import RESULTS, write

from fedknow.protocols.config import read_config
from fedknow.simulations.simulate import simulate

if TYPE_CHECKING:
    from fedknow.protocols.config import ExperimentConfig

DATA = {
    "cifar100": {
        "classes_per_task": 20,
        "classes_min": 5,
        "classes_max": 5,
        "samples": 0.02,
        "test_samples": 0.03,
    },
    "digits": {
        "classes_per_task": 5,
        "classes_min": 2,
        "classes_max": 2,
        "samples": 0.1,
        "test_samples": 0.1,
    },
}
DEVICES = [
    *["phone-low"] * 3,
    *["phone-middle"] * 3,
    *["phone-high"] * 2,
    "jetson-nano",
    "jetson-xavier-nx",
]
TRAIN = {"epochs": 2, "batch_size": 10, "optimizer": "sgd", "lr": 0.03}
FLEET = {
    "down": 250e3,
    "up": 250e3,
    "latency": 0.05,
    "link_sigma": 0.7,
    "availability": "markov",
    "online": 600.0,
    "offline": 600.0,
}
"""Bytes and seconds of the links and absences of all contenders."""


def main() -> None:
    """Run the contenders, print a table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=DATA, default="cifar100")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument(
        "--rounds", type=int, default=30, help="synchronous rounds of a task"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "asynchronous.json")
    args = parser.parse_args()
    size = max(5, args.clients // 10)
    fedavg = {
        "name": "fedavg",
        "fraction": 2 * size / args.clients,
    }  # of those who are there: half of them
    runs = {"synchronous": run(args, fedavg, 1)}
    ends = [time for time, *_ in runs["synchronous"]["rounds"]]
    wait = statistics.median(
        end - start for start, end in zip([0.0, *ends], ends, strict=False)
    )
    runs["over-committed"] = run(args, fedavg, 1, over_commit=1.3)
    runs["semisync"] = run(
        args, {"name": "semisync", "deadline": wait, "concurrency": size}, 1
    )
    runs["fedbuff"] = run(
        args, {"name": "fedbuff", "buffer": size // 5, "concurrency": size}, 5
    )
    rows = table(runs)
    for row in rows:
        print(row)
    write(
        args.out,
        {"table": rows, "runs": runs},
        clients=args.clients,
        semisync_deadline=wait,
    )


def configuration(
    args: argparse.Namespace,
    strategy: dict[str, Any],
    rounds: int,
    **fleet: Any,
) -> ExperimentConfig:
    """Return the experiment of one contender."""
    data = {"name": args.data, "tasks": 2, "clients": args.clients}
    engine: dict[str, Any] = {"backend": "inline"}
    # The numbers are the same, and one worker is not worth the start of Ray.
    if args.workers > 1:
        engine = {"backend": "ray", "workers": args.workers}
    return read_config(
        {
            "seed": args.seed,
            "data": data | DATA[args.data],
            "model": "cnn",
            "train": {"rounds": rounds, **TRAIN},
            "learner": "fedavg",
            "strategy": strategy,
            "evaluation": {"every": max(1, rounds // 15)},
            "engine": engine,
            "fleet": {
                "devices": DEVICES * (args.clients // len(DEVICES)),
                **FLEET,
                **fleet,
            },
        }
    )


def run(
    args: argparse.Namespace, strategy: dict[str, Any], steps: int, **fleet: Any
) -> dict[str, Any]:
    """Run one contender.

    It makes so many steps in the place of one synchronous round.
    """
    config = configuration(args, strategy, args.rounds * steps, **fleet)
    events: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        simulate(
            config,
            Path(folder) / "run",
            observers=[lambda event: events.append(event.line())],
        )
    kinds: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        kinds.setdefault(event["event"], []).append(event)
    return {
        "strategy": config.strategy.model_dump(),
        "rounds": [(e["virtual_seconds"], e["clients"]) for e in kinds["round"]],
        "accuracy": [
            (e["task"], e["virtual_seconds"], e["accuracy_global"])
            for e in kinds["evaluation"]
        ],
        "ends": [e["virtual_seconds"] for e in kinds["task_end"]],
        "energy_joules": kinds["task_end"][-1]["energy_joules"],
        "answers": sum(e["clients"] for e in kinds["round"]),
    }


def table(runs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row a contender."""
    rows = []
    levels = [0.95 * reached(runs["synchronous"], task) for task in (0, 1)]
    for name, outcome in runs.items():
        row: dict[str, Any] = {
            "contender": name,
            "hours": outcome["ends"][-1] / 3600,
            "answers": outcome["answers"],
        }
        begins = [0.0, *outcome["ends"]]
        for task, level in enumerate(levels):
            times = [
                time
                for t, time, accuracy in outcome["accuracy"]
                if t == task and accuracy >= level
            ]
            row[f"task {task + 1}, %"] = 100 * reached(outcome, task)
            row[f"to {100 * level:.1f} %, hours"] = (
                (times[0] - begins[task]) / 3600 if times else None
            )
        rows.append(row | {"energy, kJ": outcome["energy_joules"] / 1e3})
    return rows


def reached(outcome: dict[str, Any], task: int) -> float:
    """Average accuracy on the tasks seen, when a task ended."""
    return float(
        [accuracy for t, _, accuracy in outcome["accuracy"] if t == task][-1]
    )


if __name__ == "__main__":
    main()
