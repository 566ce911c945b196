"""What a plot is, and how it becomes a PNG file or part of a page."""

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
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b4c9a")
"""Okabe and Ito's palette: told apart by colour-blind readers too."""
GREY = "#b4b9bf"
DASHES: Sequence[Any] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
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
    """Size of a plot, inches; at 4.4 wide its letters are 10 pixels high on the smallest screen."""

    width: float = 4.4
    height: float = 3.2
    is_wide: bool = False


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
            about = {"Software": None}  # the same run gives the same file
            figure.savefig(
                buffer, format="png", dpi=200, facecolor="white", metadata=about
            )
        return buffer.getvalue()

    def svg(self) -> str:
        """Draw an ``<svg>`` element with a name, in the page's colours, without inline styles."""
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
            figure = Figure(
                figsize=(self.shape.width, self.shape.height), layout="constrained"
            )
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
    """A plot of whatever has the numbers for it.

    Attributes
    ----------
    name, title, caption : str
        As of :class:`Plot`.
    draw : callable
        Given the figure and the source, draws.
    has_data : callable
        Whether the source has the numbers.
    note : callable
        A sentence about this source, put after the caption.
    shape : callable
        The size for this source.
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


# --- what several plots draw with -------------------------------------------------------------


def axes_with(figure: Figure, x: str, y: str, is_counted: bool = True) -> Axes:
    """Add axes with labels; ``is_counted``: x has whole numbers only, such as tasks or rounds."""
    axes: Axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if is_counted:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return axes


def series_style(index: int) -> dict[str, Any]:
    """Give a colour, a dash and a marker that no other of the first 28 series has together."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5,
    }


def wrapped(label: str, width: int = 30) -> str:
    """Break the name of a method into lines that leave room for the plot beside it."""
    return "\n".join(textwrap.wrap(label, width, break_long_words=False))


def legend_rows(labels: Sequence[str]) -> int:
    """Count the rows of names that go below a plot of the usual width."""
    columns = max(1, 46 // (max(map(len, labels), default=1) + 6))
    return math.ceil(len(labels) / columns)


def legend_below(figure: Figure, axes: Axes, is_reversed: bool = False) -> None:
    """Put the names of series below the plot, in as few rows as go in."""
    handles, labels = axes.get_legend_handles_labels()
    if is_reversed:
        handles, labels = handles[::-1], labels[::-1]
    columns = math.ceil(len(labels) / max(1, legend_rows(labels)))
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, columns))


# --- SVG for a page ---------------------------------------------------------------------------


def _for_page(text: str, plot: Plot) -> str:
    """Rewrite matplotlib's file as an element that a strict content policy lets through."""
    root = ElementTree.fromstring(text)
    _drop(root, f"{SVG}metadata")
    for parent in root.iter(f"{SVG}defs"):
        _drop(parent, f"{SVG}style")
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            key.removeprefix(XLINK): _own(key.removeprefix(XLINK), value, plot.name)
            for key, value in _attributes(element.attrib).items()
        }
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    title, description = f"{plot.name}-title", f"{plot.name}-about"
    # The two that matplotlib's own style element set for everything: elements inherit them.
    root.attrib |= {"stroke-linejoin": "round", "stroke-linecap": "butt", "role": "img"}
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
    """Give inline styles as attributes, which need no permission; the font is the page's."""
    found = {key: value for key, value in attributes.items() if key != "style"}
    for declaration in filter(None, attributes.get("style", "").split(";")):
        key, _, value = declaration.partition(":")
        if key.strip() != "font-family":
            found[key.strip()] = value.strip()
    return found


def _own(key: str, value: str, name: str) -> str:
    """Keep ids apart from those of other plots, and take the page's colours."""
    if key == "id":
        return f"{name}-{value}"
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    if key == "href":
        return re.sub(r"^#", f"#{name}-", value)
    return _SERIES.get(value, value)


_SERIES = {
    colour: f"var(--series-{place}, {colour})" for place, colour in enumerate(COLOURS)
}
_SERIES |= {GREY: f"var(--series-grey, {GREY})", INK: "currentColor"}
