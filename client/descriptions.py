"""Descriptions of learners, models and data sets, from their code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic.fields import FieldInfo

from fedknow.client.data.datasets import NAMES, dataset_facts, list_datasets
from fedknow.client.learners import LEARNERS, Learner, learner_class
from fedknow.client.models import model_factory
from fedknow.protocols.config import ConfigError, closest
from fedknow.protocols.descriptions import (
    Description,
    Setting,
    allowed_values,
    documented_parameters,
    plain_text,
    toml,
)
from fedknow.protocols.installed import find_installed, list_installed

__all__ = ["describe_dataset", "describe_learner", "describe_model"]

_PARTS = re.compile(r"\b(Keeps|Sends|Gets|Needs|Valid):\s")
"""What the docstring of each learner says of it."""


def describe_learner(name: str) -> Description:
    """Describe a learner: what it keeps, sends and needs, and its settings.

    Raises
    ------
    ConfigError
        If there is none of this name.
    """
    kind = learner_class(name)
    summary, parts = _read_docstring(kind)
    facts = parts | {"Scenarios": " and ".join(kind.scenarios)}
    facts["Strategy"] = (
        kind.strategy or "any that is not one half of a method; by default fedavg"
    )
    facts["Source"] = (
        f"python -m pydoc {kind.__module__}, with equations and references"
    )
    settings = []
    for key, field in kind.Settings.model_fields.items():
        searched = ", ".join(map(toml, kind.search.get(key, ())))
        meaning = plain_text(field.description or "")
        default = (
            None
            if field.is_required()
            else toml(field.get_default(call_default_factory=True))
        )
        settings.append(
            Setting(key, default, allowed_values(field), meaning, searched)
        )
    return Description(summary, facts, "learner", settings)


def _read_docstring(kind: type[Learner]) -> tuple[str, dict[str, str]]:
    """Read a learner's docstring: its first line, and its parts by name."""
    # Reversed, so that of two names of a class the first one stays.
    names = {each.__name__: name for name, each in reversed(LEARNERS.items())}
    headline, _, body_text = (inspect.getdoc(kind) or "").partition("\n\n")
    parts: dict[str, str] = {}
    for paragraph in body_text.split("\n\n"):
        # A split by a group keeps the headings: heading and text come in turn.
        _, *pieces = _PARTS.split(paragraph)
        for heading, text in zip(pieces[::2], pieces[1::2], strict=True):
            parts[heading] = plain_text(text, names)
    return plain_text(headline, names), parts


def describe_model(name: str) -> Description:
    """Describe a model: what it is, and its settings.

    Raises
    ------
    ConfigError
        If there is none of this name.
    """
    build = model_factory(name)
    headline, _, body_text = (inspect.getdoc(build) or "").partition("\n\n")
    body = body_text.partition("Parameters\n---")[0]
    facts = {"What": plain_text(body)} if body.strip() else {}
    return Description(
        plain_text(headline),
        facts,
        "model",
        _arguments(build, ("shape", "sample", "classes")),
    )


def _arguments(
    build: Callable[..., Any], skipped: tuple[str, ...]
) -> list[Setting]:
    meanings = documented_parameters(build)
    # With extras, as bounds and descriptions stand in Annotated.
    kinds = get_type_hints(build, include_extras=True)
    settings = []
    for key, parameter in inspect.signature(build).parameters.items():
        if key in skipped:
            continue
        default = (
            None
            if parameter.default is parameter.empty
            else toml(parameter.default)
        )
        field = FieldInfo.from_annotation(kinds.get(key, Any))
        meaning = meanings.get(key) or field.description or ""
        allowed = allowed_values(field) if key in kinds else ""
        settings.append(Setting(key, default, allowed, meaning))
    return settings


def describe_dataset(name: str) -> Description:
    """Describe a data set: its images, and where its files must lie.

    Raises
    ------
    ConfigError
        If there is none of this name.
    """
    summaries: Mapping[str, str] = list_datasets()
    if name in summaries:
        return Description(summaries[name], dataset_facts(name))
    part = find_installed("data", name, "data.name")
    if part is None:
        raise ConfigError(
            f"data set {name!r}: there is none of this name{closest(name, summaries)}; "
            f"known: {', '.join(summaries)}"
        )
    headline, _, body_text = (inspect.getdoc(part) or "").partition("\n\n")
    facts = {"What": plain_text(body_text)} if body_text.strip() else {}
    facts["Source"] = list_installed("data", NAMES)[name]
    return Description(plain_text(headline), facts)
