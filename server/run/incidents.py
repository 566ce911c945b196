"""Failures of clients: recorded, and where the user wants it, fatal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedknow.client.learners.frames.learner import Layout
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.messages import Arrays, Message, client_of
from fedknow.protocols.texts import counted
from fedknow.server.checks.claims import Claims
from fedknow.server.checks.faults import (
    ClientFailure,
    ClientLost,
    Fault,
    RunError,
)
from fedknow.server.checks.replies import Inspector
from fedknow.server.grids.activity import Change
from fedknow.server.run.events import (
    ClientBegunAnew,
    ClientFailed,
    MembershipChanged,
    Warned,
)
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.recorder import Recorder

__all__ = ["Incidents"]


class Incidents:
    """Sees every answer of the clients, and deals with what cannot be used.

    Parameters
    ----------
    config : ExperimentConfig
    folder : RunFolder
        Named where the user has to do something about it.
    recorder : Recorder
    extras : mapping
        What answers of a kind may bring besides parameters
        (:class:`~fedknow.server.checks.replies.Inspector`).

    claims : Claims
        What is known of the sizes of clients' data.

    Attributes
    ----------
    inspector : Inspector
        The grid's ``inspect`` hook.
    too_small : int
        Devices that had too little memory for the work under way.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        folder: RunFolder,
        recorder: Recorder,
        extras: Mapping[str, Layout],
        claims: Claims,
    ) -> None:
        self._config = config
        self._folder = folder
        self._recorder = recorder
        self.inspector = Inspector(
            self._failed,
            config.engine.max_update_norm,
            extras,
            claims,
            config.privacy.noise * config.privacy.clip,
        )
        self.claims = claims
        self._bounded: set[int] = set()
        self.too_small = 0

    def begin_work(self, task: int, round: int, arrays: Arrays) -> None:
        """Begin a round in which clients are given work with these parameters."""
        self.inspector.begin(task, round, arrays)
        self.too_small = 0

    def warn(self, reason: str) -> None:
        """Put a warning on record, at the round under way."""
        task, round = self.inspector.position
        self._recorder.record(Warned(task=task, round=round, reason=reason))

    def note_changes(self, changes: Iterable[Change]) -> None:
        """Put changes of the membership on record."""
        for change in changes:
            self._recorder.record(
                MembershipChanged(
                    change=change.kind,
                    client=change.client,
                    reason=change.reason,
                )
            )

    def note_bounded(self, weights: Mapping[int, tuple[float, float]]) -> None:
        """Put on record whose weights were bounded, each client once a run.

        Parameters
        ----------
        weights : mapping
            By client, what it claimed and what counts in its place.
        """
        # Once for each client, as the next rounds would only repeat it.
        for client in sorted(weights.keys() - self._bounded):
            claimed, counted_weight = weights[client]
            self._bounded.add(client)
            self.warn(
                f"client {client} claims {claimed:.0f} samples, of which "
                f"{counted_weight:.0f} count: engine.max_weight = "
                f"{self._config.engine.max_weight:g} times the median of all"
            )

    def missed(self, work: Sequence[Message]) -> None:
        """Put on record which clients a wave of work went on without."""
        # A set, as a client may have missed several pieces of work.
        clients = sorted({client_of(message.node) for message in work})
        task, round = self.inspector.position
        reason = (
            f"no answer to {work[0].kind!r} in time from clients {clients}; the run goes on "
            "without them"
        )
        self._recorder.record(
            Warned(task=task, round=round, clients=tuple(clients), reason=reason)
        )

    def begun_anew(self, client: int, reason: str) -> None:
        """Put on record that a client begins anew."""
        task, round = self.inspector.position
        self._recorder.record(
            ClientBegunAnew(
                client=client,
                task=task,
                round=round,
                reason=f"client {client} begins anew: {reason}",
            )
        )

    def all_failed(self, clients: int) -> str:
        """Say in a sentence that none of so many clients answered well."""
        if self.too_small:
            # A client may have been too small for several pieces of its work.
            count = min(self.too_small, clients)
            return (
                f"learner {self._config.learner.name} with model {self._config.model.name} does "
                f"not fit the fleet: too little memory on {count} of "
                f"{counted(clients, 'device')} asked, and no other client answered; "
                "metrics.jsonl says how much they have and need"
            )
        failed = "the client" if clients == 1 else f"all {clients} clients"
        return f"{failed} failed; see metrics.jsonl"

    def _failed(self, failure: ClientFailure) -> None:
        """Put a failure on record; end the run, if the user wants that."""
        self._recorder.record(ClientFailed(**failure.event()))
        # That a device is too small is a result of the experiment, and never ends it.
        if failure.fault is Fault.OUT_OF_MEMORY:
            self.too_small += 1
        elif self._config.engine.on_client_error == "stop":
            raise self._ending(failure)

    def _ending(self, failure: ClientFailure) -> RunError:
        if failure.fault is Fault.STATE_LOST:
            # Of a kind of its own: to resume as it is would end in the same failure.
            return ClientLost(
                f"{failure}; put the state back from a copy, or have the client begin anew: go "
                f"on with --resume after fedknow forget {self._folder.path} --client "
                f"{failure.client}, or with --set engine.on_lost_state=fresh"
            )
        return RunError(
            f"{failure}; to leave such clients out of the round: "
            "--set engine.on_client_error=skip"
        )
