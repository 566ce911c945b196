"""Measure what counting costs.

Processor time of clients' work with the meter and without it, message by message in turn.

    python benchmarks/cost_model.py --learner fedknow --clients 8 --tasks 3 --rounds 3

prints, for each kind of message and for all, the median of the ratio over the repetitions, and
the rest of it in %.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from contextlib import nullcontext
from importlib import resources
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import torch

from fedknow.client.compute.cost import Cost, Meter
from fedknow.client.data.benchmark import make_benchmark
from fedknow.client.learners import resolve
from fedknow.client.learners.frames.learner import State
from fedknow.client.node import Node
from fedknow.protocols.config import ExperimentConfig, read_config
from fedknow.protocols.messages import (
    ARRAYS,
    CONFIG,
    END_TASK,
    EVALUATE,
    TRAIN,
    Arrays,
    Config,
    Message,
    node_of,
)


class Without(Meter):
    """A meter that does nothing."""

    cost = Cost()
    samples = 0

    def __init__(self) -> None:
        pass

    def message(self) -> Any:  # noqa: D102
        return nullcontext()

    def part(self, key: Any = None) -> Any:  # noqa: D102
        return nullcontext()

    free = declared = message

    def add(self, flops: int = 0, memory: int = 0) -> None:  # noqa: D102
        pass


class Unmetered(Node):
    """A node that counts nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.learner.meter = Without()

    def _costs(self, *_: Any) -> dict[str, float]:
        return {}


def run(
    config: ExperimentConfig, clients: int, tasks: int, rounds: int
) -> dict[str, Counter[str]]:
    """Return processor seconds by kind of message, with counting and without."""
    stream = make_benchmark(config)
    nodes = {"with": Node(config, stream), "without": Unmetered(config, stream)}
    spent: dict[str, Counter[str]] = {name: Counter() for name in nodes}
    states: dict[str, list[State]] = {}
    for name in nodes:
        states[name] = [{} for _ in range(clients)]
    learner = nodes["with"].learner
    learner.load_state_dict({})
    arrays = Arrays(
        (name, tensor.numpy().copy()) for name, tensor in learner.send().items()
    )

    def ask(kind: str, client: int, **settings: Any) -> None:
        message = Message(
            kind,
            node_of(client),
            "work",
            content={ARRAYS: arrays, CONFIG: Config(settings)},
        )
        for name in sorted(nodes, reverse=bool(client % 2)):
            began = time.process_time()
            reply, state = nodes[name].handle(message, states[name][client])
            spent[name][kind] += time.process_time() - began
            assert reply.failure is None, reply.failure
            states[name][client] = state

    for task in range(tasks):
        for client in range(clients):
            for round in range(1, rounds + 1):
                ask(TRAIN, client, task=task, round=round)
            if learner.ends_task:
                ask(END_TASK, client, task=task)
            for _ in range(2):
                ask(EVALUATE, client, task=task, scoring="personal")
    return spent


def _seconds(spent: Counter[str], kind: str) -> float:
    return spent.total() if kind == "all" else spent[kind]


def main() -> None:
    """Measure, and print a line for each kind of message."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--learner", default="fedknow")
    for name, default in (
        ("clients", 8),
        ("tasks", 3),
        ("rounds", 3),
        ("repeat", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    preset = (
        resources.files("fedknow.simulations") / "presets" / f"{args.preset}.toml"
    )
    config = resolve(read_config(str(preset), [f"learner={args.learner}"]))
    run(
        config, 1, 2, 1
    )  # what a process does once, PyTorch's imports among it, is not the meter's
    repeats = [
        run(config, args.clients, args.tasks, args.rounds)
        for _ in range(args.repeat)
    ]
    for kind in (*repeats[0]["with"], "all"):
        pairs = [
            (_seconds(spent["with"], kind), _seconds(spent["without"], kind))
            for spent in repeats
        ]
        share = statistics.median(a / b - 1 for a, b in pairs)
        seconds = statistics.median(b for _, b in pairs)
        print(
            f"{args.preset} {args.learner} {kind}: {share:+.1%} of {seconds:.3f} s"
        )


if __name__ == "__main__":
    main()
