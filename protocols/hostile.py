"""Which clients of a simulation are hostile."""

from __future__ import annotations

from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.seeds import generator

__all__ = ["check_honest", "hostile_clients"]


def hostile_clients(config: ExperimentConfig) -> tuple[int, ...]:
    """Choose the hostile clients of an experiment (section ``attack``).

    Returns
    -------
    tuple of int
        Ascending; empty where nobody attacks.

    Examples
    --------
    >>> from fedknow.protocols.config import read_config
    >>> hostile_clients(read_config({"attack": "signflip", "data": {"clients": 5}}))
    (3,)
    """
    if not config.attack:
        return ()
    clients = config.data.clients
    count = max(1, round(config.attack.clients * clients))
    draw = generator(config.seed, "attack")
    chosen = draw.choice(clients, min(count, clients), replace=False)
    return tuple(sorted(int(client) for client in chosen))


def check_honest(config: ExperimentConfig) -> None:
    """Refuse an experiment of real clients in which some are to be hostile.

    Raises
    ------
    ConfigError
    """
    if config.attack:
        raise ConfigError(
            f"attack.name = {config.attack.name!r}: attacks are for fedknow simulate alone; with "
            "real clients leave the section attack out"
        )
