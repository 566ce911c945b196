"""Sizes that clients claim, against what the server knows of them.

A client that claims more samples than it has gains weight in every average. Where the server
makes the clients' data itself it knows all sizes. Where clients have data of their own it holds
each to the size of a test set that it named at first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from fedknow.client.data.benchmark import Benchmark
from fedknow.client.data.stream import TaskStream
from fedknow.protocols.work import NUM_EXAMPLES
from fedknow.server.checks.faults import Fault, Unusable

__all__ = ["Claims"]

Sizes = Sequence[Sequence[int]]


class Claims:
    """Checks the numbers of samples that clients claim.

    Parameters
    ----------
    train, test : sequence of sequence of int, optional
        Training and test samples, by client and task, where the server knows them.
    are_known : bool, optional
        Whether the data are the server's to give out; by default, where sizes are given.

    Attributes
    ----------
    are_known : bool
        See the parameter. Elsewhere clients alone know what they have.

    Examples
    --------
    >>> claims = Claims([[5, 7]], [[2, 2]])
    >>> claims.check_training(0, 7)
    >>> claims.check_training(0, 10**12)
    Traceback (most recent call last):
    fedknow.server.checks.faults.Unusable: num-examples is 1000000000000, but ... at most 7
    """

    def __init__(
        self,
        train: Sizes | None = None,
        test: Sizes | None = None,
        are_known: bool | None = None,
    ) -> None:
        self.are_known = train is not None if are_known is None else are_known
        self._train = train
        self._test = test
        self._claimed: dict[tuple[int, int], int] = {}

    @classmethod
    def read(
        cls, partition: Mapping[str, Any], stream: TaskStream | None = None
    ) -> Self:
        """Take the sizes from the clients' data, or from a partition's summary.

        The summary is empty where clients have data of their own.
        """
        # The summary of many clients leaves most of them out.
        if isinstance(stream, Benchmark):
            shares = stream.partition.tasks
            return cls(shares.sizes("train"), shares.sizes("test"))
        if "clients" not in partition:
            return cls(are_known=bool(partition))
        clients = partition["clients"]
        return cls(_sizes(clients, "train"), _sizes(clients, "test"))

    def check_training(self, client: int, examples: float) -> None:
        """Refuse more training samples than any task of the client has.

        Raises
        ------
        Unusable
            Naming both numbers.
        """
        if self._train is not None:
            _check_bound(examples, max(self._train[client]))

    def check_evaluation(self, client: int, examples: float) -> None:
        """Refuse more test samples than all tasks of the client have.

        Raises
        ------
        Unusable
            Naming both numbers.
        """
        if self._test is not None:
            _check_bound(examples, sum(self._test[client]))

    def check_totals(self, client: int, totals: Sequence[int]) -> None:
        """Refuse test sets of another size than known, or than claimed before.

        Parameters
        ----------
        client : int
        totals : sequence of int
            Test samples of the client's tasks, from its first on.

        Raises
        ------
        Unusable
            Naming the task and both numbers.
        """
        for task, total in enumerate(totals):
            if self._test is not None:
                sizes = self._test[client]
                # A client may have fewer tasks than others.
                expected = sizes[task] if task < len(sizes) else 0
                source = "has"
            else:
                # Sizes are learned with the first scores, and do not change.
                expected = self._claimed.setdefault((client, task), total)
                source = "had before"
            if total != expected:
                raise Unusable(
                    Fault.METRICS,
                    "total",
                    f"total is {total:.0f} for task {task + 1}, whose test set {source} "
                    f"{expected}",
                )


def _sizes(
    clients: Sequence[Sequence[Mapping[str, Any]]], split: str
) -> list[list[int]]:
    """Take the sizes of one split, by client and task."""
    sizes: list[list[int]] = []
    for tasks in clients:
        sizes.append([task[split] for task in tasks])
    return sizes


def _check_bound(examples: float, bound: int) -> None:
    if examples > bound:
        raise Unusable(
            Fault.METRICS,
            NUM_EXAMPLES,
            f"{NUM_EXAMPLES} is {examples:.0f}, but this client has at most {bound}",
        )
