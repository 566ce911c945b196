"""Settings of learners that a recorded search found.

There is one TOML file a preset.

``learner = "ewc@best"`` stands for what is in there under ``[ewc.settings]`` of the
experiment's ``name``. Beside it stand the space that was searched, the score on held-out
training samples and the command (``fedknow search``).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fedknow.protocols.config import ConfigError, ExperimentConfig, LearnerConfig

__all__ = [
    "SEARCHED_AS",
    "SUFFIX",
    "best_settings",
    "searched_settings",
    "with_best",
]

SUFFIX = "@best"
"""What follows a learner's name where its best settings are meant."""
SEARCHED_AS = {
    "paper-cifar100-small": "cifar100-mini",
    "paper-cifar100": "cifar100-mini",
}
"""Presets that take hours a run, and the small one with the same data and network whose best
settings are theirs."""


def searched_settings(preset: str) -> Mapping[str, Any]:
    """Give all that a search found for a preset, by learner.

    It is empty where there was no search.
    """
    file = files(__name__) / f"{SEARCHED_AS.get(preset, preset)}.toml"
    return tomllib.loads(file.read_text("utf-8")) if file.is_file() else {}


def best_settings(preset: str, learner: str) -> dict[str, Any]:
    """Return the best settings of a learner in a preset.

    Raises
    ------
    ConfigError
        If none are shipped; says for what there are some.
    """
    settings = searched_settings(preset)
    if learner not in settings:
        presets = sorted(
            file.name.removesuffix(".toml")
            for file in files(__name__).iterdir()
            if ".toml" in file.name
        )
        other_presets = ", ".join(
            name for name in presets if learner in searched_settings(name)
        )
        available = (
            f"for {preset!r} there are those of {', '.join(settings)}"
            if settings
            else f"there are none for {preset!r}"
        )
        hint = (
            f", and {learner} has some for {other_presets}"
            if other_presets
            else ""
        )
        raise ConfigError(
            f"learner.name = '{learner}{SUFFIX}': no best settings are shipped "
            f"for name = {preset!r}; {available}"
            f"{hint}; search them with: "
            f"fedknow search {preset} --learners {learner}"
        )
    return dict(settings[learner]["settings"])


def with_best(config: ExperimentConfig) -> ExperimentConfig:
    """Replace ``@best`` in an experiment by settings.

    Settings that were given besides go before them.
    """
    name, suffix, trailing = config.learner.name.rpartition(SUFFIX)
    if not suffix or trailing:
        return config
    # What the user set goes before what was searched.
    settings = best_settings(config.name, name) | config.learner.options
    return config.model_copy(
        update={"learner": LearnerConfig(name=name, **settings)}
    )
