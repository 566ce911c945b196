"""Making the strategy that a configuration names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedknow.protocols.config import ConfigError, StrategyConfig, closest
from fedknow.protocols.plugins import PASSED_ON, check_options_finite, explain
from fedknow.strategies.flower_log import quiet_flower
from fedknow.strategies.options import check_options, flower_parameters
from fedknow.strategies.population import check_population
from fedknow.strategies.registry import (
    BUILTIN,
    DEFAULTS,
    OBJECTS,
    Builtin,
    find_strategy,
)
from fedknow.strategies.unsuited import PORTING, check_suited, is_of_the_old_api

__all__ = ["Recipe", "build_strategy", "option_names"]

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
        How many clients there are; a strategy that cannot work with so few is refused.

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
    recipe = Recipe.read(config.name)
    options = recipe.checked(config.options)
    strategy = recipe.make(options, config.options)
    if clients is not None:
        check_population(strategy, clients, config.name)
    return strategy


def option_names(name: str) -> list[str]:
    """List the options of a strategy.

    Raises
    ------
    ConfigError
        If there is no such strategy.
    """
    return list(Recipe.read(name).known)


@dataclass(frozen=True)
class Recipe:
    """How a strategy is made: the callables, and the options that each of them takes."""

    name: str
    builtin: Builtin | None
    factory: Callable[..., Any]
    inner: Parameters
    outer: Parameters

    @classmethod
    def read(cls, name: str) -> Recipe:
        """Find how the strategy of this name is made."""
        builtin = BUILTIN.get(name)
        if builtin is None:
            factory = find_strategy(name)
            return cls(name, None, factory, _parameters(factory), {})
        wrapper = builtin.wrapper
        outer = _parameters(wrapper, OBJECTS) if wrapper else {}
        return cls(
            name,
            builtin,
            builtin.strategy,
            _parameters(builtin.strategy, OBJECTS),
            outer,
        )

    @property
    def known(self) -> Parameters:
        """All options."""
        return self.outer | self.inner

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options to make it with: those given, checked, and our defaults."""
        options = self._without_short_names(given)
        self._check_names(options)
        check_options_finite(options, self.known, "strategy")
        if self.builtin:
            check_options(options, self.known)
            ours = {key: value for key, value in DEFAULTS.items() if key in self.inner}
            options = ours | dict(self.builtin.defaults) | options
        else:
            flowers = flower_parameters(self.factory)
            check_options(
                {key: options[key] for key in options if key in flowers}, flowers
            )
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
        except PASSED_ON:
            raise
        except (
            BaseException
        ) as error:  # Flower's raise TypeError and ValueError, a user's anything
            settings = ", ".join(
                f"strategy.{key} = {value!r}" for key, value in given.items()
            )
            raise ConfigError(
                f"strategy {self.name} refused {settings or 'its defaults'}: {explain(error)}"
            ) from error
        if not isinstance(strategy, Strategy):
            porting = f"; {PORTING}" if is_of_the_old_api(strategy) else ""
            raise ConfigError(
                f"strategy.name = {self.name!r}: made a {type(strategy).__name__}, "
                f"which is no flwr.serverapp.strategy.Strategy{porting}"
            )
        check_suited(strategy, self.name)
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
            f"strategy.{key}"
            for key, parameter in self.known.items()
            if _is_required(parameter) and key not in options
        ]
        if missing:
            raise ConfigError(
                f"strategy {self.name} needs {' and '.join(missing)}; set it"
            )


def _parameters(
    factory: Callable[..., Any], hidden: Collection[str] = ()
) -> Parameters:
    parameters = inspect.signature(factory).parameters
    return {
        key: parameter for key, parameter in parameters.items() if key not in hidden
    }


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_KEYWORD,
        parameter.VAR_POSITIONAL,
    )
