"""Descriptions of strategies, read from where they are defined."""

from __future__ import annotations

import inspect

from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from fedknow.client.learners import LEARNERS
from fedknow.protocols.descriptions import (
    Description,
    Setting,
    documented_parameters,
    plain,
    toml,
)
from fedknow.strategies.build import Recipe
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
    """Describe a strategy: what it is, and its options.

    Raises
    ------
    ConfigError
        If there is none of this name.
    """
    recipe = Recipe.read(name)
    factories = [recipe.factory]
    if recipe.builtin and recipe.builtin.wrapper:
        factories.insert(0, recipe.builtin.wrapper)
    meanings = dict(UNDOCUMENTED)
    for usual in (
        FedAvg,
        DifferentialPrivacyServerSideFixedClipping,
    ):  # others do not repeat them
        meanings |= documented_parameters(usual)
    for factory in factories:
        meanings |= documented_parameters(
            _constructor(factory)
        ) | documented_parameters(factory)
    defaults = DEFAULTS | dict(recipe.builtin.defaults) if recipe.builtin else {}
    settings = []
    for key, parameter in recipe.known.items():
        if key in OBJECTS or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            continue
        default = defaults.get(key, parameter.default)
        shown = None if default is parameter.empty else toml(default)
        allowed = allowed_values(key, parameter.default) if recipe.builtin else ""
        settings.append(Setting(key, shown, allowed, meanings.get(key, "")))
    facts = {
        "Class": " around ".join(
            f"{each.__module__}.{each.__qualname__}" for each in factories
        )
    }
    learners = [learner for learner, kind in LEARNERS.items() if kind.strategy == name]
    facts["Learner"] = (
        " or ".join(learners) if learners else "any that has no strategy of its own"
    )
    first = (inspect.getdoc(recipe.factory) or "").partition("\n\n")[0]
    summary = recipe.builtin.summary if recipe.builtin else plain(first)
    return Description(summary, facts, "strategy", settings)


def _constructor(factory: object) -> object:
    return getattr(factory, "__init__", factory)
