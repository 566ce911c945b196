"""Critical-difference plot: mean ranks of methods over streams."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedknow.server.reports.plots import INK, Plot, Shape, series_style
from fedknow.server.reports.statistics import Ranks

__all__ = ["draw_ranks", "rank_plot"]

STEP = 0.32
"""Height of a method's line, inches."""


def rank_plot(ranks: Ranks, measure: str) -> Plot:
    """Plot mean ranks, and what the critical difference does not part.

    Parameters
    ----------
    ranks : Ranks
        The methods.
    measure : str
        What they were ranked by, for the caption.
    """
    lines = len(ranks.names) + len(ranks.alike())
    return Plot(
        "ranks",
        "Mean ranks over streams",
        f"Mean rank by {measure} over {ranks.streams} streams; 1 is the best. Bars join methods "
        "that Nemenyi's critical difference does not part at 5 %.",
        lambda figure: _draw(figure, ranks),
        Shape(width=6.4, height=1.1 + STEP * lines),
    )


def _draw(figure: Figure, ranks: Ranks) -> None:
    draw_ranks(figure, ranks)


def draw_ranks(figure: Figure, ranks: Ranks) -> Axes:
    """Draw a dot for each method, and bars over those that are alike."""
    axes: Axes = figure.add_subplot()
    count = len(ranks.names)
    for row, mean in enumerate(ranks.means):
        style = series_style(row) | {"linestyle": ""}
        axes.plot([mean], [row], **style)
        axes.plot([1, mean], [row, row], color=INK, lw=0.6, alpha=0.4)
    bars = ranks.alike()
    for place, (begin, end) in enumerate(bars):
        ends = [ranks.means[begin], ranks.means[end]]
        height = -1 - 0.7 * (len(bars) - 1 - place)
        axes.plot(ends, [height, height], color=INK, lw=3, solid_capstyle="butt")
    names = [
        f"{name} ({mean:.2f})"
        for name, mean in zip(ranks.names, ranks.means, strict=True)
    ]
    axes.set_yticks(range(count), names)
    axes.set_ylim(count - 0.5, -1.6 - 0.7 * max(0, len(bars) - 1))
    axes.set_xlim(0.9, count + 0.1)
    axes.set_xticks(range(1, count + 1))
    axes.set_xlabel(f"mean rank; critical difference {ranks.critical:.2f}")
    axes.grid(False, axis="y")
    return axes
