"""Time a learner written from the README beside the built-in one.

    python benchmarks/own_learner.py            # the whole table
    python benchmarks/own_learner.py --quick    # few rounds, small models

``loss`` is the README's learner, ``gradient`` one that changes gradients; each is compared with
``FedPer``, and is bit by bit the same training. The learners train the same round in turn, in
one process, and the table has the median ratio of their processor times. ``counting`` is
the price of cost counting: FedPer's time with its costs counted over that without.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, write
from torch import Tensor
from torch.nn import functional as F

from fedknow.client.compute.cost import Meter
from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.baselines import FedPer
from fedknow.client.learners.frames.learner import (
    Batch,
    Learner,
    LearnerSettings,
    Round,
)
from fedknow.client.models import build_model
from fedknow.protocols.config import ModelConfig, TrainConfig

CLASSES = 10
MODELS = {"mlp": (1, 28, 28), "cnn": (1, 28, 28), "cnn6": (3, 32, 32)}


class ByLoss(Learner):
    """The README's learner, with no smoothing."""

    exchange = "body"

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy with smoothed labels."""
        return F.cross_entropy(logits, batch.y, label_smoothing=0.0)


class ByGradient(Learner):
    """A learner that has a say in gradients, and leaves them."""

    exchange = "body"

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Plain gradients."""
        return super().gradient(batch)


class Uncounted(FedPer):
    """The built-in learner, whose meter does nothing."""

    class _Silent(Meter):
        def part(self, key: Any = None) -> Any:
            return self.free()

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.meter = self._Silent(self.body)


LEARNERS: dict[str, type[Learner]] = {
    "built-in": FedPer,
    "loss": ByLoss,
    "gradient": ByGradient,
    "uncounted": Uncounted,
}


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "own_learner.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = ["mlp", "cnn"] if args.quick else list(MODELS)
    rounds = 6 if args.quick else args.rounds
    results = {}
    for name in models:
        for precision in ("fp32", "bf16"):
            row = measure(name, precision, rounds, args.samples)
            results[f"{name}, {precision}"] = row
            print(name, precision, row)
    write(args.out, results, rounds=rounds, samples=args.samples, batch=32)


def measure(
    model: str, precision: str, rounds: int, samples: int
) -> dict[str, float]:
    """Train the same rounds with each learner in turn.

    Returns
    -------
    dict
        ``step``: milliseconds a step of the built-in learner; and median ratios of times.
    """
    task = make_task(MODELS[model], samples)
    train = TrainConfig(batch_size=32, epochs=1, precision=precision)
    learners = {
        name: kind(
            build_model(ModelConfig(name=model), MODELS[model], CLASSES, 0),
            train,
            LearnerSettings(),
        )
        for name, kind in LEARNERS.items()
    }
    times: dict[str, list[float]] = {name: [] for name in learners}
    for number in range(rounds + 1):
        order = list(learners)
        # Each goes first as often as the others: what runs before warms the caches.
        for name in order[number % len(order) :] + order[: number % len(order)]:
            began = time.process_time()
            with learners[name].meter.message():
                learners[name].fit(task, Round(1, number))
            times[name].append(time.process_time() - began)
    steps = -(-samples // train.batch_size)
    # The first round counts each kind of step once, and is left out.
    base = times["built-in"][1:]
    return {
        "step": 1000 * statistics.median(base) / steps,
        "loss": ratio(times["loss"][1:], base),
        "gradient": ratio(times["gradient"][1:], base),
        "counting": ratio(base, times["uncounted"][1:]),
    }


def ratio(times: list[float], base: list[float]) -> float:
    """Return the median ratio, round by round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def make_task(shape: tuple[int, int, int], samples: int) -> TaskData:
    """Make a task of random images."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(samples, *shape, generator=draws)
    split = Split(x, torch.arange(samples) % CLASSES)
    classes = tuple(range(CLASSES))
    return TaskData(0, classes, classes, split, split, False)


if __name__ == "__main__":
    main()
