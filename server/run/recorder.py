"""The only way out of an experiment's loop: its events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

from fedknow.server.run.events import Event, parse
from fedknow.server.run.folder import RunFolder

__all__ = ["Recorder", "Subscriber"]

Subscriber = Callable[[Event], None]


class Recorder:
    """Writes a run's events to its folder, and passes them on.

    Subscribers are given copies: whatever they do with an event, no number of the run changes.
    An exception of theirs ends the run.

    Parameters
    ----------
    folder : RunFolder
    subscribers : iterable of callable
        Called with each event, in this order.
    """

    def __init__(
        self, folder: RunFolder, subscribers: Iterable[Subscriber] = ()
    ) -> None:
        self._folder = folder
        self._subscribers = list(subscribers)

    def subscribe(self, callback: Subscriber) -> None:
        """Have a function called with each event from now on."""
        self._subscribers.append(callback)

    def record(self, event: Event) -> dict[str, Any]:
        """Write an event that happened now, then pass it on.

        Returns
        -------
        dict
            The line as it was written: plain values, ``None`` where a number is not finite.
        """
        line = self._folder.append(replace(event, time=time.time()).line())
        for callback in self._subscribers:
            # A copy each, as no subscriber may change what the next one or the run gets.
            callback(parse(deepcopy(line)))
        return line
