"""Parts of an experiment that a user gives as Python objects.

A configuration names its parts by text: ``"gem"`` or ``"my_module:MyLearner"``. A notebook has
classes and objects instead. This module gives each of them a name that a configuration can
hold, and finds the object again by that name. A class that its module can import is named by
its module, so that any process finds it. Everything else is *registered* here, and whoever
starts another process carries it there (:func:`snapshot`, :func:`restore`).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import threading
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "MAIN",
    "Given",
    "find",
    "name_part",
    "restore",
    "snapshot",
    "source_of",
]

MAIN = "__main__:"
"""How the names of registered objects begin."""


@dataclass(frozen=True, eq=False)
class Given:
    """Stands for an object that a user gave; its call makes what a run needs.

    Attributes
    ----------
    part : object
        What was given.
    """

    part: Any

    def source(self) -> str | None:
        """Return text that says what was given, where its class does not."""
        return None


_registered: dict[str, Any] = {}
# Runs may be started from several threads of one notebook.
_lock = threading.Lock()


def name_part(part: Any, path: str = "") -> str:
    """Name an object for a configuration.

    Parameters
    ----------
    part : object
        A class, a function, or an instance of a class.
    path : str, optional
        The name after the colon; without it, that of the object or its class.

    Returns
    -------
    str
        ``module:Name``. A class or function that its module can import keeps its module's name.
        Another one, such as a class of a notebook's cell, is registered as ``__main__:Name``; a
        later object of that name takes its place, as a cell that is run again expects.

    Examples
    --------
    >>> from collections import OrderedDict
    >>> name_part(OrderedDict)
    'collections:OrderedDict'
    """
    kind = part if _is_definition(part) else type(part)
    module: str = kind.__module__
    qualified: str = kind.__qualname__
    # The import may give another object: a reloaded module's, or one that took the name later.
    if (
        kind is part
        and f"{module}:" != MAIN
        and _imported(module, qualified) is part
    ):
        return f"{module}:{qualified}"
    name = f"{MAIN}{path or qualified.replace('<locals>.', '')}"
    with _lock:
        _registered[name] = part
    return name


def find(name: str) -> Any | None:
    """Return the registered object of this name; ``None`` if there is none."""
    with _lock:
        return _registered.get(name)


def snapshot(names: Iterable[str] | None = None) -> dict[str, Any]:
    """Copy the table of registered objects, to carry it to another process.

    Parameters
    ----------
    names : iterable of str, optional
        Which to copy, as far as they are registered; by default all. Another process can
        need modules that it lacks to hold an object, so it gets those alone that it uses.
    """
    with _lock:
        if names is None:
            return dict(_registered)
        return {name: _registered[name] for name in names if name in _registered}


def restore(parts: Mapping[str, Any]) -> None:
    """Register the objects of another process's :func:`snapshot`."""
    with _lock:
        _registered.update(parts)


def source_of(name: str) -> str | None:
    """Return the source text of a registered object's class or function.

    Returns
    -------
    str or None
        ``None`` if nothing of this name is registered, or its source is not at hand, as in a
        plain interactive session.
    """
    part = find(name)
    if part is None:
        return None
    if isinstance(part, Given):
        if (text := part.source()) is not None:
            return text
        part = part.part
    definition = part if _is_definition(part) else type(part)
    try:
        return inspect.getsource(definition)
    except (OSError, TypeError):
        return _cell_source(definition)


def _cell_source(definition: Any) -> str | None:
    """Return the source of a notebook's class, by one of its methods.

    Up to Python 3.12 a class does not know where it stands, but a function does.
    """
    if not isinstance(definition, type):
        return None
    for member in vars(definition).values():
        if not isinstance(member, types.FunctionType):
            continue
        try:
            text = "".join(inspect.findsource(member)[0])
        except (OSError, TypeError):
            continue
        line = member.__code__.co_firstlineno
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.ClassDef)
                and node.name == definition.__name__
                and node.lineno <= line <= (node.end_lineno or 0)
            ):
                return ast.get_source_segment(text, node)
    return None


def _is_definition(part: Any) -> bool:
    return isinstance(part, type) or inspect.isroutine(part)


def _imported(module: str, path: str) -> Any | None:
    """Return what ``module`` has at a dotted path, if it can be imported."""
    try:
        part: Any = importlib.import_module(module)
        for name in path.split("."):
            part = getattr(part, name)
    except (ImportError, AttributeError):
        return None
    return part
