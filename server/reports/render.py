"""Render sections as one HTML file that needs nothing from outside.

Its content policy lets nothing else in.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import count

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedknow.server.reports.blocks import Section, Table

__all__ = ["content_policy", "render", "render_cell"]


def render(title: str, sections: Sequence[Section], footer: str) -> str:
    """Render a page.

    Parameters
    ----------
    title : str
        Its heading.
    sections : sequence of Section
        What stands on it.
    footer : str
        Its last line.

    Returns
    -------
    str
        HTML with styles, script and plots in it.
    """
    style = _source("page.css")
    script = _source("page.js")
    # A template has no counter that outlives a macro's call.
    numbers = count(1)
    page = _environment().get_template("page.html")
    text = page.render(
        title=title,
        sections=sections,
        footer=footer,
        style=style,
        script=script,
        policy=content_policy([style], [script]),
        next_number=lambda: next(numbers),
    )
    # The engine drops a template's last line break.
    return text + "\n"


def render_cell(tables: Sequence[Table], title: str = "", path: str = "") -> str:
    """Render tables for a cell of a notebook.

    Parameters
    ----------
    tables : sequence of Table
    title, path : str
        What they are of, and where it lies; nothing without a title.
    """
    # Without a style: a notebook has one of its own for tables.
    cell = _environment().get_template("notebook.html")
    return cell.render(tables=tables, title=title, path=path)


def content_policy(styles: Iterable[str], scripts: Iterable[str]) -> str:
    """Write a content security policy that allows these texts alone.

    It allows no request at all.
    """
    rules = {
        # A report is opened from disk, where a script of somebody else could read files beside
        # it.
        "default-src": ["'none'"],
        "style-src": map(_digest, styles),
        "script-src": map(_digest, scripts),
        "img-src": ["data:"],  # the scale beside a matrix of colours
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }
    return "; ".join(
        f"{name} {' '.join(sources)}" for name, sources in rules.items()
    )


def _digest(text: str) -> str:
    # A digest and not a nonce, which a static file cannot renew.
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("fedknow.server.reports"),
        # Names and reasons come from users and clients, and may hold markup.
        autoescape=True,
        # A name that nobody passed is a mistake, and would be an empty text otherwise.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _source(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
