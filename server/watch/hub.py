"""All messages to the page, numbered, for every browser that listens."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable
from pathlib import Path

from fedknow.server.watch.view import Message, RunView, encoded

__all__ = ["Follower", "Hub"]

POLL_SECONDS = 0.5
FOLDER_PATTERNS = ("*/config.toml", "*/*/config.toml")
"""Where the runs of a comparison lie, and those of an experiment of several comparisons."""


class Hub:
    """A list of messages that only grows, and those who wait for more.

    Attributes
    ----------
    session : str
        A name of this list; a browser that comes back with another one's number is sent
        everything again.
    """

    def __init__(self) -> None:
        self.session = secrets.token_hex(4)
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._is_over = False

    def add(self, messages: Iterable[Message]) -> None:
        """Append messages, and wake those who wait."""
        lines = [encoded(message) for message in messages]
        # Most looks find nothing, and nobody has to wake up for that.
        if not lines:
            return
        with self._changed:
            self._lines += lines
            self._changed.notify_all()

    def end(self, message: Message) -> None:
        """Append the last message."""
        self.add([message])
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def start_of(self, last_id: str) -> int:
        """Find the place after the message that a browser saw last.

        Parameters
        ----------
        last_id : str
            The header ``Last-Event-ID``; empty at a browser's first visit.
        """
        session, _, number = last_id.partition("-")
        # A page of an earlier process: its numbers mean other messages, so it gets all.
        if session != self.session or not number.isdecimal():
            return 0
        # A browser may claim any number.
        return min(int(number) + 1, len(self._lines))

    def wait(self, start: int, seconds: float) -> tuple[list[str], bool]:
        """Wait for messages from a place on.

        Returns
        -------
        tuple of list of str and bool
            The messages, none if none came in time; and whether these are the last ones.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._lines) > start or self._is_over, seconds
            )
            return self._lines[start:], self._is_over


class Follower(threading.Thread):
    """Looks at run folders every half second, and tells the hub of news.

    It only reads: nothing in the folders changes, and no lock is taken.

    Parameters
    ----------
    folder : Path
        A run folder, or a folder of several. It need not exist yet.
    hub : Hub
        What is told.
    """

    def __init__(self, folder: Path, hub: Hub) -> None:
        super().__init__(name="fedknow-watch", daemon=True)
        self._folder = folder
        self._hub = hub
        self._views: dict[Path, RunView] = {}
        self._fault = ""
        self._ended = threading.Event()

    def run(self) -> None:
        """Look until :meth:`end`."""
        while not self._ended.wait(POLL_SECONDS):
            self.look()

    def end(self) -> None:
        """Look once more, and stop."""
        self._ended.set()
        # The last look must not meet one that is under way.
        if self.is_alive():
            self.join()
        self.look()

    def look(self) -> None:
        """Tell the hub what is new."""
        try:
            messages = self._news()
            fault = ""
        except Exception as error:
            # A fault of one look, such as a folder that vanishes meanwhile, must not end the
            # page; the next look tries again.
            messages = []
            fault = f"{type(error).__name__}: {error}"
        if fault != self._fault:
            self._fault = fault
            messages.append({"type": "trouble", "reason": fault})
        self._hub.add(messages)

    def _news(self) -> list[Message]:
        messages: list[Message] = []
        for path in self._find_runs():
            if path not in self._views:
                name = path.relative_to(self._folder).as_posix()
                self._views[path] = RunView(path, name)
        for view in self._views.values():
            messages += view.poll()
        return messages

    def _find_runs(self) -> list[Path]:
        # A run itself, and not a folder of runs.
        if (self._folder / "config.toml").is_file():
            return [self._folder]
        files = []
        for pattern in FOLDER_PATTERNS:
            files += sorted(self._folder.glob(pattern))
        return [file.parent for file in files]
