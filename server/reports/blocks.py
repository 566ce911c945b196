"""The parts of a page as data.

``templates/page.html`` says how each kind looks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from fedknow.server.reports.plots import Plot

__all__ = [
    "Block",
    "Bullets",
    "Cards",
    "Cell",
    "Facts",
    "Figures",
    "Folded",
    "Section",
    "Table",
    "Text",
]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and the number its column is sorted by."""

    text: str
    value: float = math.nan

    @property
    def has_value(self) -> bool:
        """Whether there is a number to sort by; otherwise the text is."""
        return not math.isnan(self.value)


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes
    ----------
    caption : str
        Its name, unlike that of any other table of the page.
    head : sequence of str
        A name for each column.
    rows : sequence of sequence of Cell or str
        A text alone is sorted as a text, numbers in it by their size.
    introduction : str
        Sentences that stand before it.
    prose : collection of int
        Columns of words, which are set to the left and wrapped.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    introduction: str = ""
    prose: Collection[int] = field(default=())

    def cells(self) -> list[list[Cell]]:
        """Give all rows as cells."""
        return [list(map(_as_cell, row)) for row in self.rows]

    def texts(self) -> list[list[str]]:
        """Give all rows as texts."""
        return [list(map(_text, row)) for row in self.rows]


def _as_cell(entry: Cell | str) -> Cell:
    return Cell(entry) if isinstance(entry, str) else entry


def _text(entry: Cell | str) -> str:
    return _as_cell(entry).text


@dataclass(frozen=True)
class Facts:
    """Short facts in one line, after the state of a run."""

    kind: ClassVar[str] = "facts"
    items: Sequence[str]
    status: str = ""


@dataclass(frozen=True)
class Cards:
    """Large numbers with a title each."""

    kind: ClassVar[str] = "cards"
    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Figures:
    """Plots in a grid."""

    kind: ClassVar[str] = "figures"
    plots: Sequence[Plot]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of lines, each with its kind, under a title of its own."""

    kind: ClassVar[str] = "bullets"
    items: Sequence[tuple[str, str]]
    title: str = ""


@dataclass(frozen=True)
class Folded:
    """A text as typed, which a click shows or hides."""

    kind: ClassVar[str] = "folded"
    title: str
    text: str
    is_open: bool = False


Block = Table | Facts | Cards | Figures | Text | Bullets | Folded


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; without a heading, its blocks alone."""

    heading: str
    blocks: Sequence[Block]
