"""Build the strategy that a configuration names."""

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
from fedknow.strategies.unsuited import PORTING, check_suited, is_of_old_interface

__all__ = ["Recipe", "build_strategy", "is_variadic", "option_names"]

Parameters = dict[str, inspect.Parameter]


def build_strategy(
    config: StrategyConfig, clients: int | None = None
) -> Strategy:
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
    options = recipe.complete(config.options)
    # The user's own settings are for the message alone.
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
    return list(Recipe.read(name).parameters)


@dataclass(frozen=True)
class Recipe:
    """How a strategy is made.

    Attributes
    ----------
    name : str
        As configured.
    builtin : Builtin or None
        ``None``: a user's own.
    factory : callable
        Makes the strategy.
    inner, outer : dict
        The options of the factory, and those of the wrapper around its strategy.
    """

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
        inner = _parameters(builtin.strategy, OBJECTS)
        return cls(name, builtin, builtin.strategy, inner, outer)

    @property
    def parameters(self) -> Parameters:
        """All options, the wrapper's first."""
        return self.outer | self.inner

    def complete(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Check a user's settings and add the defaults of our experiments.

        Returns
        -------
        dict
            The arguments of the constructors.

        Raises
        ------
        ConfigError
            If an option is unknown, missing or impossible.
        """
        options = self._without_short_names(settings)
        self._check_names(options)
        # No strategy recovers from an infinite number, whoever wrote it.
        check_options_finite(options, self.parameters, "strategy")
        if self.builtin:
            check_options(options, self.parameters)
            defaults = _subset(DEFAULTS, self.inner) | dict(self.builtin.defaults)
            options = defaults | options
        else:
            # A user's class checks its own options, but Flower's constructor takes any value.
            inherited = flower_parameters(self.factory)
            check_options(_subset(options, inherited), inherited)
        self._check_complete(options)
        return options

    def make(
        self, options: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> Strategy:
        """Make the strategy.

        Parameters
        ----------
        options : mapping
            The arguments of the constructors.
        settings : mapping
            The options that the user set, for the message.

        Raises
        ------
        ConfigError
            If a constructor refuses a value, or does not make a strategy that can run here.
        """
        try:
            strategy = self._construct(options)
        except PASSED_ON:
            raise
        # Flower's constructors raise TypeError and ValueError, a user's may raise anything.
        except BaseException as error:
            shown = [
                f"strategy.{key} = {value!r}" for key, value in settings.items()
            ]
            raise ConfigError(
                f"strategy {self.name} refused {', '.join(shown) or 'its defaults'}: "
                f"{explain(error)}"
            ) from error
        # A user's function may return anything.
        if not isinstance(strategy, Strategy):
            porting = f"; {PORTING}" if is_of_old_interface(strategy) else ""
            raise ConfigError(
                f"strategy.name = {self.name!r}: made a {type(strategy).__name__}, "
                f"which is no flwr.serverapp.strategy.Strategy{porting}"
            )
        # A wrapper or a base class may be unsuited, so the made object is checked.
        check_suited(strategy, self.name)
        return strategy

    def _construct(self, options: Mapping[str, Any]) -> Any:
        """Call the factory, and the wrapper if there is one."""
        outer = _subset(options, self.outer)
        inner = {key: value for key, value in options.items() if key not in outer}
        # Constructors log advice that does not apply to our experiments.
        with quiet_flower():
            strategy = self.factory(**inner)
            if self.builtin and self.builtin.wrapper:
                strategy = self.builtin.wrapper(strategy, **outer)
        return strategy

    def _without_short_names(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Replace ``fraction`` by the option that it is short for."""
        options = dict(settings)
        # An own strategy may have an option of just that name.
        is_short = "fraction" in options and "fraction" not in self.parameters
        if is_short and "fraction_train" in self.parameters:
            options["fraction_train"] = options.pop("fraction")
        return options

    def _check_names(self, options: Mapping[str, Any]) -> None:
        parameters = self.parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        # A constructor with ``**options`` takes any name.
        if inspect.Parameter.VAR_KEYWORD in kinds:
            return
        for key, value in options.items():
            if key not in parameters:
                raise ConfigError(
                    f"strategy.{key} = {value!r}: {self.name} has no such option"
                    f"{closest(key, parameters)}; it has: {', '.join(parameters)}"
                )

    def _check_complete(self, options: Mapping[str, Any]) -> None:
        missing = [
            f"strategy.{key}"
            for key, parameter in self.parameters.items()
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
        key: parameter
        for key, parameter in parameters.items()
        if key not in hidden
    }


def _subset(options: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the options of these names."""
    return {key: value for key, value in options.items() if key in names}


def is_variadic(parameter: inspect.Parameter) -> bool:
    """Say whether a parameter stands for any number of arguments."""
    return parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and not is_variadic(parameter)
