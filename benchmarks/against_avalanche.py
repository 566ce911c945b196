"""Compare learners and metrics with Avalanche's.

Do GEM, A-GEM, ER, EWC, online EWC, MAS and LwF come to the same weights? Do the metrics
give the same values for the same answers?

    pip install avalanche-lib    # 0.6.0, in an environment of its own, beside fedknow
    python benchmarks/against_avalanche.py

Three tasks (scikit-learn's digits, with other pixels shuffled in each), one head, a small
network, full batches and plain SGD, so that nothing is left to chance: the same learner alone,
once ours and once Avalanche's plugin on its ``Naive`` strategy, from the same weights. The
distance of the final weights is given relative to how far the method itself moves them: to the
distance between ours and plain fine-tuning.

Where Avalanche's choice is another one it is brought to ours, and each place is marked below:
GEM's constant on the diagonal, EWC's squares of batch means, its lack of the half, MAS's
average over tasks. GEM is compared without a margin, where the paper (ours) and its authors'
code (Avalanche's) differ; EWC with ``labels = "data"``, where our default draws them.

Metrics are taken of answers that were drawn: some right, some wrong, for three clients and five
tasks. Avalanche knows one learner, so a task's accuracy is that of all clients' samples
together, and the average accuracy is put together of Avalanche's accuracies of each client as
``server/run/metrics.py`` says.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _common import write
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners import learner_class
from fedknow.client.learners.frames.learner import Round
from fedknow.client.models import build_model
from fedknow.protocols.config import ModelConfig, TrainConfig

try:
    torch.ops.torchvision.nms  # noqa: B018  (an operator is looked up by asking for it)
except AttributeError:
    # A torchvision whose compiled part does not fit a CPU build of torch cannot be imported.
    for name in ("nms", "qnms"):  # nothing here calls them
        torch.library.define(
            f"torchvision::{name}",
            "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        )

from _avalanche_metrics import metric_distances
from avalanche.benchmarks import tensors_benchmark
from avalanche.training.plugins import (
    AGEMPlugin,
    EvaluationPlugin,
    EWCPlugin,
    GEMPlugin,
    LwFPlugin,
    MASPlugin,
    ReplayPlugin,
    SupervisedPlugin,
)
from avalanche.training.supervised import Naive

SAMPLES, TASKS, EPOCHS, LR = 150, 3, 40, 0.2
STRENGTH = {"ewc": 0.5, "online-ewc": 0.5, "mas": 0.05, "lwf": 1.0}
TOLERANCE = 1e-3
METRICS_TOLERANCE = 1e-12

Task = tuple[Tensor, Tensor]


class Hook(SupervisedPlugin):  # type: ignore[misc]
    """Changes the strategy before and after a task, ahead of later plugins."""

    def __init__(
        self,
        at_start_do: Callable[[Any], None] | None = None,
        at_end_do: Callable[[Any], None] | None = None,
    ) -> None:
        super().__init__()
        self.at_start, self.at_end = at_start_do, at_end_do

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Start of a task."""
        if self.at_start:
            self.at_start(strategy)

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """End of a task."""
        if self.at_end:
            self.at_end(strategy)


def tasks() -> list[Task]:
    """Digits in another permutation of their pixels each."""
    digits = load_digits()
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    y = torch.tensor(digits.target)
    gathered = []
    for task in range(TASKS):
        part = slice(task * SAMPLES, (task + 1) * SAMPLES)
        gathered.append(
            (
                x[part][:, torch.randperm(64, generator=generator)].view(
                    -1, 1, 8, 8
                ),
                y[part],
            )
        )
    return gathered


def train_here(
    name: str, model: nn.Module, data: Sequence[Task], **settings: Any
) -> nn.Module:
    """Train with a learner of ours, alone."""
    kind = learner_class(name)
    train = TrainConfig(
        epochs=EPOCHS,
        batch_size=SAMPLES,
        optimizer="sgd",
        lr=LR,
        weight_decay=0.0,
        channels_last=False,
    )
    learner = kind(copy.deepcopy(model), train, kind.Settings(**settings))
    classes = tuple(range(10))
    for number, (x, y) in enumerate(data):
        task = TaskData(number, classes, classes, Split(x, y), Split(x, y))
        learner.fit(task, Round(1, number))
        learner.end_task(task, Round(0, number))
    return learner.model


def train_in_avalanche(
    name: str, model: nn.Module, data: Sequence[Task]
) -> nn.Module:
    """Train with Avalanche's plugin."""
    model = copy.deepcopy(model)
    # GEM's quadratic program has 1e-3 added to the diagonal: so the loss is made large, and the
    # rate small.
    scale = 1e3 if name == "gem" else 1.0

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return scale * nn.functional.cross_entropy(z, y)

    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LR / scale),
        criterion=loss,
        train_mb_size=SAMPLES,
        train_epochs=EPOCHS,
        plugins=PLUGINS[name](name),
        evaluator=EvaluationPlugin(loggers=[]),
    )
    stream = tensors_benchmark(
        train_tensors=data, test_tensors=data, task_labels=[0] * TASKS
    ).train_stream
    for experience in stream:
        strategy.train(experience, num_workers=0)
    return model


def _gem(name: str) -> list[Any]:
    return [GEMPlugin(SAMPLES, 0.0)]


def _agem(name: str) -> list[Any]:
    """As many samples of each past task: the whole memory, its parts alike."""
    agem = AGEMPlugin(SAMPLES, SAMPLES)
    return [Hook(at_start_do=lambda strategy: _all_of(agem, strategy)), agem]


def _er(name: str) -> list[Any]:
    """Let the whole memory join each batch."""
    replay = ReplayPlugin(mem_size=SAMPLES * TASKS, batch_size=SAMPLES)

    def grow(strategy: Any) -> None:
        replay.batch_size_mem = SAMPLES * strategy.clock.train_exp_counter

    return [Hook(at_start_do=grow), replay]


def _lwf(name: str) -> list[Any]:
    return [LwFPlugin(STRENGTH[name], 2.0)]


def _mas(name: str) -> list[Any]:
    mas = MASPlugin(STRENGTH[name], alpha=0.5)

    def double(strategy: Any) -> None:
        # It keeps the mean of the old importance and the new one, which after the second task
        # is half the sum.
        is_third_task = strategy.clock.train_exp_counter == 2
        mas._lambda = STRENGTH[name] * (2 if is_third_task else 1)

    return [Hook(at_start_do=double), *_per_sample(mas)]


def _ewc(name: str) -> list[Any]:
    # Its penalty has no half, and its importance squares the gradient of a batch: here, of one
    # sample.
    options = {} if name == "ewc" else {"mode": "online", "decay_factor": 0.5}
    return _per_sample(EWCPlugin(STRENGTH[name] / 2, **options))


PLUGINS: dict[str, Callable[[str], list[Any]]] = {
    "gem": _gem,
    "agem": _agem,
    "er": _er,
    "lwf": _lwf,
    "mas": _mas,
    "ewc": _ewc,
    "online-ewc": _ewc,
}
"""Avalanche's plugins for each learner, by our names."""


def _per_sample(plugin: Any) -> list[Any]:
    """Batches of one while a plugin measures importance."""
    return [
        Hook(at_end_do=lambda strategy: setattr(strategy, "train_mb_size", 1)),
        plugin,
        Hook(
            at_end_do=lambda strategy: setattr(strategy, "train_mb_size", SAMPLES)
        ),
    ]


def _all_of(agem: Any, strategy: Any) -> None:
    past_tasks = strategy.clock.train_exp_counter
    if past_tasks:
        # The loader shares its sample size out among tasks. So it gets the whole memory here,
        # as it is built anew.
        agem.sample_size = SAMPLES * (past_tasks + 1)


def distance(a: nn.Module, b: nn.Module) -> float:
    """Between the weights of two models."""
    return (
        torch.cat(
            [
                (p - q).flatten()
                for p, q in zip(a.parameters(), b.parameters(), strict=True)
            ]
        )
        .norm()
        .item()
    )


def our_settings() -> dict[str, dict[str, Any]]:
    """Return the settings of each learner of ours."""
    everything = {"exchange": "none", "memory": 1.0}
    settings: dict[str, dict[str, Any]] = {
        "gem": everything | {"margin": 0.0},
        "agem": everything | {"memory_batch": SAMPLES * TASKS},
        "er": everything | {"memory_batch": SAMPLES * TASKS},
        "ewc": {"labels": "data"},
        "online-ewc": {"labels": "data", "gamma": 0.5},
        "mas": {},
        "lwf": {"temperature": 2.0},
    }
    for name, strength in STRENGTH.items():
        alone = {"exchange": "none", "strength": strength}
        settings[name] = alone | settings[name]
    return settings


def compare_weights() -> dict[str, dict[str, Any]]:
    """Train each learner both ways; print and return how far apart they end."""
    data = tasks()
    start = build_model(ModelConfig(name="mlp", hidden=32), (1, 8, 8), 10, 0)
    finetuned = train_here("finetune", start, data)
    rows = {}
    for name, options in our_settings().items():
        learner = train_here(name, start, data, **options)
        plugin = train_in_avalanche(name, start, data)
        moved = distance(learner, finetuned)
        relative = distance(learner, plugin) / moved
        rows[name] = {
            "relative": relative,
            "method_moves": moved,
            "settings": options,
        }
        print(
            f"{name:11s} {relative:9.1e} of {moved:6.3f}  "
            f"{verdict(relative < TOLERANCE)}",
            flush=True,
        )
    return rows


def compare_metrics() -> dict[str, float]:
    """Take each metric both ways; print and return how far apart they are."""
    distances = metric_distances()
    for name, gap in distances.items():
        print(f"{name:18s} {gap:9.1e}  {verdict(gap < METRICS_TOLERANCE)}")
    return distances


def verdict(is_same: bool) -> str:
    """Return the word for a comparison."""
    return "same" if is_same else "DIFFERENT"


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "against_avalanche.json",
    )
    out = parser.parse_args().out
    torch.set_num_threads(1)
    rows = compare_weights()
    distances = compare_metrics()
    versions = {
        package: version(package)
        for package in ("avalanche-lib", "torchvision", "qpsolvers")
    }
    tolerances = {"tolerance": TOLERANCE, "metrics_tolerance": METRICS_TOLERANCE}
    write(
        out, rows | {"metrics": distances}, compared_with=versions, **tolerances
    )
    # After writing, so that the file shows which learner differs.
    if any(row["relative"] >= TOLERANCE for row in rows.values()):
        raise SystemExit("not the same weights")
    if not all(gap < METRICS_TOLERANCE for gap in distances.values()):
        raise SystemExit("not the same metrics")


if __name__ == "__main__":
    main()
