"""New projects: learner, strategy, data set, experiment and test."""

from __future__ import annotations

import importlib.util
import keyword
import sys
from importlib.resources import files
from pathlib import Path
from string import Template

from fedknow.protocols.config import ConfigError

__all__ = ["write_project"]

_FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "experiment.toml.txt": "experiment.toml",
    "init.py.txt": "{name}/__init__.py",
    "learner.py.txt": "{name}/learner.py",
    "strategy.py.txt": "{name}/strategy.py",
    "data.py.txt": "{name}/data.py",
    "test.py.txt": "tests/test_{name}.py",
}
"""Where each template goes."""


def write_project(name: str, place: Path | None = None) -> list[Path]:
    """Write a small project that runs.

    Parameters
    ----------
    name : str
        Of the project and of its module.
    place : Path, optional
        The folder in which the project's folder is made; by default the current one.

    Returns
    -------
    list of Path
        The files that were written.

    Raises
    ------
    ConfigError
        If the name cannot be a module's, or the folder exists.
    """
    _check_name(name)
    folder = (place or Path()) / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"{folder} exists already; choose another name, or delete it"
        ) from None
    templates = files("fedknow") / "templates" / "project"
    written = []
    for source, target in _FILES.items():
        path = folder / target.format(name=name)
        path.parent.mkdir(exist_ok=True)
        text = (templates / source).read_text("utf-8")
        path.write_text(Template(text).substitute(name=name), "utf-8")
        written.append(path)
    return written


def _check_name(name: str) -> None:
    # Python takes letters of any script, and packages on disk do not travel so well.
    is_module_name = name.isascii() and name.isidentifier()
    if not is_module_name or keyword.iskeyword(name) or name.startswith("_"):
        raise ConfigError(
            f"NAME = {name!r}: cannot be a module's name; use letters, digits and _, with "
            "a letter first"
        )
    is_taken = name in sys.stdlib_module_names or name == "tests"
    if is_taken or importlib.util.find_spec(name) is not None:
        raise ConfigError(
            f"NAME = {name!r}: a module of this name exists already, and one would hide the "
            "other; choose another name"
        )
