"""The node: what answers messages for a client.

It is one function: message and state in, message and state out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedknow.client.boundaries import BoundaryFinder
from fedknow.client.capacity import FEWEST, clients_at_once
from fedknow.client.data.stream import TaskData, TaskStream
from fedknow.client.groups import Answer, Group
from fedknow.client.learners.frames.learner import Learner, State
from fedknow.client.tensors import as_tensors
from fedknow.client.workbench import Workbench, failed
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.messages import (
    CLIENT_FAILED,
    END_TASK,
    EVALUATE,
    TRAIN,
    Message,
    client_of,
)
from fedknow.protocols.plugins import PASSED_ON
from fedknow.protocols.work import (
    ACCURACY,
    LOSS,
    EndTaskWork,
    Report,
    ScoreReport,
    ScoreWork,
    TaskScores,
    TrainWork,
)

__all__ = ["Node"]


class Node:
    """Answers messages for the clients of one experiment with one learner.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment.
    stream : TaskStream
        Where clients find their data.

    Attributes
    ----------
    learner : Learner
        Does the work of all clients, one after another.
    at_once : int
        How many clients :meth:`train_together` takes (``engine.vectorize``); 1: none, they
        train one by one.

    Raises
    ------
    ConfigError
        If the learner cannot be built, its device is not there (``engine.device``), or its
        clients cannot train at once where that is asked for.
    """

    def __init__(self, config: ExperimentConfig, stream: TaskStream) -> None:
        self.config = config
        self._bench = Workbench(config, stream)
        # Of samples, or of their features.
        self.stream = self._bench.stream
        self._finder: BoundaryFinder | None = None
        if config.data.boundaries == "hidden":
            self._finder = BoundaryFinder(self._bench, config)
            self.at_once = 1
        else:
            self.at_once = clients_at_once(
                self.learner, config.engine.vectorize, stream.spec
            )

    @property
    def learner(self) -> Learner:
        """The learner that does the work."""
        return self._bench.learner

    def handle(self, message: Message, state: State) -> Answer:
        """Do what a message asks for.

        Parameters
        ----------
        message : Message
            Work of any kind in :mod:`fedknow.protocols.work`.
        state : State
            What the client kept from its last message; ``{}`` for a fresh one.

        Returns
        -------
        tuple
            The answer, and the client's state from now on: the very object given where nothing
            changed. If the client fails, the answer carries a
            :class:`~fedknow.protocols.messages.Failure` and the state is the old one.
        """
        do = {
            TRAIN: self._train,
            END_TASK: self._end_task,
            EVALUATE: self._evaluate,
        }.get(message.kind)
        if do is None:
            reason = f"this client knows no work of kind {message.kind!r}"
            return message.fail(CLIENT_FAILED, reason), state
        started = time.perf_counter()
        meter = self.learner.meter
        try:
            with meter.message():
                report, new = do(message, state)
        except PASSED_ON:
            raise
        # Also SystemExit of a user's code, which would end the worker with all its clients.
        except BaseException as error:
            # That is this client's failure, not the run's.
            return failed(message, error), state
        costs = self._bench.costs(meter.cost, state, new)
        # Scoring is the experiment's wish, not work of the method: its time is not reported.
        seconds = (
            None if message.kind == EVALUATE else time.perf_counter() - started
        )
        report = replace(report, costs=costs, seconds=seconds)
        return message.reply(report.to_content()), new

    def train_together(
        self, messages: Sequence[Message], states: Sequence[State]
    ) -> list[Answer]:
        """Have several clients train at once.

        Where they are too few for it, they train one by one.

        Parameters
        ----------
        messages : sequence of Message
            All of kind ``train`` or all of ``train.end_task``, each of another client.
        states : sequence of State
            Of these clients.

        Returns
        -------
        list of tuple
            As :meth:`handle` gives them, up to rounding; ``seconds`` are shared out evenly.
        """
        if len(messages) < FEWEST:
            pairs = zip(messages, states, strict=True)
            return [self.handle(message, state) for message, state in pairs]
        return Group(self._bench, self.handle, messages, states).answer()

    def _train(self, message: Message, state: State) -> tuple[Report, State]:
        work = TrainWork.from_content(message.content)
        client = client_of(message.node)
        if self._finder is not None:
            return self._finder.train(client, work, state)
        data = self._bench.task(client, work.position.task)
        self._bench.take_over(work, state)
        round = self._bench.round(client, work)
        self._bench.charge_features(data, round)
        with self.learner.counting("fit"):
            measures = self.learner.fit(data, round)
        samples = self.learner.meter.samples
        return self._bench.report_training(data, round, measures, samples)

    def _end_task(self, message: Message, state: State) -> tuple[Report, State]:
        work = EndTaskWork.from_content(message.content)
        client = client_of(message.node)
        data = self._bench.task(client, work.position.task)
        self._bench.take_over(work, state)
        round = self._bench.round(client, work)
        self._bench.charge_features(data, round)
        return self._bench.report_end(data, round)

    def _evaluate(self, message: Message, state: State) -> tuple[Report, State]:
        work = ScoreWork.from_content(message.content)
        _check_collection(work, self.config)
        seen = work.position.task + 1
        client = client_of(message.node)
        transfer = self._bench.transfer
        current = self.stream.task(client, work.position.task)
        self._bench.take_over(work, state)
        if work.scoring == "global" and work.local_parameters is not None:
            self.learner.load_local_parameters(
                transfer.enter(as_tensors(work.local_parameters))
            )
        scored_tasks = self.stream.tasks if work.has_forward else seen
        count = min(scored_tasks, self.stream.length(client))
        tasks = [self.stream.task(client, task) for task in range(count)]
        with self.learner.counting("score"):
            results = self.learner.score(
                [transfer.enter_split(data.test) for data in tasks],
                _heads(current, tasks, seen),
                self.config.evaluation.batch_size,
            )
        # Of tasks that this client does not have there is no sample, and no score.
        results += [(0, 0, 0.0)] * (scored_tasks - count)
        scores = TaskScores(
            correct=[correct for correct, _, _ in results],
            total=[total for _, total, _ in results],
            losses=[loss for _, _, loss in results],
        )
        report = _report_scores(scores, seen)
        if work.scoring:
            report = replace(report, scores=scores)
        if work.should_collect:
            report = replace(
                report,
                local_parameters=self._bench.arrays(
                    self.learner.local_parameters()
                ),
            )
        return report, state


def _check_collection(work: ScoreWork, config: ExperimentConfig) -> None:
    """Refuse to send what the client keeps, unless the experiment says so."""
    # The experiment is what the client agreed to; a message cannot ask for more.
    if work.should_collect and not config.evaluation.global_model:
        raise ValueError(
            "the server asks for the parameters that this client keeps to itself, but the "
            "experiment says evaluation.global_model = false"
        )


def _heads(
    current: TaskData, tasks: Sequence[TaskData], seen: int
) -> list[tuple[int, ...]]:
    """Choose the classes that each task is scored among.

    In a stream whose head grows, tasks learned before are scored among all classes of today.
    """
    return [
        # A class-incremental model is not told the task, so earlier tasks compete with all
        # classes seen so far.
        current.head if current.is_incremental and task < seen else data.head
        for task, data in enumerate(tasks)
    ]


def _report_scores(scores: TaskScores, seen: int) -> ScoreReport:
    """Sum scores up over the tasks learned so far."""
    scored = [task for task in range(seen) if scores.total[task]]
    accuracies = [scores.correct[task] / scores.total[task] for task in scored]
    return ScoreReport(
        examples=sum(scores.total[:seen]),
        measures={
            # The mean over tasks and not over samples: a task counts as much as another of more
            # samples.
            ACCURACY: float(np.mean(accuracies)),
            LOSS: float(np.mean([scores.losses[task] for task in scored])),
        },
    )
