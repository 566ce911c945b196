"""Measure the effect of keeping freed memory, and of our dropout layer.

`fedknow.client.compute.heap` keeps freed memory for the next step.

    python benchmarks/heap.py                      # synthetic images of CIFAR-10's shape
    python benchmarks/heap.py --quick

Seconds of training (6-layer CNN, batch 40: 16 clients of 50 images; pfl's two-layer CNN, batch
10: one such client) and of scoring 800 images in batches of 256, with glibc's own thresholds
and with ours, and with PyTorch's dropout and ours; each in a process of its own, one thread, in
turn. `pages` is how many the system gave anew in the time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from _common import RESULTS, give, in_turn, median, ratio, write

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedknow.client.data.benchmark import Benchmark
    from fedknow.client.learners.frames.learner import Learner

MODELS = {"cnn6": (40, 800), "two_layer_cnn": (10, 50)}
"""Batch size, and images."""
WAYS: dict[str, dict[str, bool]] = {
    "glibc, nn.Dropout": {"keeps_memory": False, "own_dropout": False},
    "kept, nn.Dropout": {"keeps_memory": True, "own_dropout": False},
    "kept, our dropout": {"keeps_memory": True, "own_dropout": True},
}


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="two fits each, one repeat"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run all cases, print a table and write the results."""
    args = read_options()
    if args.case:
        give(case(**json.loads(args.case)))
        return
    results: dict[str, Any] = {}
    columns = "".join(
        f"{name:>10} {'of first':>8} {'pages':>7}"
        for name in ("fit, ms", "score, ms")
    )
    print(f"{'model':14} {'':18}{columns}")
    for model in MODELS:
        fit_count = 2 if args.quick else 6 if model == "cnn6" else 60
        cases = {
            name: [
                sys.executable,
                __file__,
                "--case",
                json.dumps({"model": model, "fit_count": fit_count, **setting}),
            ]
            for name, setting in WAYS.items()
        }
        runs = in_turn(cases, 1 if args.quick else args.repeats)
        base = next(iter(runs.values()))
        results[model] = {}
        for name, figures in runs.items():
            row: dict[str, Any] = {"runs": figures}
            for work in ("fit", "score"):
                row |= {
                    work: median(figures, work),
                    f"{work}_ratio": ratio(figures, base, work),
                }
                row[f"{work}_pages"] = median(figures, f"{work}_pages")
            results[model][name] = row
            print(f"{model:14} {name:18}", end="")
            for work in ("fit", "score"):
                print(
                    f"{1e3 * row[work]:10.1f} {row[f'{work}_ratio']:8.3f} "
                    f"{row[f'{work}_pages']:7.0f}",
                    end="",
                )
            print(flush=True)
    if not args.quick:
        write(RESULTS / "heap.json", results)


def case(
    model: str, fit_count: int, keeps_memory: bool, own_dropout: bool
) -> dict[str, float]:
    """Return median seconds and pages of fits and scorings, after a warm-up."""
    from fedknow.client.compute.heap import retain_freed_memory

    if keeps_memory:
        # A grid does this in its processes. It comes before torch takes any memory.
        retain_freed_memory()
    import torch

    from fedknow.client.learners.frames.learner import Round

    torch.set_num_threads(1)
    learner, benchmark = finetuning(model, own_dropout)
    task = benchmark.task(0, 0)
    images = MODELS[model][1]
    clients = max(1, images // len(task.train.y))
    weights = learner.send()

    def fit() -> None:
        for _ in range(clients):
            learner.adopt(weights, 0)
            learner.fit(task, Round(0, 0))

    samples = type(task.test)(
        torch.cat([task.train.x] * 16)[:800], torch.cat([task.train.y] * 16)[:800]
    )
    figures: dict[str, float] = {}
    for name, act in {
        "fit": fit,
        "score": lambda: learner.score([samples], [task.head], 256),
    }.items():
        seconds, pages = timed(act, fit_count)
        figures |= {name: seconds, f"{name}_pages": pages}
    return figures


def finetuning(model: str, own_dropout: bool) -> tuple[Learner, Benchmark]:
    """Return a learner with the dropout layer asked for, and its stream."""
    from torch import nn

    from fedknow.client.data import make_benchmark
    from fedknow.client.learners import build_learner, resolve
    from fedknow.client.models import Dropout
    from fedknow.protocols.config import read_config

    batch = MODELS[model][0]
    network = f"parts:{model}" if model == "two_layer_cnn" else model
    changes = [
        "data={name = 'parts:cifar10_like', tasks = 1, clients = 1000, partition = 'iid'}",
        f"model={{name = '{network}'}}",
        f"train={{epochs = 1, batch_size = {batch}, optimizer = 'sgd'}}",
        "train.lr=0.05",
        "train.weight_decay=0",
        "learner=finetune",
    ]
    config = resolve(read_config({}, changes))
    benchmark = make_benchmark(config)
    learner = build_learner(config, benchmark.shape, benchmark.classes)
    for module in learner.model.modules():
        if isinstance(module, nn.Dropout):
            module.__class__ = Dropout if own_dropout else nn.Dropout
    return learner, benchmark


def timed(act: Callable[[], object], times: int) -> tuple[float, float]:
    """Return the median seconds of a call, and of pages taken from the system."""
    act()
    seconds, pages = [], []
    for _ in range(times):
        faults, began = (
            resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
            time.perf_counter(),
        )
        act()
        seconds.append(time.perf_counter() - began)
        pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
    return statistics.median(seconds), statistics.median(pages)


if __name__ == "__main__":
    main()
