"""The order of a run's rounds: which comes next, which tasks are over.

Tasks begin together, or have times of their own (:mod:`fedknow.server.run.task_times`). The
loop asks one :class:`TaskSchedule`, chosen once, and does not know which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from flwr.app import Message as FlowerMessage

from fedknow.protocols.config import ConfigError
from fedknow.server.checks.aggregates import check_arrays
from fedknow.server.checks.instructions import position
from fedknow.server.run.checkpoint import CheckpointError
from fedknow.server.run.closing import TaskEnder
from fedknow.server.run.context import RunContext
from fedknow.server.run.task_times import TaskTimes, has_task_times

__all__ = ["TaskSchedule", "Turn", "choose_schedule"]


@dataclass(frozen=True)
class Turn:
    """Rounds of one task that the server makes next, without a break.

    Attributes
    ----------
    task : int
    round : int
        The first of these rounds, within the task, from 1.
    rounds : int
        How many there may be; a driver that can stop between rounds makes one.
    until : float
        The virtual second from which on no work is given out.
    """

    task: int
    round: int
    rounds: int
    until: float = math.inf


class TaskSchedule(Protocol):
    """Says which round comes next, and ends the tasks that are over."""

    def begin(self) -> None:
        """Let a new run begin; one that is resumed has begun."""
        ...

    def next_turn(self) -> Turn | None:
        """Say what comes next; ``None``: all tasks are over."""
        ...

    def finish(self, task: int, round: int) -> bool:
        """End and score what is over after a round; gives whether anything was."""
        ...

    def count_step(self) -> None:
        """Count a step of the server, made through Flower's hooks."""
        ...

    def address(self, work: Sequence[FlowerMessage]) -> None:
        """Tell clients in messages to them which task they are at."""
        ...

    def begin_loop(self) -> None:
        """Let a strategy's own loop begin, which counts its steps from 1."""
        ...

    def begin_step(self, work: Sequence[FlowerMessage]) -> None:
        """Let a step of such a loop begin, which gives out this work."""
        ...

    def end_loop_round(self, round: int) -> None:
        """End what is over between two rounds of such a loop."""
        ...

    def end_loop(self, rounds_asked: int, rounds_made: int) -> int:
        """End such a loop; gives the number of rounds that count.

        Parameters
        ----------
        rounds_asked, rounds_made : int
            Rounds that it was to make, and that it has told of.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Give how far clients have come, for checkpoints."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state` gave."""
        ...


class TasksTogether:
    """All clients meet a task at the same round.

    Each task takes ``train.rounds`` rounds.

    All are at the server's task at any time, so there is nothing to count or to tell.

    Parameters
    ----------
    run : RunContext
    ender : TaskEnder
    """

    def __init__(self, run: RunContext, ender: TaskEnder) -> None:
        self._run = run
        self._ender = ender
        self._task_under_way: int | None = None

    def begin(self) -> None:
        """Begin at once."""

    def next_turn(self) -> Turn | None:
        """Say which rounds of which task come next."""
        config = self._run.parts.config
        task, rounds_done = self._run.state.last_complete or (0, 0)
        # The last complete round was the task's last.
        if rounds_done >= config.train.rounds:
            task += 1
            rounds_done = 0
        if task >= config.data.tasks:
            return None
        if task != self._task_under_way:
            # The checkpoint of the task before is no part of this one's time.
            self._task_under_way = task
            self._ender.start_clock()
        return Turn(task, rounds_done + 1, config.train.rounds - rounds_done)

    def finish(self, task: int, round: int) -> bool:
        """End and score the task after its last round."""
        is_over = round == self._run.parts.config.train.rounds
        if is_over:
            self._ender.finish_task(task, round)
        return is_over

    def count_step(self) -> None:
        """Count nothing."""

    def address(self, work: Sequence[FlowerMessage]) -> None:
        """Change nothing: the server's task is each client's."""

    def begin_loop(self) -> None:
        """Count nothing."""

    def begin_step(self, work: Sequence[FlowerMessage]) -> None:
        """Count nothing."""

    def end_loop_round(self, round: int) -> None:
        """End nothing: a task takes the whole loop."""

    def end_loop(self, rounds_asked: int, rounds_made: int) -> int:
        """Take all rounds as made: the loop need not have told of each."""
        return rounds_asked

    def state(self) -> dict[str, Any]:
        """Give nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore nothing."""


class TasksByTime:
    """Tasks come to all clients at the same moment of virtual time.

    The server's task is that of whoever is furthest behind. Before a round begins all clients
    are at the tasks that they are to train on in it.

    Parameters
    ----------
    run : RunContext
    ender : TaskEnder

    Raises
    ------
    ConfigError
        If times are in virtual seconds, of which the grid has none.
    """

    def __init__(self, run: RunContext, ender: TaskEnder) -> None:
        self._run = run
        self._ender = ender
        config = run.parts.config
        self._last_task = config.data.tasks - 1
        self._times = TaskTimes.plan(config)
        self._steps_before = 0
        self._steps_given_out = 0
        # Only a grid with a virtual clock says how much of it has passed.
        if self._times.is_in_seconds and not run.grid.elapsed():
            raise ConfigError(
                f"data.arrival_seconds = {config.data.arrival_seconds:g}: real clients have no "
                "virtual time; set it to 0, or run fedknow simulate"
            )

    def next_turn(self) -> Turn | None:
        """Say which rounds of which task come next."""
        if self._times.is_over:
            return None
        task = self._times.task
        last_task, last_round = self._run.state.last_complete or (task, 0)
        # Rounds are counted anew in each task.
        round = last_round + 1 if last_task == task else 1
        rounds, until = self._times.span(self._run.state.server_round)
        return Turn(task, round, rounds, until)

    def begin(self) -> None:
        """Wait until enough clients are there; tasks may end meanwhile."""
        self._finish_all(0)

    def finish(self, task: int, round: int) -> bool:
        """End and score the tasks that are over before the next round begins."""
        return self._finish_all(round)

    def count_step(self) -> None:
        """Count a step of the server."""
        self._times.steps += 1

    def address(self, work: Sequence[FlowerMessage]) -> None:
        """Tell clients in messages to them which task they are at."""
        self._times.address(work)

    def begin_loop(self) -> None:
        """Let a strategy's own loop begin, which counts its steps from 1."""
        self._steps_before = self._times.steps
        self._steps_given_out = self._times.steps

    def begin_step(self, work: Sequence[FlowerMessage]) -> None:
        """Let a step of such a loop begin, which gives out this work."""
        # The loop counts from 1 in each turn, and its messages are all that tells its steps.
        number = cast(int, position(work[0])["round"])
        self._times.steps = self._steps_before + number - 1
        self._steps_given_out = self._steps_before + number

    def end_loop_round(self, round: int) -> None:
        """Count the steps of such a loop; tasks end for all clients after it."""
        self._times.steps = self._steps_given_out

    def end_loop(self, rounds_asked: int, rounds_made: int) -> int:
        """End such a loop; gives the number of rounds that count."""
        self._times.steps = self._steps_given_out
        # A loop in which nobody answered until it was told to stop is one round.
        return max(1, rounds_made)

    def state(self) -> dict[str, Any]:
        """Give how far clients have come."""
        return self._times.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state` gave.

        Raises
        ------
        CheckpointError
            If the state is of an earlier version, which did not have it.
        """
        if not state:
            raise CheckpointError(
                f"{self._run.folder.checkpoints}: the checkpoint does not say which task each "
                "client is at, as it is of an earlier version; start again with another --out"
            )
        self._times.restore(state)

    def _finish_all(self, round: int) -> bool:
        """End and score tasks until there is something to do in a round.

        Telling clients and waiting for enough of them take time, in which further tasks may end.
        A client that a round kept longer than its next task took ends that one too.

        Returns
        -------
        bool
            Whether any task ended.
        """
        any_over = False
        while not self._times.is_over:
            if self._leave_tasks(round, is_last_over=True):
                any_over = True
            # No time passed, so that waiting again would never end.
            elif not self._wait():
                break
        return any_over

    def _leave_tasks(self, round: int, is_last_over: bool) -> bool:
        """End and score one finished task of each idle client.

        Parameters
        ----------
        round : int
        is_last_over : bool
            Whether the last task ends too, or goes on.

        Returns
        -------
        bool
            Whether any task ended.
        """
        busy = self._run.grid.at_work
        any_over = False
        for task, finished in self._times.leaving(self._moment()).items():
            # A client at work ends its task when it has answered.
            clients = [client for client in finished if client not in busy]
            # The last task ends with the run, so that a strategy's loop is not cut off in it.
            if not clients or (task == self._last_task and not is_last_over):
                continue
            any_over = True
            # Before they are told: whether they are the last of the task is read off the times.
            self._times.leave(clients, self._run.state.server_round)
            self._finish_for(task, round, clients)
        return any_over

    def _finish_for(self, task: int, round: int, clients: Sequence[int]) -> None:
        self._ender.finish_task(task, round)

    def _moment(self) -> float:
        """Say which moment it is, as the times count."""
        if self._times.is_in_seconds:
            # Tasks by seconds begin in virtual time, others by the server's rounds.
            return self._run.grid.clock_time
        return self._run.state.server_round

    def _wait(self) -> bool:
        """Let time pass until a round can begin; gives whether any passed."""
        earlier = self._moment()
        if self._times.is_idle(self._run.state.server_round):
            # Nobody has a task: time must go on without work.
            self._run.grid.wait(self._times.next_moment())
        elif self._times.is_in_seconds:
            self._run.grid.gather(self._times.next_moment())
        return self._moment() > earlier


class TasksStaggered(TasksByTime):
    """Each client meets its tasks at times of its own.

    The times are rounds or virtual seconds.
    """

    def begin_step(self, work: Sequence[FlowerMessage]) -> None:
        """Let a step of a strategy's own loop begin.

        Tasks that are over end before clients are given the next work.
        """
        super().begin_step(work)
        # The usual case, which must not cost a check of the whole model.
        if not self._times.leaving(self._moment()):
            return
        run = self._run
        # The loop's present model is known from its messages alone.
        present = next(iter(work[0].content.array_records.values()))
        run.state.arrays = check_arrays(present, run.state.arrays, run.calls.name)
        inspector = run.incidents.inspector
        with inspector.outside_the_round():
            self._leave_in_loop(inspector.position[1])

    def end_loop_round(self, round: int) -> None:
        """End what is over between two rounds of such a loop.

        Clients at work finish that first; the last task is over for all when the run is.
        """
        super().end_loop_round(round)
        self._leave_in_loop(round)

    def _leave_in_loop(self, round: int) -> None:
        has_ended = True
        # A client may have been kept at work so long that several of its tasks are over.
        while has_ended:
            has_ended = self._leave_tasks(round, is_last_over=False)

    def _finish_for(self, task: int, round: int, clients: Sequence[int]) -> None:
        is_last = self._times.task > task
        self._ender.finish_own_task(task, round, clients, is_last)


def choose_schedule(run: RunContext, ender: TaskEnder) -> TaskSchedule:
    """Choose the schedule that an experiment asks for.

    Raises
    ------
    ConfigError
        If it asks for virtual seconds, of which the grid has none.
    """
    config = run.parts.config
    if not has_task_times(config):
        return TasksTogether(run, ender)
    if config.data.arrival == "same":
        return TasksByTime(run, ender)
    return TasksStaggered(run, ender)
