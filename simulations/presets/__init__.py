"""Experiments shipped with fedknow, one TOML file each."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.resources import files

from fedknow.protocols.config import ConfigError, ExperimentConfig, closest, read_config

__all__ = ["list_presets", "load_preset"]


def list_presets() -> dict[str, str]:
    """Name of each preset and what it is: the comment on the first line of its file."""
    texts = {path.name: path.read_text("utf-8") for path in files(__name__).iterdir() if path.name.endswith(".toml")}
    comments = {name.removesuffix(".toml"): text.partition("\n")[0].lstrip("# ") for name, text in texts.items()}
    return dict(sorted(comments.items()))


def load_preset(name: str, overrides: Iterable[str] = ()) -> ExperimentConfig:
    """The preset of this name with ``key=value`` overrides applied in order.

    Raises
    ------
    ConfigError
        If there is no such preset, or an override is refused.
    """
    known = list_presets()
    if name not in known:
        raise ConfigError(
            f"preset {name!r}: there is none of this name{closest(name, known)}; known: {', '.join(known)}"
        )
    tree = tomllib.loads((files(__name__) / f"{name}.toml").read_text("utf-8"))
    return read_config(tree, overrides, called=f"preset {name}")
