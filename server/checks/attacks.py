"""Checks of the section ``attack``, before a run."""

from __future__ import annotations

from flwr.serverapp.strategy import Strategy

from fedknow.client.data.samples import SampleSpec
from fedknow.client.learners.frames.learner import Learner
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.hostile import hostile_clients
from fedknow.protocols.texts import counted

__all__ = ["check_attack"]


def check_attack(
    config: ExperimentConfig,
    strategy: Strategy,
    learner: Learner,
    spec: SampleSpec,
) -> None:
    """Refuse an attack that could not take place.

    Parameters
    ----------
    config : ExperimentConfig
        The simulation; nothing is refused where nobody attacks.
    strategy : flwr.serverapp.strategy.Strategy
        Its strategy.
    learner : Learner
        Its learner.
    spec : SampleSpec
        What a sample is.

    Raises
    ------
    ConfigError
        Naming the key, the value and the remedy.
    """
    if not config.attack:
        return
    name = config.attack.name
    hostile = len(hostile_clients(config))
    clients = config.data.clients
    share = f"attack.clients = {config.attack.clients:g}"
    if hostile >= clients:
        raise ConfigError(
            f"{share}: that is all of {counted(clients, 'client')}; lower it, or raise "
            "data.clients"
        )
    if not learner.send():
        raise ConfigError(
            f"attack.name = {name!r}: learner {config.learner.name} sends nothing that could "
            "be attacked; choose another learner"
        )
    if name == "backdoor" and spec.kind != "image":
        raise ConfigError(
            f"attack.name = 'backdoor': the trigger is a white corner of an image, and samples of "
            f"{config.data.name} are of kind {spec.kind}; choose another attack"
        )
    if config.engine.running_mean:
        raise ConfigError(
            f"attack.name = {name!r}: engine.running_mean = true averages updates before they "
            "can be falsified; set it to false"
        )
    if name == "little":
        _check_conspiracy(strategy, hostile, share)


def _check_conspiracy(strategy: Strategy, hostile: int, share: str) -> None:
    if hostile < 2:
        raise ConfigError(
            f"{share}: clients conspire in the attack 'little', and one alone has nobody to "
            "agree with; raise it, or raise data.clients"
        )
    if type(strategy).start is not Strategy.start:
        raise ConfigError(
            "attack.name = 'little': clients conspire within a round, which "
            f"{type(strategy).__name__} has not, as it takes answers when they come; choose "
            "another attack or a strategy with rounds"
        )
