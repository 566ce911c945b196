"""Task boundaries that nobody tells: what is refused, what was found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedknow.client.learners import Learner
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.messages import client_of
from fedknow.protocols.work import BOUNDARIES, BOUNDARY_DELAY
from fedknow.server.run.stream_events import BoundaryFound
from fedknow.strategies.paired import PairedStrategy

__all__ = ["boundaries_found", "check_boundaries"]

_HIDDEN = "data.boundaries = 'hidden'"


def check_boundaries(
    config: ExperimentConfig, strategy: Strategy, learner: Learner
) -> None:
    """Refuse what cannot be done where nobody tells that a task begins.

    Raises
    ------
    ConfigError
        Naming the key, the value and the remedy.
    """
    if config.data.boundaries == "told":
        return
    is_gathered = learner.shares(ended=False) or learner.shares(ended=True)
    if isinstance(strategy, PairedStrategy) or is_gathered:
        raise ConfigError(
            f"{_HIDDEN} with learner.name = {config.learner.name!r}: its server gathers something "
            "of each task from all clients, who find its end at different times; choose "
            "another learner, for example 'ewc', or set data.boundaries = 'told'"
        )
    if config.model.cache_features:
        raise ConfigError(
            f"{_HIDDEN} with model.cache_features = true: features are charged once a task, and "
            "clients do not know when one begins; set model.cache_features = false"
        )
    for key, value, remedy in (
        ("engine.vectorize", config.engine.vectorize == "on", "'auto' or 'off'"),
        ("engine.running_mean", config.engine.running_mean, "false"),
    ):
        if value:
            raise ConfigError(
                f"{_HIDDEN} with {key}: each client finds its boundaries by itself, which work "
                f"for several at once does not tell; set {key} = {remedy}"
            )


def boundaries_found(
    trained: Iterable[tuple[int, Mapping[str, Any]]], task: int, round: int
) -> Iterator[BoundaryFound]:
    """Give an event for each client that found a boundary in a round.

    Parameters
    ----------
    trained : iterable of (int, mapping)
        Node and metrics of each good answer.
    task, round : int
        Where the round is in the stream.
    """
    # By node, as answers arrive in another order each time.
    for node, metrics in sorted(trained, key=lambda entry: entry[0]):
        delay, count = metrics.get(BOUNDARY_DELAY), metrics.get(BOUNDARIES)
        # Answers of clients of other make may lack them.
        if isinstance(delay, float) and isinstance(count, float) and delay > 0:
            yield BoundaryFound(
                client=client_of(node),
                task=task,
                round=round,
                boundaries=int(count),
                delay=int(delay),
            )
