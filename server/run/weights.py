"""A bound on the weights that clients give themselves.

A mean weighted by ``num-examples`` believes each client. Where the server does not know the
sizes of the clients' data, it bounds each weight by a multiple of the median of all.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from flwr.app import Message as FlowerMessage
from flwr.app import MetricRecord

from fedknow.protocols.messages import TRAIN, client_of
from fedknow.protocols.work import NUM_EXAMPLES

__all__ = ["WeightBounds", "bound_weights"]


def bound_weights(
    replies: Sequence[FlowerMessage], multiple: float
) -> dict[int, tuple[float, float]]:
    """Bound ``num-examples`` of a round's replies, in place.

    Parameters
    ----------
    replies : sequence of flwr.app.Message
        Good replies to training.
    multiple : float
        How many times the median a weight may be; of two clients, the lower counts.

    Returns
    -------
    dict of int to tuple of float
        By client, what it claimed and what counts in its place; only those changed.
    """
    records = _records(replies)
    if not records:
        return {}
    median = statistics.median_low(map(_weight, records.values()))
    return _bound(records, multiple * median)


class WeightBounds:
    """Bounds weights where answers come one by one.

    The median is that of all clients' latest claims. So it is known once a few have answered,
    and a strategy that gathers answers has them bounded again before it weighs them.

    Parameters
    ----------
    multiple : float
        How many times the median a weight may be.
    """

    def __init__(self, multiple: float) -> None:
        self._multiple = multiple
        self._claims: dict[int, float] = {}

    def bound(
        self, replies: Sequence[FlowerMessage]
    ) -> dict[int, tuple[float, float]]:
        """Bound ``num-examples`` of replies, in place; see :func:`bound_weights`."""
        records = _records(replies)
        for client, record in records.items():
            self._claims[client] = _weight(record)
        if not records:
            return {}
        median = statistics.median_low(self._claims.values())
        return _bound(records, self._multiple * median)


def _records(replies: Sequence[FlowerMessage]) -> dict[int, MetricRecord]:
    """Find the record with the weight of each client's answer to training."""
    records: dict[int, MetricRecord] = {}
    for reply in replies:
        if reply.metadata.message_type != TRAIN or reply.has_error():
            continue
        client = client_of(reply.metadata.src_node_id)
        for record in reply.content.metric_records.values():
            if NUM_EXAMPLES in record:
                records[client] = record
    return records


def _bound(
    records: Mapping[int, MetricRecord], bound: float
) -> dict[int, tuple[float, float]]:
    changed: dict[int, tuple[float, float]] = {}
    for client, record in records.items():
        claimed = _weight(record)
        if claimed > bound:
            record[NUM_EXAMPLES] = type(claimed)(bound)
            changed[client] = claimed, _weight(record)
    return changed


def _weight(record: MetricRecord) -> int | float:
    value = record[NUM_EXAMPLES]
    # The inspector has refused anything else.
    assert isinstance(value, int | float)
    return value
