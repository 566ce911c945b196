"""Calibration: this machine's speed of training, as a device profile."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import tomli_w
import torch

from fedknow.client.data import make_benchmark
from fedknow.client.learners import build_learner, resolve
from fedknow.client.node import Node
from fedknow.protocols.bounds import check_between
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.files import write_atomic
from fedknow.protocols.messages import TRAIN, Arrays, Message, node_of
from fedknow.protocols.texts import counted
from fedknow.protocols.values import show
from fedknow.protocols.work import FLOPS, Position, TrainReport, TrainWork
from fedknow.server.checks.faults import RunError
from fedknow.simulations.fleet.devices import Profile

__all__ = ["calibrate", "check_device_name", "write_profile"]

MOST_MEASURING = 86_400
"""Seconds: a day."""

MOST_WATTS = 1_000_000
"""Far above any device."""

LEAST = 3
"""Rounds that are timed at least, after one that also counts operations."""


def calibrate(
    config: ExperimentConfig,
    seconds: float = 10.0,
    busy: float | None = None,
    idle: float | None = None,
) -> Profile:
    """Measure how fast this machine trains.

    It trains client 0 of an experiment on its earliest task, round after round. Only the
    processor is measured, as clients train on it; the GPU has no part.

    Parameters
    ----------
    config : ExperimentConfig
        Data, model, learner and settings of the training.
    seconds : float
        Time to go on; three rounds are timed in any case.
    busy, idle : float, optional
        Watts that this machine draws, from a meter. Without both, the energy of fleets that have
        it is unknown.

    Returns
    -------
    Profile
        Its speed is the median over rounds of counted operations by seconds. Its memory limit is
        what the system could give at this moment, with caches that it would empty.

    Raises
    ------
    ConfigError
        If the experiment cannot be run, or a number is out of range.
    RunError
        If training fails.
    """
    _check_numbers(seconds, busy, idle)
    config = resolve(config)
    benchmark = make_benchmark(config)
    # The node and not the learner alone: what a device does for a round is more than steps.
    node = Node(config, benchmark)
    learner = build_learner(config, benchmark.spec, benchmark.classes)
    arrays = Arrays(
        (name, value.numpy()) for name, value in learner.send().items()
    )
    position = Position(
        task=0,
        round=1,
        rounds=config.train.rounds,
        tasks=config.data.tasks,
        server_round=1,
    )
    work = TrainWork(position=position, parameters=arrays)
    message = Message(TRAIN, node_of(0), "1", content=work.to_content())
    memory = psutil.virtual_memory()
    speeds: list[float] = []
    until = time.monotonic() + seconds
    # At least some rounds, however slow the machine is.
    while len(speeds) <= LEAST or time.monotonic() < until:
        reply, _ = node.handle(message, {})
        if reply.failure is not None:
            raise RunError(f"training failed: {reply.failure.reason}")
        report = TrainReport.from_content(reply.content)
        # A node measures the time of training.
        assert report.seconds is not None
        speeds.append(report.costs[FLOPS] / report.seconds)
    total = float(memory.total)
    # What is in use now is what other programs keep.
    reserved = float(memory.total - memory.available)
    watts = {"busy": busy, "idle": idle}
    # The first round counts operations and warms up, and is slower.
    return _profile(config, speeds[1:], total, reserved, watts)


def _profile(
    config: ExperimentConfig,
    speeds: Sequence[float],
    memory: float,
    reserved: float,
    watts: Mapping[str, float | None],
) -> Profile:
    """Make a profile of measured speeds, with the source of each number."""
    workload = (
        f"{config.learner.name}, {config.model.name} on {config.data.name}, "
        f"batches of {config.train.batch_size}"
    )
    rounds = counted(len(speeds), "round")
    threads = counted(torch.get_num_threads(), "thread")
    given_watts = {
        name: value for name, value in watts.items() if value is not None
    }
    return Profile(
        about=f"{platform.machine()}, {threads}, CPU, measured",
        # The median: a round that another process slowed down must not count.
        peak=statistics.median(speeds),
        memory=memory,
        reserved=reserved,
        **given_watts,
        source={
            "peak": f"measured: median of {rounds} on the CPU ({workload}), "
            f"{min(speeds):.3g} to {max(speeds):.3g}; torch {torch.__version__}",
            "efficiency": "contained in peak, which was measured",
            "memory": "the system's own figure",
            "reserved": "the system's own figure: what was not available when calibrated, "
            "PyTorch already loaded",
            **dict.fromkeys(given_watts, "as given"),
        },
    )


def _check_numbers(
    seconds: float, busy: float | None, idle: float | None
) -> None:
    check_between("--seconds", seconds, 0, MOST_MEASURING)
    for option, watts in (("--busy-watts", busy), ("--idle-watts", idle)):
        if watts is not None:
            check_between(option, watts, 0, MOST_WATTS)
    if busy is not None and idle is not None and busy < idle:
        raise ConfigError(
            f"--busy-watts {busy:g} is below --idle-watts {idle:g}: a machine that trains draws no "
            "less than one that waits; exchange them"
        )


def check_device_name(name: str) -> None:
    """Refuse a name that an experiment could not give to a device.

    Raises
    ------
    ConfigError
        If the name is empty, or holds more than letters, digits and ``._-``.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(
            f"--name {show(name)}: must be a letter or a digit, and then letters, digits, '.', "
            "'_' or '-' (fleets use other characters for patterns); for example my-pi"
        )


def write_profile(
    path: Path,
    name: str,
    profile: Profile,
    existing: Mapping[str, Profile],
) -> None:
    """Write a profile into a TOML file that ``fleet.profiles`` can name.

    Parameters
    ----------
    path : Path
    name : str
        The device's name.
    profile : Profile
    existing : mapping
        Further profiles of the file, which are kept.
    """
    profiles = {**existing, name: profile}
    # TOML has no word for None.
    sections = {
        key: value.model_dump(exclude_none=True)
        for key, value in profiles.items()
    }
    write_atomic(path, tomli_w.dumps(sections).encode())
