"""Measure the cost of the framework.

A whole simulated run beside a raw PyTorch loop that takes the same steps.

    FEDKNOW_DATA=DIR python benchmarks/overhead.py    # digits: mlp, cnn; CIFAR-100: cnn6
    python benchmarks/overhead.py --quick --workloads mlp cnn

The run is FedAvg of all clients, one task: rounds, checks, aggregation, events, a checkpoint
after every round, and scoring all clients at the end. The raw loop is what one writes without a
framework: for each client put the global weights into the model, make the optimizer (fused),
draw the same batches, forward, loss, backward, step; then the weighted mean; at the end each
client's test samples. Model, optimizer, memory format, order of samples and what the C library
keeps of freed memory are the run's, and both must end with the same weights, but for rounding.
Each process computes with one thread. `1` is one process (our `inline` grid), `2` is two
workers (Ray) beside a pool of two processes. Both are timed from the end of the first round,
which is warm-up, to the end of the scoring; what we take before the first round and after the
end (start of processes, data; report) is `start` and `report`. With one process the ratio of
processor seconds is given too (`cpu_ratio`), which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import RESULTS, give, in_turn, median, ratio, spent, write
from _raw_loop import Loop, mean, start, work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedknow.protocols.config import ExperimentConfig
    from fedknow.server.run.events import Event

    Outcome = tuple[dict[str, Any], Sequence[Any], list[tuple[float, float]]]

TRAIN = {"weight_decay": 0.0, "epochs": 1}
WORKLOADS: dict[str, dict[str, Any]] = {
    "mlp": {
        "data": {"name": "digits", "tasks": 1, "clients": 10, "partition": "iid"},
        "model": "mlp",
        "train": {
            "rounds": 101,
            "batch_size": 10,
            "optimizer": "sgd",
            "lr": 0.05,
            **TRAIN,
        },
    },
    "cnn": {
        "data": {"name": "digits", "tasks": 1, "clients": 10, "partition": "iid"},
        "model": "cnn",
        "train": {
            "rounds": 61,
            "batch_size": 16,
            "optimizer": "adam",
            "lr": 1e-3,
            **TRAIN,
        },
    },
    "cnn6": {
        "data": {
            "name": "cifar100",
            "tasks": 1,
            "clients": 4,
            "classes_min": 100,
            "classes_max": 100,
            "samples": 0.016,
        },
        "model": {"name": "cnn6", "init": "kaiming"},
        "train": {
            "rounds": 5,
            "batch_size": 40,
            "optimizer": "adam",
            "lr": 1e-3,
            **TRAIN,
        },
    },
}
"""Settings of each run; the others are the defaults."""


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS)
    )
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="three rounds, one repeat"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.json")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run all cases, print a table and write the results."""
    args = read_options()
    if args.case:
        contender, processes, text = args.case
        run = simulated if contender == "ours" else raw
        give(run(json.loads(text), int(processes)))
        return
    results = {}
    print(
        f"{'workload':8} {'processes':>9} {'raw':>8} {'ours':>8} {'ratio':>6} "
        f"{'start':>6} {'report':>6}"
    )
    for workload in args.workloads:
        settings = WORKLOADS[workload]
        if args.quick:
            settings = {**settings, "train": {**settings["train"], "rounds": 3}}
        for processes in args.processes:
            repeats = 1 if args.quick else args.repeats
            row = compare(workload, settings, processes, repeats)
            results[f"{workload}, {processes}"] = row
            print(
                f"{workload:8} {processes:9} {row['raw']:8.2f} {row['ours']:8.2f} "
                f"{row['ratio']:6.3f} "
                f"{row['start']:6.2f} {row['report']:6.2f}",
                flush=True,
            )
    write(args.out, results)


def compare(
    workload: str, settings: dict[str, Any], processes: int, repeats: int
) -> dict[str, Any]:
    """Measure both contenders in turn, and return their figures."""
    cases = {
        contender: [
            sys.executable,
            __file__,
            "--case",
            contender,
            str(processes),
            json.dumps(settings),
        ]
        for contender in ("raw", "ours")
    }
    runs = in_turn(cases, repeats)
    check(workload, runs)
    row: dict[str, Any] = {
        "raw": median(runs["raw"], "seconds"),
        "ours": median(runs["ours"], "seconds"),
        "ratio": ratio(runs["ours"], runs["raw"], "seconds"),
        "steps": runs["raw"][0]["steps"],
    }
    # The processor seconds of workers are not counted.
    if processes == 1:
        row["cpu_ratio"] = ratio(runs["ours"], runs["raw"], "cpu")
    for key in ("start", "report"):
        row[key] = median(runs["ours"], key)
    return row | {"settings": settings, "runs": runs}


def check(workload: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Check that weights and right answers are equal, and so the steps."""
    every_run = list(chain.from_iterable(runs.values()))
    norms = [run["norm"] for run in every_run]
    right = {run["right"] for run in every_run}
    if (
        max(norms) - min(norms) > 1e-3 * max(norms)
        or max(right) - min(right) > 0.01
    ):
        raise SystemExit(
            f"{workload}: the runs do not agree: norms {norms}, accuracies {right}"
        )


def simulated(settings: dict[str, Any], processes: int) -> dict[str, Any]:
    """Do the whole run."""
    from fedknow.client.host import one_thread
    from fedknow.simulations.simulate import simulate

    began, events = time.perf_counter(), []

    def happened(event: Event) -> None:
        events.append((event.event, time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder, one_thread():
        config = configuration(settings, processes)
        result = simulate(config, Path(folder) / "run", observers=[happened])
    start_round = next(event for event in events if event[0] == "round")
    return spent([start_round[1:], events[-1][1:]]) | {
        "start": events[0][1] - began,
        "report": time.perf_counter() - events[-1][1],
        "norm": norm(result.arrays),
        "right": result.summary["accuracy"],
    }


def raw(settings: dict[str, Any], processes: int) -> dict[str, Any]:
    """Take the same steps without a framework."""
    import torch

    config = configuration(settings, 1)
    loop = Loop(config)
    if processes == 1:
        weights, right, ends = loop_in_process(loop, config)
    else:
        weights, right, ends = loop_in_pool(loop, config, processes)
    steps = (
        sum(-(-len(y) // config.train.batch_size) for _, y in loop.data)
        * config.train.rounds
        * config.train.epochs
    )
    arrays = {
        name: torch.as_tensor(value).numpy() for name, value in weights.items()
    }
    return spent(ends) | {
        "norm": norm(arrays),
        "right": right[0] / right[1],
        "steps": steps,
    }


def loop_in_process(loop: Loop, config: ExperimentConfig) -> Outcome:
    """Run the raw loop in this process.

    Returns
    -------
    tuple
        The weights; right answers, and answers; the clocks after the first round and at the end.
    """
    weights = loop.initial()
    clients = range(config.data.clients)
    ends = []
    for round in range(1, config.train.rounds + 1):
        weights = mean([loop.train(weights, clients, round)])
        if round == 1:
            ends.append(clocks())
    right = loop.score(weights, clients)
    ends.append(clocks())
    return weights, right, ends


def loop_in_pool(loop: Loop, config: ExperimentConfig, processes: int) -> Outcome:
    """Run the raw loop in a pool; see :func:`loop_in_process`."""
    weights = loop.initial()
    shares = [
        range(offset, config.data.clients, processes)
        for offset in range(processes)
    ]
    ends = []
    with ProcessPoolExecutor(
        processes, get_context("spawn"), start, (config,)
    ) as pool:

        def on_all(kind: str, round: int) -> list[Any]:
            """Have each process work on its share of the clients."""
            arguments = (kind, weights, round)
            kinds, copies, rounds = ([value] * processes for value in arguments)
            return list(pool.map(work, kinds, copies, shares, rounds))

        for round in range(1, config.train.rounds + 1):
            weights = mean(on_all("train", round))
            if round == 1:
                ends.append(clocks())
        answers = on_all("score", 0)
        ends.append(clocks())
    right = [sum(part) for part in zip(*answers, strict=True)]
    return weights, right, ends


def clocks() -> tuple[float, float]:
    """Read the wall clock and this process's own."""
    return time.perf_counter(), time.process_time()


def configuration(settings: dict[str, Any], processes: int) -> ExperimentConfig:
    """Return the experiment."""
    from fedknow.client.learners import resolve
    from fedknow.protocols.config import read_config

    engine = {
        "backend": "inline" if processes == 1 else "ray",
        "workers": processes,
    }
    return resolve(
        read_config({**settings, "learner": "finetune", "engine": engine})
    )


def norm(arrays: Any) -> float:
    """L2 norm of all weights together."""
    return float(
        sum(float((array.astype(float) ** 2).sum()) for array in arrays.values())
        ** 0.5
    )


if __name__ == "__main__":
    main()
