"""How fast this machine trains: real work, timed, and written down as a device profile."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import tomli_w
import torch

from fedknow.client.cost import FLOPS
from fedknow.client.data import make_benchmark
from fedknow.client.learners import build_learner, resolve
from fedknow.client.node import Node
from fedknow.client.state import write_atomic
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.messages import ARRAYS, CONFIG, METRICS, TRAIN, Arrays, Config, Message, Metrics, node_of
from fedknow.protocols.texts import counted
from fedknow.simulations.fleet.devices import Profile

__all__ = ["calibrate", "write_profile"]

LEAST = 3
"""Rounds that are timed at the least; the first of all, which also counts operations, is not."""


def calibrate(
    config: ExperimentConfig, seconds: float = 10.0, busy: float | None = None, idle: float | None = None
) -> Profile:
    """Train client 0 of an experiment on its first task, round after round, and see how fast that was.

    What is measured is how this machine's processor trains, as clients do; its GPU has no part in it.

    Parameters
    ----------
    config : ExperimentConfig
        What to train: data, model, learner and settings.
    seconds : float
        How long to go on; three rounds are timed in any case.
    busy, idle : float, optional
        Watts that this machine draws, from a meter; without both the energy of fleets that have it is not known.

    Returns
    -------
    Profile
        Its speed is the median over rounds of counted operations by seconds; its room what the system could give at
        this moment, caches that it would empty included.

    Raises
    ------
    ConfigError
        If the experiment cannot be run.
    RuntimeError
        If training fails.
    """
    config = resolve(config)
    benchmark = make_benchmark(config)
    node = Node(config, benchmark)
    learner = build_learner(config, benchmark.shape, benchmark.classes)
    arrays = Arrays((name, value.numpy()) for name, value in learner.send().items())
    memory = psutil.virtual_memory()
    speeds: list[float] = []
    until = time.monotonic() + seconds
    while len(speeds) <= LEAST or time.monotonic() < until:
        settings = Config(task=0, round=1, rounds=config.train.rounds, tasks=config.data.tasks)
        settings["server-round"] = 1
        reply, _ = node.handle(Message(TRAIN, node_of(0), "1", content={ARRAYS: arrays, CONFIG: settings}), {})
        if reply.failure is not None:
            raise RuntimeError(f"training failed: {reply.failure.reason}")
        metrics = reply.content[METRICS]
        assert isinstance(metrics, Metrics)
        speeds.append(float(str(metrics[FLOPS])) / float(str(metrics["seconds"])))
    timed = speeds[1:]
    what = f"{config.learner.name}, {config.model.name} on {config.data.name}, batches of {config.train.batch_size}"
    threads = torch.get_num_threads()
    watts = {name: value for name, value in (("busy", busy), ("idle", idle)) if value is not None}
    return Profile(
        about=f"{platform.machine()}, {counted(threads, 'thread')}, CPU, measured",
        peak=statistics.median(timed),
        memory=float(memory.total),
        reserved=float(memory.total - memory.available),
        **watts,
        source={
            "peak": f"measured: median of {counted(len(timed), 'round')} on the CPU ({what}), "
            f"{min(timed):.3g} to {max(timed):.3g}; torch {torch.__version__}",
            "efficiency": "contained in peak, which was measured",
            "memory": "the system's own figure",
            "reserved": "the system's own figure: what was not available when calibrated, PyTorch already loaded",
            **dict.fromkeys(watts, "as given"),
        },
    )


def write_profile(path: Path, name: str, profile: Profile, others: Mapping[str, Profile]) -> None:
    """Write a profile into a TOML file that ``fleet.profiles`` can name; other profiles in it are kept."""
    profiles = {**others, name: profile}
    text = tomli_w.dumps({key: value.model_dump(exclude_none=True) for key, value in profiles.items()})
    write_atomic(path, text.encode())
