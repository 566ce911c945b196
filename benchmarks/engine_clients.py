"""The clients of ``engine_vs_flower.py``.

One client code serves our grids and, as a ``ClientApp``, Flower.

A module of its own, so that the workers of either engine import it and keep what they have
built.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from fedknow.client.data import make_benchmark
from fedknow.client.data.stream import TaskData, TaskStream
from fedknow.client.host import Host
from fedknow.client.learners import build_learner, resolve
from fedknow.client.state import State, StateStore
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.flower import from_flower, to_flower
from fedknow.protocols.messages import Arrays, Message, Metrics, node_of
from fedknow.simulations.presets import load_preset


@dataclass(frozen=True)
class Nothing:
    """A stream of tasks without data, for the echo client."""

    clients: int
    tasks: int = 1
    classes: int = 1
    shape: tuple[int, int, int] = (1, 1, 1)

    def task(self, client: int, task: int) -> TaskData:
        """Never called."""
        raise NotImplementedError("the echo client has no data")


class Echo:
    """A client that sends back what it got: all that is left is the engine."""

    def __init__(self, config: ExperimentConfig, stream: TaskStream) -> None:
        self.metrics = Metrics({"num-examples": 1})

    def handle(self, message: Message, state: State) -> tuple[Message, State]:
        """Give the arrays back, as new ones.

        Clients of a real run do not all send one object.
        """
        arrays = Arrays(
            (name, array.copy()) for name, array in message.arrays().items()
        )
        return message.reply({"arrays": arrays, "metrics": self.metrics}), state


def digits(clients: int, learner: str) -> ExperimentConfig:
    """Return the ``digits`` preset with these clients, and one local epoch."""
    changes = [
        f"data.clients={clients}",
        f"learner={learner}",
        "train.epochs=1",
        "strategy.fraction=1.0",
    ]
    return resolve(load_preset("digits", changes))


def first_arrays(workload: str, clients: int, parameters: int) -> Arrays:
    """Return the arrays that the server starts with.

    They are ``parameters`` float32 in ten tensors, or the digits model's parameters.
    """
    if workload == "echo":
        rng = np.random.default_rng(0)
        return Arrays(
            {
                f"w{i}": part
                for i, part in enumerate(
                    np.array_split(rng.random(parameters, np.float32), 10)
                )
            }
        )
    config = digits(clients, workload)
    stream = make_benchmark(config)
    learner = build_learner(config, stream.shape, stream.classes)
    return Arrays(
        {name: tensor.numpy() for name, tensor in learner.send().items()}
    )


def flower_app(workload: str, clients: int, folder: str) -> ClientApp:
    """Make the client a Flower app.

    The echo client is written as one writes it for Flower, without our messages; a learner
    answers through the same :class:`~fedknow.client.host.Host` as in our grids, built once a
    process; Flower carries its state's version.
    """
    app = ClientApp()

    @app.train()
    def train(message: FlowerMessage, context: Context) -> FlowerMessage:
        if workload == "echo":
            arrays = next(iter(message.content.array_records.values()))
            content = RecordDict(
                {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
            )
            return FlowerMessage(content, reply_to=message)
        record = context.state.config_records.get(
            "version", ConfigRecord({"version": 0})
        )
        node = node_of(int(context.node_config["partition-id"]))
        work = replace(from_flower(message), node=node)
        reply, version = _host(workload, clients, folder).handle(
            work, int(record["version"])
        )
        context.state["version"] = ConfigRecord({"version": version})
        return to_flower(reply, message)

    return app


@lru_cache(maxsize=1)
def _host(workload: str, clients: int, folder: str) -> Host:
    import torch

    torch.set_num_threads(1)
    config = digits(clients, workload)
    store = StateStore(
        Path(folder), config.engine.memory_mb * 2**20, durable=False
    )
    return Host(config, make_benchmark(config), store)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Make a folder for client states."""
    return tempfile.TemporaryDirectory(prefix="fedknow-benchmark-")
