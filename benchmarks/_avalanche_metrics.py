"""Our metrics beside Avalanche's, for ``against_avalanche.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from avalanche.evaluation.metrics import (
    BWT,
    Accuracy,
    Forgetting,
    ForwardTransfer,
    Mean,
)

from fedknow.server.run import metrics


def metric_distances(clients: int = 3, count: int = 5) -> dict[str, float]:
    """Return the largest distance of each of our metrics from Avalanche's.

    The answers are drawn, and the distance is the largest after any task.
    """
    draws = np.random.default_rng(0)
    sizes = draws.integers(20, 60, (clients, count))
    chance = draws.random(
        (clients, count, count + 1)
    )  # of a right answer; the first model is the untrained one
    right = [
        [
            draws.random((sizes[i, u], count + 1)) < chance[i, u]
            for u in range(count)
        ]
        for i in range(clients)
    ]
    share = np.array(
        [[answers.mean(0) for answers in client] for client in right]
    )  # [client, seen, trained + 1]
    untrained, accuracy, weights = (
        share[:, :, 0],
        share[:, :, 1:],
        sizes.astype(float),
    )

    def accuracy_of(
        task: int, model: int, among: Sequence[int] = range(clients)
    ) -> float:
        gathered = Accuracy()
        for client in among:
            answers = torch.from_numpy(right[client][task][:, model].astype(int))
            gathered.update(answers, torch.ones_like(answers))
        return float(gathered.result())

    def mean(
        values: Sequence[float], weights: Sequence[float] | None = None
    ) -> float:
        gathered = Mean()
        for value, weight in zip(
            values, weights or [1.0] * len(values), strict=True
        ):
            gathered.update(value, weight)
        return float(gathered.result())

    def change(
        metric: Any,
        tasks: range,
        start_model: Callable[[int], int],
        end_model: Callable[[int], int],
    ) -> float:
        for task in tasks:
            metric.update(
                task, accuracy_of(task, start_model(task)), initial=True
            )
            metric.update(task, accuracy_of(task, end_model(task)))
        return mean(list(metric.result().values()))

    worst: dict[str, float] = {}
    for m in range(count):  # model m + 1 is the one after task m
        a_client = [
            mean([accuracy_of(u, m + 1, [i]) for u in range(m + 1)])
            for i in range(clients)
        ]
        gathered = {
            "average_accuracy": mean(
                a_client, [float(sizes[i, : m + 1].sum()) for i in range(clients)]
            )
        }
        if m:
            for name, metric in (
                ("forgetting", Forgetting()),
                ("backward_transfer", BWT()),
            ):
                gathered[name] = change(
                    metric, range(m), lambda u: u + 1, lambda u, m=m: m + 1
                )
            gathered["forward_transfer"] = change(
                ForwardTransfer(), range(1, m + 1), lambda u: 0, lambda u: u
            )
        for name, value in gathered.items():
            arguments = (
                (accuracy, weights, untrained)
                if name == "forward_transfer"
                else (accuracy, weights)
            )
            distance_away = abs(getattr(metrics, name)(*arguments)[m] - value)
            worst[name] = float(
                np.maximum(worst.get(name, 0.0), distance_away)
            )  # not a number stays one
    return worst
