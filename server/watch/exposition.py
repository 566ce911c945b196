"""A server's run as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedknow.server.run.events import ClientFailed, Evaluated, Event, RoundEnded

__all__ = ["Exposition"]


class Exposition:
    """Writes what a server knows of its run, in Prometheus' text format.

    It is a subscriber to the run's events, too, for accuracy and loss.

    Parameters
    ----------
    status : callable
        Gives :meth:`fedknow.server.grids.grpc_service.Service.status`.
    """

    def __init__(self, status: Callable[[], Mapping[str, Any]]) -> None:
        self._status = status
        self._values: dict[str, float] = {}
        self._failures = 0
        # Not the library's global one, in which a second run's metrics would collide.
        self._registry = CollectorRegistry()
        self._registry.register(_Families(self._families))

    def __call__(self, event: Event) -> None:
        """Take in an event of the run."""
        match event:
            case RoundEnded():
                self._values |= {
                    "task": event.task + 1,
                    "round": event.server_round,
                    "loss": event.loss,
                    "round_seconds": event.seconds,
                }
            case Evaluated():
                self._values |= {
                    "accuracy": event.accuracy,
                    "accuracy_global": event.accuracy_global,
                    "forgetting": event.forgetting,
                }
            case ClientFailed():
                # A counter: Prometheus takes rates of it, and needs it from the start.
                self._failures += 1

    def text(self) -> bytes:
        """Return the text of one scrape."""
        return generate_latest(self._registry)

    def _families(self) -> Iterator[Metric]:
        # Asked anew for each scrape, so that nobody has to keep numbers up to date.
        status = self._status()
        for name, description, value in (
            ("clients", "Clients of the experiment.", status["clients"]),
            (
                "clients_connected",
                "Clients that are connected.",
                status["connected"],
            ),
            (
                "clients_working",
                "Clients that have work.",
                len(status["waiting_for"]),
            ),
            (
                "uptime_seconds",
                "Seconds since the server began.",
                status["seconds"],
            ),
        ):
            yield GaugeMetricFamily(f"fedknow_{name}", description, value)
        # What has not happened is left out: a 0 would be drawn as a measurement.
        for name, value in self._values.items():
            yield GaugeMetricFamily(f"fedknow_{name}", ABOUT[name], value)
        for name, description, value in (
            (
                "received_bytes",
                "Bytes of messages from clients.",
                status["bytes_in"],
            ),
            ("sent_bytes", "Bytes of messages to clients.", status["bytes_out"]),
            (
                "client_failures",
                "Answers that could not be used.",
                self._failures,
            ),
            ("left_out", "Pieces of work given up.", status["left_out"]),
        ):
            yield CounterMetricFamily(f"fedknow_{name}", description, value)
        # One metric with a label: which codes will occur is not known beforehand.
        refusals = CounterMetricFamily(
            "fedknow_refusals", "Clients that were refused.", labels=["code"]
        )
        for code, count in status["refusals"].items():
            refusals.add_metric([code], count)
        yield refusals


ABOUT = {
    "task": "The task of the last round, from 1.",
    "round": "Rounds that are done.",
    "loss": "Mean training loss of the last round.",
    "round_seconds": "Seconds that the last round took.",
    "accuracy": "Average accuracy of the clients' models, 0 to 1.",
    "accuracy_global": "Average accuracy of the global model, 0 to 1.",
    "forgetting": "Accuracy lost on earlier tasks, 0 to 1.",
}


class _Families(Collector):
    """The library's face of a function that gives metrics."""

    def __init__(self, give: Callable[[], Iterator[Metric]]) -> None:
        self._give = give

    def collect(self) -> Iterator[Metric]:
        return self._give()
