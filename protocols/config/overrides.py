"""Changes of a configuration on the command line: ``--set key=value``."""

from __future__ import annotations

import tomllib
from typing import Any

from fedknow.protocols.config.errors import ConfigError, first_sentence
from fedknow.protocols.values import show

__all__ = ["NAMED", "assign", "parse_override"]

_COMPONENTS = ("learner", "strategy", "model")
NAMED = (*_COMPONENTS, "data", "fleet", "start", "tracking", "attack")
"""Sections that a bare value may stand for."""


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split ``a.b=value``.

    A value that is no TOML is a string.

    Raises
    ------
    ConfigError
        If there is no ``=`` or the key is empty.
    """
    key, equals, value = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise ConfigError(
            f"--set {show(text)}: write key=value, for example --set train.lr=0.01"
        )
    try:
        # TOML gives numbers and lists their type, as in a file.
        return path, tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        # A shell eats quotes, so text without them is taken as text.
        return path, value.strip()
    except RecursionError:
        raise ConfigError(
            f"--set {key}: its value is nested too deeply; no setting is"
        ) from None
    except ValueError as error:
        # Python refuses to read integers with thousands of digits.
        raise ConfigError(
            f"--set {key}: its value is no TOML: {first_sentence(error)}"
        ) from None


def assign(tree: dict[str, Any], path: list[str], value: Any, text: str) -> None:
    """Put an override into a configuration as it was read.

    Parameters
    ----------
    tree : dict
        The configuration, which is changed.
    path : list of str
        The key, part by part.
    value : object
        What it is set to.
    text : str
        The override as it was written, for errors.

    Raises
    ------
    ConfigError
        If the key leads through a value that is no section.
    """
    *parents, leaf = path
    section = _descend(tree, parents, text)
    # Only there can a bare name replace a table, as with learner=gem.
    is_whole_section = not parents
    if is_whole_section:
        value = _as_replacement(leaf, value, section.get(leaf))
    section[leaf] = value


def _descend(
    tree: dict[str, Any], parents: list[str], text: str
) -> dict[str, Any]:
    """Go down to the section of a key, and make what is missing on the way."""
    section = tree
    for key in parents:
        child = _as_section(key, section.get(key, {}))
        if not isinstance(child, dict):
            raise ConfigError(
                f"--set {show(text)}: {key!r} is a value, not a section"
            )
        section[key] = child
        section = child
    return section


def _as_section(key: str, value: Any) -> Any:
    """Spell a bare value out as the section that it stands for.

    ``learner = "gem"`` may be followed by ``--set learner.memory=20``, and
    ``fleet = "testbed-a"`` by ``--set fleet.down=1e6``.
    """
    if key == "tracking" and not isinstance(value, dict):
        return {"to": value}
    if key == "start" and isinstance(value, str):
        return {"weights": value}
    if key in (*_COMPONENTS, "data", "attack") and isinstance(value, str):
        return {"name": value}
    if key == "fleet" and not isinstance(value, dict):
        return {"devices": value}
    return value


def _as_replacement(key: str, value: Any, old: Any) -> Any:
    """Give what takes the place of a section where a bare value is set."""
    if not isinstance(old, dict):
        return value
    if key in _COMPONENTS and isinstance(value, str):
        # Another learner, strategy or model has settings of its own: those of the old one go
        # with it.
        is_same = old.get("name") == value
        return {**old, "name": value} if is_same else {"name": value}
    if key in ("data", "attack") and isinstance(value, str):
        return {**old, "name": value}
    if key == "fleet" and isinstance(value, str | list):
        return {**old, "devices": value}
    if key == "tracking" and isinstance(value, str | list):
        return {**old, "to": value}
    return value
