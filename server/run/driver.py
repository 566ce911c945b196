"""Driving a strategy: by Flower's hooks, or through its own loop.

The experiment chooses one :class:`Driver` for a run and does not know which.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from flwr.serverapp.strategy import Result, Strategy

from fedknow.protocols.flower import to_record
from fedknow.protocols.messages import TRAIN
from fedknow.protocols.work import FLOPS
from fedknow.server.checks.aggregates import check_aggregate, check_arrays
from fedknow.server.checks.faults import RunError
from fedknow.server.run.closing import Scorer
from fedknow.server.run.context import RunContext
from fedknow.server.run.events import RoundEnded, VirtualTime, Warned
from fedknow.server.run.schedule import TaskSchedule, Turn
from fedknow.server.run.weights import bound_weights

__all__ = ["Driver", "HookDriver", "LoopDriver", "choose_driver"]


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
        seconds = time.perf_counter() - began
        clients = run.incidents.inspector
        run.state.note_memory(metrics for _, metrics in clients.trained)
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
                elapsed=VirtualTime.read(run.grid.elapsed()),
            )
        )


class HookDriver(Driver):
    """Calls Flower's four hooks, one round at a time."""

    def train(self, turn: Turn, schedule: TaskSchedule, scorer: Scorer) -> int:
        """Make one round: configure, send, aggregate."""
        began = time.perf_counter()
        task, round = turn.task, turn.round
        run = self._run
        # Before the hooks: seeds and settings of this round depend on it.
        run.state.server_round += 1
        run.incidents.begin_work(task, round, run.state.arrays)
        messages = self._configure(task, round)
        replies = _good(run.strategy_grid.send_and_receive(messages))
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
        schedule.address(_training(messages))

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
        if not run.state.arrays:
            # Some strategies stumble over it if nothing travels that could be aggregated.
            run.calls.adopt(task, round, run.state.arrays)
            return {}
        with run.calls.call("aggregate_train", task, round):
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


class LoopDriver(Driver):
    """Calls a strategy that has a loop of its own, its ``start``.

    Asynchronous strategies have one.

    Between its rounds it cannot be stopped or saved: a checkpoint is written when it comes back.
    """

    def train(self, turn: Turn, schedule: TaskSchedule, scorer: Scorer) -> int:
        """Have the strategy make a turn's rounds in its own loop."""
        run = self._run
        task = turn.task
        rounds_before = run.state.server_round
        schedule.begin_loop()
        watch = _RoundWatch(self, run, turn, schedule, scorer)
        run.incidents.begin_work(task, turn.round, run.state.arrays)
        with run.calls.call("start", task, turn.round):
            result = run.parts.strategy.start(
                grid=run.strategy_grid.with_end(turn.until),
                initial_arrays=to_record(run.state.arrays),
                num_rounds=turn.rounds,
                train_config=watch.train_config,
                evaluate_config=watch.evaluate_config,
                evaluate_fn=watch,
            )
        # The rounds still count; only their events and scores are missing.
        if not watch.has_been_called:
            self._warn_of_silence(turn)
        self._take(turn, result)
        # The schedule decides how many rounds count: a loop may end early, or tell of none.
        rounds_made = schedule.end_loop(
            turn.rounds, run.state.server_round - rounds_before
        )
        run.state.server_round = rounds_before + rounds_made
        return rounds_made

    def evaluate(self, task: int, round: int) -> Mapping[str, Any]:
        """Give nothing: such a strategy evaluates in its own loop, if it does."""
        return {}

    def address(
        self, messages: Sequence[FlowerMessage], schedule: TaskSchedule
    ) -> None:
        """Write each client's own task into messages before they are sent.

        Sending work is when a step of the loop begins.
        """
        work = _training(messages)
        if work:
            schedule.begin_step(work)
        schedule.address(work)

    def _warn_of_silence(self, turn: Turn) -> None:
        reason = (
            f"strategy {self._run.calls.name}: its start never called evaluate_fn: its rounds "
            "could not be told apart"
        )
        self._run.recorder.record(
            Warned(task=turn.task, round=turn.rounds, reason=reason)
        )

    def _take(self, turn: Turn, result: Result) -> None:
        """Take over what the loop came to."""
        run = self._run
        task, rounds = turn.task, turn.rounds
        record = getattr(result, "arrays", None)
        if not isinstance(record, ArrayRecord):
            raise RunError(
                f"strategy {run.calls.name}: start must return a Result, not {result!r}"
            )
        # An empty record is what Flower's loop returns where no round aggregated.
        if run.state.arrays and not record:
            run.calls.note_nothing(task, rounds, "aggregated nothing")
            run.calls.refuse_standstill(f"by the end of task {task + 1}")
        else:
            arrays = check_arrays(record, run.state.arrays, run.calls.name)
            run.calls.adopt(task, rounds, arrays)


class _RoundWatch:
    """The ``evaluate_fn`` of a strategy's own loop; tells its rounds apart.

    Flower's contract has ``start`` call it before the first round and after each. Clients are
    told of the next round through the settings that all of a turn's messages share.

    Parameters
    ----------
    driver : Driver
        Records rounds.
    run : RunContext
    turn : Turn
    schedule : TaskSchedule
    scorer : Scorer

    Attributes
    ----------
    train_config, evaluate_config : ConfigRecord
        The shared settings.
    has_been_called : bool
    """

    def __init__(
        self,
        driver: Driver,
        run: RunContext,
        turn: Turn,
        schedule: TaskSchedule,
        scorer: Scorer,
    ) -> None:
        self._driver = driver
        self._run = run
        self._turn = turn
        self._schedule = schedule
        self._scorer = scorer
        self._rounds_before = run.state.server_round
        self._began = time.perf_counter()
        self.train_config: ConfigRecord = run.calls.settings(turn.task, 1)
        self.evaluate_config: ConfigRecord = run.calls.settings(turn.task, 1)
        self.has_been_called = False

    def __call__(self, number: int, record: ArrayRecord) -> MetricRecord | None:
        """Note that the loop has made so many rounds, and has this model now."""
        self.has_been_called = True
        run = self._run
        arrays = check_arrays(record, run.state.arrays, run.calls.name)
        if number > 0:
            run.state.server_round = self._rounds_before + number
            round = self._turn.round + number - 1
            strategy = run.parts.strategy
            aggregated = getattr(strategy, "round_metrics", None) or {}
            self._driver.record_round(
                self._turn.task, round, aggregated, self._began
            )
            # Before the scores, which are of the model that the loop has now.
            run.state.arrays = arrays
            self._score(number, round)
            self._schedule.end_loop_round(round)
        self._began = time.perf_counter()
        run.incidents.inspector.begin(
            self._turn.task, self._turn.round + number, arrays
        )
        # In place: the strategy holds this record and sends it with its next round.
        self.train_config["round"] = number + 1
        self.evaluate_config["round"] = number + 1
        # Each round its own seed, so that a resumed run draws what it would have drawn.
        run.calls.seed(self._rounds_before + number + 1, "start")
        return None

    def _score(self, number: int, round: int) -> None:
        every = self._run.parts.config.evaluation.every
        if every and round % every == 0 and number < self._turn.rounds:
            self._scorer.evaluate_within(self._turn.task, round)


def choose_driver(run: RunContext) -> Driver:
    """Choose how to drive the strategy of a run."""
    # By the class: Flower's own `start` knows neither tasks nor checkpoints, so that its hooks
    # are called here.
    has_own_loop = type(run.parts.strategy).start is not Strategy.start
    return LoopDriver(run) if has_own_loop else HookDriver(run)


def _training(messages: Iterable[FlowerMessage]) -> list[FlowerMessage]:
    return [each for each in messages if each.metadata.message_type == TRAIN]


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
