"""Parts a user brings along: ``module:name`` references in a configuration."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedknow.protocols.config import ConfigError, closest

__all__ = ["calling", "explain", "is_reference", "load_object"]


def is_reference(name: str) -> bool:
    """Whether a part's name points at a user's own code (``module:name``) rather than at one of ours."""
    return ":" in name


def load_object(reference: str, key: str) -> Any:
    """Import what ``module:name`` names; modules in the current folder are found too.

    Parameters
    ----------
    reference : str
        For example ``my_models:build`` or ``package.module:Class.method``.
    key : str
        The setting it stands in, for error messages, for example ``model.name``.

    Raises
    ------
    ConfigError
        If the text is not ``module:name``, the module cannot be imported or has no such name.
    """
    module_name, colon, path = reference.partition(":")
    if not (colon and module_name and path):
        raise ConfigError(f"{key} = {reference!r}: write module:name, for example my_module:MyClass")
    here = os.getcwd()
    if here not in sys.path:  # appended, so that a file of the user's never hides an installed package
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{key} = {reference!r}: importing {module_name!r} failed: {type(error).__name__}: {error}; "
            f"modules are looked for in {here} and among the installed packages"
        ) from error
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise ConfigError(
                f"{key} = {reference!r}: {module_name!r} has no {name!r}{closest(name, dir(found))}"
            ) from None
    return found


@contextmanager
def calling(reference: str, key: str) -> Iterator[None]:
    """Around a call of a user's part while an experiment is set up: says which part failed, where and why.

    Raises
    ------
    ConfigError
        Whatever else the part raises becomes one that names ``key`` and ``reference``.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{key} = {reference!r}: failed: {explain(error)}") from error


def explain(error: Exception) -> str:
    """An exception's type and text, and where in a user's code it arose, or the call that led to it."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file, module = frame.f_code.co_filename, frame.f_globals.get("__name__", "")
        if "site-packages" not in file and not module.startswith("fedknow."):
            place = f" ({os.path.basename(file)}, line {line})"
    return f"{type(error).__name__}: {error}{place}"
