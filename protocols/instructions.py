"""Settings that a strategy sends to clients with their work.

Flower's strategies put settings into the config record of a training message. Clients train by
four of them, which take the place of the experiment's own for this round:

================================  ==================================================================
``lr``                            learning rate, instead of ``train.lr``
``epochs`` (or ``local-epochs``)  local epochs, instead of ``train.epochs``
``batch-size``                    samples a batch, instead of ``train.batch_size``
``proximal-mu``                   weight of FedProx's term, a number not below 0
================================  ==================================================================

All others are for the learner. The server checks them before they are sent, and a client checks
them again, as it trusts nobody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from fedknow.protocols.config import TrainConfig
from fedknow.protocols.values import show
from fedknow.protocols.work import POSITION

__all__ = ["OVERRIDES", "READ", "Instructions", "read_instructions"]

OVERRIDES = {
    "lr": "lr",
    "epochs": "epochs",
    "local-epochs": "epochs",
    "batch-size": "batch_size",
}
"""Keys that take the place of one of the ``train`` section."""

READ = (*OVERRIDES, "proximal-mu")
"""Keys that all clients train by."""


@dataclass(frozen=True)
class Instructions:
    """How a client is to train in one round.

    Attributes
    ----------
    train : TrainConfig
        The experiment's own, with what the strategy puts in its place.
    proximal_mu : float
        Weight of FedProx's term.
    learner_settings : dict
        All other keys, for the learner.
    """

    train: TrainConfig
    proximal_mu: float
    learner_settings: dict[str, Any]


def read_instructions(
    settings: Mapping[str, Any], train: TrainConfig
) -> Instructions:
    """Read what a strategy tells clients.

    Parameters
    ----------
    settings : mapping
        Of the training message (:func:`~fedknow.protocols.work.merge_settings`).
    train : TrainConfig
        The experiment's own.

    Raises
    ------
    ValueError
        Naming the key, the value and what would be right.

    Examples
    --------
    >>> read_instructions({"lr": 0.5, "beta": 2.0}, TrainConfig()).train.lr
    0.5
    >>> read_instructions({"lr": 0.5, "beta": 2.0}, TrainConfig()).learner_settings
    {'beta': 2.0}
    """
    changes: dict[str, Any] = {}
    for key, name in OVERRIDES.items():
        if key not in settings:
            continue
        value = _checked(key, name, settings[key], train)
        # Two spellings of one setting may both be sent as long as they agree.
        if changes.setdefault(name, value) != value:
            raise ValueError(
                f"{key} = {show(value)} contradicts {name} = {show(changes[name])}; send "
                f"one of them"
            )
    mu = settings.get("proximal-mu", 0.0)
    if not (_is_number(mu) and math.isfinite(mu) and mu >= 0):
        raise ValueError(
            f"proximal-mu = {show(mu)}: must be a finite number, not below 0"
        )
    read_keys = {*POSITION, *READ}
    learner_settings = {
        key: value for key, value in settings.items() if key not in read_keys
    }
    # Each value is checked above already, and the copy checks nothing.
    return Instructions(
        train.model_copy(update=changes) if changes else train,
        float(mu),
        learner_settings,
    )


def _checked(key: str, name: str, value: object, train: TrainConfig) -> float:
    """Return a value that the ``train`` section could have."""
    if not _is_number(value):
        raise ValueError(f"{key} = {show(value)}: must be a number")
    try:
        # The whole section, as some of its checks compare two settings.
        checked = TrainConfig.model_validate({**train.model_dump(), name: value})
    except ValidationError as error:
        raise ValueError(
            f"{key} = {show(value)}: {error.errors()[0]['msg']}"
        ) from None
    number: float = getattr(checked, name)
    return number


def _is_number(value: object) -> bool:
    # A bool is an int to Python, and lr = true is a mistake.
    return isinstance(value, int | float) and not isinstance(value, bool)
