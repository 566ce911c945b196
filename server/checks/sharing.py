"""Checks of what clients share beside the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedknow.client.learners.frames.learner import Layout
from fedknow.protocols.messages import END_TASK, EXTRA, TRAIN, Arrays, Message
from fedknow.server.checks.arrays import check_layout
from fedknow.server.checks.faults import Fault, Unusable

__all__ = ["Sharing"]


class Sharing:
    """What a method says of the ``extra`` records of its clients.

    Parameters
    ----------
    layouts : mapping
        Names, dtypes and shapes, by the kind of the message.

    Attributes
    ----------
    check : callable, optional
        Raises ``ValueError`` for values that no client of the method would send.
    """

    def __init__(self, layouts: Mapping[str, Layout]) -> None:
        self._layouts = layouts
        self.check: Callable[[Arrays], None] | None = None

    def inspect(self, reply: Message) -> None:
        """Refuse an answer whose record is not as declared.

        Raises
        ------
        Unusable
            Naming what is wrong.
        """
        if reply.kind not in (TRAIN, END_TASK) or EXTRA not in reply.content:
            return
        record = reply.content[EXTRA]
        check_layout(record, self._layouts.get(reply.kind, {}))
        if self.check is None or not isinstance(record, Arrays) or not record:
            return
        try:
            self.check(record)
        except ValueError as error:
            raise Unusable(Fault.VALUES, EXTRA, f"{EXTRA}: {error}") from None
