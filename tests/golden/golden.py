"""Golden runs: small experiments whose numbers no change of the code may move.

``python tests/golden/golden.py --write`` records them in ``golden.json``. Record only where a
change of numbers is meant, and say in the commit which numbers changed and why. ``--add`` records
the runs that are not in it yet, and on which machine, and leaves all others as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import platform
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from fedknow.client.data import make_benchmark
from fedknow.client.edge.client import EdgeClient
from fedknow.client.learners import learner_class, list_learners, resolve
from fedknow.client.node import Node
from fedknow.protocols.config import ExperimentConfig, read_config
from fedknow.server.run.folder import RunFolder
from fedknow.server.serve import serve
from fedknow.simulations.simulate import simulate

FILE = Path(__file__).with_name("golden.json")
CLIENTS = 3
SCENARIOS = ("task-incremental", "class-incremental")
BASE: dict[str, dict[str, Any]] = {
    "data": {
        "clients": CLIENTS,
        "tasks": 3,
        "classes_per_task": 2,
        "classes_max": 2,
        "test_samples": 0.5,
    },
    "model": {"name": "cnn"},
    "train": {"rounds": 2, "epochs": 2, "batch_size": 16, "lr": 1e-3},
    "strategy": {"name": "fedavg", "fraction": 0.5},
    # Real clients keep their heads at home unless told otherwise.
    "evaluation": {"global_model": True},
    "engine": {"backend": "inline"},
}
FROZEN = ["model.train=head", "model.random_features=64"]
PARTLY = {
    "all": [],
    "head": FROZEN,
    "lora": ["model.train=lora", "model.lora_rank=2"],
}
"""For learners that need a frozen body, or adapters."""
FLEET = [
    'fleet.devices=["phone-low", "phone-high"]',
    "fleet.down=1e6",
    "fleet.up=1e6",
]
SETTINGS: dict[str, list[str]] = {
    "fedknow-plus, no margin": ["learner=fedknow-plus", "learner.margin=0"],
    "fedknow-plus, surrogate": [
        "learner=fedknow-plus",
        "learner.integrator=surrogate",
    ],
    "fedknow-plus, online": ["learner=fedknow-plus", "learner.integrator=online"],
    "fedknow-plus, sum": ["learner=fedknow-plus", "learner.integrator=sum"],
    "fedknow-plus, full path, k = 1": [
        "learner=fedknow-plus",
        "learner.path=full",
        "learner.k=1",
    ],
    "fedknow-plus, part of the batch": [
        "learner=fedknow-plus",
        "learner.restore_from=0.5",
    ],
    "fedknow-plus, extra epoch": [
        "learner=fedknow-plus",
        "learner.post_aggregation=extra-epoch",
        "strategy.fraction=1",
    ],
    "fedknow-plus, first epoch": [
        "learner=fedknow-plus",
        "learner.post_aggregation=first-epoch",
        "strategy.fraction=1",
    ],
    "fedknow-plus, batch norm": [
        "learner=fedknow-plus",
        "model=resnet18",
        "data.tasks=2",
        "train.epochs=1",
    ],
    "fedknow-plus, class-incremental": [
        "learner=fedknow-plus",
        "data.scenario=class-incremental",
    ],
    "fedknow-plus, bf16, sgd": [
        "learner=fedknow-plus",
        "train.precision=bf16",
        "train.optimizer=sgd",
    ],
    "fedavg, fedadam": [
        "learner=fedavg",
        "strategy=fedadam",
        "train.clip_norm=1",
    ],
    "er, fedprox": ["learner=er", "strategy=fedprox", "strategy.proximal_mu=0.1"],
    "gem, shuffled": [
        "learner=gem",
        "data.task_order=shuffled",
        "train.weight_decay=1e-3",
    ],
    "fedavg, vectorized": ["learner=fedavg", "model=mlp", "engine.vectorize=on"],
    "fedknow-plus, fleet": ["learner=fedknow-plus", *FLEET, "fleet.deadline=60"],
    "fedbuff, fleet": [
        "learner=fedrep",
        "strategy=fedbuff",
        "strategy.buffer=2",
        *FLEET,
    ],
    "fedasync, staggered": [
        "learner=ewc",
        "strategy=fedasync",
        "data.arrival=staggered",
        "data.arrival_lag=1",
        *FLEET,
    ],
    "loci, all clients": [
        "learner=loci",
        "strategy.fraction=1",
        "data.task_order=shuffled",
    ],
    "stsa, light": ["learner=stsa", "learner.light=true", *FROZEN],
    "fedrep, staggered": [
        "learner=fedrep",
        "data.arrival=staggered",
        "data.arrival_lag=1",
    ],
}
"""Runs besides one of each learner, in each scenario that it is made for."""
OVER_GRPC = (
    "fedknow, task-incremental",
    "fedknow-plus, task-incremental",
    "fedweit, task-incremental",
    "loci, all clients",
)
WAIT = 120
"""Seconds that no client takes."""


def experiments() -> dict[str, ExperimentConfig]:
    """Give all golden experiments by name."""
    table = {}
    for name in list_learners():
        for scenario in SCENARIOS:
            # Not in all that each is made for: domains come to a learner as classes do.
            if scenario not in learner_class(name).scenarios:
                continue
            table[f"{name}, {scenario}"] = [
                f"learner={name}",
                f"data.scenario={scenario}",
                *PARTLY[learner_class(name).model_train],
            ]
    table |= SETTINGS
    return {
        name: resolve(read_config(BASE, changes))
        for name, changes in table.items()
    }


def machine() -> dict[str, str]:
    """Say what the last bit of a sum may depend on besides our code."""
    return {
        "torch": torch.__version__.partition("+")[0],
        # A build for GPUs has other libraries for the CPU, too.
        "build": torch.version.cuda or torch.version.hip or "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "arithmetic": arithmetic(),
    }


def arithmetic() -> str:
    """Digest what this processor makes of a step of training, bit by bit.

    Two processors of one capability may take other kernels, which sum in another order.
    """
    draws = torch.Generator().manual_seed(0)
    digest = hashlib.sha256()
    for precision in (torch.float32, torch.bfloat16):
        for width in (8, 16, 32):
            x = torch.randn(16, width, 8, 8, generator=draws)
            kernel = torch.randn(2 * width, width, 3, 3, generator=draws)
            weight = torch.randn(10, 2 * width * 16, generator=draws)
            for part in (x, kernel, weight):
                part.requires_grad_()
            with torch.autocast("cpu", precision, precision != torch.float32):
                z = functional.conv2d(x, kernel, padding=1).relu()
                z = functional.linear(
                    functional.max_pool2d(z, 2).flatten(1), weight
                )
            target = torch.arange(16) % 10
            functional.cross_entropy(z.float(), target).backward()
            for part in (x, kernel, weight):
                digest.update(part.grad.numpy().tobytes())
    return digest.hexdigest()[:16]


def run_inline(config: ExperimentConfig, folder: Path) -> Path:
    """Run an experiment in this process; gives its folder."""
    return simulate(config, folder, report=False).folder


def run_grpc(config: ExperimentConfig, folder: Path) -> Path:
    """Run an experiment with real clients, threads of this process; gives its folder."""
    at_work = threading.Lock()

    class OneAtATime:
        """A node; all clients are threads that share torch's generator."""

        def __init__(self, config: ExperimentConfig) -> None:
            with at_work:
                self.node = Node(config, make_benchmark(config))

        def handle(self, message: Any, state: Any) -> Any:
            with at_work:
                return self.node.handle(message, state)

    with ThreadPoolExecutor(CLIENTS) as threads:
        running = []

        def start(port: int) -> None:
            for client in range(CLIENTS):
                state = folder.with_name(f"{folder.name}-state{client}")
                edge = EdgeClient(
                    f"127.0.0.1:{port}", state, client=client, node=OneAtATime
                )
                running.append(threads.submit(asyncio.run, edge.run()))

        serve(config, folder, "127.0.0.1:0", ready=start)
        for client in running:
            client.result(WAIT)
    return folder


def numbers(folder: Path) -> dict[str, Any]:
    """Read what a run came to: accuracies, what was counted, and a digest of the global model."""
    run = RunFolder.open(folder)
    [arrays] = folder.glob("checkpoint/checkpoint-*/arrays.safetensors")
    rounds = [event for event in run.events() if event["event"] == "round"]
    ended = [event for event in run.events() if event["event"] == "task_end"]
    return {
        "accuracy": {
            name: _listed(array) for name, array in sorted(run.accuracy().items())
        },
        "samples": [event["samples"] for event in rounds],
        "flops": [event["flops"] for event in rounds],
        "flops_of_task_ends": [event["flops"] for event in ended],
        "knowledge_bytes": [event["knowledge_bytes"] for event in ended],
        "client_memory_bytes": [
            event["client_memory_bytes"] for event in rounds + ended
        ],
        "traffic": rounds[-1]["traffic"],
        "loss": [event["loss"] for event in rounds],
        "model": hashlib.sha256(arrays.read_bytes()).hexdigest(),
    }


def _listed(array: Any) -> Any:
    """Give an array as nested lists that JSON can hold; NaN becomes None."""
    if array.ndim:
        return [_listed(part) for part in array]
    value = array.item()
    return None if value != value else value


def run_all(table: dict[str, ExperimentConfig]) -> dict[str, Any]:
    """Run experiments and give what came of each."""
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, config) in enumerate(table.items()):
            print(name, file=sys.stderr, flush=True)
            runs[name] = numbers(run_inline(config, Path(folder) / str(i)))
    return runs


def record() -> dict[str, Any]:
    """Run everything and give what came of it."""
    runs = run_all(experiments())
    return {"machine": machine(), "added": {}, "runs": runs}


def add(recorded: dict[str, Any]) -> dict[str, Any]:
    """Run what a record lacks, and note the machine where it is another one."""
    table = experiments()
    lacking = {
        name: config
        for name, config in table.items()
        if name not in recorded["runs"]
    }
    runs = recorded["runs"] | run_all(lacking)
    places = recorded.get("added", {})
    if machine() != recorded["machine"]:
        places |= dict.fromkeys(lacking, machine())
    return {
        "machine": recorded["machine"],
        "added": places,
        # In the order of a record made at once.
        "runs": {name: runs[name] for name in table},
    }


def main() -> None:
    """Record the golden runs."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--add", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = add(json.loads(FILE.read_text())) if arguments.add else record()
    FILE.write_text(
        json.dumps(result, separators=(",", ":")).replace('},"', '},\n"') + "\n"
    )


if __name__ == "__main__":
    main()
