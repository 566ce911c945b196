"""A strategy of your own: an ordinary Flower strategy.

Run it with ``python examples/own_strategy.py``, or from the command line, in this folder::

    fedknow simulate digits --set strategy=own_strategy:ShortUpdates --set strategy.slack=1.5
"""

import sys
from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

import fedknow


class ShortUpdates(FedAvg):
    """Average updates, each at most ``slack`` times the median length."""

    def __init__(self, slack: float = 1.0) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.slack = slack
        self.initial: dict[str, np.ndarray] = {}

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[Message]:
        """Remember what the clients start from."""
        self.initial = {name: array.numpy() for name, array in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Shorten long updates, then let FedAvg average."""
        usable = [r for r in replies if not r.has_error()]
        records = [r.content.array_records[self.arrayrecord_key] for r in usable]
        norms = [self.norm(record) for record in records]
        limit = self.slack * np.median(norms) if norms else 0.0
        for record, norm in zip(records, norms, strict=True):
            factor = np.float32(min(1.0, limit / norm) if norm else 1.0)
            for name, w in self.initial.items():
                record[name] = Array(w + factor * (record[name].numpy() - w))
        return super().aggregate_train(server_round, usable)

    def norm(self, record: ArrayRecord) -> float:
        """Return the L2 norm of a client update."""
        moved = [record[name].numpy() - w for name, w in self.initial.items()]
        return float(np.sqrt(sum(np.sum(change**2) for change in moved)))


if __name__ == "__main__":
    out = sys.argv[1] if len(sys.argv) > 1 else "runs/own-strategy"
    print(fedknow.simulate("digits", strategy=ShortUpdates(slack=1.5), out=out))
