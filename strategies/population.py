"""Whether a strategy can do its work with as many clients as there are."""

from __future__ import annotations

import math
from collections.abc import Iterator

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedknow.protocols.config import ConfigError
from fedknow.protocols.texts import counted

__all__ = ["check_population", "layers", "sampled"]


def check_population(strategy: Strategy, clients: int, name: str) -> None:
    """Refuse a strategy that would wait for ever, or never aggregate, with so few clients.

    Parameters
    ----------
    strategy : flwr.serverapp.strategy.Strategy
        The strategy, or what wraps it.
    clients : int
        How many there are; how many of them a round asks is up to the strategy's
        ``fraction_train`` and ``min_train_nodes``.
    name : str
        What messages call the strategy.

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
    """The strategy, what it wraps, what that wraps, and so on."""
    while isinstance(strategy, Strategy):
        yield strategy
        strategy = getattr(strategy, "strategy", None)


def _check_nobody_is_waited_for(strategy: Strategy, clients: int, name: str) -> None:
    for key in (
        "min_train_nodes",
        "min_evaluate_nodes",
        "min_available_nodes",
        "buffer",
        "concurrency",
        "num_sampled_clients",
    ):
        wanted = getattr(strategy, key, 0)
        if isinstance(wanted, int) and wanted > clients:
            raise ConfigError(
                f"strategy {name} waits for {key} = {wanted}, but data.clients = "
                f"{clients}; lower strategy.{key} or raise data.clients"
            )


def _check_enough_answers(strategy: flower.FedAvg, answers: int, name: str) -> None:
    malicious = getattr(strategy, "num_malicious_nodes", None)
    if not isinstance(malicious, int):
        return
    if isinstance(strategy, flower.Bulyan):
        factor = 4
    elif isinstance(strategy, flower.MultiKrum):  # Krum is one
        factor = 2
    else:
        return
    needed = factor * malicious + 3
    if answers < needed:
        most = (answers - 3) // factor
        remedy = (
            f"lower strategy.num_malicious_nodes to {most}, or " if most >= 0 else ""
        )
        raise ConfigError(
            f"strategy {name} with strategy.num_malicious_nodes = {malicious} needs "
            f"{factor} x {malicious} + 3 = {needed} clients in a round, and a round asks "
            f"{answers}; {remedy}raise data.clients or strategy.fraction"
        )
    wanted = getattr(strategy, "num_nodes_to_select", 1)
    if isinstance(wanted, int) and wanted > answers - malicious:
        raise ConfigError(
            f"strategy.num_nodes_to_select = {wanted}: of {counted(answers, 'client')} in a round "
            f"{malicious} may be malicious; set it to {answers - malicious} or less"
        )


def _check_something_is_trimmed(
    strategy: flower.FedTrimmedAvg, answers: int, name: str
) -> None:
    beta = strategy.beta
    # As Flower counts. A beta of 0 asks for a plain mean, and gets it.
    if not beta or int(beta * answers):
        return
    needed = math.ceil(1 / beta)
    needed += not int(beta * needed)  # of 1/49 times 49 rounding leaves less than 1
    remedy = (
        f"raise strategy.beta to {math.ceil(1000 / answers) / 1000:g}, or "
        if answers > 2
        else ""
    )
    raise ConfigError(
        f"strategy {name} with strategy.beta = {beta:g} trims nothing of {counted(answers, 'answer')} "
        f"in a round, as {beta:g} x {answers} is below 1; {remedy}have {needed:g} clients in a round "
        "(data.clients, strategy.fraction), or set strategy.beta = 0 for a plain mean"
    )
