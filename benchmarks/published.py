"""Reproduce published figures of methods in their published settings.

    python benchmarks/published.py --data-dir DIR
    python benchmarks/published.py --data-dir DIR --only lwf --seeds 3

One client learns streams made of MNIST, with the learners that clients of a federation run. Three
publications are followed. What they state is done as stated: tasks, samples, network, initial
weights, optimizer, rate, batches, passes and memory. ``docs/evidence/verified.md`` lists what
differs nevertheless.

- Rotations: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS
  2017, the table of MNIST rotations by passes, one pass.
- Permutations: Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019, the
  table of permuted MNIST.
- Split: van de Ven and Tolias, "Three scenarios for continual learning", 2019, the table of split
  MNIST, task-incremental.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, write
from _mnist_streams import (
    Mnist,
    Stage,
    load_mnist,
    permutations,
    rotations,
    split,
)
from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners import learner_class
from fedknow.client.learners.frames.learner import Learner, Round
from fedknow.client.models import build_model
from fedknow.protocols.config import ModelConfig, TrainConfig
from fedknow.protocols.seeds import integer
from fedknow.server.reports.measures import estimate


@dataclass(frozen=True)
class Publication:
    """A published setting.

    Attributes
    ----------
    stages : callable
        Makes the stream from the data and a seed.
    hidden : int
        Width of each of the two hidden layers.
    train : TrainConfig
        How a task is trained, but for the rate.
    start : callable
        Draws a layer's initial weights.
    """

    stages: Callable[[Mnist, int], list[Stage]]
    hidden: int
    train: TrainConfig
    start: Callable[[nn.Linear], None]


@dataclass(frozen=True)
class Case:
    """A published figure.

    Attributes
    ----------
    name : str
        What the case is called.
    publication, learner : str
        Where it stands, and the learner that has it here.
    lr : float
        The published rate.
    accuracy : float
        The published average accuracy after the last task, in percent.
    spread : float
        What the publication gives after it; NaN where it gives none.
    settings : mapping
        Of the learner.
    """

    name: str
    publication: str
    learner: str
    lr: float
    accuracy: float
    spread: float = math.nan
    settings: Mapping[str, Any] = field(default_factory=dict)


# --- initial weights


def _xavier(layer: nn.Linear) -> None:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


def _truncated(layer: nn.Linear) -> None:
    nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2)
    nn.init.constant_(layer.bias, 0.1)


def _pytorchs(layer: nn.Linear) -> None:
    layer.reset_parameters()


def _training(**settings: Any) -> TrainConfig:
    return TrainConfig(rounds=1, weight_decay=0.0, **settings)


ONCE = _training(epochs=1, batch_size=10, optimizer="sgd")
PUBLICATIONS = {
    "rotations": Publication(rotations, 100, ONCE, _xavier),
    "permutations": Publication(permutations, 256, ONCE, _truncated),
    # 2,000 batches of 128 are 21.3 passes over the mean task.
    "split": Publication(
        split,
        400,
        _training(epochs=21, batch_size=128, optimizer="adam"),
        _pytorchs,
    ),
}
CASES = (
    Case("rotations, plain", "rotations", "finetune", 0.003, 53.0),
    Case("permutations, plain", "permutations", "finetune", 0.03, 53.5, 1.46),
    Case(
        "permutations, er, 1 a class",
        "permutations",
        "er",
        0.1,
        70.2,
        0.56,
        {"memory": 0.01, "memory_floor": 1, "memory_batch": 10},
    ),
    Case(
        "permutations, er, 15 a class",
        "permutations",
        "er",
        0.1,
        79.4,
        0.43,
        {"memory": 0.15, "memory_batch": 10},
    ),
    Case(
        "permutations, agem, 1 a class",
        "permutations",
        "agem",
        0.1,
        62.1,
        1.39,
        {"memory": 0.01, "memory_floor": 1, "memory_batch": 256},
    ),
    Case(
        "permutations, agem, 15 a class",
        "permutations",
        "agem",
        0.1,
        66.0,
        1.78,
        {"memory": 0.15, "memory_batch": 256},
    ),
    Case("split, plain", "split", "finetune", 0.001, 87.19, 0.94),
    Case(
        "split, lwf",
        "split",
        "lwf",
        0.001,
        99.57,
        0.02,
        # Its weights 1 / k and 1 - 1 / k, and T^2 on the mean over old tasks, are T^2 here: Adam
        # does not see the common factor.
        {"strength": 4.0, "temperature": 2.0},
    ),
    Case(
        "rotations, gem",
        "rotations",
        "gem",
        0.1,
        86.0,
        settings={"memory": 0.256, "margin": 0.5},
    ),
    Case("split, ewc", "split", "ewc", 0.001, 98.64, 0.22, {"strength": 1e7}),
    Case(
        "split, online-ewc",
        "split",
        "online-ewc",
        0.001,
        99.12,
        0.11,
        # gamma also weighs the penalty there.
        {"strength": 0.8e8, "gamma": 0.8},
    ),
)


def main() -> None:
    """Run the cases, and write their accuracies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--only", default="", help="a part of the cases' names")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "published.json")
    args = parser.parse_args()
    # Threads of small matrices only wait for each other.
    torch.set_num_threads(1)
    data = load_mnist(args.data_dir)
    rows = []
    for case in CASES:
        if args.only in case.name:
            rows.append(row_of(case, data, range(args.seeds)))
            # After each case, so that an interrupted call keeps what it has.
            write(args.out, {"table": rows})


def row_of(case: Case, data: Mnist, seeds: Sequence[int]) -> dict[str, Any]:
    """Run a case with some seeds."""
    begin = time.perf_counter()
    values = [100 * accuracy(case, data, seed) for seed in seeds]
    point = estimate(values)
    row = {
        "case": case.name,
        "learner": case.learner,
        "settings": dict(case.settings),
        "lr": case.lr,
        "published": case.accuracy,
        "published_spread": None if math.isnan(case.spread) else case.spread,
        "accuracy": values,
        "mean": point.mean,
        "half_interval_95": None if math.isnan(point.half) else point.half,
        "difference": point.mean - case.accuracy,
        "seconds": time.perf_counter() - begin,
    }
    print(f"{case.name}: {values}, published {case.accuracy}", flush=True)
    return row


def accuracy(case: Case, data: Mnist, seed: int) -> float:
    """Train a case's stream; gives the mean accuracy over all its tasks."""
    publication = PUBLICATIONS[case.publication]
    stages = publication.stages(data, seed)
    kind = learner_class(case.learner)
    train = publication.train.model_copy(update={"lr": case.lr})
    learner = kind(
        _model(publication, seed), train, kind.Settings(**case.settings)
    )
    for number, (stage, task) in enumerate(
        zip(stages, _tasks(stages, data), strict=True)
    ):
        draw = integer(seed, "published/batches", number)
        learner.fit(task, Round(1, draw))
        # Nothing comes after the last task, so that nothing needs to be kept of it.
        if stage is not stages[-1]:
            learner.end_task(task, Round(0, draw))
    return float(np.mean([_score(learner, stage, data) for stage in stages]))


def _model(publication: Publication, seed: int) -> nn.Module:
    config = ModelConfig(name="mlp", hidden=publication.hidden, layers=2)
    model = build_model(config, (1, 28, 28), 10, seed)
    with torch.random.fork_rng():
        torch.manual_seed(integer(seed, "published/weights"))
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                publication.start(layer)
    return model


def _tasks(stages: Sequence[Stage], data: Mnist) -> Iterator[TaskData]:
    images, labels = data.train
    seen: tuple[int, ...] = ()
    for number, stage in enumerate(stages):
        seen = tuple(dict.fromkeys((*seen, *stage.classes)))
        part = Split(stage.change(images[stage.train]), labels[stage.train])
        yield TaskData(number, stage.classes, seen, part, part)


@torch.no_grad()
def _score(learner: Learner, stage: Stage, data: Mnist) -> float:
    """Give the accuracy on all test samples of a task's classes."""
    images, labels = data.test
    classes = torch.tensor(stage.classes)
    rows = torch.isin(labels, classes)
    learner.model.eval()
    logits = learner.model(stage.change(images[rows]))[:, classes]
    answers = classes[logits.argmax(1)]
    return (answers == labels[rows]).float().mean().item()


if __name__ == "__main__":
    main()
