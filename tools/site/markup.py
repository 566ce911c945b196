"""Small pieces of Markdown, made of docstrings and values."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress, pairwise

__all__ = [
    "attribute_texts",
    "cell",
    "code",
    "listed",
    "literal",
    "prose",
    "section",
    "table",
]

_MODULE = re.compile(r":mod:`~?([\w.]+)`")
_ROLE = re.compile(r":(?!mod)[a-z]+:`~?\.*([\w.]+)`")


def prose(text: str) -> str:
    """Write a docstring's text as Markdown; marks of code stay code.

    Examples
    --------
    >>> prose("See :class:`~fedknow.Learner` and ``ai-*``.")
    'See `Learner` and `ai-*`.'
    """
    without_roles = _ROLE.sub(
        lambda match: f"`{match[1].rpartition('.')[2]}`", text
    )
    return _MODULE.sub(r"`\1`", without_roles).replace("``", "`")


def code(text: str) -> str:
    """Write a value as code; nothing for no value."""
    return f"`{text}`" if text else ""


def literal(text: str) -> str:
    """Write text so that none of its characters is a mark, but for code.

    Examples
    --------
    >>> literal("`a_*` and a_*")
    '`a_*` and a\\\\_\\\\*'
    """
    pieces = re.split(r"(`[^`]*`)", text)
    pieces[::2] = [re.sub(r"([*_])", r"\\\1", piece) for piece in pieces[::2]]
    pieces[::2] = [piece.replace("<", "&lt;") for piece in pieces[::2]]
    return "".join(pieces)


def cell(text: str) -> str:
    """Write text as one cell of a table.

    Examples
    --------
    >>> cell("one | two\\nlines of <b>")
    'one \\\\| two lines of &lt;b>'
    """
    return literal(" ".join(text.split())).replace("|", r"\|")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a table; a column that is empty in all rows is left out."""
    lines = list(rows)
    is_shown = [any(column) for column in zip(*lines, strict=True)]
    shown = [list(compress(line, is_shown)) for line in [heads, *lines]]
    text = [_row(line) for line in shown]
    text.insert(1, _row(["---"] * len(shown[0])))
    return "\n".join(text) + "\n"


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(map(cell, texts))} |"


def listed(pairs: Mapping[str, str]) -> str:
    """Make a list of headings and texts."""
    return "".join(
        f"- **{name}**: {literal(text)}\n" for name, text in pairs.items()
    )


def section(level: int, title: str, *blocks: str) -> str:
    """Make a section of a heading and blocks of text."""
    parts = [
        f"{'#' * level} {title}",
        *(block.strip("\n") for block in blocks if block),
    ]
    return "\n\n".join(parts) + "\n\n"


def attribute_texts(kind: type) -> dict[str, str]:
    """Read the texts that stand below the attributes of a class.

    Python does not keep these strings, so they are read from the source.

    Examples
    --------
    >>> from fedknow.protocols.config.sections import TrainConfig
    >>> attribute_texts(TrainConfig)["rounds"]
    'Rounds of each task.'
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    texts: dict[str, str] = {}
    for statement, following in pairwise(body):
        if not isinstance(statement, ast.AnnAssign):
            continue
        if isinstance(following, ast.Expr) and isinstance(
            following.value, ast.Constant
        ):
            name = ast.unparse(statement.target)
            texts[name] = inspect.cleandoc(str(following.value.value))
    return texts
