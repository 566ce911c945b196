"""Measure when it pays to train clients at once.

Seconds a client, one by one and with their weights stacked.

    python benchmarks/vmap_clients.py
    python benchmarks/vmap_clients.py --device cuda

Each case trains the same clients both ways, in turn, with one thread: 50 samples each, batches
of 10, one local epoch. One by one is what a client's node does (`Learner.fit`).
`engine.vectorize = "auto"` is made from the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _common import RESULTS, write

from fedknow.client.compute.device import find_device
from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners import Learner, build_learner
from fedknow.client.learners.frames.learner import Round
from fedknow.client.together import Start, fit_together
from fedknow.protocols.config import read_config

if TYPE_CHECKING:
    from collections.abc import Sequence

CLASSES, SAMPLES = 10, 50
MODELS: dict[str, tuple[int, list[str]]] = {
    "mlp 64, 8x8": (8, ["model=mlp"]),
    "mlp 64, 8x8, Adam": (8, ["model=mlp", "train.optimizer=adam"]),
    "linear": (28, ["model=linear"]),
    "mlp 64": (28, ["model=mlp"]),
    "mlp 64, Adam": (28, ["model=mlp", "train.optimizer=adam"]),
    "mlp 128": (28, ["model=mlp", "model.hidden=128"]),
    "mlp 256": (28, ["model=mlp", "model.hidden=256"]),
    "mlp 512": (28, ["model=mlp", "model.hidden=512"]),
    "cnn, 8x8": (8, ["model=cnn"]),
    "cnn": (28, ["model=cnn"]),
    "cnn6, quarter width": (
        28,
        ["model=cnn6", "model.width=0.25", "model.dropout=false"],
    ),
}
"""Side of the images, and settings."""
CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS)
    )
    parser.add_argument("--clients", nargs="+", type=int, default=CLIENTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = find_device(args.device, "--device")
    results = [
        case(model, clients, args.repeats, device)
        for model, clients in product(args.models, args.clients)
    ]
    name = (
        "vmap_clients.json"
        if args.device == "cpu"
        else f"vmap_clients_{args.device}.json"
    )
    write(
        args.out or RESULTS / name,
        results,
        samples=SAMPLES,
        batch=10,
        repeats=args.repeats,
    )


def case(
    name: str, clients: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    side, width = MODELS[name]
    changes = [
        "learner=fedavg",
        "train.batch_size=10",
        "train.epochs=1",
        "train.optimizer=sgd",
        *width,
    ]
    learner = build_learner(
        read_config({}, changes), (1, side, side), CLASSES, device
    )
    starts = [start(learner, side, client, device) for client in range(clients)]
    seconds: dict[str, list[float]] = {"one": [], "together": []}
    methods = {"one": one_by_one, "together": fit_together}
    for turn in range(repeats + 1):  # the first is warm-up
        for method, train in methods.items():
            began = time.perf_counter()
            train(learner, starts)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[method].append((time.perf_counter() - began) / clients)
    result = {
        "model": name,
        "parameters": sum(p.numel() for p in learner.model.parameters()),
        "clients": clients,
        "one_ms": 1e3 * statistics.median(seconds["one"]),
        "together_ms": 1e3 * statistics.median(seconds["together"]),
        "gain": statistics.median(
            a / b
            for a, b in zip(seconds["one"], seconds["together"], strict=True)
        ),
    }
    print(
        "{model}, {clients} clients: {one_ms:.2f} ms, {together_ms:.2f} ms a client: "
        "{gain:.2f}".format(**result)
    )
    return result


def start(
    learner: Learner, side: int, client: int, device: torch.device
) -> Start:
    generator = torch.Generator().manual_seed(client)
    x = torch.randn(SAMPLES, 1, side, side, generator=generator).to(device)
    y = torch.randint(0, CLASSES, (SAMPLES,), generator=generator).to(device)
    classes = tuple(range(CLASSES))
    return Start(
        learner.send(),
        TaskData(0, classes, classes, Split(x, y), Split(x, y)),
        Round(1, client),
    )


def one_by_one(learner: Learner, starts: Sequence[Start]) -> None:
    for s in starts:
        learner.adopt(s.parameters, s.task.task)
        learner.fit(s.task, s.round)
        learner.send()


if __name__ == "__main__":
    main()
