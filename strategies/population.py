"""Refuse strategies that need more clients than there are."""

from __future__ import annotations

import math
from collections.abc import Iterator

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedknow.protocols.config import ConfigError
from fedknow.protocols.texts import counted

__all__ = ["check_population", "layers", "sampled"]

_MINIMA = (
    "min_train_nodes",
    "min_evaluate_nodes",
    "min_available_nodes",
    "buffer",
    "concurrency",
    "num_sampled_clients",
)
"""Attributes of strategies that hold a number of clients to wait for."""


def check_population(strategy: Strategy, clients: int, name: str) -> None:
    """Refuse a strategy that cannot work with so few clients.

    It would wait for ever, or never aggregate.

    Parameters
    ----------
    strategy : flwr.serverapp.strategy.Strategy
        The strategy, or what wraps it.
    clients : int
        How many there are. The strategy's ``fraction_train`` and ``min_train_nodes`` decide how
        many of them a round asks.
    name : str
        The strategy's name in messages.

    Raises
    ------
    ConfigError
        Naming the option, and how many clients it would take.
    """
    for layer in layers(strategy):
        _check_nobody_is_waited_for(layer, clients, name)
        if isinstance(layer, flower.FedAvg):
            _check_enough_answers(layer, sampled(layer, clients), name)
        if isinstance(layer, flower.FedTrimmedAvg):
            _check_something_is_trimmed(layer, sampled(layer, clients), name)


def sampled(strategy: flower.FedAvg, clients: int) -> int:
    """Count the clients that a round asks, as Flower's FedAvg does."""
    return max(int(clients * strategy.fraction_train), strategy.min_train_nodes)


def layers(strategy: object) -> Iterator[Strategy]:
    """Yield the strategy, the one it wraps, and so on."""
    while isinstance(strategy, Strategy):
        yield strategy
        strategy = getattr(strategy, "strategy", None)


def _check_nobody_is_waited_for(
    strategy: Strategy, clients: int, name: str
) -> None:
    for key in _MINIMA:
        minimum = getattr(strategy, key, 0)
        # A user's class may use such a name for something else.
        if isinstance(minimum, int) and minimum > clients:
            raise ConfigError(
                f"strategy {name} waits for {key} = {minimum}, but data.clients = "
                f"{clients}; lower strategy.{key} or raise data.clients"
            )


def _check_enough_answers(
    strategy: flower.FedAvg, answers: int, name: str
) -> None:
    malicious = getattr(strategy, "num_malicious_nodes", None)
    if not isinstance(malicious, int):
        return
    # With f malicious clients Bulyan needs 4 f + 3 answers, Krum 2 f + 3 (their papers).
    if isinstance(strategy, flower.Bulyan):
        factor = 4
    elif isinstance(strategy, flower.MultiKrum):  # Krum is one
        factor = 2
    else:
        return
    minimum = factor * malicious + 3
    if answers < minimum:
        limit = (answers - 3) // factor
        remedy = ""
        if limit >= 0:
            remedy = f"lower strategy.num_malicious_nodes to {limit}, or "
        raise ConfigError(
            f"strategy {name} with strategy.num_malicious_nodes = {malicious} needs "
            f"{factor} x {malicious} + 3 = {minimum} clients in a round, and a round asks "
            f"{answers}; {remedy}raise data.clients or strategy.fraction"
        )
    selected = getattr(strategy, "num_nodes_to_select", 1)
    if isinstance(selected, int) and selected > answers - malicious:
        raise ConfigError(
            f"strategy.num_nodes_to_select = {selected}: of {counted(answers, 'client')} "
            f"in a round {malicious} may be malicious; set it to {answers - malicious} or less"
        )


def _check_something_is_trimmed(
    strategy: flower.FedTrimmedAvg, answers: int, name: str
) -> None:
    beta = strategy.beta
    # As Flower counts. A beta of 0 asks for a plain mean, and gets it.
    if not beta or int(beta * answers):
        return
    minimum = math.ceil(1 / beta)
    # Rounding makes 1/49 times 49 less than 1.
    if not int(beta * minimum):
        minimum += 1
    remedy = ""
    if answers > 2:
        # Rounded up to three decimals, so that the product reaches 1.
        remedy = (
            f"raise strategy.beta to {math.ceil(1000 / answers) / 1000:g}, or "
        )
    raise ConfigError(
        f"strategy {name} with strategy.beta = {beta:g} trims nothing of "
        f"{counted(answers, 'answer')} in a round, as {beta:g} x {answers} is below 1; "
        f"{remedy}have {minimum:g} clients in a round (data.clients, strategy.fraction), "
        "or set strategy.beta = 0 for a plain mean"
    )
