"""The ledger of traffic between the server and its clients, by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedknow.protocols.messages import (
    EXTRA,
    Arrays,
    Mean,
    Message,
    Record,
    nbytes,
)
from fedknow.protocols.wire.codec import Encoding, encode
from fedknow.server.grids.wave import WaveOptions

__all__ = ["Traffic", "record_bytes"]

Counts = dict[str, dict[str, int]]


class Traffic:
    """Bytes ``down`` and ``up``, and ``messages``, by kind.

    Down is to clients, up is from them. A message's ``extra`` record is counted apart, under
    ``KIND.extra``.
    """

    def __init__(self) -> None:
        self._counts: Counts = {}

    def counts(self) -> Counts:
        """Return a copy of all counts so far.

        Returns
        -------
        dict of str to dict
            By kind ``down``, ``up`` and ``messages``.
        """
        # A copy, as an event keeps the counts of its moment.
        return {kind: dict(count) for kind, count in self._counts.items()}

    def restore(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Go back to earlier counts, those of a checkpoint."""
        self._counts = {kind: dict(count) for kind, count in counts.items()}

    def count_requests(
        self, work: Sequence[Message], options: WaveOptions
    ) -> None:
        """Count the messages of a wave to clients."""
        # Messages of a wave share records. Each is weighed once, as encoding takes long.
        sizes: dict[int, int] = {}
        for message in work:
            kind = options.label or message.kind
            self._entry(kind)
            for name, record in message.content.items():
                if id(record) not in sizes:
                    sizes[id(record)] = record_bytes(record, options.is_sparse)
                self._book(kind, "down", name, sizes[id(record)])
            self._entry(kind)["messages"] += 1

    def count_answer(self, reply: Message, options: WaveOptions) -> None:
        """Count a message from a client."""
        kind = options.label or reply.kind
        self._entry(kind)
        for name, record in reply.content.items():
            size = record_bytes(record, options.is_sparse)
            if name not in options.record_labels:
                self._book(kind, "up", name, size)
            # No entry appears for a record that holds nothing.
            elif size:
                self._entry(options.record_labels[name])["up"] += size

    def _book(self, kind: str, direction: str, name: str, size: int) -> None:
        is_extra = name == EXTRA
        count = self._entry(f"{kind}.{EXTRA}" if is_extra else kind)
        count[direction] += size
        # An extra record has a kind of its own, whose messages nobody else counts.
        count["messages"] += is_extra

    def _entry(self, kind: str) -> dict[str, int]:
        return self._counts.setdefault(kind, {"down": 0, "up": 0, "messages": 0})


def record_bytes(record: Record, is_sparse: bool) -> int:
    """Return the bytes of a record on its way."""
    # A mean stands for the arrays of each client, which are equally large.
    if isinstance(record, Mean):
        return record.bytes
    if is_sparse and isinstance(record, Arrays):
        return sum(
            encode(entry, array, Encoding.SPARSE)[0].length
            for entry, array in record.items()
        )
    return nbytes({"": record})
