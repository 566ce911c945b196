"""Building and checking an experiment's parts, once for each way in."""

from __future__ import annotations

import logging
from enum import Enum, auto

from fedknow.client.data import Benchmark, make_benchmark
from fedknow.client.data.local import LOCAL, local_spec
from fedknow.client.learners import (
    Learner,
    build_learner,
    check_samples,
    keep_at_home,
    keeps_parameters,
    resolve,
)
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.hostile import check_honest
from fedknow.protocols.values import show
from fedknow.server.checks.attacks import check_attack
from fedknow.server.checks.privacy import check_privacy
from fedknow.server.run.boundaries import check_boundaries
from fedknow.server.run.held_out import check_people
from fedknow.server.run.parts import Parts
from fedknow.server.run.task_times import check_task_times
from fedknow.server.start import start_learner
from fedknow.server.tracking import check_trackers
from fedknow.strategies import build_strategy, check_running_mean
from fedknow.strategies.central_privacy import GaussianMean

__all__ = ["Clients", "assemble"]

log = logging.getLogger(__name__)


ARE_SENT = (
    "evaluation.global_model = true: for the scores of the purely global model each client sends "
    "the parameters that it keeps to itself, such as its head"
)
"""What the log says where a user has clients send what the method keeps with them."""


class Clients(Enum):
    """Which clients an experiment is to have."""

    VIRTUAL = auto()
    """In this process or its workers; their data are made here."""
    REAL = auto()
    """Devices of their own, connected over gRPC."""
    FLOWER = auto()
    """Nodes of Flower's."""


def assemble(
    config: ExperimentConfig, clients: Clients, benchmark: Benchmark | None = None
) -> Parts:
    """Build and check each part of an experiment.

    Parameters
    ----------
    config : ExperimentConfig
        Its learner's settings may be left to their defaults.
    clients : Clients
        Who is to take part.
    benchmark : Benchmark, optional
        The clients' data, where it is made already; by default it is made here, unless clients
        have data of their own.

    Returns
    -------
    Parts
        With the complete configuration, whose paths are absolute.

    Raises
    ------
    ConfigError
        If the data, the strategy, the learner or its model cannot be built, or they do not fit
        each other, the clients or the configuration.
    """
    # First, as the checks below read settings with all their defaults.
    config = resolve(config)
    if clients is not Clients.VIRTUAL:
        check_honest(config)
        config = keep_at_home(config)
        if config.evaluation.global_model and keeps_parameters(config):
            log.warning(ARE_SENT)
    if config.fleet.devices and clients is not Clients.VIRTUAL:
        raise ConfigError(
            "fleet.devices: real clients are devices themselves; a fleet is for fedknow simulate"
        )
    _check_states(config, clients)
    has_own_data = config.data.name == LOCAL and clients is not Clients.VIRTUAL
    if benchmark is None and not has_own_data:
        benchmark = make_benchmark(config)
    if benchmark is None:
        spec, classes = local_spec(config.data)
    else:
        spec, classes = benchmark.spec, benchmark.classes

    check_trackers(config.tracking.to)
    strategy = build_strategy(config.strategy, config.data.clients)
    if isinstance(strategy, GaussianMean):
        # Only a simulation must be repeatable.
        strategy.is_secret = clients is not Clients.VIRTUAL
    check_task_times(config, strategy, are_clients_real=clients is Clients.REAL)
    learner = build_learner(config, spec, classes)
    config = start_learner(config, learner)
    check_samples(config, learner, spec, benchmark)
    _check_lengths(config, learner, benchmark)
    check_people(config, learner)
    check_boundaries(config, strategy, learner)
    check_running_mean(config, strategy, learner.sparse)
    check_attack(config, strategy, learner, spec)
    _check_privacy_reaches(config, clients)
    check_privacy(config, strategy, learner)
    return Parts(
        # Not before: errors name paths as they were given. Without trackers: neither a run
        # folder nor a client is told of them, so that no byte of a result depends on them.
        config=config.absolute().untracked(),
        learner=learner,
        strategy=strategy,
        partition={} if benchmark is None else benchmark.partition.summary(),
        stream=benchmark,
    )


def _check_lengths(
    config: ExperimentConfig, learner: Learner, benchmark: Benchmark | None
) -> None:
    """Refuse clients of fewer tasks where the server gathers at each end."""
    if benchmark is None or not learner.shares(ended=True):
        return
    lengths = [benchmark.length(client) for client in range(benchmark.clients)]
    fewest = min(lengths)
    if fewest < benchmark.tasks:
        raise ConfigError(
            f"learner.name = {config.learner.name!r}: its server gathers what all clients send "
            f"when a task ends, and client {lengths.index(fewest)} has {fewest} of "
            f"data.tasks = {benchmark.tasks}; choose another learner, or a stream in which all "
            "clients have all tasks (data.tasks_min, data.partition)"
        )


def _check_states(config: ExperimentConfig, clients: Clients) -> None:
    """Refuse a place for states that this process would not use."""
    if config.engine.states and clients is not Clients.VIRTUAL:
        raise ConfigError(
            f"engine.states = {show(config.engine.states)}: real clients keep their states "
            "themselves; leave it empty, or run fedknow simulate"
        )


def _check_privacy_reaches(config: ExperimentConfig, clients: Clients) -> None:
    """Refuse privacy where it does not reach clients."""
    if config.privacy.clip and clients is Clients.FLOWER:
        raise ConfigError(
            f"privacy.clip = {config.privacy.clip:g}: nodes of Flower's would draw noise that "
            "the server knows; use fedknow server and fedknow client, or set it to 0"
        )
    if config.privacy.secure and clients is Clients.FLOWER:
        raise ConfigError(
            "privacy.secure = true: nodes of Flower's do not know the messages of secure "
            "aggregation; use fedknow server and fedknow client, or set it to false"
        )
