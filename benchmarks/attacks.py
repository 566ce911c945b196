"""Accuracy under attack: strategies against hostile clients.

    python benchmarks/attacks.py
    python benchmarks/attacks.py --quick        # two strategies, two attacks, few rounds

Fifteen clients share the ten digits evenly, in one task, and three of them are hostile. The
accuracy is the honest clients', in percent. ``backdoor`` has a second number: the share of the
test images of other classes that the model takes for the backdoor's target once they are
marked.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, write

from fedknow.client.data import make_benchmark
from fedknow.client.data.poison import add_trigger
from fedknow.client.learners import build_learner, resolve
from fedknow.protocols.config import ExperimentConfig, read_config
from fedknow.protocols.hostile import hostile_clients
from fedknow.protocols.messages import Arrays
from fedknow.simulations.simulate import simulate

CLIENTS = 15
HOSTILE = 3
ATTACKS = ("none", "signflip", "scaling", "labelflip", "backdoor", "little")
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedmedian": {},
    "fedtrimmedavg": {"beta": 0.2},
    "krum": {"num_malicious_nodes": HOSTILE},
    "multikrum": {
        "num_malicious_nodes": HOSTILE,
        "num_nodes_to_select": CLIENTS - HOSTILE,
    },
    "bulyan": {"num_malicious_nodes": HOSTILE},
    "centred-clipping": {},
}
QUICK = ("fedavg", "multikrum"), ("none", "signflip", "backdoor")


def main() -> None:
    """Run each strategy under each attack, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "attacks.json")
    args = parser.parse_args()
    strategies, attacks = QUICK if args.quick else (STRATEGIES, ATTACKS)
    rounds, seeds = (2, 1) if args.quick else (args.rounds, args.seeds)
    cases = []
    for strategy in strategies:
        for attack in attacks:
            runs = [case(strategy, attack, rounds, seed) for seed in range(seeds)]
            cases.append({"strategy": strategy, "attack": attack, "runs": runs})
            print(strategy, attack, runs, flush=True)
    write(
        args.out,
        {"cases": cases},
        clients=CLIENTS,
        hostile=HOSTILE,
        rounds=rounds,
    )


def case(strategy: str, attack: str, rounds: int, seed: int) -> dict[str, float]:
    """Run one strategy under one attack."""
    section: dict[str, Any] = {}
    if attack != "none":
        section = {"name": attack, "clients": HOSTILE / CLIENTS}
    config = read_config(
        {
            "seed": seed,
            "data": {
                "name": "digits",
                "tasks": 1,
                "clients": CLIENTS,
                "partition": "iid",
            },
            "model": "mlp",
            "train": {"rounds": rounds, "epochs": 2, "batch_size": 16},
            "learner": "fedavg",
            "strategy": {"name": strategy, **STRATEGIES[strategy]},
            "evaluation": {"global_model": False},
            "engine": {"backend": "inline"},
            "attack": section,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        result = simulate(config, Path(folder) / "run", report=False)
    hostile = hostile_clients(config)
    honest = np.delete(result.accuracy["personal"], hostile, axis=0)
    measures = {"accuracy": 100 * float(honest[:, 0, 0].mean())}
    if attack == "backdoor":
        measures["marked"] = 100 * share_marked(config, result.arrays)
    return measures


def share_marked(config: ExperimentConfig, arrays: Arrays) -> float:
    """Give the share of marked test images that are taken for the target."""
    config = resolve(config)
    stream = make_benchmark(config)
    learner = build_learner(config, stream.spec, stream.classes)
    learner.receive({name: torch.tensor(a) for name, a in arrays.items()})
    learner.model.eval()
    right = total = 0
    for client in range(stream.clients):
        data = stream.task(client, 0)
        images = data.test.x[data.test.y != data.classes[0]]
        with torch.no_grad():
            answers = learner.forward(add_trigger(images)).argmax(1)
        right += int((answers == data.classes[0]).sum())
        total += len(images)
    return right / total


if __name__ == "__main__":
    main()
