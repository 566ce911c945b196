"""A user's own parts: ``module:name`` references in a configuration."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedknow.protocols import parts
from fedknow.protocols.config import ConfigError, closest
from fedknow.protocols.values import is_finite, show

__all__ = [
    "PASSED_ON",
    "calling",
    "check_maker",
    "check_options_finite",
    "explain",
    "is_reference",
    "load_object",
]

PASSED_ON = (KeyboardInterrupt, GeneratorExit)
"""What is no fault of the code it comes out of. ``SystemExit`` is: it would end a run as if
it were finished."""


def is_reference(name: str) -> bool:
    """Say whether a part's name points at a user's own code (``module:name``)."""
    return ":" in name


def load_object(reference: str, key: str) -> Any:
    """Import what ``module:name`` names.

    Modules in the current folder are found too. An object that a Python program gave
    (:mod:`fedknow.protocols.parts`) is found before any import.

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
    # Before the import: an object that was given in Python has no module to import.
    if (part := parts.find(reference)) is not None:
        return part
    module_name, colon, path = reference.partition(":")
    # The import below would find this command's own __main__, and say that it lacks the name.
    if module_name == "__main__" and path:
        raise ConfigError(
            f"{key} = {reference!r}: this part was defined in a notebook or script and is not in "
            "this process; go on from Python with the same object given again, to simulate or "
            f"load_run, or move it to a module and set {key} = 'module:{path}'"
        )
    if not (colon and module_name and path):
        raise ConfigError(
            f"{key} = {reference!r}: write module:name, for example my_module:MyClass"
        )
    part_object = _import(module_name, reference, key)
    with calling(reference, key):  # a module may compute its names
        for name in path.split("."):
            try:
                part_object = getattr(part_object, name)
            except AttributeError:
                raise ConfigError(
                    f"{key} = {reference!r}: {module_name!r} has no "
                    f"{name!r}{closest(name, dir(part_object))}"
                ) from None
    return part_object


def _import(module_name: str, reference: str, key: str) -> Any:
    """Import a module from the current folder or an installed package."""
    folder = os.getcwd()
    # Last, so that a user's file never hides an installed package.
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module(module_name)
    except PASSED_ON:
        raise
    # Any error: a script that ends in sys.exit() raises SystemExit.
    except BaseException as error:
        raise ConfigError(
            f"{key} = {reference!r}: importing {module_name!r} failed: {_type_and_text(error)}; "
            f"modules are looked for in {folder} and among the installed packages"
        ) from error


def check_maker(
    part_object: Any,
    reference: str,
    key: str,
    base: type,
    base_name: str,
) -> Callable[..., Any]:
    """Refuse, without calling it, what cannot make a part of this kind.

    A part is made by a class derived from its base class or by a user's function. What is
    written in C, or belongs to Python itself, makes no part; and to call it to find out might
    end the process, delete files or wait for input.

    Parameters
    ----------
    found : object
        What the reference names.
    reference, key : str
        The reference, and the setting it stands in.
    base : type
        What the part must be an instance of.
    base_name : str
        Where users import that from.

    Raises
    ------
    ConfigError
        Saying what would be right.
    """
    right = f"it must be a class derived from {base_name}, or a function of yours that makes one"
    if not callable(part_object):
        raise ConfigError(
            f"{key} = {reference!r}: is a {type(part_object).__name__}, no class or "
            f"function; {right}"
        )
    if isinstance(part_object, type):
        if not issubclass(part_object, base):
            raise ConfigError(f"{key} = {reference!r}: is another class; {right}")
    elif owner := _owner(part_object):
        raise ConfigError(f"{key} = {reference!r}: belongs to {owner}; {right}")
    try:
        inspect.signature(part_object)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{key} = {reference!r}: does not say which arguments it takes; {right}"
        ) from None
    return part_object  # type: ignore[no-any-return]


def check_options_finite(
    options: Mapping[str, Any],
    parameters: Mapping[str, inspect.Parameter],
    part: str,
) -> None:
    """Refuse options that are infinite or NaN.

    An argument whose own default is such a number says by it that it takes them.

    Parameters
    ----------
    options : mapping
        What is configured.
    parameters : mapping
        The arguments of what is called with them.
    part : str
        The section of the configuration: ``model``, ``strategy``.

    Raises
    ------
    ConfigError
        Naming the first.
    """
    for key, value in options.items():
        # Options for **kwargs have no parameter; they must be finite.
        default = parameters[key].default if key in parameters else None
        if not is_finite(value) and is_finite(default):
            raise ConfigError(
                f"{part}.{key} = {show(value)}: must be a finite number"
            )


@contextmanager
def calling(reference: str, key: str) -> Iterator[None]:
    """Say which user's part failed, around a call that sets it up.

    Raises
    ------
    ConfigError
        Whatever else the part raises becomes one that names ``key`` and ``reference``; that it
        would end the process (``SystemExit``) too.
    """
    try:
        yield
    # A user's part may raise ConfigError itself; it already names the key.
    except (ConfigError, *PASSED_ON):
        raise
    except BaseException as error:
        raise ConfigError(
            f"{key} = {reference!r}: failed: {explain(error)}"
        ) from error


def explain(error: BaseException) -> str:
    """Give an exception's type and text, and where in a user's code it arose."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file, module = (
            frame.f_code.co_filename,
            frame.f_globals.get("__name__", ""),
        )
        if "site-packages" not in file and not str(module).startswith("fedknow."):
            # The last such frame stays, the one nearest to the error.
            place = f" ({os.path.basename(file)}, line {line})"
    return f"{_type_and_text(error)}{place}"


def _type_and_text(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # a user's exception may fail even at this
        text = "(its text cannot be had)"
    return f"{type(error).__name__}: {text}"


def _owner(part_object: Any) -> str:
    """Who a callable belongs to, if it can be no user's; else nothing."""
    # A partial or a decorated function belongs to whoever wrote the function inside.
    while isinstance(part_object, functools.partial):
        part_object = part_object.func
    part_object = inspect.unwrap(part_object)
    is_function = inspect.isroutine(part_object) or isinstance(part_object, type)
    module = (
        getattr(
            part_object if is_function else type(part_object), "__module__", None
        )
        or ""
    )
    # A user's functions are Python; a reference such as builtins:eval must not be called.
    if inspect.isbuiltin(part_object) or inspect.ismethoddescriptor(part_object):
        return "a library that is not written in Python"
    if module.partition(".")[0] in sys.stdlib_module_names:
        return "Python's standard library"
    return ""
