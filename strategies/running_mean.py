"""Which strategies can do with the mean of the clients' answers."""

from __future__ import annotations

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.strategies.registry import BUILTIN

__all__ = ["check_running_mean"]


OF_THE_MEAN = (
    flower.FedAvg,
    flower.FedProx,
    flower.FedAvgM,
    flower.FedAdam,
    flower.FedAdagrad,
    flower.FedYogi,
)
"""Of Flower's strategies, those that look at the mean of the answers alone."""


def check_running_mean(
    config: ExperimentConfig, strategy: Strategy, sparse: bool
) -> None:
    """Refuse ``engine.running_mean`` where each answer must be seen.

    A strategy of a user's own says by an attribute ``of_the_mean = True`` that the mean,
    weighted by ``num-examples``, is all it asks for.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment; nothing is refused where it does not ask for the running mean.
    strategy : flwr.serverapp.strategy.Strategy
        Its strategy.
    sparse : bool
        Whether the learner's parameters travel without their zeros.

    Raises
    ------
    ConfigError
        If the strategy may ask for more, or the bytes of sparse parameters are to be counted.
    """
    if not config.engine.running_mean:
        return
    if sparse:
        raise ConfigError(
            f"engine.running_mean = true: learner {config.learner.name} sends sparse parameters, "
            "whose sizes a mean does not tell; set it to false"
        )
    if not _asks_for_the_mean(strategy):
        known = ", ".join(
            name
            for name, builtin in BUILTIN.items()
            if builtin.strategy in OF_THE_MEAN and not builtin.wrapper
        )
        raise ConfigError(
            f"engine.running_mean = true: strategy {config.strategy.name} may look at each "
            "client's answer, not at their mean alone; "
            f"set it to false, or use one of {known}, "
            "or a class of your own with of_the_mean = True and Flower's start"
        )
    key = getattr(strategy, "weighted_by_key", "num-examples")
    if key != "num-examples":
        raise ConfigError(
            "engine.running_mean = true: the mean is weighted by num-examples, not by "
            f"strategy.weighted_by_key = {key!r}; set one or the other"
        )


def _asks_for_the_mean(strategy: Strategy) -> bool:
    if type(strategy).start is not Strategy.start:
        return False
    is_plain = (
        isinstance(strategy, flower.FedAvg)
        and type(strategy) in OF_THE_MEAN
        and strategy.train_metrics_aggr_fn is aggregate_metricrecords
    )
    return is_plain or bool(getattr(strategy, "of_the_mean", False))
