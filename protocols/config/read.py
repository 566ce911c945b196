"""Reading of configurations, with every problem said."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic import ValidationError

from fedknow.protocols.config.errors import ConfigError, closest, first_sentence
from fedknow.protocols.config.experiment import ExperimentConfig
from fedknow.protocols.config.overrides import NAMED, assign, parse_override
from fedknow.protocols.values import bad_values, show, too_deep

__all__ = ["read_config"]


def read_config(
    source: Mapping[str, Any] | str | os.PathLike[str],
    overrides: Iterable[str] = (),
    called: str = "the configuration",
) -> ExperimentConfig:
    """Read an experiment, and apply overrides in order.

    Parameters
    ----------
    source : mapping, str or path
        The experiment, or the file it stands in.
    overrides : iterable of str
        Changes.
    called : str
        What errors call a mapping; a file is called by its name.

    Raises
    ------
    ConfigError
        For a missing or malformed file, an unknown key or an impossible value; every problem is
        listed.
    """
    if isinstance(source, Mapping):
        title = called
        # Before it is copied: that is recursive, and Python's stack is not endless.
        _refuse_deep(source, title)
        tree = _copy(source)
    else:
        title = str(source)
        tree = _read_toml(source)
    for text in overrides:
        assign(tree, *parse_override(text), text)
    # Once more, as an override may have added levels.
    _refuse_deep(tree, title)
    try:
        config = ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        _refuse([_explain(problem) for problem in error.errors()], title)
    # Ten are enough for a person; a faulty list could have thousands.
    if problems := list(islice(bad_values(tree), 10)):
        _refuse(problems, title)
    return config


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; give a .toml file or a preset (fedknow list presets)"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(
            f"{path}: not valid TOML: lists or tables nested too deeply"
        ) from None
    except ValueError as error:
        # TOML's, UTF-8's, or Python's, which refuses integers with thousands of digits.
        raise ConfigError(
            f"{path}: not valid TOML: {first_sentence(error)}"
        ) from None


def _refuse_deep(tree: Mapping[str, Any], title: str) -> None:
    if problem := too_deep(tree):
        _refuse([problem], title)


def _refuse(problems: Iterable[str], title: str) -> NoReturn:
    raise ConfigError(
        "\n".join([f"{title}:", *(f"  {problem}" for problem in problems)])
    ) from None


def _copy(tree: Any) -> Any:
    return (
        {key: _copy(value) for key, value in tree.items()}
        if isinstance(tree, Mapping)
        else tree
    )


def _explain(problem: Any) -> str:
    """Say what is wrong with a value, in the words of a user."""
    place = [str(part) for part in problem["loc"]]
    key = ".".join(place)
    kind = problem["type"]
    # Pydantic's own text for it does not say which keys there are.
    if kind == "extra_forbidden":
        return _explain_unknown(place)
    if kind == "value_error":
        # A validator's own sentence, without the words that pydantic puts before it.
        return str(problem["ctx"]["error"])
    value = show(problem["input"])
    if kind == "string_type" and isinstance(problem["input"], bool | int | float):
        quoted = f'{key}="{value}"'
        return f"{key} = {value}: must be text; write {quoted} (in a shell: --set '{quoted}')"
    if kind == "model_type":
        name = "a name or " if key in NAMED else ""
        return f"{key} = {value}: must be {name}a table of settings"
    return f"{key} = {value}: {problem['msg']}"


def _explain_unknown(place: list[str]) -> str:
    """Say which keys there are in the place of an unknown one."""
    *parents, leaf = place
    section: Any = ExperimentConfig
    for part in parents:
        annotation = section.model_fields[part].annotation
        types = (a for a in get_args(annotation) if isinstance(a, type))
        section = next(types, annotation)
    keys = list(section.model_fields)
    owner = ".".join(parents) or "an experiment"
    return (
        f"{'.'.join(place)}: unknown key{closest(leaf, keys)}; "
        f"{owner} has: {', '.join(keys)}"
    )
