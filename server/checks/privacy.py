"""Checks of the section ``privacy``, before a run."""

from __future__ import annotations

from importlib.util import find_spec

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedknow.client.learners.frames.learner import Learner
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.extras import how_to_install
from fedknow.protocols.secure.rounds import MINIMUM
from fedknow.protocols.texts import counted
from fedknow.strategies import mean_strategies, needs_mean_alone
from fedknow.strategies.central_privacy import GaussianMean
from fedknow.strategies.population import sampled

__all__ = ["check_privacy"]

_SECURE = "privacy.secure = true"


def check_privacy(
    config: ExperimentConfig, strategy: Strategy, learner: Learner
) -> None:
    """Refuse privacy where it could not hold what it promises.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment; nothing is refused where it does not ask for it.
    strategy : flwr.serverapp.strategy.Strategy
        Its strategy.
    learner : Learner
        Its learner.

    Raises
    ------
    ConfigError
        Naming the key, the value and the remedy.
    """
    if config.privacy.clip:
        _check_noise(config, strategy, learner)
        if isinstance(strategy, GaussianMean):
            raise ConfigError(
                f"privacy.clip = {config.privacy.clip:g}: strategy {config.strategy.name} clips on "
                "the server, and there is one epsilon; set it to 0, or choose another strategy"
            )
    if not config.privacy.secure:
        return
    # Before the run: each client would otherwise fail in its first round.
    if find_spec("cryptography") is None:
        raise ConfigError(
            f"{_SECURE}: the package cryptography is missing; {how_to_install('secure')}"
        )
    _check_sums(config, strategy, learner)
    _check_strategy(config, strategy)
    _check_learner(config, learner, _SECURE, "set it to false")
    _check_fleet(config)
    for key, value, default in (
        ("engine.running_mean", config.engine.running_mean, False),
        ("engine.vectorize", config.engine.vectorize, "off"),
        ("attack.name", config.attack.name, "none"),
    ):
        if value != default:
            raise ConfigError(
                f"{_SECURE}: {key} = {value!r} needs single updates in the clear; set it to "
                f"{default!r}"
            )


def _check_fleet(config: ExperimentConfig) -> None:
    # Clients that are asked in case others are late have made no keys with them.
    if config.fleet.over_commit > 1:
        raise ConfigError(
            f"{_SECURE}: fleet.over_commit = {config.fleet.over_commit:g} asks clients that have "
            "agreed on no masks; set it to 1"
        )


def _check_noise(
    config: ExperimentConfig, strategy: Strategy, learner: Learner
) -> None:
    """Refuse noise on clients where more than one noisy update would travel."""
    setting = f"privacy.clip = {config.privacy.clip:g}"
    if type(strategy).start is not Strategy.start:
        raise ConfigError(
            f"{setting}: strategy {config.strategy.name} asks clients whenever it likes, so that "
            "a round's updates cannot be counted; set it to 0, or use a strategy that "
            "works in rounds, such as fedavg"
        )
    _check_learner(config, learner, setting, "set it to 0")
    if _is_sharing(learner):
        raise ConfigError(
            f"{setting}: learner {config.learner.name} sends arrays beside the parameters, to "
            "which no noise is added; choose another learner, or set it to 0"
        )
    for key, value, default in (
        ("engine.running_mean", config.engine.running_mean, False),
        ("engine.vectorize", config.engine.vectorize, "off"),
        ("attack.name", config.attack.name, "none"),
    ):
        if value != default:
            raise ConfigError(
                f"{setting}: {key} = {value!r} would change updates beside the noise; set it "
                f"to {default!r}"
            )


def _check_strategy(config: ExperimentConfig, strategy: Strategy) -> None:
    # A method that compares or clips single updates has none to look at.
    if not (needs_mean_alone(strategy) or getattr(strategy, "takes_sums", False)):
        raise ConfigError(
            f"{_SECURE}: strategy {config.strategy.name} looks at single updates, which are "
            f"hidden; set it to false, or use one of {', '.join(mean_strategies())}, or a class "
            "of your own with of_the_mean = True and Flower's start"
        )
    # A strategy of the user's own may have no such attribute.
    key = getattr(strategy, "weighted_by_key", "num-examples")
    if key != "num-examples":
        raise ConfigError(
            f"{_SECURE}: the mean is weighted by num-examples, not by "
            f"strategy.weighted_by_key = {key!r}; set one or the other"
        )
    clients = config.data.clients
    # Of the round's clients, and not of all: a sample is smaller.
    if isinstance(strategy, flower.FedAvg):
        clients = sampled(strategy, clients)
    if clients < MINIMUM:
        raise ConfigError(
            f"{_SECURE}: a round asks {counted(clients, 'client')}, and a sum of fewer than "
            f"{MINIMUM} hides nobody; raise data.clients or strategy.fraction"
        )


def _check_learner(
    config: ExperimentConfig, learner: Learner, setting: str, remedy: str
) -> None:
    name = config.learner.name
    problem = ""
    if learner.sparse:
        problem = "sends sparse parameters, whose zeros would be filled"
    elif not learner.send():
        problem = "sends nothing"
    if problem:
        raise ConfigError(
            f"{setting}: learner {name} {problem}; choose another learner, or {remedy}"
        )
    # The global model's score needs what clients keep, and they would send it unmasked.
    if config.evaluation.global_model and learner.local_parameters():
        raise ConfigError(
            f"{setting}: learner {name} keeps parameters to itself, and "
            "evaluation.global_model = true would have each client send them; set it to false"
        )


def _is_sharing(learner: Learner) -> bool:
    return any(learner.shares(ended) for ended in (False, True))


def _check_sums(
    config: ExperimentConfig, strategy: Strategy, learner: Learner
) -> None:
    """Refuse arrays beside the parameters that could not be added up."""
    name = config.learner.name
    if not _is_sharing(learner):
        return
    if not learner.sum_layout():
        remedy = f"{learner.no_sums}, " if learner.no_sums else ""
        raise ConfigError(
            f"{_SECURE}: learner {name} sends arrays beside the parameters that are no sums, so "
            f"they would be in the clear; {remedy}choose another learner, or set it to false"
        )
    if not getattr(strategy, "takes_sums", False):
        raise ConfigError(
            f"{_SECURE}: strategy {config.strategy.name} does not take the sums of learner {name}; "
            "leave strategy.name to the learner, or set it to false"
        )
