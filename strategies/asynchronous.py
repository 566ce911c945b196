"""The frame of strategies whose clients do not wait for each other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from fedknow.protocols.flower import to_arrays, to_record
from fedknow.protocols.messages import Arrays
from fedknow.strategies.dispatch import ArrivalGrid, ClientUpdate, Dispatcher

__all__ = [
    "Asynchronous",
    "ClientUpdate",
    "Dispatcher",
    "check_whole_number",
    "combine",
    "staleness_metrics",
]


class Asynchronous(FedAvg):
    """Frame for strategies in which clients do not wait for each other.

    They run on any of our grids. Where clients are equally fast, all answers arrive at once, in
    the order of clients. With a fleet they arrive in the order of virtual time; over gRPC, as
    they come. When :meth:`start` returns, nobody is at work any more. So a task that is over is
    over for everybody, and a checkpoint at that moment is complete.

    Parameters
    ----------
    concurrency : int
        How many clients work at the same time; 0: all.
    staleness : {"polynomial", "hinge", "constant"}
        How an answer counts whose model the server has moved on from by ``d`` steps: ``(d +
        1)^-a``; 1 up to ``b`` and ``1 / (a (d - b) + 1)`` from there; or 1 (Xie et al. 2019,
        section 5.2).
    staleness_a, staleness_b : float
        The ``a`` and ``b`` in it.

    Raises
    ------
    ValueError
        If an option has an impossible value.
    """

    by_clock = False
    """Whether the strategy depends on the grid's clock.

    It is another strategy where that clock stands still.
    """

    def __init__(
        self,
        concurrency: int = 0,
        staleness: str = "polynomial",
        staleness_a: float = 0.5,
        staleness_b: float = 4.0,
    ) -> None:
        # The experiment scores every client itself, and one free client is enough to go on.
        super().__init__(
            fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1
        )
        check_whole_number("concurrency", concurrency, minimum=0)
        if staleness not in ("polynomial", "hinge", "constant"):
            raise ValueError(
                f"staleness = {staleness!r}: must be polynomial, hinge or constant"
            )
        for name, value in (
            ("staleness_a", staleness_a),
            ("staleness_b", staleness_b),
        ):
            if value < 0:
                raise ValueError(f"{name} = {value!r}: must not be below 0")
        self.concurrency = concurrency
        self.staleness = staleness
        self.staleness_a = staleness_a
        self.staleness_b = staleness_b
        self.round_metrics = MetricRecord()

    @abstractmethod
    def round(
        self, dispatcher: Dispatcher, rounds_remaining: int
    ) -> MetricRecord | None:
        """Carry out one round, in which the server makes at least one step.

        Nobody may be at work after the last round.

        Parameters
        ----------
        dispatcher : Dispatcher
            Hands out work; its ``step`` makes the server's step.
        rounds_remaining : int
            Rounds to go, this one included.

        Returns
        -------
        MetricRecord or None
            The round's metrics.
        """

    def settings(self) -> dict[str, float]:
        """Return the settings that clients need besides the experiment's own."""
        return {}

    def discount(self, staleness: int) -> float:
        """Return how much an answer counts that is so many steps late."""
        if self.staleness == "constant":
            return 1.0
        if self.staleness == "polynomial":
            return float((staleness + 1) ** -self.staleness_a)
        # Hinge: answers count fully up to b steps, and less from there on.
        excess = staleness - self.staleness_b
        if excess <= 0:
            return 1.0
        return 1.0 / (self.staleness_a * excess + 1)

    def start(  # noqa: PLR0913  # Flower's signature
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None]
        | None = None,
    ) -> Result:
        """Run as Flower's ``Strategy.start`` does.

        ``timeout`` and ``evaluate_config`` are not used. The grid may say until when work is
        given out; the rounds end when that moment comes first.

        Raises
        ------
        RuntimeError
            If in a round no client at all answered.
        """
        # The strategy's settings go before the experiment's.
        config = ConfigRecord({**(train_config or {}), **self.settings()})
        arrival_grid = cast(ArrivalGrid, grid)
        dispatcher = Dispatcher(
            arrival_grid, initial_arrays, config, self.concurrency
        )
        result = Result(arrays=initial_arrays)
        # Flower evaluates the initial model too, as round 0.
        if evaluate_fn:
            evaluate_fn(0, dispatcher.arrays)
        for number in range(1, num_rounds + 1):
            version = dispatcher.version
            metrics = self.round(dispatcher, num_rounds - number + 1)
            if dispatcher.version == version:
                # The time of the task may end before any client answers; that is no failure.
                if dispatcher.is_over:
                    break
                raise RuntimeError("no client gave a usable answer")
            # The experiment reads the latest round's metrics from here.
            self.round_metrics = metrics or MetricRecord()
            result.arrays = dispatcher.arrays
            result.train_metrics_clientapp[number] = self.round_metrics
            if evaluate_fn:
                evaluate_fn(number, dispatcher.arrays)
            # No more work will be given out, so no further round is begun.
            if dispatcher.is_over:
                break
        return result


def combine(
    update: Callable[..., np.ndarray], *records: ArrayRecord
) -> ArrayRecord:
    """Apply a function to the floating-point arrays of several records.

    Parameters
    ----------
    update : callable
        Gets one array from each record, in the order of the records.
    *records : ArrayRecord
        Records of the same names.

    Returns
    -------
    ArrayRecord
        The function's results; arrays of whole numbers are those of the last record.
    """
    decoded = [to_arrays(record) for record in records]
    combined = Arrays()
    for name, array in decoded[-1].items():
        combined[name] = array
        if array.dtype.kind == "f":
            inputs = [arrays[name] for arrays in decoded]
            result = np.asarray(update(*inputs), array.dtype)
            # A read-only array is referred to by the record without another copy.
            result.flags.writeable = False
            combined[name] = result
    return to_record(combined)


def staleness_metrics(
    staleness: list[int],
) -> dict[str, float | list[int] | list[float]]:
    """Return the mean and the maximum staleness of a round's answers."""
    return {
        "staleness": float(np.mean(staleness)),
        "staleness-max": max(staleness),
    }


def check_whole_number(name: str, value: float, minimum: int) -> None:
    """Refuse an option that is no whole number or too small.

    Raises
    ------
    ValueError
        Naming the option, its value and the minimum.
    """
    # A truth value is a whole number to Python.
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < minimum:
        raise ValueError(
            f"{name} = {value!r}: must be a whole number, {minimum} or more"
        )
