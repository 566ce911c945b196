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


class Answers:
    """Answers that were drawn: some right, some wrong, of several clients.

    Parameters
    ----------
    clients : int
    count : int
        How many tasks.
    """

    def __init__(self, clients: int, count: int) -> None:
        draws = np.random.default_rng(0)
        self.clients = clients
        self.count = count
        self.sizes = draws.integers(20, 60, (clients, count))
        # Of a right answer; the first model is the untrained one.
        chance = draws.random((clients, count, count + 1))
        self._right: list[list[np.ndarray]] = []
        for client in range(clients):
            of_client = []
            for task in range(count):
                shape = (self.sizes[client, task], count + 1)
                of_client.append(draws.random(shape) < chance[client, task])
            self._right.append(of_client)

    def share(self) -> np.ndarray:
        """Return the share of right answers: client, task seen, model."""
        rows = []
        for of_client in self._right:
            rows.append([answers.mean(0) for answers in of_client])
        return np.array(rows)

    def accuracy(
        self, task: int, model: int, clients: Sequence[int] | None = None
    ) -> float:
        """Return Avalanche's accuracy of a model on a task of some clients."""
        gathered = Accuracy()
        for client in range(self.clients) if clients is None else clients:
            is_right = self._right[client][task][:, model].astype(int)
            answers = torch.from_numpy(is_right)
            gathered.update(answers, torch.ones_like(answers))
        return float(gathered.result())

    def mean_accuracy(self, task: int) -> float:
        """Return the mean over clients after a task, by their samples."""
        a_client, weights = [], []
        for client in range(self.clients):
            seen = [
                self.accuracy(number, task + 1, [client])
                for number in range(task + 1)
            ]
            a_client.append(mean(seen))
            weights.append(float(self.sizes[client, : task + 1].sum()))
        return mean(a_client, weights)

    def change(
        self,
        metric: Any,
        tasks: range,
        start_model: Callable[[int], int],
        end_model: Callable[[int], int],
    ) -> float:
        """Return Avalanche's metric of the change between two models."""
        for task in tasks:
            at_start = self.accuracy(task, start_model(task))
            metric.update(task, at_start, initial=True)
            metric.update(task, self.accuracy(task, end_model(task)))
        return mean(list(metric.result().values()))


def mean(
    values: Sequence[float], weights: Sequence[float] | None = None
) -> float:
    """Return Avalanche's mean."""
    gathered = Mean()
    for value, weight in zip(values, weights or [1.0] * len(values), strict=True):
        gathered.update(value, weight)
    return float(gathered.result())


def theirs_after(answers: Answers, task: int) -> dict[str, float]:
    """Return Avalanche's value of each metric after a task."""
    # Model `task + 1` is the one after the task.
    values = {"average_accuracy": answers.mean_accuracy(task)}
    if not task:
        return values
    past_tasks = range(task)
    for name, metric in (
        ("forgetting", Forgetting()),
        ("backward_transfer", BWT()),
    ):
        values[name] = answers.change(
            metric, past_tasks, lambda seen: seen + 1, lambda _: task + 1
        )
    values["forward_transfer"] = answers.change(
        ForwardTransfer(),
        range(1, task + 1),
        lambda _: 0,
        lambda seen: seen,
    )
    return values


def metric_distances(clients: int = 3, count: int = 5) -> dict[str, float]:
    """Return the largest distance of each of our metrics from Avalanche's.

    The answers are drawn, and the distance is the largest after any task.
    """
    answers = Answers(clients, count)
    share = answers.share()
    untrained, accuracy = share[:, :, 0], share[:, :, 1:]
    weights = answers.sizes.astype(float)
    worst: dict[str, float] = {}
    for task in range(count):
        for name, value in theirs_after(answers, task).items():
            arguments = [accuracy, weights]
            if name == "forward_transfer":
                arguments.append(untrained)
            distance = abs(getattr(metrics, name)(*arguments)[task] - value)
            # Unlike `max`, this keeps what is not a number.
            worst[name] = float(np.maximum(worst.get(name, 0.0), distance))
    return worst
