"""The values that options of built-in strategies may have."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedknow.protocols.config import ConfigError
from fedknow.protocols.values import show

__all__ = ["allowed_values", "check_options", "flower_parameters"]


@dataclass(frozen=True)
class _Span:
    """The numbers an option may have.

    Attributes
    ----------
    low, high : float
        The bounds; infinite: none.
    is_low_in, is_high_in : bool
        Whether a bound itself is allowed.
    is_whole : bool
        Whether it must be a whole number.
    meaning : str
        What the number is, for the message.
    """

    low: float = -math.inf
    high: float = math.inf
    is_low_in: bool = True
    is_high_in: bool = True
    is_whole: bool = False
    meaning: str = ""

    def holds(self, value: object) -> bool:
        """Say whether a value is such a number; infinite ones never are."""
        kind = int if self.is_whole else int | float
        # A truth value is a whole number to Python.
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        # An infinite number would pass a lower bound.
        if not math.isfinite(value):
            return False
        is_above = value >= self.low if self.is_low_in else value > self.low
        is_below = value <= self.high if self.is_high_in else value < self.high
        return is_above and is_below

    def __str__(self) -> str:
        bounds = []
        if math.isfinite(self.low):
            words = "at least" if self.is_low_in else "above"
            bounds.append(f"{words} {self.low:g}")
        if math.isfinite(self.high):
            words = "at most" if self.is_high_in else "below"
            bounds.append(f"{words} {self.high:g}")
        kind = "a whole number" if self.is_whole else "a number"
        meaning = f" ({self.meaning})" if self.meaning else ""
        return f"{kind}, {' and '.join(bounds) or 'finite'}{meaning}"


_POSITIVE = _Span(low=0, is_low_in=False)
_NOT_NEGATIVE = _Span(low=0)
_MOMENTUM = _Span(low=0, high=1, is_high_in=False)
_NODES = _Span(low=1, is_whole=True, meaning="a number of clients")

_SPANS = {
    "fraction_train": _Span(
        low=0, high=1, is_low_in=False, meaning="the share of clients in a round"
    ),
    "fraction_evaluate": _Span(
        low=0, high=1, meaning="the share of clients that evaluate"
    ),
    "min_train_nodes": _NODES,
    "min_evaluate_nodes": _Span(
        low=0, is_whole=True, meaning="a number of clients"
    ),
    "min_available_nodes": _NODES,
    "num_malicious_nodes": _Span(
        low=0, is_whole=True, meaning="a number of clients"
    ),
    "num_nodes_to_select": _NODES,
    "num_sampled_clients": _NODES,
    "radius": _Span(low=0, meaning="an L2 norm; 0: the median of the round's"),
    "iterations": _Span(low=1, high=1000, is_whole=True),
    "eta": _POSITIVE,
    "eta_l": _POSITIVE,
    "tau": _POSITIVE,
    "beta_1": _MOMENTUM,
    "beta_2": _MOMENTUM,
    "server_learning_rate": _POSITIVE,
    "server_momentum": _MOMENTUM,
    "proximal_mu": _Span(low=0, high=1e6),
    "client_learning_rate": _POSITIVE,
    "q": _Span(low=0, high=100, meaning="the power of the losses"),
    "noise_multiplier": _NOT_NEGATIVE,
    "clipping_norm": _POSITIVE,
    "initial_clipping_norm": _POSITIVE,
    "target_clipped_quantile": _Span(low=0, high=1),
    "clip_norm_lr": _POSITIVE,
    "clipped_count_stddev": _NOT_NEGATIVE,
}
"""Options of Flower's strategies, which take any value; ours check their own."""


def flower_parameters(factory: object) -> dict[str, inspect.Parameter]:
    """List the arguments that a class inherits from Flower's strategies.

    A user's class hands them on to Flower's constructor, which takes any value.

    Returns
    -------
    dict
        The parameters by name, as Flower declares them; empty where no base is Flower's.
    """
    bases = factory.__mro__ if isinstance(factory, type) else ()
    parameters: dict[str, inspect.Parameter] = {}
    # From the oldest class to the youngest, whose defaults hold.
    for base in reversed(bases):
        if base.__module__.startswith("flwr.serverapp.") and "__init__" in vars(
            base
        ):
            parameters |= inspect.signature(base).parameters
    return parameters


def check_options(
    options: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> None:
    """Refuse values on which a strategy would fail later.

    A constructor of Flower's takes any value.

    Parameters
    ----------
    options : mapping
        The options as configured.
    parameters : mapping
        The constructor's arguments; defaults tell the type of those that have no span.

    Raises
    ------
    ConfigError
        Naming the first wrong option, its value, and what would be right.
    """
    for key, value in options.items():
        default = parameters[key].default
        # Names of keys and switches have no span, their type is enough.
        if isinstance(default, str | bool):
            is_allowed = isinstance(value, type(default))
        else:
            is_allowed = _span(key, default).holds(value)
        if not is_allowed:
            allowed = allowed_values(key, default)
            raise ConfigError(
                f"strategy.{key} = {show(value)}: must be {allowed}"
            )


def allowed_values(key: str, default: object) -> str:
    """Describe the values that an option of a built-in strategy may have."""
    if isinstance(default, str):
        return "text"
    if isinstance(default, bool):
        return "true or false"
    return str(_span(key, default))


def _span(key: str, default: object) -> _Span:
    # Without a span of its own an option takes any finite number of its type.
    return _SPANS.get(key, _Span(is_whole=isinstance(default, int)))
