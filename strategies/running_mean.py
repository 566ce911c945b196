"""Strategies for which the mean of the clients' answers is enough."""

from __future__ import annotations

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.strategies.registry import BUILTIN

__all__ = ["check_running_mean", "mean_strategies", "needs_mean_alone"]


MEAN_STRATEGIES = (
    flower.FedAvg,
    flower.FedProx,
    flower.FedAvgM,
    flower.FedAdam,
    flower.FedAdagrad,
    flower.FedYogi,
)
"""Flower's strategies that look at the mean of the answers alone."""


def check_running_mean(
    config: ExperimentConfig, strategy: Strategy, is_sparse: bool
) -> None:
    """Refuse ``engine.running_mean`` where each answer must be seen.

    A user's own strategy says by an attribute ``of_the_mean = True`` that it needs nothing but
    the mean, weighted by ``num-examples``.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment; nothing is refused where it does not ask for the running mean.
    strategy : flwr.serverapp.strategy.Strategy
        Its strategy.
    is_sparse : bool
        Whether the learner's parameters travel without their zeros.

    Raises
    ------
    ConfigError
        If the strategy may ask for more, or the bytes of sparse parameters are to be counted.
    """
    if not config.engine.running_mean:
        return
    # The bytes are counted from each answer's own zeros.
    if is_sparse:
        raise ConfigError(
            f"engine.running_mean = true: learner {config.learner.name} sends sparse parameters, "
            "whose sizes a mean does not tell; set it to false"
        )
    if not needs_mean_alone(strategy):
        raise ConfigError(
            f"engine.running_mean = true: strategy {config.strategy.name} may look at each "
            "client's answer, not at their mean alone; "
            f"set it to false, or use one of {', '.join(mean_strategies())}, "
            "or a class of your own with of_the_mean = True and Flower's start"
        )
    # Workers weigh with this metric before the strategy sees an answer.
    key = getattr(strategy, "weighted_by_key", "num-examples")
    if key != "num-examples":
        raise ConfigError(
            "engine.running_mean = true: the mean is weighted by num-examples, not by "
            f"strategy.weighted_by_key = {key!r}; set one or the other"
        )


def mean_strategies() -> list[str]:
    """Name the built-in strategies that look at the mean alone."""
    return [
        name
        for name, builtin in BUILTIN.items()
        if builtin.strategy in MEAN_STRATEGIES and not builtin.wrapper
    ]


def needs_mean_alone(strategy: Strategy) -> bool:
    """Say whether a strategy looks at the mean of the answers alone."""
    # A loop of the strategy's own may do anything with the answers.
    if type(strategy).start is not Strategy.start:
        return False
    # The exact type: a subclass may override the aggregation.
    is_mean_strategy = (
        isinstance(strategy, flower.FedAvg)
        and type(strategy) in MEAN_STRATEGIES
        and strategy.train_metrics_aggr_fn is aggregate_metricrecords
    )
    return is_mean_strategy or bool(getattr(strategy, "of_the_mean", False))
