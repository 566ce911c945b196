"""One experiment, from its configuration to its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedknow.client.capacity import clients_at_once
from fedknow.client.compute.device import find_device
from fedknow.client.data import Benchmark, TaskStream, make_benchmark
from fedknow.client.data.poison import POISONS, PoisonedStream
from fedknow.client.host import Host
from fedknow.client.learners import resolve
from fedknow.client.state.remote import check_url, open_states
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.hostile import hostile_clients
from fedknow.server.assemble import Clients, assemble
from fedknow.server.grids.activity import Listener
from fedknow.server.grids.base import Adversary, MessageGrid
from fedknow.server.grids.inline import InlineGrid
from fedknow.server.grids.process_memory import forget_process_peak
from fedknow.server.reports.page import write_report
from fedknow.server.run.activity import ActivityLog
from fedknow.server.run.error_log import error_log
from fedknow.server.run.experiment import Experiment, RunResult
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.parts import Parts
from fedknow.server.run.recorder import Subscriber
from fedknow.server.run.states import states_place
from fedknow.server.tracking import tracking
from fedknow.simulations.attacks import build_attack
from fedknow.simulations.fleet.build import Fleet, build_fleet
from fedknow.simulations.fleet.grid import FleetGrid

__all__ = ["prepare", "simulate"]


def simulate(
    config: ExperimentConfig,
    out: Path,
    resume: bool = False,
    observers: Sequence[Subscriber] = (),
    report: bool = True,
) -> RunResult:
    """Run an experiment with virtual clients, and write its run folder.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment; its learner's settings may be left to their defaults.
    out : Path
        The run folder: a new one, or with ``resume`` that of an earlier, unfinished run.
    resume : bool
        Go on from the last complete round.
    observers : sequence of callable
        Called with each event of the experiment (:mod:`fedknow.server.run.events`).
    report : bool
        Whether to write the page and the plots too. They take longer than a very small run.

    Raises
    ------
    ConfigError
        If the configuration cannot be run, or ``out`` holds another or a finished run.
    RunError
        If the run fails; it can be resumed from its latest checkpoint.
    """
    forget_process_peak()
    benchmark = make_benchmark(resolve(config))
    # Before the folder is made, so that a refused configuration leaves none behind.
    parts, fleet = prepare(config, benchmark)
    opened = RunFolder.resume if resume else RunFolder.create
    with opened(out, parts.config) as folder:
        with (
            # The log comes first, so that it has the errors of opening the others too.
            error_log(folder.path),
            _grid(parts, fleet, benchmark, folder) as grid,
            tracking(parts.config, config.tracking, out, resume) as trackers,
        ):
            # First, since a callback may stop the run at an event.
            subscribers = [*trackers, *observers]
            result = Experiment(parts, grid, folder, subscribers).run()
        if report:
            write_report([folder], folder.path)
    return result


def prepare(
    config: ExperimentConfig, benchmark: Benchmark
) -> tuple[Parts, Fleet | None]:
    """Build all parts of an experiment before there is a folder.

    A configuration that cannot be run is refused here.

    Returns
    -------
    parts : Parts
    fleet : Fleet or None
        ``None`` where all clients are equally fast.

    Raises
    ------
    ConfigError
        If a part (:func:`fedknow.server.assemble.assemble`) or the fleet cannot be built, there
        is no such device, clients cannot train at once (``engine.vectorize``), or nothing can be
        written at ``engine.states``.
    """
    fleet = build_fleet(config) if config.fleet.devices else None
    # A cluster's machines have GPUs of their own.
    if not config.engine.address:
        find_device(config.engine.device)
    parts = assemble(config, Clients.VIRTUAL, benchmark)
    clients_at_once(parts.learner, config.engine.vectorize, benchmark.spec)
    if config.engine.states:
        check_url(config.engine.states)
    return parts, fleet


def _grid(
    parts: Parts,
    fleet: Fleet | None,
    benchmark: Benchmark,
    folder: RunFolder,
) -> MessageGrid:
    config = parts.config
    stream = _poisoned(config, benchmark)
    listener = ActivityLog(folder.path)
    attack = build_attack(config)
    if fleet is None:
        return _workers(config, stream, folder, listener, attack)
    # Flower's strategies wait for so many clients in real time, while virtual time would stand
    # still.
    quorum = max(
        getattr(parts.strategy, f"min_{name}_nodes", 1)
        for name in ("available", "train", "evaluate")
    )
    # The outer grid alone has them, as answers pass through both.
    workers = _workers(config, stream, folder)
    return FleetGrid(workers, config, fleet, quorum, listener, attack)


def _poisoned(config: ExperimentConfig, benchmark: Benchmark) -> TaskStream:
    """Give the clients' data as the hostile ones among them falsify them."""
    if config.attack.name not in POISONS:
        return benchmark
    return PoisonedStream(benchmark, config.attack, hostile_clients(config))


def _workers(
    config: ExperimentConfig,
    stream: TaskStream,
    folder: RunFolder,
    listener: Listener | None = None,
    adversary: Adversary | None = None,
) -> MessageGrid:
    if config.engine.backend == "ray":
        # A run without Ray does not wait for its import.
        from fedknow.simulations.engine.ray_grid import RayGrid

        return RayGrid(
            config,
            stream,
            states_place(folder),
            listener=listener,
            adversary=adversary,
        )
    # Not durable at once: checkpoints wait for the disk.
    memory_bytes = config.engine.memory_mb * 2**20
    store = open_states(states_place(folder), memory_bytes, durable=False)
    host = Host(config, stream, store)
    return InlineGrid(config.data.clients, host, store, listener, adversary)
