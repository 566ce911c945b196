"""The experiment: tasks, rounds, scoring and checkpoints around any Flower strategy.

The loop tells of itself by events (:mod:`fedknow.server.run.events`) and by nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from flwr.serverapp.strategy import Strategy

from fedknow.client.data.stream import TaskStream
from fedknow.client.learners.frames.learner import Layout, Learner
from fedknow.client.state import StateError
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.flower import to_record
from fedknow.protocols.messages import (
    ARRAYS,
    CONFIG,
    END_TASK,
    METRICS,
    TRAIN,
    Arrays,
    Config,
    Message,
    Record,
    client_of,
    node_of,
)
from fedknow.protocols.plugins import PASSED_ON, explain
from fedknow.protocols.seeds import integer
from fedknow.protocols.texts import counted
from fedknow.protocols.work import FLOPS, KNOWLEDGE_BYTES, MEMORY
from fedknow.server.checks.aggregates import check_aggregate, check_arrays
from fedknow.server.checks.faults import (
    ClientFailure,
    ClientLost,
    Fault,
    NothingAggregatedError,
    RunError,
)
from fedknow.server.checks.instructions import StrategyCheck, position
from fedknow.server.checks.replies import Inspector
from fedknow.server.grids.base import MessageGrid
from fedknow.server.grids.strategy_grid import StrategyGrid
from fedknow.server.grids.wave import WaveOptions
from fedknow.server.run import metrics
from fedknow.server.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    restore_strategy,
    save_checkpoint,
    strategy_state,
)
from fedknow.server.run.evaluation import Scores, score_clients
from fedknow.server.run.events import (
    ClientBegunAnew,
    ClientFailed,
    Evaluated,
    RoundEnded,
    RunEnded,
    RunInterrupted,
    RunStarted,
    TaskEnded,
    VirtualTime,
    Warned,
)
from fedknow.server.run.folder import RunFolder, is_disk_full, running_out_of_disk
from fedknow.server.run.recorder import Recorder, Subscriber
from fedknow.server.run.schedule import Arrivals
from fedknow.strategies import (
    build_strategy,
    check_running_mean,
    heard_from_flower,
    quiet_flower,
)
from fedknow.strategies.paired import PairedStrategy, Setup

__all__ = ["Experiment", "RunError", "RunResult", "ServerLearner"]

LIBRARIES = ("fedknow", "flwr", "torch", "ray", "numpy")
"""What a result may depend on besides our own code."""


class ServerLearner(Protocol):
    """What the server must know of the clients' method (:class:`fedknow.client.learners.Learner`)."""

    @property
    def ends_task(self) -> bool:
        """Whether clients must be told that a task is over."""
        ...

    @property
    def sparse(self) -> bool:
        """Whether zeros are left out on the way."""
        ...

    @property
    def frozen_digest(self) -> str:
        """Digest of the parameters that are frozen and do not travel; "" without any."""
        ...

    def send(self) -> dict[str, torch.Tensor]:
        """Initial values of the parameters that travel."""
        ...

    def shares(self, ended: bool) -> Layout:
        """What clients may send to the strategy beside them, in a round or when a task has ended."""
        ...


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes
    ----------
    folder : Path
        The run folder.
    accuracy : dict of str to ndarray
        Raw accuracies, as :meth:`fedknow.server.run.folder.RunFolder.accuracy` gives them.
    arrays : Arrays
        Final global parameters.
    summary : dict
        The ``end`` event.
    """

    folder: Path
    accuracy: dict[str, np.ndarray]
    arrays: Arrays
    summary: dict[str, Any]


class Experiment:
    """One run of one configuration on one grid.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment.
    grid : MessageGrid
        How clients are reached.
    folder : RunFolder
        Created, or opened to be resumed: then the run goes on after its last complete round.
    learner : ServerLearner
        A freshly built one; its initial parameters are the global model's.
    observers : sequence of callable
        Called with each event.
    partition : mapping, optional
        Which client holds what; written to the run folder. A resumed run must have the same.
    stream : TaskStream, optional
        The clients' data, for a strategy that trains on them itself; unknown here where clients
        have their own.

    Raises
    ------
    ConfigError
        If the strategy cannot be built, wants more clients than there are, or cannot have them
        at different tasks.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        grid: MessageGrid,
        folder: RunFolder,
        learner: ServerLearner,
        observers: Sequence[Subscriber] = (),
        partition: Mapping[str, Any] | None = None,
        stream: TaskStream | None = None,
    ) -> None:
        self.config = config
        self.grid = grid
        self.folder = folder
        self.learner = learner
        self.recorder = Recorder(folder, observers)
        self.partition = dict(partition or {})
        self.strategy = build_strategy(config.strategy, config.data.clients)
        Arrivals.check(config, self.strategy)
        check_running_mean(config, self.strategy, learner.sparse)
        self.arrivals = Arrivals.of(config)
        if self.arrivals is not None and self.arrivals.seconds and not grid.elapsed():
            raise ConfigError(
                f"data.arrival_seconds = {config.data.arrival_seconds:g}: real clients have no virtual time; set it to "
                "0, or run fedknow simulate"
            )
        if isinstance(self.strategy, PairedStrategy):
            self.strategy.prepare(Setup(config, cast(Learner, learner), stream))
        self.scores = Scores(config.data.clients, config.data.tasks)
        self.arrays = Arrays(
            (name, value.numpy()) for name, value in learner.send().items()
        )
        extras = {
            TRAIN: learner.shares(ended=False),
            END_TASK: learner.shares(ended=True),
        }
        self.inspector = Inspector(
            self._client_failed, config.engine.max_update_norm, extras
        )
        self.options = WaveOptions(
            inspect=self.inspector,
            on_missed=self._missed,
            on_lost_state=(
                self._forgot if config.engine.on_lost_state == "fresh" else None
            ),
            is_sparse=learner.sparse,
            is_averaged=config.engine.running_mean,
        )
        self.strategy_grid = StrategyGrid(grid, self.options, self._address)
        self._last: Checkpoint | None = None
        self._deleting: Thread | None = None
        self._server_round = 0
        self._steps_before = self._steps_told = 0
        self._seconds_before = 0.0
        self._task_began = 0.0
        self._client_memory = 0.0
        self._of_ending = {"samples": 0.0, FLOPS: 0.0}
        self._check_strategy = StrategyCheck(config, learner, self._warn)
        self._lost_told = False
        self._has_aggregated = False
        self._heard: list[str] = []
        self._heard_before: set[str] = set()
        self._too_small = 0

    # --- the run
    # --------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Run to the end, from the beginning or from the last checkpoint.

        Raises
        ------
        RunError
            If the run cannot go on: a client failed (under ``engine.on_client_error =
            "stop"``), all clients failed, the strategy failed or gave something unusable, or
            the disk is full. The last checkpoint stays.
        KeyboardInterrupt
            If the user interrupts; likewise.
        """
        self._began = self._task_began = time.perf_counter()
        try:
            with (
                quiet_flower(),
                _restored_randomness(),
                running_out_of_disk(self.folder.path),
            ):
                self._begin()
                if self.arrivals is None:
                    self._run_tasks()
                else:
                    self._run_arrivals(self.arrivals)
                return self._end()
        except KeyboardInterrupt:
            last = self._last
            self.recorder.record(
                RunInterrupted(
                    task=last.task if last else None, round=last.round if last else None
                )
            )
            raise
        finally:
            if self._deleting is not None:
                self._deleting.join()

    def _run_tasks(self) -> None:
        """What is left of tasks that all clients meet at the same rounds."""
        rounds = self.config.train.rounds
        for task, first in self._remaining():
            self._task_began = time.perf_counter()
            if self._own_loop:
                self._start_strategy(task, 1, rounds)
                self._finish_round(task, rounds)
            else:
                for round in range(first, rounds + 1):
                    self._train(task, round)
                    self._finish_round(task, round)

    def _run_arrivals(self, arrivals: Arrivals) -> None:
        """What is left of tasks that have times of their own; the server's task is that of whoever
        is furthest behind.

        Before a round begins all clients are at the tasks that they are to train on in it.
        """
        if self._last is None:
            self._finish_tasks(
                0, arrivals
            )  # it may take time until enough clients are there
        while not arrivals.over:
            task, last = arrivals.task, self._last
            round = last.round + 1 if last and last.task == task else 1
            if self._own_loop:
                rounds, until = arrivals.span(self._server_round)
                round += self._start_strategy(task, round, rounds, until) - 1
            else:
                self._train(task, round)
            self._finish_round(task, round)

    def _remaining(self) -> Iterator[tuple[int, int]]:
        """Tasks still to do, each with its first round still to do."""
        task, round = (self._last.task, self._last.round + 1) if self._last else (0, 1)
        if round > self.config.train.rounds:
            task, round = task + 1, 1
        for later in range(task, self.config.data.tasks):
            yield later, round if later == task else 1

    def _begin(self) -> None:
        checkpoint = load_checkpoint(self.folder.checkpoints)
        digest = _digest(self.partition)
        if checkpoint is not None:
            if (checkpoint.partition or _digest_before(self.folder, digest)) != digest:
                raise ConfigError(
                    f"{self.folder.path} was started with other data: its clients held other samples (digest differs); "
                    "use the same data, or choose another --out"
                )
            self.folder.cut_back(checkpoint.position, checkpoint.chain)
            self._resume(checkpoint)
        else:
            self.folder.cut_back(0)
        self.folder.write_partition(self.partition)
        self.recorder.record(
            RunStarted(
                clients=self.config.data.clients,
                tasks=self.config.data.tasks,
                rounds=self.config.train.rounds,
                travelling=sum(array.size for array in self.arrays.values()),
                bytes=sum(array.nbytes for array in self.arrays.values()),
                learner=self.config.learner.name,
                strategy=self.config.strategy.name,
                partition=digest,
                resumed_from=checkpoint.server_round if checkpoint else None,
                versions=_versions(),
            )
        )
        if (
            checkpoint is None
            and getattr(self.strategy, "by_clock", False)
            and not self.grid.is_timed
        ):
            self.recorder.record(
                Warned(
                    reason=f"strategy {self.config.strategy.name} goes by the clock, which stands still here, as all "
                    "clients are equally fast: nobody is ever late, as in fedavg; set fleet.devices "
                    "(fedknow list devices), or use real clients"
                )
            )
        if checkpoint is None and self.config.evaluation.forward:
            self.inspector.begin(0, 0, self.arrays)
            tasks = self.config.data.tasks
            correct, total = score_clients(
                self.grid,
                self.options,
                self.inspector,
                self.arrays,
                0,
                tasks,
                both=False,
                forward=True,
            )
            self.scores.add_untrained(correct["personal"], total)

    def _resume(self, checkpoint: Checkpoint) -> None:
        check = {
            name: (array.shape, array.dtype)
            for name, array in checkpoint.arrays.items()
        }
        if check != {
            name: (array.shape, array.dtype) for name, array in self.arrays.items()
        }:
            raise CheckpointError(
                f"{self.folder.checkpoints}: the checkpoint holds another model's parameters; use the model it was "
                "started with, or choose another --out"
            )
        # Only where no round has aggregated anything is the model still the one it began with.
        self._has_aggregated = any(
            not np.array_equal(array, self.arrays[name])
            for name, array in checkpoint.arrays.items()
        )
        self.arrays = checkpoint.arrays
        self.scores = Scores.from_raw(checkpoint.scores)
        self.grid.restore(checkpoint.versions, checkpoint.traffic)
        self.grid.restore_state(checkpoint.grid)
        if self.arrivals is not None:
            if not checkpoint.arrivals:
                raise CheckpointError(
                    f"{self.folder.checkpoints}: the checkpoint does not say which task each client is at, as it is of "
                    "an earlier version; start again with another --out"
                )
            self.arrivals.restore(checkpoint.arrivals)
        with self._strategy_acts(
            "load_state_dict", 0, checkpoint.task, checkpoint.round
        ):
            restore_strategy(self.strategy, checkpoint.strategy)
        self._last = checkpoint
        self._server_round = checkpoint.server_round
        self._seconds_before = checkpoint.seconds
        self._client_memory = checkpoint.client_memory
        # Files that are only written when a task ends may have been damaged since.
        if np.isfinite(self.scores.weights).any():
            self.folder.write_accuracy(self.scores.arrays())
        if fleet := self.grid.fleet():
            self.folder.write_fleet(fleet)

    def _end(self) -> RunResult:
        if self.arrays:
            self._refuse_to_stand_still("in the whole run")
        weights = self.scores.sizes()
        personal, shared = (
            self.scores.accuracy("personal"),
            self.scores.accuracy("global"),
        )
        untrained = self.scores.untrained / self.scores.weights
        summary = self.recorder.record(
            RunEnded(
                seconds=self._elapsed(),
                accuracy=metrics.average_accuracy(personal, weights)[-1],
                accuracy_global=metrics.average_accuracy(shared, weights)[-1],
                forgetting=metrics.forgetting(personal, weights)[-1],
                forgetting_relative=metrics.relative_forgetting(personal, weights)[-1],
                forgetting_max=metrics.max_forgetting(personal, weights)[-1],
                backward_transfer=metrics.backward_transfer(personal, weights)[-1],
                forward_transfer=metrics.forward_transfer(personal, weights, untrained)[
                    -1
                ],
                gap=metrics.local_global_gap(personal, shared, weights)[-1],
                traffic=self.grid.traffic.counts(),
                elapsed=VirtualTime.read(self.grid.elapsed()),
            )
        )
        return RunResult(self.folder.path, self.scores.arrays(), self.arrays, summary)

    # --- a round
    # --------------------------------------------------------------------------------------------------

    def _train(self, task: int, round: int) -> None:
        """One round through the strategy's hooks."""
        began = time.perf_counter()
        self._server_round += 1
        self.inspector.begin(task, round, self.arrays)
        self._too_small = 0
        config = self._settings(task, round)
        with self._strategy_acts("configure_train", 0, task, round):
            record = to_record(self.arrays)
            messages = _messages(
                self.strategy.configure_train(
                    self._server_round, record, config, self.strategy_grid
                )
            )
        replies = _good(self.strategy_grid.send_and_receive(messages))
        if (
            messages
            and not replies
            and (self.inspector.failures or not self.config.fleet.devices)
        ):
            raise RunError(
                f"task {task + 1}, round {round}: {self._all_failed(len(messages))}"
            )
        aggregated: dict[str, Any] = {}
        if self.arrays:  # where nothing travels there is nothing to aggregate, and some strategies stumble over it
            with self._strategy_acts("aggregate_train", 1, task, round):
                returned = self.strategy.aggregate_train(self._server_round, replies)
            arrays, aggregated = check_aggregate(
                returned, self.arrays, self.config.strategy.name
            )
        else:
            arrays = self.arrays
        if arrays is None:
            self._aggregated_nothing(
                task, round, "aggregated nothing" if messages else "chose no clients"
            )
            if replies and round >= self.config.train.rounds:
                self._refuse_to_stand_still(f"by task {task + 1}, round {round}")
        else:
            self._note_aggregate(task, round, arrays)
        if self.arrivals is not None:
            self.arrivals.steps += 1
        self._emit_round(task, round, aggregated, time.perf_counter() - began)

    def _start_strategy(
        self, task: int, first: int, rounds: int, until: float = math.inf
    ) -> int:
        """Rounds of a task through a strategy that has a loop of its own; how many it made.

        Between its rounds it cannot be stopped or saved: a checkpoint is written when it comes
        back, once a task. Flower's contract has ``start`` call ``evaluate_fn`` before the first
        round and after each; that is when we count rounds, and tell clients of the next through
        the settings that all of a task's messages share.
        """
        every = self.config.evaluation.every
        base = self._server_round
        train_config, evaluate_config = self._settings(task, 1), self._settings(task, 1)
        if self.arrivals is not None:
            self._steps_before = self._steps_told = self.arrivals.steps
        began = time.perf_counter()
        calls = 0

        def evaluate_fn(number: int, arrays: ArrayRecord) -> MetricRecord | None:
            nonlocal began, calls
            calls += 1
            current = check_arrays(arrays, self.arrays, self.config.strategy.name)
            if number > 0:
                self._server_round = base + number
                round = first + number - 1
                aggregated = getattr(self.strategy, "round_metrics", None) or {}
                self._emit_round(task, round, aggregated, time.perf_counter() - began)
                self.arrays = current
                if every and round % every == 0 and number < rounds:
                    self._evaluate_within(task, round)
                self._between_rounds(round)
            began = time.perf_counter()
            self.inspector.begin(task, first + number, current)
            for config in (train_config, evaluate_config):
                config["round"] = number + 1
            self._seed(base + number + 1, 0)
            return None

        self.inspector.begin(task, first, self.arrays)
        self._too_small = 0
        with self._strategy_acts("start", 0, task, first):
            result = self.strategy.start(
                grid=self.strategy_grid.with_end(until),
                initial_arrays=to_record(self.arrays),
                num_rounds=rounds,
                train_config=train_config,
                evaluate_config=evaluate_config,
                evaluate_fn=evaluate_fn,
            )
        if not calls:
            reason = (
                "its start never called evaluate_fn: its rounds could not be told apart"
            )
            self.recorder.record(
                Warned(
                    task=task,
                    round=rounds,
                    reason=f"strategy {self.config.strategy.name}: {reason}",
                )
            )
        if not isinstance(getattr(result, "arrays", None), ArrayRecord):
            raise RunError(
                f"strategy {self.config.strategy.name}: start must return a Result, not {result!r}"
            )
        if self.arrays and not result.arrays:
            self._aggregated_nothing(task, rounds, "aggregated nothing")
            self._refuse_to_stand_still(f"by the end of task {task + 1}")
        else:
            self._note_aggregate(
                task,
                rounds,
                check_arrays(result.arrays, self.arrays, self.config.strategy.name),
            )
        if self.arrivals is None:
            made = rounds
        else:  # it is told when to stop; a round in which nobody answered is one
            made = max(1, self._server_round - base)
            self.arrivals.steps = self._steps_told
        self._server_round = base + made
        return made

    def _between_rounds(self, round: int) -> None:
        """Where clients have tasks of their own, end those that are over between two rounds of a
        strategy's own loop.

        Who is at work finishes that first; and the last task is over for all when the run is.
        """
        if self.arrivals is not None:
            self.arrivals.steps = self._steps_told
            while self.config.data.arrival != "same" and self._leave_tasks(
                round, self.arrivals, last=False
            ):
                pass

    def _address(self, messages: Sequence[FlowerMessage]) -> None:
        """See what a strategy is about to send, and tell clients which task they are at."""
        self._check_strategy(messages, lambda: self._settings(*self.inspector.position))
        if self.arrivals is not None:
            self._address_arrivals(messages, self.arrivals)

    def _address_arrivals(
        self, messages: Sequence[FlowerMessage], arrivals: Arrivals
    ) -> None:
        """Tell clients which task they are at; in a strategy's own loop, end first what is over
        for those asked."""
        work = [
            message for message in messages if message.metadata.message_type == TRAIN
        ]
        if self._own_loop and work:
            content = work[0].content
            number = cast(int, position(work[0])["round"])  # of the step it is for
            arrivals.steps, self._steps_told = (
                self._steps_before + number - 1,
                self._steps_before + number,
            )
            if self.config.data.arrival != "same" and arrivals.leaving(
                self._moment(arrivals)
            ):
                now = next(iter(content.array_records.values()))
                self.arrays = check_arrays(now, self.arrays, self.config.strategy.name)
                with self.inspector.outside_the_round():
                    while self._leave_tasks(
                        self.inspector.position[1], arrivals, last=False
                    ):
                        pass
        arrivals.tell(work)

    def _finish_round(self, task: int, round: int) -> None:
        """All that follows a round of training, up to the checkpoint."""
        every = self.config.evaluation.every
        if self.arrivals is None:
            over = round == self.config.train.rounds
            if over:
                self._finish_task(task, round)
        else:
            over = self._finish_tasks(round, self.arrivals)
        if every and round % every == 0 and not over:
            self._evaluate(task, round, over)
        self._commit(task, round)

    def _finish_task(self, task: int, round: int) -> None:
        """End and score a task that is over for all clients at once."""
        knowledge = self._end_task(task, round)
        self._evaluate(task, round, over=True)
        self._emit_task_end(task, round, knowledge)

    def _evaluate_within(self, task: int, round: int) -> None:
        """Score clients between two rounds of a strategy's own loop, if they can be asked."""
        if self.grid.is_occupied:
            reason = "clients are at work, and are not scored before the task is over"
            self.recorder.record(Warned(task=task, round=round, reason=reason))
        else:
            self._evaluate(task, round, over=False)

    def _finish_tasks(self, round: int, arrivals: Arrivals) -> bool:
        """End and score the tasks that are over by the moment at which the next round begins;
        whether there were any.

        What takes time (telling clients, waiting for enough of them) may have further tasks
        end, so it goes on until nothing is to be done. A client that a round kept longer than
        its next task took ends that one too.
        """
        any_over = False
        while not arrivals.over:
            if self._leave_tasks(round, arrivals):
                any_over = True
            elif not self._wait(arrivals):
                break
        return any_over

    def _leave_tasks(self, round: int, arrivals: Arrivals, last: bool = True) -> bool:
        """End and score a task of each client that is not at work and whose task is over now;
        whether there were any.

        Without ``last`` the last task goes on.
        """
        busy, any_over = self.grid.at_work, False
        for task, over in arrivals.leaving(self._moment(arrivals)).items():
            clients = [client for client in over if client not in busy]
            if not clients or (task == self.config.data.tasks - 1 and not last):
                continue
            any_over = True
            arrivals.leave(clients, self._server_round)
            if self.config.data.arrival == "same":
                self._finish_task(task, round)
            else:
                self._finish_own_task(task, round, clients, last=arrivals.task > task)
        return any_over

    def _moment(self, arrivals: Arrivals) -> float:
        """The moment that it is now, as the schedule counts."""
        return self.grid.clock_time if arrivals.seconds else self._server_round

    def _wait(self, arrivals: Arrivals) -> bool:
        """Where a schedule has times, wait until there is something to do in a round; whether time
        has passed."""
        before = self._moment(arrivals)
        if arrivals.idle(self._server_round):
            self.grid.wait(arrivals.next())
        elif arrivals.seconds:
            self.grid.gather(arrivals.next())
        return self._moment(arrivals) > before

    def _finish_own_task(
        self, task: int, round: int, clients: Sequence[int], last: bool
    ) -> None:
        """End and score a task that is over for these clients; what is told of it is told with the
        last of them.

        The purely global model is not scored, as that takes what all clients keep at one moment.
        """
        began = time.perf_counter()
        nodes = (
            [node_of(client) for client in clients]
            if len(clients) < self.config.data.clients
            else None
        )
        knowledge = self._end_task(task, round, nodes)
        self.inspector.begin(task, round, self.arrays)
        tasks, forward = self.config.data.tasks, self.config.evaluation.forward
        correct, total = score_clients(
            self.grid,
            self.options,
            self.inspector,
            self.arrays,
            task,
            tasks,
            both=False,
            forward=forward,
            nodes=nodes,
        )
        self.scores.add_task(task, correct, total)
        self.folder.write_accuracy(self.scores.arrays())
        if last:
            now = {scoring: self.scores.accuracy(scoring) for scoring in correct}
            self._emit_evaluation(task, round, now, {}, time.perf_counter() - began)
            self._emit_task_end(task, round, knowledge)

    def _end_task(
        self, task: int, round: int, nodes: Sequence[int] | None = None
    ) -> float:
        """Tell clients (all) that the task is over; mean size in bytes of what they keep about
        their tasks.

        NaN: none of those asked answered well.
        """
        if not self.learner.ends_task:
            return 0.0
        self.inspector.begin(task, round, self.arrays)
        self._too_small = 0
        content: dict[str, Record] = {ARRAYS: self.arrays, CONFIG: Config(task=task)}
        work = [
            Message(END_TASK, node, "", group=str(task), content=content)
            for node in nodes or self.grid.members()
        ]
        replies = [
            reply
            for reply in self.grid.exchange(work, self.options)
            if reply.failure is None
        ]
        sizes = [_scalar(reply.content[METRICS], KNOWLEDGE_BYTES) for reply in replies]
        self._note_memory(reply.content[METRICS] for reply in replies)
        for reply in replies:
            for name in self._of_ending:
                spent = reply.content[METRICS].get(name)
                self._of_ending[name] += (
                    float(spent) if isinstance(spent, int | float) else math.nan
                )
        if not sizes:
            if nodes is not None:  # others may still go on
                return math.nan
            raise RunError(
                f"task {task + 1}, when it ended: {self._all_failed(len(work))}"
            )
        if isinstance(self.strategy, PairedStrategy):
            with self._strategy_acts("aggregate_end_task", 5, task, round):
                self.strategy.aggregate_end_task(task, self.arrays, replies)
        return sum(sizes) / len(sizes)

    def _evaluate(self, task: int, round: int, over: bool) -> None:
        """Score every client, and let the strategy do the evaluation of its own, if it has one."""
        began = time.perf_counter()
        self.inspector.begin(task, round, self.arrays)
        aggregated = None
        if not self._own_loop:
            config = self._settings(task, round)
            with self._strategy_acts("configure_evaluate", 2, task, round):
                record = to_record(self.arrays)
                messages = _messages(
                    self.strategy.configure_evaluate(
                        self._server_round, record, config, self.strategy_grid
                    )
                )
            replies = _good(self.strategy_grid.send_and_receive(messages))
            with self._strategy_acts("aggregate_evaluate", 3, task, round):
                aggregated = self.strategy.aggregate_evaluate(
                    self._server_round, replies
                )
        evaluation = self.config.evaluation
        correct, total = score_clients(
            self.grid,
            self.options,
            self.inspector,
            self.arrays,
            task,
            self.config.data.tasks,
            both=evaluation.global_model,
            forward=evaluation.forward,
        )
        if over:
            self.scores.add_task(task, correct, total)
        else:
            self.scores.add_round((self._server_round, task, round), correct, total)
        self.folder.write_accuracy(self.scores.arrays())
        now = {}
        for scoring, values in correct.items():
            now[scoring] = self.scores.accuracy(scoring)
            now[scoring][:, :, task] = values / self.scores.weights
        self._emit_evaluation(
            task, round, now, aggregated or {}, time.perf_counter() - began
        )

    def _emit_task_end(self, task: int, round: int, knowledge: float) -> None:
        kept = 0
        if isinstance(self.strategy, PairedStrategy):
            with self._strategy_acts("kept_bytes", 6, task, round):
                kept = self.strategy.kept_bytes()
        now = time.perf_counter()
        seconds, self._task_began = now - self._task_began, now
        self.recorder.record(
            TaskEnded(
                task=task,
                knowledge_bytes=knowledge,
                server_bytes=kept,
                client_memory_bytes=self._client_memory or math.nan,
                **self._of_ending,
                seconds=seconds,
                elapsed=VirtualTime.read(self.grid.elapsed()),
            )
        )
        self._of_ending = dict.fromkeys(self._of_ending, 0.0)
        if fleet := self.grid.fleet():
            self.folder.write_fleet(fleet)

    def _emit_evaluation(
        self,
        task: int,
        round: int,
        now: Mapping[str, np.ndarray],
        aggregated: Mapping[str, Any],
        seconds: float,
    ) -> None:
        weights = self.scores.sizes()
        per_task = metrics.task_accuracy(now["personal"], weights)
        self.recorder.record(
            Evaluated(
                task=task,
                round=round,
                accuracy=metrics.average_accuracy(now["personal"], weights)[task],
                accuracy_global=metrics.average_accuracy(now["global"], weights)[task],
                forgetting=metrics.forgetting(now["personal"], weights)[task],
                per_task=tuple(per_task[: task + 1, task].tolist()),
                metrics=dict(aggregated),
                seconds=seconds,
                elapsed=VirtualTime.read(self.grid.elapsed()),
            )
        )

    def _commit(self, task: int, round: int) -> None:
        """Make the round just finished the one that a resumed run goes on from."""
        with self._strategy_acts("state_dict", 4, task, round):
            state, lost = strategy_state(self.strategy)
        if lost and not self._lost_told:
            reason = f"strategy {self.config.strategy.name}: not in checkpoints, so reset if resumed: {', '.join(lost)}"
            self.recorder.record(Warned(task=task, round=round, reason=reason))
            self._lost_told = True
        checkpoint = Checkpoint(
            task=task,
            round=round,
            server_round=self._server_round,
            arrays=self.arrays,
            strategy=state,
            scores=self.scores.raw(),
            versions=dict(self.grid.versions),
            traffic=self.grid.traffic.counts(),
            position=self.folder.position(),
            seconds=self._elapsed(),
            grid=self.grid.state(),
            arrivals=self.arrivals.state() if self.arrivals else {},
            client_memory=self._client_memory,
            chain=self.folder.chain,
            partition=_digest(self.partition),
        )
        self._deleting = save_checkpoint(self.folder.checkpoints, checkpoint)
        self._last = checkpoint
        self.grid.prune()

    # --- helpers
    # --------------------------------------------------------------------------------------------------

    def _warn(self, reason: str) -> None:
        """Put a warning on record, at the round under way."""
        task, round = self.inspector.position
        self.recorder.record(Warned(task=task, round=round, reason=reason))

    def _missed(self, work: Sequence[Message]) -> None:
        """Put on record which clients a wave went on without."""
        clients = sorted({client_of(message.node) for message in work})
        task, round = self.inspector.position
        reason = f"no answer to {work[0].kind!r} in time from clients {clients}; the run goes on without them"
        self.recorder.record(
            Warned(task=task, round=round, clients=tuple(clients), reason=reason)
        )

    def _forgot(self, client: int, reason: str) -> None:
        """Put on record that a client begins anew."""
        task, round = self.inspector.position
        self.recorder.record(
            ClientBegunAnew(
                client=client,
                task=task,
                round=round,
                reason=f"client {client} begins anew: {reason}",
            )
        )

    @property
    def _own_loop(self) -> bool:
        return type(self.strategy).start is not Strategy.start

    def _settings(self, task: int, round: int) -> ConfigRecord:
        settings = ConfigRecord(
            {
                "task": task,
                "round": round,
                "rounds": self.config.train.rounds,
                "tasks": self.config.data.tasks,
                "server-round": self._server_round,
            }
        )
        if self.learner.frozen_digest:
            settings["frozen"] = self.learner.frozen_digest
        return settings

    @contextmanager
    def _strategy_acts(
        self, hook: str, stage: int, task: int, round: int
    ) -> Iterator[None]:
        """Seed what strategies draw from, and name the strategy if it fails."""
        self._seed(self._server_round, stage)
        try:
            with heard_from_flower() as self._heard:
                yield
        except (RunError, StateError, *PASSED_ON):  # these name somebody else
            raise
        except BaseException as error:
            if is_disk_full(error):
                raise
            raise RunError(
                f"strategy {self.config.strategy.name} failed in {hook}, task {task + 1}, round {round}: "
                f"{explain(error)}"
                + (f"; {self._all_failed(self._too_small)}" if self._too_small else "")
            ) from error

    def _aggregated_nothing(self, task: int, round: int, what: str) -> None:
        """Put on record that a round left the model alone, with Flower's reason where it gives one."""
        because = f": {'; '.join(self._heard)}" if self._heard else ""
        reason = f"strategy {what}{because}; the global model stays as it is"
        self.recorder.record(Warned(task=task, round=round, reason=reason))

    def _note_aggregate(self, task: int, round: int, arrays: Arrays) -> None:
        """Take over an aggregate, and put on record what Flower warned of meanwhile, each text once."""
        self.arrays = arrays
        self._has_aggregated = True
        for text in self._heard:
            if text not in self._heard_before:
                self._heard_before.add(text)
                reason = f"strategy {self.config.strategy.name}: {text}"
                self.recorder.record(Warned(task=task, round=round, reason=reason))

    def _refuse_to_stand_still(self, when: str) -> None:
        """Stop a run whose strategy has never aggregated anything.

        Its results would be those of the initial model, and look like any others.
        """
        if self._has_aggregated:
            return
        because = f" ({'; '.join(self._heard)})" if self._heard else ""
        deadline = self.config.fleet.deadline
        more_time = f", raise fleet.deadline = {deadline:g}" if deadline else ""
        raise NothingAggregatedError(
            f"strategy {self.config.strategy.name} has aggregated nothing {when}{because}, so the "
            f"global model is still the initial one; change the strategy's settings{more_time} or "
            "the number of clients, and start again with another --out"
        )

    def _seed(self, server_round: int, stage: int) -> None:
        # Flower samples clients with Python's global generator and draws noise from NumPy's.
        random.seed(integer(self.config.seed, "strategy", server_round, stage))
        seed = integer(self.config.seed, "strategy.numpy", server_round, stage) % 2**32
        np.random.seed(seed)  # noqa: NPY002

    def _client_failed(self, failure: ClientFailure) -> None:
        self.recorder.record(ClientFailed(**failure.event()))
        if (
            failure.fault is Fault.OUT_OF_MEMORY
        ):  # that a device is too small is a result of the experiment
            self._too_small += 1
        elif self.config.engine.on_client_error == "stop":
            if failure.fault is Fault.STATE_LOST:
                raise ClientLost(
                    f"{failure}; put the state back from a copy, or have the client begin anew: go on with --resume "
                    f"after fedknow forget {self.folder.path} --client {failure.client}, or with "
                    "--set engine.on_lost_state=fresh"
                )
            raise RunError(
                f"{failure}; to leave such clients out of the round: --set engine.on_client_error=skip"
            )

    def _all_failed(self, clients: int) -> str:
        if self._too_small:
            return (
                f"learner {self.config.learner.name} with model {self.config.model.name} does not fit the fleet: "
                f"too little memory on {min(self._too_small, clients)} of "
                f"{counted(clients, 'device')} asked, and no other client answered; "
                "metrics.jsonl says how much they have and need"
            )
        failed = "the client" if clients == 1 else f"all {clients} clients"
        return f"{failed} failed; see metrics.jsonl"

    def _emit_round(
        self, task: int, round: int, aggregated: Mapping[str, Any], seconds: float
    ) -> None:
        clients = self.inspector
        self._note_memory(metrics for _, metrics in clients.trained)
        # Where no client trains, a strategy that does says in its metrics how it went.
        self.recorder.record(
            RoundEnded(
                task=task,
                round=round,
                server_round=self._server_round,
                clients=len(clients.trained),
                loss=clients.mean("loss")
                if clients.trained
                else aggregated.get("loss", math.nan),
                accuracy=clients.mean("accuracy")
                if clients.trained
                else aggregated.get("accuracy", math.nan),
                samples=clients.total("samples")
                if clients.trained
                else aggregated.get("samples", 0.0),
                metrics=dict(aggregated),
                seconds=seconds,
                traffic=self.grid.traffic.counts(),
                peak_memory_mb=self.grid.peak_memory_mb(),
                client_memory_bytes=self._client_memory or math.nan,
                flops=clients.total(FLOPS)
                if clients.trained
                else aggregated.get("flops", math.nan),
                failures=self.inspector.failures,
                elapsed=VirtualTime.read(self.grid.elapsed()),
            )
        )

    def _note_memory(self, answers: Iterable[Record]) -> None:
        """Note the most memory that a client's work has needed; clients of other make may not say."""
        for record in answers:
            needed = record.get(MEMORY)
            if isinstance(needed, int | float):
                self._client_memory = max(self._client_memory, float(needed))

    def _elapsed(self) -> float:
        return self._seconds_before + time.perf_counter() - self._began


def _messages(messages: object) -> list[FlowerMessage]:
    if messages is None:
        raise TypeError(
            "it returned nothing (None); it must return messages, an empty list for no clients"
        )
    return list(messages)  # type: ignore[call-overload, no-any-return]


def _good(replies: Any) -> list[FlowerMessage]:
    """Replies without errors; these have been counted and reported when they arrived."""
    return [reply for reply in replies if not reply.has_error()]


def _scalar(record: Record, name: str) -> float:
    value = record[name]
    assert isinstance(value, int | float)  # the inspector saw to it
    return float(value)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):  # real clients need no Ray
            found[name] = metadata.version(name)
    return found


def _digest(partition: Mapping[str, Any]) -> str:
    stated = partition.get("digest")
    return (
        str(stated)
        if stated
        else hashlib.sha256(json.dumps(partition, sort_keys=True).encode()).hexdigest()
    )


def _digest_before(folder: RunFolder, otherwise: str) -> str:
    """The digest in ``partition.json``, for checkpoints of earlier versions, which do not have it."""
    before = folder.partition
    return otherwise if before is None else _digest(before)


@contextmanager
def _restored_randomness() -> Iterator[None]:
    """Leave the process's global generators as they were."""
    python, numpy, pytorch = (
        random.getstate(),
        np.random.get_state(),  # noqa: NPY002
        torch.get_rng_state(),
    )
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(pytorch)
