"""Experiments shipped with fedknow, one TOML file each."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.resources import files

from fedknow.protocols.config import ConfigError, ExperimentConfig, closest, read_config
from fedknow.protocols.descriptions import Description

__all__ = ["describe_preset", "list_presets", "load_preset"]


def list_presets() -> dict[str, str]:
    """Name of each preset and what it is: the comment on the first line of its file."""
    texts = {
        path.name: path.read_text("utf-8")
        for path in files(__name__).iterdir()
        if path.name.endswith(".toml")
    }
    comments = {
        name.removesuffix(".toml"): text.partition("\n")[0].lstrip("# ")
        for name, text in texts.items()
    }
    return dict(sorted(comments.items()))


def load_preset(name: str, overrides: Iterable[str] = ()) -> ExperimentConfig:
    """The preset of this name with ``key=value`` overrides applied in order.

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
    known = list_presets()
    if name not in known:
        raise ConfigError(
            f"preset {name!r}: there is none of this name{closest(name, known)}; known: {', '.join(known)}"
        )
    return (files(__name__) / f"{name}.toml").read_text("utf-8")
