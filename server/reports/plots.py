"""Plots: their specifications, PNG files and elements of a page."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = [
    "COLOURS",
    "GREY",
    "INK",
    "NotebookFigure",
    "Plot",
    "PlotSpec",
    "Shape",
    "axes_with",
    "draw_plots",
    "legend_below",
    "legend_rows",
    "series_style",
    "wrapped",
]

Source = TypeVar("Source")

INK = "#1c2127"
"""Text and lines. On a page it becomes the page's own text colour: light and dark are followed."""
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#6b4c9a",
)
"""Okabe and Ito's palette: told apart by colour-blind readers too."""
GREY = "#b4b9bf"
DASHES: Sequence[Any] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (6, 2, 1, 2)),
)
MARKERS = "osD^vP*Xhd<>p"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the reader's own font, and it can be searched
    "svg.hashsalt": "fedknow",  # the same run gives the same file
    "font.size": 10,
    "legend.fontsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True)
class Shape:
    """Size of a plot in inches.

    At a width of 4.4 its letters are 10 pixels high on the smallest screen.
    """

    width: float = 4.4
    height: float = 3.2
    is_wide: bool = False


class NotebookFigure(Figure):
    """A figure of matplotlib that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, facecolor="white")
        return buffer.getvalue()


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes
    ----------
    name : str
        Its file's name without ending, unlike that of any other plot of the page.
    title, caption : str
        Its name, and sentences that say what is seen.
    draw : callable
        Draws it on a figure of matplotlib.
    shape : Shape
        Its size, and whether it takes the whole width of a page.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Figure], None]
    shape: Shape = Shape()

    @property
    def is_wide(self) -> bool:
        """Whether it takes the whole width of a page."""
        return self.shape.is_wide

    def png(self) -> bytes:
        """Draw a PNG file: white background, 200 dots an inch."""
        buffer = io.BytesIO()
        with self._drawn() as figure:
            figure.suptitle(self.title)
            # Without matplotlib's version: the same run gives the same file.
            metadata = {"Software": None}
            figure.savefig(
                buffer,
                format="png",
                dpi=200,
                facecolor="white",
                metadata=metadata,
            )
        return buffer.getvalue()

    def svg(self) -> str:
        """Draw an ``<svg>`` element with a name, in the page's colours.

        It has no inline styles, which the page's content policy forbids.
        """
        buffer = io.StringIO()
        with self._drawn() as figure:
            figure.savefig(buffer, format="svg", transparent=True)
        return _for_page(buffer.getvalue(), self)

    def figure(self) -> Figure:
        """Draw it as a figure of matplotlib, which a notebook shows."""
        with self._drawn() as figure:
            figure.suptitle(self.title)
            return figure

    @contextmanager
    def _drawn(self) -> Iterator[Figure]:
        with matplotlib.rc_context(STYLE):
            size = (self.shape.width, self.shape.height)
            # Not through pyplot, which keeps every figure until it is closed.
            figure = NotebookFigure(figsize=size, layout="constrained")
            self.draw(figure)
            yield figure


def _always(source: object) -> bool:
    return True


def _nothing(source: object) -> str:
    return ""


def _usual(source: object) -> Shape:
    return Shape()


@dataclass(frozen=True)
class PlotSpec(Generic[Source]):
    """A plot of any source that has the numbers for it.

    Attributes
    ----------
    name, title, caption : str
        As of :class:`Plot`.
    draw : callable
        Draws a source on a figure.
    has_data : callable
        Tells whether a source has the numbers.
    note : callable
        Writes a sentence about a source, which stands after the caption.
    shape : callable
        Gives the size for a source.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Figure, Source], object]
    has_data: Callable[[Source], bool] = _always
    note: Callable[[Source], str] = _nothing
    shape: Callable[[Source], Shape] = _usual

    def plot(self, source: Source, prefix: str = "") -> Plot:
        """Give the plot of a source."""
        caption = " ".join(filter(None, [self.caption, self.note(source)]))

        def draw(figure: Figure) -> None:
            self.draw(figure, source)

        return Plot(
            f"{prefix}{self.name}", self.title, caption, draw, self.shape(source)
        )


def draw_plots(
    specs: Sequence[PlotSpec[Source]], source: Source, prefix: str = ""
) -> list[Plot]:
    """Give the plots for which a source has the numbers."""
    return [spec.plot(source, prefix) for spec in specs if spec.has_data(source)]


# --- parts of several plots -----------------------------------------------------------------


def axes_with(figure: Figure, x: str, y: str, is_counted: bool = True) -> Axes:
    """Add axes with labels.

    Parameters
    ----------
    figure : Figure
        Gets the axes.
    x, y : str
        Labels.
    is_counted : bool
        Whether x has whole numbers only, such as tasks or rounds.
    """
    axes: Axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if is_counted:
        # There is no task or round two and a half.
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return axes


def series_style(index: int) -> dict[str, Any]:
    """Give a colour, a dash and a marker, unlike those of 27 other series."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5,
    }


def wrapped(label: str, width: int = 30) -> str:
    """Break a method's name into lines that leave room for the plot."""
    return "\n".join(textwrap.wrap(label, width, break_long_words=False))


def legend_rows(labels: Sequence[str]) -> int:
    """Count the rows of names that go below a plot of the usual width."""
    longest = max(map(len, labels), default=1)
    # About 46 letters fit in a row, and a line's sample takes the place of six.
    columns = max(1, 46 // (longest + 6))
    return math.ceil(len(labels) / columns)


def legend_below(figure: Figure, axes: Axes, is_reversed: bool = False) -> None:
    """Put the names of series below the plot, in as few rows as go in."""
    handles, labels = axes.get_legend_handles_labels()
    if is_reversed:
        handles, labels = handles[::-1], labels[::-1]
    columns = math.ceil(len(labels) / max(1, legend_rows(labels)))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=max(1, columns)
    )


# --- SVG for a page -------------------------------------------------------------------------


def _for_page(text: str, plot: Plot) -> str:
    """Rewrite matplotlib's file as an element that the page's policy allows."""
    root = ElementTree.fromstring(text)
    _drop(root, f"{SVG}metadata")
    for parent in root.iter(f"{SVG}defs"):
        # The page's policy allows no inline style sheets.
        _drop(parent, f"{SVG}style")
    for element in root.iter():
        # An <svg> within HTML needs no name spaces.
        element.tag = element.tag.rpartition("}")[2]
        attributes = {}
        for name, value in _attributes(element.attrib).items():
            key = name.removeprefix(XLINK)
            attributes[key] = _adapted(key, value, plot.name)
        element.attrib = attributes
    # The page scales the plot: only its viewBox counts.
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    title = f"{plot.name}-title"
    description = f"{plot.name}-about"
    # The two that matplotlib's own style element set for everything: elements inherit them.
    root.attrib |= {
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
        "role": "img",
    }
    root.attrib |= {"aria-labelledby": title, "aria-describedby": description}
    names = [("title", title, plot.title), ("desc", description, plot.caption)]
    for place, (tag, name, words) in enumerate(names):
        element = ElementTree.Element(tag, {"id": name})
        element.text = words
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _drop(parent: ElementTree.Element, tag: str) -> None:
    for child in parent.findall(tag):
        parent.remove(child)


def _attributes(attributes: Mapping[str, str]) -> dict[str, str]:
    """Give inline styles as attributes, which the page's policy allows.

    The font is left out, as it is the page's.
    """
    result = {key: value for key, value in attributes.items() if key != "style"}
    for declaration in filter(None, attributes.get("style", "").split(";")):
        key, _, value = declaration.partition(":")
        # The page's own font, as the reader may lack matplotlib's.
        if key.strip() != "font-family":
            result[key.strip()] = value.strip()
    return result


def _adapted(key: str, value: str, name: str) -> str:
    """Prefix ids with the plot's name, and take the page's colours."""
    # Ids must be unique on the whole page, and every plot of matplotlib uses the same.
    if key == "id":
        return f"{name}-{value}"
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    if key == "href":
        return re.sub(r"^#", f"#{name}-", value)
    return _SERIES.get(value, value)


_SERIES = {
    colour: f"var(--series-{place}, {colour})"
    for place, colour in enumerate(COLOURS)
}
_SERIES |= {GREY: f"var(--series-grey, {GREY})", INK: "currentColor"}
