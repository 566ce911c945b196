"""Scoring clients, and ending tasks that are over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedknow.protocols.flower import to_record
from fedknow.protocols.messages import (
    END_TASK,
    Message,
    client_of,
    node_of,
)
from fedknow.protocols.work import FLOPS, EndTaskReport, EndTaskWork, Position
from fedknow.server.checks.aggregates import check_arrays
from fedknow.server.checks.faults import RunError
from fedknow.server.run import metrics
from fedknow.server.run.context import RunContext
from fedknow.server.run.evaluation import (
    Scored,
    ScoreRequest,
    score_clients,
)
from fedknow.server.run.events import Evaluated, TaskEnded, VirtualTime, Warned
from fedknow.server.run.exchange import choose_ending
from fedknow.server.run.held_out import HeldOutScorer
from fedknow.strategies.paired import PairedStrategy

__all__ = ["Scorer", "TaskEnder"]

StrategyEvaluation = Callable[[int, int], Mapping[str, Any]]
"""Given task and round, lets the strategy evaluate; gives the metrics that it aggregated."""


class Scorer:
    """Has clients score the global model, and keeps the results.

    Parameters
    ----------
    run : RunContext
    evaluate_strategy : callable
        The strategy's own evaluation.
    """

    def __init__(
        self, run: RunContext, evaluate_strategy: StrategyEvaluation
    ) -> None:
        self._run = run
        self._evaluate_strategy = evaluate_strategy
        self._people = HeldOutScorer(run.parts.config, run.parts.stream)
        # The same clients all the time: forgetting compares a client with itself.
        self._sample = run.state.scores.sample

    def score_untrained(self) -> None:
        """Score every client on every task before any training."""
        run = self._run
        # Task 0, round 0: failures of this wave belong to no round.
        run.incidents.inspector.begin(0, 0, run.state.arrays)
        request = ScoreRequest(0, run.parts.config.data.tasks, with_later=True)
        correct, total, _ = self._score(request)
        # Forward transfer compares with it: what a model knows of a task before any training.
        run.state.scores.add_untrained(correct["personal"], total)

    def evaluate(self, task: int, round: int, is_over: bool) -> None:
        """Score every client, and let the strategy do an evaluation of its own.

        Parameters
        ----------
        task, round : int
        is_over : bool
            Whether the task is over for all clients.
        """
        began = time.perf_counter()
        run = self._run
        scores = run.state.scores
        run.incidents.inspector.begin(task, round, run.state.arrays)
        # Before our own scoring, which tells the inspector to expect other metrics.
        aggregated = self._evaluate_strategy(task, round)
        evaluation = run.parts.config.evaluation
        request = ScoreRequest(
            task,
            run.parts.config.data.tasks,
            with_global=evaluation.global_model,
            with_later=evaluation.forward,
        )
        correct, total, means = self._score(request)
        people = None
        if is_over:
            scores.add_task(task, correct, total)
            people = self._people.score(
                task, scores.held_out, run.state.arrays, means
            )
        else:
            scores.add_round(
                (run.state.server_round, task, round), correct, total
            )
        run.folder.write_accuracy(scores.arrays())
        accuracies = {}
        for scoring, values in correct.items():
            accuracies[scoring] = scores.accuracy(scoring)
            # Within a task the table has no column for it yet.
            accuracies[scoring][:, :, task] = values / scores.weights
        self._record(task, round, accuracies, aggregated, began)
        if people is not None:
            run.recorder.record(people)

    def evaluate_within(self, task: int, round: int) -> None:
        """Score clients between two rounds of a strategy's loop.

        Clients at work cannot be asked; a warning says so.
        """
        # A client at work cannot be scored, and a mean without it would not compare.
        if self._run.grid.is_occupied:
            reason = (
                "clients are at work, and are not scored before the task is over"
            )
            self._run.recorder.record(
                Warned(task=task, round=round, reason=reason)
            )
        else:
            self.evaluate(task, round, is_over=False)

    def score_some(
        self, task: int, round: int, nodes: Sequence[int] | None, is_last: bool
    ) -> None:
        """Score clients for whom a task is over; others may still be at it.

        The purely global model is not scored, as that takes what all clients keep at one moment.

        Parameters
        ----------
        task, round : int
        nodes : sequence of int, or None
            Theirs; ``None``: everybody's.
        is_last : bool
            Whether the task is over for all clients now, so that the results are told.
        """
        began = time.perf_counter()
        run = self._run
        scores = run.state.scores
        run.incidents.inspector.begin(task, round, run.state.arrays)
        config = run.parts.config
        request = ScoreRequest(
            task,
            config.data.tasks,
            with_later=config.evaluation.forward,
            nodes=nodes,
        )
        correct, total, _ = self._score(request)
        scores.add_task(task, correct, total)
        run.folder.write_accuracy(scores.arrays())
        if is_last:
            accuracies = {
                scoring: scores.accuracy(scoring) for scoring in correct
            }
            self._record(task, round, accuracies, {}, began)

    def _score(self, request: ScoreRequest) -> Scored:
        run = self._run
        inspector = run.incidents.inspector
        arrays = run.state.arrays
        strategy = run.parts.strategy
        extra = None
        if isinstance(strategy, PairedStrategy):
            with run.calls.call("extra_to_score", request.task, 0):
                extra = strategy.extra_to_score()
        request = replace(request, sample=self._sample, extra=extra)
        return score_clients(run.grid, run.options, inspector, arrays, request)

    def _record(
        self,
        task: int,
        round: int,
        accuracies: Mapping[str, np.ndarray],
        aggregated: Mapping[str, Any],
        began: float,
    ) -> None:
        weights = self._run.state.scores.sizes()
        personal = accuracies["personal"]
        per_task = metrics.task_accuracy(personal, weights)
        self._run.recorder.record(
            Evaluated(
                task=task,
                round=round,
                accuracy=metrics.average_accuracy(personal, weights)[task],
                accuracy_global=metrics.average_accuracy(
                    accuracies["global"], weights
                )[task],
                accuracy_median=metrics.median_accuracy(personal, weights)[task],
                accuracy_trimmed=metrics.trimmed_accuracy(personal, weights)[
                    task
                ],
                is_claimed=not self._run.incidents.claims.are_known,
                forgetting=metrics.forgetting(accuracies["personal"], weights)[
                    task
                ],
                accuracy_margin=self._margin(personal, weights, task),
                per_task=tuple(per_task[: task + 1, task].tolist()),
                metrics=dict(aggregated),
                seconds=time.perf_counter() - began,
                elapsed=VirtualTime.read(self._run.grid.elapsed()),
            )
        )

    def _margin(
        self, accuracy: np.ndarray, weights: np.ndarray, task: int
    ) -> float | None:
        """Return how far the accuracy of a sample may be from that of all."""
        if self._sample is None:
            return None
        clients = self._run.parts.config.data.clients
        return float(metrics.sampling_margin(accuracy, weights, clients)[task])


class TaskEnder:
    """Tells clients that a task is over, and has them scored.

    Parameters
    ----------
    run : RunContext
    scorer : Scorer
    """

    def __init__(self, run: RunContext, scorer: Scorer) -> None:
        self._run = run
        self._scorer = scorer
        self._exchange = choose_ending(run)
        self._began = 0.0
        self._samples = 0.0
        self._flops = 0.0

    def start_clock(self) -> None:
        """Begin to count a task's seconds."""
        self._began = time.perf_counter()

    def finish_task(self, task: int, round: int) -> None:
        """End and score a task that is over for all clients at once."""
        knowledge = self._end_task(task, round)
        self._scorer.evaluate(task, round, is_over=True)
        self._record(task, round, knowledge)

    def finish_own_task(
        self, task: int, round: int, clients: Sequence[int], is_last: bool
    ) -> None:
        """End and score a task that is over for these clients.

        Parameters
        ----------
        task, round : int
        clients : sequence of int
        is_last : bool
            Whether the task is over for all clients now; its events are recorded then.
        """
        is_everybody = len(clients) == self._run.parts.config.data.clients
        # None and not all ids: with everybody asked, a wave without an answer is an error.
        nodes = None if is_everybody else [node_of(client) for client in clients]
        knowledge = self._end_task(task, round, nodes)
        self._scorer.score_some(task, round, nodes, is_last)
        if is_last:
            self._record(task, round, knowledge)

    def _end_task(
        self, task: int, round: int, nodes: Sequence[int] | None = None
    ) -> float:
        """Tell clients (all) that the task is over.

        Returns
        -------
        float
            Mean size in bytes of what they keep about their tasks; NaN: none of those asked
            answered well.
        """
        run = self._run
        # A wave of messages to all clients is saved where nothing would come of it.
        if not run.parts.learner.ends_task:
            return 0.0
        ending = self._nodes_at_an_end(task, nodes or run.grid.members())
        if not ending:
            return (
                math.nan
            )  # all go on with their task, or find its end themselves
        run.incidents.begin_work(task, round, run.state.arrays)
        work = self._end_work(task, ending)
        replies = [
            reply for reply in self._exchange(work) if reply.failure is None
        ]
        if not replies and nodes is not None:
            return math.nan  # others may still go on
        if not replies:
            failed = run.incidents.all_failed(len(work))
            raise RunError(f"task {task + 1}, when it ended: {failed}")
        reports = [EndTaskReport.from_content(reply.content) for reply in replies]
        # The end of a task may need more memory than its rounds.
        run.state.note_memory(report.costs for report in reports)
        self._add_costs(reports)
        self._tell_strategy(task, round, replies)
        sizes = [report.knowledge_bytes for report in reports]
        return sum(sizes) / len(sizes)

    def _nodes_at_an_end(self, task: int, nodes: Sequence[int]) -> list[int]:
        """Leave out clients with fewer tasks, whose last one goes on.

        Nobody is left where clients find a task's end themselves.
        """
        parts = self._run.parts
        if parts.config.data.boundaries == "hidden":
            return []
        stream = parts.stream
        if stream is None or task == stream.tasks - 1:
            return list(nodes)
        return [
            node for node in nodes if stream.length(client_of(node)) - 1 > task
        ]

    def _end_work(self, task: int, nodes: Sequence[int]) -> list[Message]:
        work = EndTaskWork(
            position=Position(task), parameters=self._run.state.arrays
        )
        # One content for all: what clients share is encoded once.
        content = work.to_content()
        return [
            Message(END_TASK, node, "", group=str(task), content=content)
            for node in nodes
        ]

    def _tell_strategy(
        self, task: int, round: int, replies: Sequence[Message]
    ) -> None:
        """Give a method's half on the server what clients sent at the end."""
        run = self._run
        strategy = run.parts.strategy
        if isinstance(strategy, PairedStrategy):
            with run.calls.call("aggregate_end_task", task, round):
                changed = strategy.aggregate_end_task(
                    task, run.state.arrays, replies
                )
                if changed is not None:
                    arrays = check_arrays(
                        to_record(changed), run.state.arrays, run.calls.name
                    )
                    run.calls.adopt(task, round, arrays)

    def _add_costs(self, reports: Sequence[EndTaskReport]) -> None:
        """Add up what ending tasks cost; clients of other make may not say."""
        for report in reports:
            self._samples += report.samples
            # NaN spreads to the sum: a total that lacks a client would be wrong.
            self._flops += report.costs.get(FLOPS, math.nan)

    def _record(self, task: int, round: int, knowledge: float) -> None:
        run = self._run
        moment = time.perf_counter()
        run.recorder.record(
            TaskEnded(
                task=task,
                knowledge_bytes=knowledge,
                server_bytes=self._kept_by_strategy(task, round),
                client_memory_bytes=run.state.client_memory_bytes,
                samples=self._samples,
                flops=self._flops,
                seconds=moment - self._began,
                elapsed=VirtualTime.read(run.grid.elapsed()),
            )
        )
        # From the same reading of the clock, so that no time between two tasks is lost.
        self._began = moment
        self._samples = 0.0
        self._flops = 0.0
        if fleet := run.grid.fleet():
            run.folder.write_fleet(fleet)

    def _kept_by_strategy(self, task: int, round: int) -> int:
        strategy = self._run.parts.strategy
        # Other strategies keep nothing about past tasks that we know of.
        if not isinstance(strategy, PairedStrategy):
            return 0
        with self._run.calls.call("kept_bytes", task, round):
            return strategy.kept_bytes()
