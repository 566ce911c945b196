"""Making the strategy that a configuration names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedknow.protocols.config import ConfigError, StrategyConfig, closest
from fedknow.protocols.plugins import explain
from fedknow.strategies.flower_log import quiet_flower
from fedknow.strategies.registry import BUILTIN, DEFAULTS, OBJECTS, Builtin, find_strategy

__all__ = ["build_strategy"]

Parameters = dict[str, inspect.Parameter]


def build_strategy(config: StrategyConfig, clients: int | None = None) -> Strategy:
    """Make the strategy that the configuration names.

    Parameters
    ----------
    config : StrategyConfig
        ``name``: one of :func:`~fedknow.strategies.list_strategies`, or ``module:Class`` for a
        class in an importable file (the current folder counts). Its other keys are arguments
        of the constructor; ``fraction`` is short for ``fraction_train``, the share of clients
        that train in a round.
    clients : int, optional
        How many clients there are; a strategy that waits for more is refused.

    Returns
    -------
    flwr.serverapp.strategy.Strategy
        A new one, as Flower or its author made it.

    Raises
    ------
    ConfigError
        If there is no such strategy, an option is unknown or missing, or the constructor
        refuses a value.
    """
    recipe = _Recipe.read(config.name)
    options = recipe.checked(config.options)
    strategy = recipe.make(options, config.options)
    if clients is not None:
        _check_enough_clients(strategy, clients, config.name)
    return strategy


@dataclass(frozen=True)
class _Recipe:
    """How a strategy is made: the callables, and the options that each of them takes."""

    name: str
    builtin: Builtin | None
    factory: Callable[..., Any]
    inner: Parameters
    outer: Parameters

    @classmethod
    def read(cls, name: str) -> _Recipe:
        builtin = BUILTIN.get(name)
        if builtin is None:
            factory = find_strategy(name)
            return cls(name, None, factory, _parameters(factory), {})
        wrapper = builtin.wrapper
        outer = _parameters(wrapper, OBJECTS) if wrapper else {}
        return cls(name, builtin, builtin.strategy, _parameters(builtin.strategy, OBJECTS), outer)

    @property
    def known(self) -> Parameters:
        """All options."""
        return self.outer | self.inner

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options to make it with: those given, checked, and our defaults."""
        options = self._without_short_names(given)
        self._check_names(options)
        if self.builtin:
            _check_values(options, self.known)
            ours = {key: value for key, value in DEFAULTS.items() if key in self.inner}
            options = ours | dict(self.builtin.defaults) | options
        self._check_complete(options)
        return options

    def make(self, options: Mapping[str, Any], given: Mapping[str, Any]) -> Strategy:
        """Call the constructors; ``given`` is what the user set, for the message."""
        inner = {key: value for key, value in options.items() if key not in self.outer}
        outer = {key: value for key, value in options.items() if key in self.outer}
        try:
            with quiet_flower():
                strategy = self.factory(**inner)
                if self.builtin and self.builtin.wrapper:
                    strategy = self.builtin.wrapper(strategy, **outer)
        except Exception as error:  # Flower's raise TypeError and ValueError, a user's anything
            settings = ", ".join(f"strategy.{key} = {value!r}" for key, value in given.items())
            raise ConfigError(f"strategy {self.name} refused {settings or 'its defaults'}: {explain(error)}") from error
        if not isinstance(strategy, Strategy):
            raise ConfigError(
                f"strategy.name = {self.name!r}: made a {type(strategy).__name__}, "
                "which is no flwr.serverapp.strategy.Strategy"
            )
        return strategy

    def _without_short_names(self, given: Mapping[str, Any]) -> dict[str, Any]:
        options = dict(given)
        is_short = "fraction" in options and "fraction" not in self.known
        if is_short and "fraction_train" in self.known:
            options["fraction_train"] = options.pop("fraction")
        return options

    def _check_names(self, options: Mapping[str, Any]) -> None:
        known = self.known
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            return
        for key, value in options.items():
            if key not in known:
                raise ConfigError(
                    f"strategy.{key} = {value!r}: {self.name} has no such option"
                    f"{closest(key, known)}; it has: {', '.join(known)}"
                )

    def _check_complete(self, options: Mapping[str, Any]) -> None:
        missing = [
            f"strategy.{key}" for key, parameter in self.known.items() if _is_required(parameter) and key not in options
        ]
        if missing:
            raise ConfigError(f"strategy {self.name} needs {' and '.join(missing)}; set it")


def _check_values(options: Mapping[str, Any], known: Parameters) -> None:
    """Refuse what a built-in strategy's constructor would take and choke on later."""
    for key, value in options.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "fraction_train":
            fits = is_number and 0 < value <= 1
            right = "above 0 and at most 1: the share of clients in a round"
        elif isinstance(known[key].default, str):
            fits, right = isinstance(value, str), "text"
        else:
            fits, right = is_number, "a number"
        if not fits:
            raise ConfigError(f"strategy.{key} = {value!r}: must be {right}")


def _check_enough_clients(strategy: Strategy, clients: int, name: str) -> None:
    """Refuse a strategy that waits for more clients than there are, which is for ever."""
    inner: object = strategy
    while isinstance(inner, Strategy):
        for key in (
            "min_train_nodes",
            "min_evaluate_nodes",
            "min_available_nodes",
            "buffer",
            "concurrency",
        ):
            wanted = getattr(inner, key, 0)
            if isinstance(wanted, int) and wanted > clients:
                raise ConfigError(
                    f"strategy {name} waits for {key} = {wanted} clients, but data.clients = "
                    f"{clients}; lower strategy.{key} or raise data.clients"
                )
        inner = getattr(inner, "strategy", None)


def _parameters(factory: Callable[..., Any], hidden: Collection[str] = ()) -> Parameters:
    parameters = inspect.signature(factory).parameters
    return {key: parameter for key, parameter in parameters.items() if key not in hidden}


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_KEYWORD,
        parameter.VAR_POSITIONAL,
    )
