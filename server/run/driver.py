"""Driving a strategy: what drivers have in common, and Flower's hooks.

:mod:`fedknow.server.run.loop_driver` drives a strategy that has a loop of its own.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Message as FlowerMessage

from fedknow.protocols.flower import to_record
from fedknow.protocols.messages import TRAIN
from fedknow.protocols.work import FLOPS
from fedknow.server.checks.aggregates import check_aggregate
from fedknow.server.checks.faults import RunError
from fedknow.server.run.accounting import epsilon_of
from fedknow.server.run.boundaries import boundaries_found
from fedknow.server.run.closing import Scorer
from fedknow.server.run.context import RunContext
from fedknow.server.run.events import RoundEnded, VirtualTime
from fedknow.server.run.exchange import choose_exchange
from fedknow.server.run.schedule import TaskSchedule, Turn
from fedknow.server.run.weights import bound_weights
from fedknow.strategies.central_privacy import GaussianMean
from fedknow.strategies.paired import PairedStrategy

__all__ = ["Driver", "HookDriver", "training_messages"]


class Driver(ABC):
    """Has a strategy make rounds, and records them.

    Parameters
    ----------
    run : RunContext
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run

    @abstractmethod
    def train(self, turn: Turn, schedule: TaskSchedule, scorer: Scorer) -> int:
        """Have the strategy make rounds of a task.

        Parameters
        ----------
        turn : Turn
            Which rounds.
        schedule : TaskSchedule
            Is told of each step.
        scorer : Scorer
            Scores clients between two rounds, where the strategy comes back only later.

        Returns
        -------
        int
            How many rounds were made.

        Raises
        ------
        RunError
            If all clients failed, or the strategy failed or gave something unusable.
        """

    @abstractmethod
    def evaluate(self, task: int, round: int) -> Mapping[str, Any]:
        """Let the strategy evaluate; gives the metrics that it aggregated."""

    @abstractmethod
    def address(
        self, messages: Sequence[FlowerMessage], schedule: TaskSchedule
    ) -> None:
        """Write each client's own task into messages before they are sent."""

    def record_round(
        self, task: int, round: int, aggregated: Mapping[str, Any], began: float
    ) -> None:
        """Record a round that clients have trained in.

        Parameters
        ----------
        task, round : int
        aggregated : mapping
            Metrics of the strategy's. Where no client trains, a strategy that does says in them
            how it went.
        began : float
            When, on ``time.perf_counter``.
        """
        run = self._run
        # First, so that the record's own work is no time of the round.
        seconds = time.perf_counter() - began
        run.incidents.note_changes(run.grid.news())
        clients = run.incidents.inspector
        run.state.note_memory(metrics for _, metrics in clients.trained)
        # Clients' own numbers count: a strategy may report others, or none.
        if clients.trained:
            loss = clients.mean("loss")
            accuracy = clients.mean("accuracy")
            samples = clients.total("samples")
            flops = clients.total(FLOPS)
        else:
            loss = aggregated.get("loss", math.nan)
            accuracy = aggregated.get("accuracy", math.nan)
            samples = aggregated.get("samples", 0.0)
            flops = aggregated.get("flops", math.nan)
        run.recorder.record(
            RoundEnded(
                task=task,
                round=round,
                server_round=run.state.server_round,
                clients=len(clients.trained),
                loss=loss,
                accuracy=accuracy,
                samples=samples,
                metrics=dict(aggregated),
                seconds=seconds,
                traffic=run.grid.traffic.counts(),
                peak_memory_mb=run.grid.peak_memory_mb(),
                client_memory_bytes=run.state.client_memory_bytes,
                flops=flops,
                failures=clients.failures,
                epsilon=self._epsilon(),
                elapsed=VirtualTime.read(run.grid.elapsed()),
            )
        )
        for boundary in boundaries_found(clients.trained, task, round):
            run.recorder.record(boundary)

    def _epsilon(self) -> float | None:
        """Account for the noise of a client that trained in each round so far."""
        parts = self._run.parts
        rounds = self._run.state.server_round
        privacy = parts.config.privacy
        if privacy.noise:
            return epsilon_of(privacy.noise, rounds, privacy.delta)
        # On the server, one client's data change the sum by twice the bound at most, too.
        strategy = parts.strategy
        if isinstance(strategy, GaussianMean):
            return epsilon_of(strategy.noise, rounds, strategy.delta)
        return None


class HookDriver(Driver):
    """Calls Flower's four hooks, one round at a time."""

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._exchange = choose_exchange(run)

    def train(self, turn: Turn, schedule: TaskSchedule, scorer: Scorer) -> int:
        """Make one round: configure, send, aggregate."""
        began = time.perf_counter()
        task, round = turn.task, turn.round
        run = self._run
        # Before the hooks: seeds and settings of this round depend on it.
        run.state.server_round += 1
        run.incidents.begin_work(task, round, run.state.arrays)
        messages = self._configure(task, round)
        replies = _good(self._exchange(messages))
        self._refuse_total_failure(task, round, messages, replies)
        self._bound_weights(replies)
        aggregated = self._aggregate(task, round, messages, replies)
        schedule.count_step()
        self.record_round(task, round, aggregated, began)
        return 1

    def evaluate(self, task: int, round: int) -> Mapping[str, Any]:
        """Call the pair of hooks by which a strategy evaluates."""
        run = self._run
        strategy, number = run.parts.strategy, run.state.server_round
        settings = run.calls.settings(task, round)
        with run.calls.call("configure_evaluate", task, round):
            record = to_record(run.state.arrays)
            messages = _messages(
                strategy.configure_evaluate(
                    number, record, settings, run.strategy_grid
                )
            )
        replies = _good(run.strategy_grid.send_and_receive(messages))
        with run.calls.call("aggregate_evaluate", task, round):
            aggregated = strategy.aggregate_evaluate(number, replies)
        return aggregated or {}

    def address(
        self, messages: Sequence[FlowerMessage], schedule: TaskSchedule
    ) -> None:
        """Write each client's own task into messages before they are sent."""
        schedule.address(training_messages(messages))

    def _configure(self, task: int, round: int) -> list[FlowerMessage]:
        run = self._run
        settings = run.calls.settings(task, round)
        with run.calls.call("configure_train", task, round):
            record = to_record(run.state.arrays)
            return _messages(
                run.parts.strategy.configure_train(
                    run.state.server_round, record, settings, run.strategy_grid
                )
            )

    def _bound_weights(self, replies: Sequence[FlowerMessage]) -> None:
        """Bound what clients claim, where the server does not know it."""
        run = self._run
        multiple = run.parts.config.engine.max_weight
        if multiple and not run.incidents.claims.are_known:
            run.incidents.note_bounded(bound_weights(replies, multiple))

    def _refuse_total_failure(
        self,
        task: int,
        round: int,
        messages: Sequence[FlowerMessage],
        replies: Sequence[FlowerMessage],
    ) -> None:
        """End a run in which no client answered well.

        With a fleet, clients may all be late or away, which is no failure.
        """
        run = self._run
        has_fleet = bool(run.parts.config.fleet.devices)
        # Silence is excused there, a failure is not.
        is_excused = has_fleet and not run.incidents.inspector.failures
        if messages and not replies and not is_excused:
            failed = run.incidents.all_failed(len(messages))
            raise RunError(f"task {task + 1}, round {round}: {failed}")

    def _aggregate(
        self,
        task: int,
        round: int,
        messages: Sequence[FlowerMessage],
        replies: Sequence[FlowerMessage],
    ) -> Mapping[str, Any]:
        """Have the strategy aggregate; gives its metrics."""
        run = self._run
        has_halves = isinstance(run.parts.strategy, PairedStrategy)
        if not run.state.arrays and not has_halves:
            # Some strategies stumble over it if nothing travels that could be aggregated. A
            # paired one may have been sent something else.
            run.calls.adopt(task, round, run.state.arrays)
            return {}
        with run.calls.call("aggregate_train", task, round):
            # Also without replies: a strategy may keep count of its rounds.
            returned = run.parts.strategy.aggregate_train(
                run.state.server_round, replies
            )
        arrays, aggregated = check_aggregate(
            returned, run.state.arrays, run.calls.name
        )
        if arrays is not None:
            run.calls.adopt(task, round, arrays)
            return aggregated
        outcome = "aggregated nothing" if messages else "chose no clients"
        run.calls.note_nothing(task, round, outcome)
        # A strategy may fill a buffer for some rounds; after a whole task of them nothing will
        # come.
        if replies and round >= run.parts.config.train.rounds:
            run.calls.refuse_standstill(f"by task {task + 1}, round {round}")
        return aggregated


def _messages(messages: object) -> list[FlowerMessage]:
    """Take the messages that a hook returned."""
    # A hook that forgets its `return` would otherwise pass for one that chose nobody.
    if messages is None:
        raise TypeError(
            "it returned nothing (None); it must return messages, an empty list for no clients"
        )
    return list(messages)  # type: ignore[call-overload, no-any-return]


def _good(replies: Iterable[FlowerMessage]) -> list[FlowerMessage]:
    """Leave out errors, which were counted and reported when they arrived."""
    return [reply for reply in replies if not reply.has_error()]


def training_messages(messages: Iterable[FlowerMessage]) -> list[FlowerMessage]:
    """Pick the messages that ask clients to train."""
    return [each for each in messages if each.metadata.message_type == TRAIN]
