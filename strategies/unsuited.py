"""Refuse strategies that would not do what their name says.

Some would run without their effect here, and some cannot be run at all.
"""

from __future__ import annotations

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedknow.protocols.config import ConfigError
from fedknow.strategies.population import layers

__all__ = ["PORTING", "check_suited", "is_of_old_interface"]

OLD = "flwr.server.strategy"
"""The module of Flower's older interface."""

PORTING = (
    f"strategies of the older {OLD} must be ported: "
    "derive from flwr.serverapp.strategy.Strategy, or from the class of the same name "
    "beside it; configure_fit becomes configure_train and returns messages, "
    "aggregate_fit becomes aggregate_train and returns an ArrayRecord and a "
    "MetricRecord, and initial parameters are the experiment's"
)

_CLIPS_ON_CLIENTS = (
    flower.DifferentialPrivacyClientSideFixedClipping,
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
)
_TREES = (flower.FedXgbBagging, flower.FedXgbCyclic)


def is_of_old_interface(strategy: object) -> bool:
    """Say whether a class or an object belongs to Flower's older interface."""
    kind = strategy if isinstance(strategy, type) else type(strategy)
    # By name: importing the older module would load it for everybody.
    return any(base.__module__.startswith(OLD) for base in kind.__mro__)


def check_suited(strategy: Strategy, name: str) -> None:
    """Refuse strategies that need clients of another kind.

    Parameters
    ----------
    strategy : flwr.serverapp.strategy.Strategy
        The strategy, or its wrapper.
    name : str
        ``strategy.name``, for the message.

    Raises
    ------
    ConfigError
        Saying why, and which strategy works instead.
    """
    # A wrapper may hide the strategy that does not fit.
    for layer in layers(strategy):
        kind = type(layer).__name__
        if isinstance(layer, _CLIPS_ON_CLIENTS):
            raise ConfigError(
                f"strategy.name = {name!r}: {kind} leaves it to Flower's mods to clip "
                "updates, which clients here do not run, so its noise would protect nobody; "
                "set privacy.clip and privacy.noise, or strategy.name = 'dp-fixed-clipping' or "
                "'dp-adaptive-clipping', or wrap yours in "
                "DifferentialPrivacyServerSideFixedClipping: there the server clips"
            )
        if isinstance(layer, _TREES):
            raise ConfigError(
                f"strategy.name = {name!r}: {kind} puts trees of XGBoost together, and "
                "clients here train a network; choose a strategy that averages parameters, "
                "for example 'fedavg'"
            )
