"""Descriptions of the parts of an experiment, from their docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

__all__ = [
    "Description",
    "Setting",
    "allowed_values",
    "documented_parameters",
    "plain_text",
    "summary",
    "toml",
]

_ROLE = re.compile(r":[a-z]+:`~?\.*([\w.]+)`")
_LITERAL = re.compile(r"``(.+?)``|`(.+?)`")
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Setting:
    """One setting of a part.

    Attributes
    ----------
    name : str
        Its key, without the section.
    default : str or None
        Its value where nobody sets it, as TOML; ``None``: it must be set; empty: it has none.
    allowed : str
        The values it may have.
    meaning : str
        What it does.
    searched : str
        The values that ``fedknow search`` tries; empty: it does not search it.
    """

    name: str
    default: str | None
    allowed: str = ""
    meaning: str = ""
    searched: str = ""


@dataclass(frozen=True)
class Description:
    """A part of an experiment.

    Attributes
    ----------
    summary : str
        What it is, in a sentence.
    facts : mapping
        What there is to know of it, by heading.
    section : str
        The section of the configuration that its settings are in.
    settings : sequence of Setting
        Its own settings.
    text : str
        A file to be shown as it is.
    """

    summary: str
    facts: Mapping[str, str] = field(default_factory=dict)
    section: str = ""
    settings: Sequence[Setting] = ()
    text: str = ""


def summary(documented: object) -> str:
    """Return the first paragraph of an object's docstring, on one line."""
    return " ".join(
        (inspect.getdoc(documented) or "").partition("\n\n")[0].split()
    )


def plain_text(text: str, names: Mapping[str, str] | None = None) -> str:
    """Write a piece of a docstring as plain text in one paragraph.

    Parameters
    ----------
    text : str
        With roles and literals of reStructuredText.
    names : mapping, optional
        What a reader knows classes by.

    Examples
    --------
    >>> text = "What ``exchange`` says, as :class:`~fedknow.client.learners.ewc.Ewc`."
    >>> plain_text(text, {"Ewc": "ewc"})
    'What exchange says, as ewc.'
    """

    def name_of(match: re.Match[str]) -> str:
        short = match[1].rpartition(".")[2]
        return (names or {}).get(short, short)

    without_roles = _ROLE.sub(name_of, text)
    without_marks = _LITERAL.sub(
        lambda match: match[1] or match[2], without_roles
    )
    return " ".join(without_marks.split())


def documented_parameters(function: object) -> dict[str, str]:
    """Read the meanings of parameters from a docstring's NumPy section."""
    documentation = inspect.getdoc(function) or ""
    # Up to the next heading with its underline, or the end.
    section = re.search(
        r"^Parameters\n-+\n(.*?)(?:\n\n\w[\w ]*\n-+\n|\Z)",
        documentation,
        re.S | re.M,
    )
    meanings: dict[str, str] = {}
    if section is None:
        return meanings
    # An entry begins at the margin, and its meaning is indented.
    for entry in re.split(r"^(?=\S)", section[1], flags=re.M)[1:]:
        heading, _, meaning = entry.partition("\n")
        for name in heading.partition(":")[0].split(","):
            meanings[name.strip()] = plain_text(meaning)
    return meanings


def allowed_values(setting: FieldInfo) -> str:
    """Say which values a setting may have, from its type and its bounds.

    Examples
    --------
    >>> from pydantic import Field
    >>> allowed_values(FieldInfo.from_annotated_attribute(int, Field(1, ge=1)))
    'a whole number, at least 1'
    """
    kind = setting.annotation
    if get_origin(kind) is Literal:
        return " or ".join(toml(value) for value in get_args(kind))
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
    }
    parts = [
        words[kind] if isinstance(kind, type) and kind in words else str(kind)
    ]
    for bound in setting.metadata:
        parts += [
            f"{word} {getattr(bound, key):g}"
            for key, word in _BOUNDS.items()
            if hasattr(bound, key)
        ]
    return ", ".join(parts)


def toml(value: object) -> str:
    """Write a setting's value as TOML has it; empty for ``None``."""
    if value is None:
        return ""
    # Before text and numbers: Python writes True where TOML has true.
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
