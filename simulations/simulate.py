"""One experiment, from its configuration to its report."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedknow.client.compute.device import find_device
from fedknow.client.data import Benchmark, make_benchmark
from fedknow.client.host import Host
from fedknow.client.learners import Learner, build_learner, check_samples, resolve
from fedknow.client.state import StateStore
from fedknow.client.together import clients_at_once
from fedknow.protocols.config import ExperimentConfig
from fedknow.server.grids.base import MessageGrid
from fedknow.server.grids.inline import InlineGrid
from fedknow.server.grids.process_memory import forget_process_peak
from fedknow.server.reports.page import write_report
from fedknow.server.run.experiment import Experiment, RunResult
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.recorder import Subscriber
from fedknow.server.run.schedule import Arrivals
from fedknow.simulations.fleet.grid import FleetGrid, build_fleet
from fedknow.strategies import build_strategy, check_running_mean

__all__ = ["prepare", "simulate"]


def simulate(
    config: ExperimentConfig,
    out: Path,
    resume: bool = False,
    observers: Sequence[Subscriber] = (),
    report: bool = True,
) -> RunResult:
    """Run an experiment with virtual clients and write everything it yields to ``out``.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment; its learner's settings may be left to their defaults.
    out : Path
        The run folder: a new one, or with ``resume`` one that an earlier, unfinished run left.
    resume : bool
        Go on from the last complete round.
    observers : sequence of callable
        Called with each event of the experiment (:mod:`fedknow.server.run.events`).
    report : bool
        Whether to write the page and the plots too, which take longer than a very small run.

    Raises
    ------
    ConfigError
        If the configuration cannot be run, or ``out`` holds another or a finished run.
    RunError
        If the run fails; what it earned until then is kept and can be resumed.
    """
    config = resolve(config)
    forget_process_peak()
    benchmark = make_benchmark(config)
    learner = prepare(config, benchmark)
    config = config.absolute()  # not before: errors name paths as they were given
    with (
        RunFolder.resume(out, config)
        if resume
        else RunFolder.create(out, config) as folder
    ):
        try:
            with _grid(config, benchmark, folder) as grid:
                partition = benchmark.partition.summary()
                result = Experiment(
                    config, grid, folder, learner, observers, partition, benchmark
                ).run()
        except Exception:
            _log(folder)
            raise
        if report:
            write_report([folder], folder.path)
    return result


def prepare(config: ExperimentConfig, benchmark: Benchmark) -> Learner:
    """The learner of an experiment; whatever its parts can be refused for is refused here, before
    there is a folder.

    Raises
    ------
    ConfigError
        If the learner, its model, the strategy or the fleet cannot be built, there is no such
        device, or clients cannot train at once as asked for.
    """
    strategy = build_strategy(config.strategy, config.data.clients)
    Arrivals.check(config, strategy)
    if config.fleet.devices:
        build_fleet(config)
    if not config.engine.address:  # a cluster's machines have GPUs of their own
        find_device(config.engine.device)
    learner = build_learner(config, benchmark.shape, benchmark.classes)
    check_samples(config, learner, benchmark.shape, benchmark)
    check_running_mean(config, strategy, learner.sparse)
    clients_at_once(learner, config.engine.vectorize, benchmark.shape)
    return learner


def _grid(
    config: ExperimentConfig, benchmark: Benchmark, folder: RunFolder
) -> MessageGrid:
    grid = _workers(config, benchmark, folder)
    if not config.fleet.devices:
        return grid
    strategy = build_strategy(config.strategy, config.data.clients)
    wanted = [
        getattr(strategy, f"min_{name}_nodes", 1)
        for name in ("available", "train", "evaluate")
    ]
    return FleetGrid(grid, config, build_fleet(config), quorum=max(wanted))


def _workers(
    config: ExperimentConfig, benchmark: Benchmark, folder: RunFolder
) -> MessageGrid:
    if config.engine.backend == "ray":
        from fedknow.simulations.engine.ray_grid import (
            RayGrid,
        )  # a run without Ray does not wait for its import

        return RayGrid(config, benchmark, folder.clients)
    store = StateStore(
        folder.clients, config.engine.memory_mb * 2**20, durable=False
    )  # checkpoints see to it
    return InlineGrid(config.data.clients, Host(config, benchmark, store), store)


def _log(folder: RunFolder) -> None:
    """Keep the traceback of the exception being handled in ``error.log``, for whom one sentence is
    not enough."""
    # A disk too full for the run is too full for its log; the run's own error is the one to be
    # seen.
    with suppress(OSError):
        (folder.path / "error.log").write_text(traceback.format_exc(), "utf-8")
