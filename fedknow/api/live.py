"""Curves that grow in a notebook while a run goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedknow.api.callbacks import Callback
from fedknow.protocols.config import ConfigError
from fedknow.server.run.events import Evaluated, RoundEnded, RunStarted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LivePlot"]


class LivePlot(Callback):
    """Show training loss and accuracy in a notebook as they come.

    Accuracies are there after each task, and within tasks where ``evaluation.every`` says so.

    Raises
    ------
    ConfigError
        If IPython is not running.

    Examples
    --------
    >>> import fedknow
    >>> fedknow.LivePlot()  # in a notebook: fedknow.simulate(callbacks=[fedknow.LivePlot()])
    Traceback (most recent call last):
    fedknow.protocols.config.errors.ConfigError: LivePlot draws in a notebook; ...
    """

    def __init__(self) -> None:
        try:
            from IPython import get_ipython  # only notebooks have it
        except ModuleNotFoundError:
            shell = None
        else:
            shell = get_ipython()
        if shell is None:
            raise ConfigError(
                "LivePlot draws in a notebook; elsewhere follow a run with `fedknow watch`"
            )
        self._display: Any = None
        self._reset()

    def _reset(self) -> None:
        self.losses: list[float] = []
        self.scored_at: list[int] = []
        self.accuracy: list[float] = []
        self.global_accuracy: list[float] = []
        self.task_starts: list[int] = []

    def on_start(self, event: RunStarted) -> None:
        """Open an empty plot."""
        from IPython.display import display

        self._reset()
        # With an id, so that later plots take this one's place in the cell.
        self._display = display(self.figure(), display_id=True)  # type: ignore[no-untyped-call]

    def on_round_end(self, event: RoundEnded) -> None:
        """Add the round's training loss."""
        if event.round == 1:
            self.task_starts.append(event.server_round)
        self.losses.append(event.loss)
        self._display.update(self.figure())

    def on_evaluation_end(self, event: Evaluated) -> None:
        """Add the accuracies of an evaluation."""
        # Counted in rounds seen here, as an evaluation does not say the server's round.
        self.scored_at.append(len(self.losses))
        self.accuracy.append(event.accuracy)
        self.global_accuracy.append(event.accuracy_global)
        self._display.update(self.figure())

    def figure(self) -> Figure:
        """Draw what is known so far."""
        from fedknow.server.reports.plots import NotebookFigure

        figure = NotebookFigure(figsize=(9, 3), layout="constrained")
        losses, scores = figure.subplots(1, 2)
        losses.plot(range(1, len(self.losses) + 1), self.losses, marker=".")
        losses.set(xlabel="round", ylabel="training loss")
        for values, label in (
            (self.accuracy, "clients' models"),
            (self.global_accuracy, "global model"),
        ):
            scores.plot(self.scored_at, _percent(values), marker="o", label=label)
        scores.set(xlabel="round", ylabel="average accuracy (%)", ylim=(0, 102))
        scores.legend(loc="lower left")
        # The first task begins at the axis, where no line is needed.
        for start in self.task_starts[1:]:
            losses.axvline(start - 0.5, linestyle=":", color="grey")
            scores.axvline(start - 0.5, linestyle=":", color="grey")
        return figure


def _percent(values: Sequence[float]) -> list[float]:
    return [math.nan if math.isnan(value) else 100 * value for value in values]
