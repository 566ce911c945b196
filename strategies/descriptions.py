"""Descriptions of strategies, read from where they are defined."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)

from fedknow.client.learners import LEARNERS
from fedknow.protocols.descriptions import (
    Description,
    Setting,
    documented_parameters,
    plain_text,
    toml,
)
from fedknow.strategies.build import Recipe, is_variadic
from fedknow.strategies.options import allowed_values
from fedknow.strategies.registry import DEFAULTS, OBJECTS

__all__ = ["describe_strategy"]

UNDOCUMENTED = {
    "initial_clipping_norm": "The clipping norm of the first round.",
    "target_clipped_quantile": "The share of updates that shall stay below the clipping norm.",
    "clip_norm_lr": "How fast the clipping norm follows that share.",
    "clipped_count_stddev": "Standard deviation of the noise on the number of clipped updates.",
}
"""Meanings of options that Flower does not document."""


def describe_strategy(name: str) -> Description:
    """Describe a strategy: its summary, its class and its options.

    Raises
    ------
    ConfigError
        If there is none of this name.
    """
    recipe = Recipe.read(name)
    # A wrapper stands before the strategy that it wraps.
    factories = [recipe.factory]
    if recipe.builtin and recipe.builtin.wrapper:
        factories.insert(0, recipe.builtin.wrapper)
    names = [
        f"{factory.__module__}.{factory.__qualname__}" for factory in factories
    ]
    learners = [
        learner for learner, kind in LEARNERS.items() if kind.strategy == name
    ]
    facts = {
        "Class": " around ".join(names),
        "Learner": " or ".join(learners) or "any that has no strategy of its own",
    }
    settings = _settings(recipe, _meanings(factories))
    return Description(_summary(recipe), facts, "strategy", settings)


def _summary(recipe: Recipe) -> str:
    if recipe.builtin:
        return recipe.builtin.summary
    documentation = inspect.getdoc(recipe.factory) or ""
    paragraph, _, _ = documentation.partition("\n\n")
    return plain_text(paragraph)


def _meanings(factories: Sequence[Callable[..., Any]]) -> dict[str, str]:
    """Read the meanings of options; later sources override earlier ones."""
    meanings = dict(UNDOCUMENTED)
    # Flower's other strategies do not repeat the options of these two.
    for strategy in (FedAvg, DifferentialPrivacyServerSideFixedClipping):
        meanings |= documented_parameters(strategy)
    for factory in factories:
        # Some classes document their options in the constructor, some in the class.
        meanings |= documented_parameters(getattr(factory, "__init__", factory))
        meanings |= documented_parameters(factory)
    return meanings


def _settings(recipe: Recipe, meanings: Mapping[str, str]) -> list[Setting]:
    """Describe the options that a file can hold."""
    builtin = recipe.builtin
    defaults = DEFAULTS | dict(builtin.defaults) if builtin else {}
    settings = []
    for key, parameter in recipe.parameters.items():
        if key in OBJECTS or is_variadic(parameter):
            continue
        # Our defaults replace Flower's, which suit other experiments.
        default = defaults.get(key, parameter.default)
        shown = None if default is parameter.empty else toml(default)
        allowed = allowed_values(key, parameter.default) if builtin else ""
        settings.append(Setting(key, shown, allowed, meanings.get(key, "")))
    return settings
