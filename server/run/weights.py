"""A bound on the weights that clients give themselves.

A mean weighted by ``num-examples`` believes each client. Where the server does not know the
sizes of the clients' data, it bounds each weight by a multiple of the median of all.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from flwr.app import Message as FlowerMessage
from flwr.app import MetricRecord

from fedknow.protocols.messages import client_of
from fedknow.protocols.work import NUM_EXAMPLES

__all__ = ["bound_weights"]


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
    records: dict[int, MetricRecord] = {}
    for reply in replies:
        client = client_of(reply.metadata.src_node_id)
        for record in reply.content.metric_records.values():
            if NUM_EXAMPLES in record:
                records[client] = record
    if not records:
        return {}
    median = statistics.median_low(map(_weight, records.values()))
    bound = multiple * median
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
