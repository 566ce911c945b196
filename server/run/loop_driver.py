"""A strategy with a loop of its own, and how its rounds are told apart."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from flwr.serverapp.strategy import Result

from fedknow.protocols.flower import to_record
from fedknow.server.checks.aggregates import check_arrays
from fedknow.server.checks.faults import RunError
from fedknow.server.run.closing import Scorer
from fedknow.server.run.context import RunContext
from fedknow.server.run.driver import Driver, training_messages
from fedknow.server.run.events import Warned
from fedknow.server.run.schedule import TaskSchedule, Turn
from fedknow.server.run.weights import WeightBounds

__all__ = ["LoopDriver"]


class LoopDriver(Driver):
    """Calls a strategy that has a loop of its own, its ``start``.

    Asynchronous strategies have one.

    Between its rounds it cannot be stopped or saved: a checkpoint is written when it comes back.
    """

    # Made when answers come; it remembers what clients claimed in earlier tasks.
    _weights: WeightBounds | None = None

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
                grid=run.strategy_grid.with_loop(turn.until, self._bound),
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
        work = training_messages(messages)
        if work:
            schedule.begin_step(work)
        schedule.address(work)

    def _bound(self, replies: Sequence[FlowerMessage]) -> None:
        """Bound what clients claim, where the server does not know it."""
        run = self._run
        multiple = run.parts.config.engine.max_weight
        if not multiple or run.incidents.claims.are_known:
            return
        if self._weights is None:
            self._weights = WeightBounds(multiple)
        run.incidents.note_bounded(self._weights.bound(replies))

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
