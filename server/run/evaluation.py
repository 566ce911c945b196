"""Scoring every client on every task, twice: with what it keeps to itself, and with the purely
global model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedknow.protocols.messages import (
    ARRAYS,
    CONFIG,
    EVALUATE,
    KEPT,
    METRICS,
    Arrays,
    Config,
    Message,
    Metrics,
    Record,
    client_of,
)
from fedknow.server.checks.faults import RunError
from fedknow.server.checks.replies import Inspector
from fedknow.server.grids.base import MessageGrid
from fedknow.server.grids.wave import WaveOptions

__all__ = ["GLOBAL_TRAFFIC", "SCORINGS", "Scores", "score_clients"]

Floats = NDArray[np.float64]

SCORINGS = ("personal", "global")
GLOBAL_TRAFFIC = "evaluate.global"
"""Traffic of scoring the purely global model, which no method needs and none is charged with."""


class Scores:
    """All raw results of a run so far.

    Parameters
    ----------
    clients, tasks : int

    Attributes
    ----------
    correct : dict of scoring to float64 [client, seen, trained]
        Test samples classified rightly; NaN: not measured.
    weights : float64 [client, seen]
        Test samples; NaN: not known yet.
    untrained : float64 [client, seen]
        Samples classified rightly before any training; NaN without ``evaluation.forward``.
    """

    def __init__(self, clients: int, tasks: int) -> None:
        self.correct = {
            scoring: np.full((clients, tasks, tasks), np.nan) for scoring in SCORINGS
        }
        self.weights: Floats = np.full((clients, tasks), np.nan)
        self.untrained: Floats = np.full((clients, tasks), np.nan)
        self._steps: list[tuple[int, int, int]] = []
        self._within: dict[str, list[Floats]] = {scoring: [] for scoring in SCORINGS}

    def add_task(self, task: int, correct: Mapping[str, Floats], total: Floats) -> None:
        """Results after a task was finished: ``correct`` and ``total`` are float64 [client, seen].

        Clients of whom there is no result are left as they are.
        """
        self._weigh(total)
        scored = np.isfinite(total).any(axis=1)
        for scoring in SCORINGS:
            self.correct[scoring][scored, :, task] = correct[scoring][scored]

    def add_untrained(self, correct: Floats, total: Floats) -> None:
        """Results before any training, float64 [client, seen]."""
        self._weigh(total)
        self.untrained = correct

    def add_round(
        self, step: tuple[int, int, int], correct: Mapping[str, Floats], total: Floats
    ) -> None:
        """Results within a task; ``step`` is (server round, task, round)."""
        self._weigh(total)
        self._steps.append(step)
        for scoring in SCORINGS:
            self._within[scoring].append(correct[scoring])

    def accuracy(self, scoring: str) -> Floats:
        """Accuracies, float64 [client, seen, trained]."""
        return self.correct[scoring] / self.weights[:, :, None]

    def sizes(self) -> Floats:
        """Sizes of the test sets, float64 [client, seen]; 0 where they are not known yet."""
        return np.nan_to_num(self.weights)

    def raw(self) -> dict[str, np.ndarray]:
        """All that was counted, as arrays by name: enough to make the scores again."""
        shape = (-1, *self.weights.shape)
        return {
            "weights": self.sizes(),
            "correct_untrained": self.untrained,
            "round_steps": np.array(self._steps, dtype=np.int64).reshape(-1, 3),
            **{f"correct_{scoring}": self.correct[scoring] for scoring in SCORINGS},
            **{
                f"round_correct_{scoring}": np.reshape(self._within[scoring], shape)
                for scoring in SCORINGS
            },
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Accuracies and counts by name (:meth:`fedknow.server.run.folder.RunFolder.accuracy` says
        which)."""
        raw = self.raw()
        return {
            **{scoring: self.accuracy(scoring) for scoring in SCORINGS},
            **{
                f"round_{scoring}": raw[f"round_correct_{scoring}"] / self.weights
                for scoring in SCORINGS
            },
            "untrained": self.untrained / self.weights,
            **raw,
        }

    @classmethod
    def from_raw(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Undo :meth:`raw`."""
        clients, tasks = arrays["weights"].shape
        scores = cls(clients, tasks)
        scores.weights = np.where(arrays["weights"] > 0, arrays["weights"], np.nan)
        scores.untrained = arrays["correct_untrained"]
        scores._steps = [(int(a), int(b), int(c)) for a, b, c in arrays["round_steps"]]
        for scoring in SCORINGS:
            scores.correct[scoring] = arrays[f"correct_{scoring}"]
            scores._within[scoring] = list(arrays[f"round_correct_{scoring}"])
        return scores

    def _weigh(self, total: Floats) -> None:
        self.weights = np.where(np.isfinite(total), total, self.weights)


def score_clients(
    grid: MessageGrid,
    options: WaveOptions,
    inspector: Inspector,
    arrays: Arrays,
    task: int,
    tasks: int,
    *,
    both: bool,
    forward: bool = False,
    nodes: Sequence[int] | None = None,
) -> tuple[dict[str, Floats], Floats]:
    """Have every client score the model on the test samples of its tasks.

    Where clients keep parameters to themselves, a second wave scores the purely global model:
    what does not travel is replaced by its mean over the clients, weighted by their test
    samples, in the order of the clients. Where everything travels, both scorings are the same.

    Parameters
    ----------
    grid : MessageGrid
    options : WaveOptions
        What the experiment wants of all its waves; ``inspect`` is the inspector.
    inspector : Inspector
        Is told what the answers must be.
    arrays : Arrays
        Global parameters.
    task : int
        Tasks 0 to ``task`` have been learned.
    tasks : int
        All tasks of the stream.
    both : bool
        Whether the purely global model is scored too (otherwise its results are NaN, where they
        are not the same).
    forward : bool
        Whether tasks not learned yet are scored as well.
    nodes : sequence of int, optional
        Who is scored; by default everybody.

    Returns
    -------
    correct : dict of scoring to float64 [client, seen]
        Samples classified rightly; NaN where a task or client was not scored.
    total : float64 [client, seen]
        Samples.

    Raises
    ------
    RunError
        If no client could be scored, and everybody was to be.
    """
    # Parameters that clients keep come with the first wave, but serve the second.
    scoring_options = replace(
        options, is_measurement=True, record_labels={KEPT: GLOBAL_TRAFFIC}
    )

    def wave(
        scoring: str, extra: Mapping[str, Record], label: str | None, collect: bool
    ) -> list[Message]:
        inspector.expect_scores(tasks if forward else task + 1, collect)
        settings = Config(task=task, scoring=scoring, collect=collect, forward=forward)
        content: dict[str, Record] = {ARRAYS: arrays, **extra, CONFIG: settings}
        work = [
            Message(EVALUATE, node, "", group=str(task), content=content)
            for node in nodes or grid.members()
        ]
        replies = [
            reply
            for reply in grid.exchange(work, replace(scoring_options, label=label))
            if reply.failure is None
        ]
        if not replies and nodes is None:
            raise RunError(
                f"no client could be scored after task {task + 1}; see the failures in metrics.jsonl"
            )
        return replies

    replies = wave("personal", {}, None, both)
    correct, total = _table(replies, grid.clients, tasks)
    if not both:
        return {"personal": correct, "global": np.full_like(correct, np.nan)}, total
    kept = _mean_kept(replies)
    if not kept:
        return {"personal": correct, "global": correct}, total
    shared, _ = _table(
        wave("global", {KEPT: kept}, GLOBAL_TRAFFIC, False), grid.clients, tasks
    )
    return {"personal": correct, "global": shared}, total


def _table(replies: list[Message], clients: int, tasks: int) -> tuple[Floats, Floats]:
    correct, total = (
        np.full((clients, tasks), np.nan),
        np.full((clients, tasks), np.nan),
    )
    for reply in replies:
        metrics = _metrics(reply)
        for table, name in ((correct, "correct"), (total, "total")):
            values = np.atleast_1d(metrics[name])
            table[client_of(reply.node), : len(values)] = values
    return correct, total


def _mean_kept(replies: list[Message]) -> Arrays:
    mean: dict[str, np.ndarray] = {}
    weights = [float(np.sum(_metrics(reply)["num-examples"])) for reply in replies]
    for reply, weight in zip(replies, weights, strict=True):
        record = reply.content.get(KEPT)
        for name, array in (record if isinstance(record, Arrays) else Arrays()).items():
            part = array.astype(np.float64) * (weight / sum(weights))
            mean[name] = mean[name] + part if name in mean else part
    kept = replies[0].content.get(KEPT, Arrays())
    return Arrays(
        (name, value.astype(np.asarray(kept[name]).dtype))
        for name, value in mean.items()
    )


def _metrics(reply: Message) -> Metrics:
    record = reply.content[METRICS]
    assert isinstance(record, Metrics)  # the inspector saw to it
    return record
