"""Experiments shipped with fedknow, one TOML file each."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.resources import files

from fedknow.protocols.config import (
    ConfigError,
    ExperimentConfig,
    closest,
    read_config,
)
from fedknow.protocols.descriptions import Description

__all__ = ["describe_preset", "list_presets", "load_preset"]


def list_presets() -> dict[str, str]:
    """List the presets by name, each with a line about it.

    The line is the comment at the top of its file.
    """
    comments = {}
    for path in files(__name__).iterdir():
        if path.name.endswith(".toml"):
            comment, _, _ = path.read_text("utf-8").partition("\n")
            comments[path.name.removesuffix(".toml")] = comment.lstrip("# ")
    # A folder has no order of its own.
    return dict(sorted(comments.items()))


def load_preset(name: str, overrides: Iterable[str] = ()) -> ExperimentConfig:
    """Load a preset with ``key=value`` overrides, applied in order.

    Raises
    ------
    ConfigError
        If there is no such preset, or an override is refused.
    """
    tree = tomllib.loads(_text(name))
    return read_config(tree, overrides, called=f"preset {name}")


def describe_preset(name: str) -> Description:
    """Describe a preset by its file.

    Raises
    ------
    ConfigError
        If there is none of this name.
    """
    comment, _, settings = _text(name).partition("\n")
    facts = {"All settings": f"fedknow show {name}"}
    return Description(comment.lstrip("# "), facts, text=settings)


def _text(name: str) -> str:
    presets = list_presets()
    if name not in presets:
        raise ConfigError(
            f"preset {name!r}: there is none of this name{closest(name, presets)}; "
            f"known: {', '.join(presets)}"
        )
    return (files(__name__) / f"{name}.toml").read_text("utf-8")
