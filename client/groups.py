"""Training of several clients at once, for messages to each of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fedknow.client.learners.frames.learner import State
from fedknow.client.together import (
    Start,
    Trained,
    fit_together,
    price,
)
from fedknow.client.workbench import Workbench, failed
from fedknow.protocols.config import TrainConfig
from fedknow.protocols.messages import (
    METRICS,
    TRAIN,
    Message,
    Metrics,
    client_of,
)
from fedknow.protocols.plugins import PASSED_ON
from fedknow.protocols.work import (
    SECONDS,
    EndTaskReport,
    EndTaskWork,
    TrainWork,
)

__all__ = ["Answer", "Group"]

log = logging.getLogger(__name__)

Answer = tuple[Message, State]
"""The answer to a message, and the client's state from now on."""


class Group:
    """Clients that train at once, each for a message of its own.

    Parameters
    ----------
    bench : Workbench
        The learner that trains them.
    handle : callable
        Answers a single message: for clients that have nothing to train.
    messages : sequence of Message
        All of kind ``train`` or all of ``train.end_task``, each of another client.
    states : sequence of State
        Of these clients.
    """

    def __init__(
        self,
        bench: Workbench,
        handle: Callable[[Message, State], Answer],
        messages: Sequence[Message],
        states: Sequence[State],
    ) -> None:
        self._bench = bench
        self._handle = handle
        self._messages = messages
        self._states = states
        self._answers: dict[int, Answer] = {}
        self._starts: dict[int, Start] = {}
        self._settings: dict[int, TrainConfig] = {}

    def answer(self) -> list[Answer]:
        """Do the work.

        Returns
        -------
        list of tuple
            Answers and states in the order of the messages.
        """
        started = time.perf_counter()
        # Step 1: from which parameters and samples does each client train?
        for place in range(len(self._messages)):
            self._begin(place)
        # Step 2: train those at once that are told to train alike.
        trained = self._train()
        # Step 3: each client's own answer.
        for place, result in trained.items():
            self._finish(place, result)
        # Step 4: nobody can say whose time it was, so all have the same share.
        seconds = (time.perf_counter() - started) / len(self._messages)
        for reply, _ in self._answers.values():
            if isinstance(
                metrics := reply.content.get(METRICS),
                Metrics,
            ):
                metrics[SECONDS] = seconds
        return [self._answers[place] for place in range(len(self._messages))]

    def _begin(self, place: int) -> None:
        """Note what a client trains from, or its answer where it trains nothing."""
        message, state = (
            self._messages[place],
            self._states[place],
        )
        bench = self._bench
        client = client_of(message.node)
        kind = TrainWork if message.kind == TRAIN else EndTaskWork
        try:
            work = kind.from_content(message.content)
            data = bench.task(client, work.position.task)
            bench.take_over(work, state)
            # It trains nothing more, so there is nothing to stack.
            has_trained = bench.learner.has_trained(data.task)
            if isinstance(work, EndTaskWork) and has_trained:
                self._answers[place] = self._handle(message, state)
                return
            round = bench.round(client, work)
            parameters = bench.learner.send() | bench.learner.local_parameters()
            self._starts[place] = Start(parameters, data, round)
            self._settings[place] = bench.learner.train
        except PASSED_ON:
            raise
        except BaseException as error:
            self._answers[place] = (
                failed(message, error),
                state,
            )

    def _train(self) -> dict[int, Trained]:
        """Train all clients that have a start, in the order of the starts."""
        trained: dict[int, Trained] = {}
        # As a rule all clients are told the same, and this is one turn.
        for settings in dict.fromkeys(self._settings.values()):
            alike = {
                place: start
                for place, start in self._starts.items()
                if self._settings[place] == settings
            }
            self._bench.learner.train = settings
            trained |= self._fit(alike)
        return {place: trained[place] for place in self._starts}

    def _fit(self, starts: Mapping[int, Start]) -> dict[int, Trained]:
        """Train clients at once that are told to train alike."""
        try:
            results = fit_together(self._bench.learner, list(starts.values()))
            return dict(zip(starts, results, strict=True))
        except PASSED_ON:
            raise
        except BaseException as error:
            log.info(
                "%d clients failed together",
                len(starts),
                exc_info=error,
            )
            # All of them failed. The traceback would keep their tensors in memory.
            result = Trained({}, error.with_traceback(None))
            return dict.fromkeys(starts, result)

    def _finish(self, place: int, result: Trained) -> None:
        """Make a client's answer from what its training came to."""
        message, state = (
            self._messages[place],
            self._states[place],
        )
        start = self._starts[place]
        bench = self._bench
        learner = bench.learner
        # The learner served other clients since, under their settings.
        learner.train = self._settings[place]
        if isinstance(result.report, BaseException):
            self._answers[place] = (
                failed(message, result.report),
                state,
            )
            return
        # The price is taken before the parameters: it leaves the learner with nobody's.
        cost = price(learner, start)
        learner.adopt(result.parameters, start.task.task)
        samples = learner.epochs * len(start.task.train)
        report: EndTaskReport
        if message.kind == TRAIN:
            report, new = bench.report_training(
                start.task,
                start.round,
                result.report,
                samples,
            )
        else:
            report, new = bench.report_end(start.task, start.round, samples)
        report = replace(report, costs=bench.costs(cost, state, new))
        self._answers[place] = (
            message.reply(report.to_content()),
            new,
        )
