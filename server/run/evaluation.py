"""Scoring every client on every task, twice.

The first scoring is with the parameters that a client keeps to itself, the second with the
purely global model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedknow.protocols.messages import (
    EVALUATE,
    KEPT,
    Arrays,
    Message,
    client_of,
    node_of,
)
from fedknow.protocols.seeds import generator
from fedknow.protocols.work import Position, ScoreReport, ScoreWork
from fedknow.server.checks.faults import RunError
from fedknow.server.checks.replies import Inspector
from fedknow.server.grids.base import MessageGrid
from fedknow.server.grids.wave import WaveOptions
from fedknow.server.run.held_out import HeldOutScores
from fedknow.server.run.requests import Scored, ScoreRequest

__all__ = [
    "GLOBAL_TRAFFIC",
    "SCORINGS",
    "ScoreRequest",
    "Scored",
    "Scores",
    "score_clients",
]

Floats = NDArray[np.float64]

SCORINGS = ("personal", "global")
GLOBAL_TRAFFIC = "evaluate.global"
"""Traffic of scoring the purely global model, which no method needs and none is charged with."""


class Scores:
    """All raw results of a run so far.

    Parameters
    ----------
    clients, tasks : int
    sample : sequence of int, optional
        The clients that are scored, ascending; by default all. Only they have a row in the arrays.
    people : int
        People who are held out.

    Attributes
    ----------
    sample : sequence of int, or None
        See the parameter.
    held_out : HeldOutScores
        Results of people who are no clients.
    correct : dict of scoring to float64 [client, seen, trained]
        Test samples classified rightly; NaN: not measured.
    weights : float64 [client, seen]
        Test samples; NaN: not known yet.
    untrained : float64 [client, seen]
        Samples classified rightly before any training; NaN without ``evaluation.forward``.
    """

    def __init__(
        self,
        clients: int,
        tasks: int,
        sample: Sequence[int] | None = None,
        people: int = 0,
    ) -> None:
        self.sample = sample
        self.held_out = HeldOutScores(people, tasks)
        clients = clients if sample is None else len(sample)
        # NaN stands for "not measured"; a 0 would be a score.
        self.correct = {
            scoring: np.full((clients, tasks, tasks), np.nan)
            for scoring in SCORINGS
        }
        self.weights: Floats = np.full((clients, tasks), np.nan)
        self.untrained: Floats = np.full((clients, tasks), np.nan)
        self._steps: list[tuple[int, int, int]] = []
        self._within: dict[str, list[Floats]] = {
            scoring: [] for scoring in SCORINGS
        }

    def add_task(
        self,
        task: int,
        correct: Mapping[str, Floats],
        total: Floats,
    ) -> None:
        """Add results after a task, as float64 [client, seen].

        Clients of whom there is no result are left as they are.
        """
        self._weigh(total)
        # Others keep what they had: with times of their own, clients are scored in several
        # goes.
        scored = np.isfinite(total).any(axis=1)
        for scoring in SCORINGS:
            self.correct[scoring][scored, :, task] = correct[scoring][scored]

    def add_untrained(self, correct: Floats, total: Floats) -> None:
        """Results before any training, float64 [client, seen]."""
        self._weigh(total)
        self.untrained = correct

    def add_round(
        self,
        step: tuple[int, int, int],
        correct: Mapping[str, Floats],
        total: Floats,
    ) -> None:
        """Results within a task; ``step`` is (server round, task, round)."""
        self._weigh(total)
        self._steps.append(step)
        for scoring in SCORINGS:
            self._within[scoring].append(correct[scoring])

    def accuracy(self, scoring: str) -> Floats:
        """Accuracies, float64 [client, seen, trained]."""
        # Right answers and sizes are kept apart: ratios could not be added up again.
        return self.correct[scoring] / self.weights[:, :, None]

    def sizes(self) -> Floats:
        """Sizes of the test sets, float64 [client, seen]; 0: not known yet."""
        # A task without a size has no weight in a mean.
        return np.nan_to_num(self.weights)

    def raw(self) -> dict[str, np.ndarray]:
        """Give all counts as arrays by name: enough for :meth:`from_raw`."""
        shape = (-1, *self.weights.shape)
        sample = {} if self.sample is None else {"clients": self.sample}
        return {
            **{name: np.array(rows, np.int64) for name, rows in sample.items()},
            "weights": self.sizes(),
            "correct_untrained": self.untrained,
            "round_steps": np.array(self._steps, dtype=np.int64).reshape(-1, 3),
            **{
                f"correct_{scoring}": self.correct[scoring]
                for scoring in SCORINGS
            },
            **{
                f"round_correct_{scoring}": np.reshape(
                    self._within[scoring], shape
                )
                for scoring in SCORINGS
            },
            **self.held_out.raw(),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Give accuracies and counts by name.

        :meth:`fedknow.server.run.folder.RunFolder.accuracy` describes them.
        """
        raw = self.raw()
        return {
            **{scoring: self.accuracy(scoring) for scoring in SCORINGS},
            **{
                f"round_{scoring}": raw[f"round_correct_{scoring}"] / self.weights
                for scoring in SCORINGS
            },
            "untrained": self.untrained / self.weights,
            **({"held_out": self.held_out.accuracy()} if self.held_out else {}),
            **raw,
        }

    @classmethod
    def from_raw(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Undo :meth:`raw`."""
        clients, tasks = arrays["weights"].shape
        sample = arrays.get("clients")
        scores = cls(clients, tasks, None if sample is None else sample.tolist())
        # Earlier versions wrote 0 for sizes that were not known.
        scores.weights = np.where(
            arrays["weights"] > 0, arrays["weights"], np.nan
        )
        scores.untrained = arrays["correct_untrained"]
        scores._steps = [
            (int(a), int(b), int(c)) for a, b, c in arrays["round_steps"]
        ]
        for scoring in SCORINGS:
            scores.correct[scoring] = arrays[f"correct_{scoring}"]
            scores._within[scoring] = list(arrays[f"round_correct_{scoring}"])
        scores.held_out = HeldOutScores.from_raw(arrays, tasks)
        return scores

    def _weigh(self, total: Floats) -> None:
        # Sizes are learned with the first scores, and do not change.
        self.weights = np.where(np.isfinite(total), total, self.weights)


def draw_sample(seed: int, clients: int, size: int) -> list[int] | None:
    """Draw the clients that are scored (``evaluation.clients``).

    Parameters
    ----------
    seed : int
        The run's.
    clients : int
        All clients.
    size : int
        How many are scored; 0: all.

    Returns
    -------
    list of int, or None
        The clients, ascending; ``None``: all clients.
    """
    if not size or size >= clients:
        return None
    # Draws of their own, so that scoring fewer clients changes no training.
    drawn = generator(seed, "scored clients").choice(clients, size, replace=False)
    sample: list[int] = np.sort(drawn).tolist()
    return sample


def score_clients(
    grid: MessageGrid,
    options: WaveOptions,
    inspector: Inspector,
    arrays: Arrays,
    request: ScoreRequest,
) -> Scored:
    """Have clients score the model on the test samples of their tasks.

    Where clients keep parameters to themselves, a second wave scores the purely global model:
    what does not travel is replaced by its mean over the clients, weighted by their test
    samples, in the order of the clients; over those of a sample, if there is
    one. Where everything travels, both scorings are the same.

    Parameters
    ----------
    grid : MessageGrid
    options : WaveOptions
        What the experiment wants of all its waves; ``inspect`` is the inspector.
    inspector : Inspector
        Is told what the answers must be.
    arrays : Arrays
        Global parameters.
    request : ScoreRequest

    Returns
    -------
    Scored
        Only clients of the sample have a row.

    Raises
    ------
    RunError
        If no client could be scored, and everybody was to be.
    """
    work = ScoreWork(
        position=Position(request.task),
        parameters=arrays,
        extra=request.extra,
        scoring="personal",
        should_collect=request.with_global,
        has_forward=request.with_later,
    )
    # Parameters that clients keep come with the first wave, but serve the second.
    options = replace(
        options, is_measurement=True, record_labels={KEPT: GLOBAL_TRAFFIC}
    )
    reports = _reports(_wave(grid, options, inspector, request, work))
    rows = range(grid.clients) if request.sample is None else request.sample
    correct, total = _table(reports, rows, request.tasks)
    if not request.with_global:
        missing = np.full_like(correct, np.nan)
        return Scored({"personal": correct, "global": missing}, total, Arrays())
    mean_kept = _mean_kept(list(reports.values()))
    if not mean_kept:
        # Clients keep nothing to themselves, so both scorings are one.
        return Scored({"personal": correct, "global": correct}, total, mean_kept)

    work = replace(
        work, scoring="global", should_collect=False, local_parameters=mean_kept
    )
    # Counted apart, since no method needs this wave.
    options = replace(options, label=GLOBAL_TRAFFIC)
    reports = _reports(_wave(grid, options, inspector, request, work))
    shared, _ = _table(reports, rows, request.tasks)
    return Scored({"personal": correct, "global": shared}, total, mean_kept)


def _wave(
    grid: MessageGrid,
    options: WaveOptions,
    inspector: Inspector,
    request: ScoreRequest,
    work: ScoreWork,
) -> list[Message]:
    """Ask clients to score; gives the good answers."""
    # Tasks to come are scored only for forward transfer, and cost a pass each.
    scored = request.tasks if request.with_later else request.task + 1
    inspector.expect_scores(scored, work.should_collect)
    # One content for all: what clients share is encoded once.
    content = work.to_content()
    addressees = request.nodes or grid.members()
    if request.sample is not None:
        sampled = {node_of(client) for client in request.sample}
        addressees = [node for node in addressees if node in sampled]
    messages = [
        Message(EVALUATE, node, "", group=str(request.task), content=content)
        for node in addressees
    ]
    replies = [
        reply
        for reply in grid.exchange(messages, options)
        if reply.failure is None
    ]
    # Some clients may all be away; that nobody answers at all is a fault.
    if not replies and request.nodes is None:
        raise RunError(
            f"no client could be scored after task {request.task + 1}; "
            "see the failures in metrics.jsonl"
        )
    return replies


def _reports(replies: Sequence[Message]) -> dict[int, ScoreReport]:
    """Read the reports, by client, in the order of clients."""
    return {
        client_of(reply.node): ScoreReport.from_content(reply.content)
        for reply in replies
    }


def _table(
    reports: Mapping[int, ScoreReport], clients: Sequence[int], tasks: int
) -> tuple[Floats, Floats]:
    """Make tables of correct answers and of samples, a row a client."""
    correct = np.full((len(clients), tasks), np.nan)
    total = np.full((len(clients), tasks), np.nan)
    for row, client in enumerate(clients):
        report = reports.get(client)
        if report is None:
            continue
        scores = report.scores
        assert scores is not None  # the inspector saw to it
        correct[row, : len(scores.correct)] = scores.correct
        total[row, : len(scores.total)] = scores.total
    # A task without samples is one that the client does not have.
    is_missing = total == 0
    correct[is_missing] = np.nan
    total[is_missing] = np.nan
    return correct, total


def _mean_kept(reports: Sequence[ScoreReport]) -> Arrays:
    """Average what clients keep to themselves, weighted by their test samples.

    The sum is in float64 and in the order of clients, so that it is the same in every run.
    """
    mean: dict[str, np.ndarray] = {}
    weights = [float(report.examples) for report in reports]
    for report, weight in zip(reports, weights, strict=True):
        for name, array in (report.local_parameters or Arrays()).items():
            # In float64, as the mean of hundreds of float32 loses digits.
            part = array.astype(np.float64) * (weight / sum(weights))
            mean[name] = mean[name] + part if name in mean else part
    # Back to each parameter's own type: clients load it as such.
    original = reports[0].local_parameters or Arrays()
    return Arrays(
        (name, value.astype(original[name].dtype)) for name, value in mean.items()
    )
