"""The loop of tasks, rounds and scoring around any Flower strategy.

The loop says what happens by events (:mod:`fedknow.server.run.events`) and by nothing else.
"""

from __future__ import annotations

import platform
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message as FlowerMessage
from flwr.serverapp.strategy import Strategy

from fedknow.protocols.hostile import hostile_clients
from fedknow.protocols.messages import END_TASK, TRAIN, Arrays
from fedknow.server.checks.claims import Claims
from fedknow.server.checks.faults import RunError
from fedknow.server.checks.instructions import StrategyCheck
from fedknow.server.grids.base import MessageGrid
from fedknow.server.grids.strategy_grid import StrategyGrid
from fedknow.server.grids.wave import WaveOptions
from fedknow.server.run import metrics
from fedknow.server.run.closing import Scorer, TaskEnder
from fedknow.server.run.context import RunContext
from fedknow.server.run.disk import running_out_of_disk
from fedknow.server.run.driver import Driver, HookDriver
from fedknow.server.run.evaluation import Scores, draw_sample
from fedknow.server.run.events import (
    RunEnded,
    RunInterrupted,
    RunStarted,
    VirtualTime,
    Warned,
)
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.incidents import Incidents
from fedknow.server.run.loop_driver import LoopDriver
from fedknow.server.run.parts import Parts
from fedknow.server.run.recorder import Recorder, Subscriber
from fedknow.server.run.resumption import Resumption
from fedknow.server.run.schedule import choose_schedule
from fedknow.server.run.state import RunState
from fedknow.server.run.strategy_calls import StrategyCalls
from fedknow.strategies import quiet_flower
from fedknow.strategies.paired import PairedStrategy, Setup

__all__ = ["Experiment", "RunError", "RunResult"]

LIBRARIES = ("fedknow", "flwr", "torch", "ray", "numpy")
"""What a result may depend on besides our own code."""


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
        The line of the event :class:`~fedknow.server.run.events.RunEnded`.
    """

    folder: Path
    accuracy: dict[str, np.ndarray]
    arrays: Arrays
    summary: dict[str, Any]


class Experiment:
    """One run of one configuration on one grid.

    Parameters
    ----------
    parts : Parts
        What the experiment consists of (:func:`fedknow.server.assemble.assemble`).
    grid : MessageGrid
        How clients are reached.
    folder : RunFolder
        Created, or opened to be resumed: then the run goes on after its last complete round.
    subscribers : iterable of callable
        Called with each event.

    Raises
    ------
    ConfigError
        If the experiment needs virtual time, of which the grid has none, or the strategy finds
        that it does not fit.
    """

    def __init__(
        self,
        parts: Parts,
        grid: MessageGrid,
        folder: RunFolder,
        subscribers: Iterable[Subscriber] = (),
    ) -> None:
        recorder = Recorder(folder, subscribers)
        # The callback is given before this object is complete; no message is sent until then.
        self._run = _make_context(parts, grid, folder, recorder, self._address)
        self._driver = _choose_driver(self._run)
        self._scorer = Scorer(self._run, self._driver.evaluate)
        self._ender = TaskEnder(self._run, self._scorer)
        self._schedule = choose_schedule(self._run, self._ender)
        self._resumption = Resumption(self._run, self._schedule)
        self._check_strategy = StrategyCheck(
            parts.config, parts.learner, self._run.incidents.warn
        )
        if isinstance(parts.strategy, PairedStrategy):
            parts.strategy.prepare(
                Setup(parts.config, parts.learner, parts.stream)
            )

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
        self._resumption.start_clock()
        self._ender.start_clock()
        with (
            self._interruption_recorded(),
            _surroundings_kept(),
            running_out_of_disk(self._run.folder.path),
        ):
            return self._run_all()

    def _run_all(self) -> RunResult:
        run = self._run
        every = run.parts.config.evaluation.every

        # step 1: begin, or go back to the last checkpoint
        self._begin()

        # step 2: as long as tasks are not over, say which rounds come next
        while turn := self._schedule.next_turn():
            # step 3: clients train, and the strategy aggregates
            rounds_made = self._driver.train(turn, self._schedule, self._scorer)
            task = turn.task
            round = turn.round + rounds_made - 1

            # step 4: end and score the tasks that are over
            is_any_over = self._schedule.finish(task, round)

            # step 5: score clients within a task, where the user wants that
            if every and round % every == 0 and not is_any_over:
                self._scorer.evaluate(task, round, is_over=False)

            # step 6: make this the round that a resumed run goes on from
            self._resumption.commit(task, round)

        # step 7: sum up
        return self._end()

    def _begin(self) -> None:
        run = self._run
        config = run.parts.config
        checkpoint = self._resumption.go_back()
        # After the last checkpoint was checked, whose data must be these.
        run.folder.write_partition(run.parts.partition)
        run.recorder.record(
            RunStarted(
                clients=config.data.clients,
                tasks=config.data.tasks,
                rounds=config.train.rounds,
                travelling=sum(array.size for array in run.state.arrays.values()),
                bytes=sum(array.nbytes for array in run.state.arrays.values()),
                learner=config.learner.name,
                strategy=config.strategy.name,
                partition=self._resumption.digest,
                resumed_from=checkpoint.server_round if checkpoint else None,
                versions=_versions(),
                attack=config.attack.name if config.attack else None,
                hostile=hostile_clients(config) or None,
            )
        )
        if checkpoint is not None:
            return
        self._warn_of_still_clock()
        if config.evaluation.forward:
            self._scorer.score_untrained()
        self._schedule.begin()

    def _warn_of_still_clock(self) -> None:
        """Tell of a strategy that goes by a clock which no grid like this moves."""
        run = self._run
        if (
            not getattr(run.parts.strategy, "by_clock", False)
            or run.grid.is_timed
        ):
            return
        reason = (
            f"strategy {run.calls.name} goes by the clock, which stands still here, as all "
            "clients are equally fast: nobody is ever late, as in fedavg; set fleet.devices "
            "(fedknow list devices), or use real clients"
        )
        run.recorder.record(Warned(reason=reason))

    def _end(self) -> RunResult:
        run = self._run
        # Where nothing travels there is nothing to aggregate, and standing still is right.
        if run.state.arrays:
            run.calls.refuse_standstill("in the whole run")
        scores = run.state.scores
        weights = scores.sizes()
        personal = scores.accuracy("personal")
        shared = scores.accuracy("global")
        untrained = scores.untrained / scores.weights
        transfer = metrics.forward_transfer(personal, weights, untrained)
        summary = run.recorder.record(
            RunEnded(
                seconds=self._resumption.seconds(),
                accuracy=metrics.average_accuracy(personal, weights)[-1],
                accuracy_global=metrics.average_accuracy(shared, weights)[-1],
                forgetting=metrics.forgetting(personal, weights)[-1],
                forgetting_relative=metrics.relative_forgetting(
                    personal, weights
                )[-1],
                forgetting_max=metrics.max_forgetting(personal, weights)[-1],
                backward_transfer=metrics.backward_transfer(personal, weights)[
                    -1
                ],
                forward_transfer=transfer[-1],
                gap=metrics.local_global_gap(personal, shared, weights)[-1],
                traffic=run.grid.traffic.counts(),
                elapsed=VirtualTime.read(run.grid.elapsed()),
            )
        )
        return RunResult(
            run.folder.path, scores.arrays(), run.state.arrays, summary
        )

    @contextmanager
    def _interruption_recorded(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            # The last round on the disk, as a resumed run goes on from there.
            task, round = self._run.state.last_complete or (None, None)
            self._run.recorder.record(RunInterrupted(task=task, round=round))
            raise
        finally:
            self._resumption.settle()

    def _address(self, messages: Sequence[FlowerMessage]) -> None:
        """Check a strategy's messages, and write clients' tasks into them."""
        run = self._run
        self._check_strategy(
            messages,
            lambda: run.calls.settings(*run.incidents.inspector.position),
        )
        self._driver.address(messages, self._schedule)


def _make_context(
    parts: Parts,
    grid: MessageGrid,
    folder: RunFolder,
    recorder: Recorder,
    address: Callable[[Sequence[FlowerMessage]], None],
) -> RunContext:
    """Make what the halves of the loop share.

    ``address`` sees each of the strategy's messages before it is sent.
    """
    config, learner = parts.config, parts.learner
    arrays = Arrays(
        (name, value.numpy()) for name, value in learner.send().items()
    )
    data = config.data
    sample = draw_sample(config.seed, data.clients, config.evaluation.clients)
    people = len(parts.partition.get("held_out", ()))
    scores = Scores(data.clients, data.tasks, sample, people)
    state = RunState(arrays, scores)
    extras = {
        TRAIN: learner.shares(ended=False),
        END_TASK: learner.shares(ended=True),
    }
    if config.privacy.secure:
        # What clients share comes under masks; in the clear it is a fault.
        extras = {}
    claims = Claims.read(parts.partition, parts.stream)
    incidents = Incidents(config, folder, recorder, extras, claims)
    # A user's learner may be none of ours.
    incidents.inspector.sharing.check = getattr(learner, "check_share", None)
    may_begin_anew = config.engine.on_lost_state == "fresh"
    options = WaveOptions(
        inspect=incidents.inspector,
        on_missed=incidents.missed,
        on_lost_state=incidents.begun_anew if may_begin_anew else None,
        is_sparse=learner.sparse,
        is_averaged=config.engine.running_mean,
    )
    return RunContext(
        parts=parts,
        grid=grid,
        options=options,
        strategy_grid=StrategyGrid(grid, options, address),
        folder=folder,
        recorder=recorder,
        state=state,
        incidents=incidents,
        calls=StrategyCalls(parts, state, recorder, incidents),
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):  # real clients need no Ray
            versions[name] = metadata.version(name)
    return versions


@contextmanager
def _surroundings_kept() -> Iterator[None]:
    """Keep Flower quiet and the process's random generators unchanged."""
    # A notebook's own draws must not depend on whether a run was made in between.
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002
    pytorch = torch.get_rng_state()
    try:
        with quiet_flower():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(pytorch)


def _choose_driver(run: RunContext) -> Driver:
    """Choose how to drive the strategy of a run."""
    # By the class: Flower's own `start` knows neither tasks nor checkpoints, so that its hooks
    # are called here.
    has_own_loop = type(run.parts.strategy).start is not Strategy.start
    return LoopDriver(run) if has_own_loop else HookDriver(run)
