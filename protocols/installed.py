"""Parts that installed packages bring along, by entry points.

A package names its parts in its ``pyproject.toml``, in one of the groups below. Wherever it is
installed, an experiment can use them by these names.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fedknow.protocols.config import ConfigError
from fedknow.protocols.plugins import PASSED_ON, explain

__all__ = ["GROUPS", "find_installed", "is_offered", "list_installed"]

GROUPS = {
    "learner": "fedknow.learners",
    "strategy": "fedknow.strategies",
    "model": "fedknow.models",
    "data": "fedknow.datasets",
    "tracking": "fedknow.trackers",
}
"""Groups of entry points by the section of a configuration that names their parts."""


def list_installed(section: str, builtin: Collection[str]) -> dict[str, str]:
    """List the parts of installed packages, with a line about each.

    Nothing is imported, so a package that is broken is listed too.

    Parameters
    ----------
    section : str
        One of :data:`GROUPS`.
    builtin : collection of str
        Names that are taken. A package's part of such a name is listed as not used.

    Examples
    --------
    >>> list_installed("learner", builtin=["fedknow"])
    {}
    """
    lines: dict[str, str] = {}
    for name, entries in _offered(section).items():
        origins = " and ".join(_origin(entry) for entry in entries)
        if name in builtin:
            lines[f"{name} (installed)"] = (
                f"not used, because {name!r} is built in: {origins}; "
                f"name it {entries[0].value}"
            )
        elif len(entries) > 1:
            lines[name] = (
                f"not used, because several packages offer it: {origins}"
            )
        else:
            lines[name] = f"from {origins}"
    return lines


def is_offered(section: str, name: str) -> bool:
    """Say whether an installed package offers a part of this name.

    Nothing is imported.
    """
    return name in _offered(section)


def find_installed(section: str, name: str, key: str) -> Any | None:
    """Import the part that an installed package offers by a name.

    Parameters
    ----------
    section : str
        One of :data:`GROUPS`.
    name : str
        The name, which is no built-in one.
    key : str
        The setting it stands in, for errors.

    Returns
    -------
    object or None
        ``None`` if no package offers it.

    Raises
    ------
    ConfigError
        If several packages offer the name, or the part cannot be imported.
    """
    entries = _offered(section).get(name)
    if not entries:
        return None
    if len(entries) > 1:
        origins = " and ".join(_origin(entry) for entry in entries)
        choices = " or ".join(repr(entry.value) for entry in entries)
        raise ConfigError(
            f"{key} = {name!r}: several installed packages offer it: {origins}; "
            f"write {choices}, or uninstall one"
        )
    try:
        return entries[0].load()
    except PASSED_ON:
        raise
    except BaseException as error:  # importing a package may fail in any way
        raise ConfigError(
            f"{key} = {name!r}: {_origin(entries[0])} cannot be imported: "
            f"{explain(error)}; mend or uninstall that package"
        ) from error


def _offered(section: str) -> dict[str, list[EntryPoint]]:
    """Find the entry points of a section's group by their names."""
    return _read(GROUPS[section], tuple(sys.path))


# It reads a file of each installed package, and a learner is looked up many times in a run.
@lru_cache
def _read(group: str, path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    offered: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        offered.setdefault(entry.name, []).append(entry)
    # By name, since the order of packages is that of the folders on a disk.
    return dict(sorted(offered.items()))


def _origin(entry: EntryPoint) -> str:
    package = (
        f"{entry.dist.name} {entry.dist.version}" if entry.dist else "a package"
    )
    return f"{package} ({entry.value})"
