"""How many samples clients have, and whether they are enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fedknow.client.data.samples import SampleSpec, as_spec
from fedknow.client.learners.frames.learner import Learner
from fedknow.client.learners.joint import JointCentral
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.texts import counted

__all__ = ["Sizes", "check_samples"]


class Sizes(Protocol):
    """How many samples clients have (:class:`fedknow.client.data.Benchmark`)."""

    @property
    def clients(self) -> int:
        """Number of clients."""
        ...

    @property
    def tasks(self) -> int:
        """Number of tasks."""
        ...

    def train_size(self, client: int, task: int) -> int:
        """How many training samples a client has of a task."""
        ...


def check_samples(
    config: ExperimentConfig,
    learner: Learner,
    sample: SampleSpec | Sequence[int],
    sizes: Sizes | None,
) -> None:
    """Refuse an experiment with too few samples for BatchNorm.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment.
    learner : Learner
        Its learner.
    sample : SampleSpec or sequence of int
        What a sample is; a shape alone is that of 8-bit images.
    sizes : Sizes or None
        Who has how many samples; None where clients have their own data, and find out themselves.

    Raises
    ------
    ConfigError
        Naming the batch size, or the client, the task and the count
        (:mod:`~fedknow.client.learners.frames.batching`).
    """
    # Zeros will do: only the shapes within the model matter.
    x = as_spec(sample).blank(1, device=learner.device)
    smallest = learner.smallest_batch(x)
    minimum = counted(smallest, "sample")
    model = f"model.name = {config.model.name!r} has BatchNorm layers that need {minimum} a batch"
    if config.train.batch_size < smallest:
        raise ConfigError(
            f"train.batch_size = {config.train.batch_size}: {model}; set it to {smallest} or more"
        )
    if (
        sizes is None or smallest == 1 or isinstance(learner, JointCentral)
    ):  # which trains on all of them together
        return
    for client in range(sizes.clients):
        for task in range(sizes.tasks):
            count = sizes.train_size(client, task)
            if count < smallest:
                raise ConfigError(
                    f"client {client} has {count} training sample in task {task + 1}, "
                    f"and {model}; raise data.samples, "
                    "lower data.clients, or choose a model without BatchNorm, for example 'cnn'"
                )
