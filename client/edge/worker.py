"""The worker of a client: all that is done in its thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedknow.client.edge.desk import Desk, Job, Result
from fedknow.client.edge.intake import (
    check_names,
    message_limits,
    read_toml,
    without_folders,
)
from fedknow.client.edge.journal import Journal
from fedknow.client.host import Answerer, Host, one_thread
from fedknow.client.learners import learner_class
from fedknow.client.permissions import Permissions, sends_own
from fedknow.client.state import StateError
from fedknow.protocols.config import (
    ConfigError,
    ExperimentConfig,
    TrainConfig,
    read_config,
)
from fedknow.protocols.hostile import check_honest
from fedknow.protocols.messages import CLIENT_FAILED, Message, client_of
from fedknow.protocols.texts import counted
from fedknow.protocols.transport import CHUNK_BYTES
from fedknow.protocols.wire import (
    Encoding,
    Limits,
    Parcel,
    WireError,
    pack,
    unpack,
)
from fedknow.protocols.work import ROUND, TASK, merge_settings

__all__ = ["NodeFactory", "Worker"]

log = logging.getLogger(__name__)

NodeFactory = Callable[[ExperimentConfig], Answerer]
"""Makes what answers messages, once the server has said what the experiment is."""


class Worker:
    """Does a client's work, and keeps its states and answers.

    Parameters
    ----------
    desk : Desk
        Its last answer is forgotten when another run begins.
    journal : Journal
        The client's own folder.
    make_node : callable
        Makes what answers.
    device : str, optional
        What the client computes on, whatever the experiment says.
    keep_after : float
        Seconds of work from which on an answer is kept on disk.
    permissions : Permissions
        What the client's owner lets the server ask for.
    data : Path, optional
        The client's folder of data, whose name the server is not told.

    Attributes
    ----------
    limits : Limits
        What the server may send, once the client is ready for the run.
    """

    def __init__(  # noqa: PLR0913  # made in one place only
        self,
        desk: Desk,
        journal: Journal,
        make_node: NodeFactory,
        device: str | None,
        keep_after: float,
        permissions: Permissions,
        data: Path | None = None,
    ) -> None:
        self._desk = desk
        self._journal = journal
        self._make_node = make_node
        self._device = device
        self._keep_after = keep_after
        self._permissions = permissions
        self._folders = {"--data": data, "--state": journal.folder}
        self.limits = Limits()
        self._train = TrainConfig()
        self._host: Host | None = None
        self._encoding = Encoding.DENSE
        self._prepared: tuple[str, str] | None = None

    def prepare(
        self,
        config: str,
        run: str,
        node: int,
        fence: bytes = b"",
        signature: bytes = b"",
    ) -> None:
        """Make ready for a run, before its first work.

        Parameters
        ----------
        config : str
            The experiment, as TOML.
        run : str
            The run's id.
        node : int
            The client's node id in it.
        fence : bytes
            The secret of this stream.
        signature : bytes
            Of the experiment, by its owner.

        Raises
        ------
        ConfigError
            If the experiment cannot be run here.
        """
        check_names(run, node, fence)
        if self._prepared == (config, run):
            self._journal.begin(run, node)
            self._journal.keep_fence(fence)
            return
        experiment = read_config(read_toml(config))
        # Before anything that a server named is imported, read or built.
        self._permissions.check_signature(experiment, signature)
        check_honest(experiment)
        self._permissions.check(experiment)
        # Only now: it deletes what an earlier run has left, which nobody else's words may.
        self._journal.begin(run, node)
        self._journal.keep_fence(fence)
        # An answer of an earlier run is none for this one.
        self._desk.result = None
        if sends_own(experiment):
            log.warning(
                "evaluation.global_model = true: the server scores a purely global model, for "
                "which this client sends the parameters that it keeps to itself; --keep-own "
                "refuses such experiments"
            )
        self._train = experiment.train
        if self._device is not None:
            experiment = experiment.on_device(self._device)
        node_of_run = self._make_node(experiment)
        self._host = Host(experiment, None, self._journal.store, node_of_run)
        is_sparse = learner_class(experiment.learner.name).sparse
        self._encoding = Encoding.SPARSE if is_sparse else Encoding.DENSE
        self.limits = message_limits(
            node_of_run, experiment, self._permissions.limits.message_mb * 2**20
        )
        self._prepared = config, run

    def is_ready_for(self, config: str, run: str) -> bool:
        """Say whether all is ready for a run, as its server describes it."""
        return self._prepared == (config, run)

    def discreet(self, text: str) -> str:
        """Give a text for the server, without the names of this client's folders."""
        return without_folders(text, self._folders)

    def answer(self, job: Job) -> Result:
        """Give the answer to work, from the journal if it was done before.

        Raises
        ------
        WireError
            If the work cannot be read.
        """
        started = time.perf_counter()
        parcel = job.parcel
        # The key takes the id's place: the same work asked for again gives the same version.
        message = replace(unpack(parcel, self.limits), id=job.key)
        stored = self._journal.find(job.key, parcel.committed)
        reply, version = stored or self._work(message, parcel)
        if reply.failure is not None:
            reason = self.discreet(reply.failure.reason)
            reply = replace(reply, failure=replace(reply.failure, reason=reason))
        try:
            answer = pack(reply, self._encoding, chunk_bytes=CHUNK_BYTES)
        except WireError as error:
            reply = message.fail(
                CLIENT_FAILED, f"the answer cannot be sent: {error}"
            )
            version = parcel.version
            answer = pack(reply)
        seconds = time.perf_counter() - started
        result = Result(
            key=job.key,
            asked_by=parcel.id,
            answer=answer,
            version=version,
            # Without the arrays: this is kept for a failure's envelope, which needs none.
            work=replace(message, content={}),
            old_version=parcel.version,
            has_failed=reply.failure is not None,
        )
        is_new = stored is None and not result.has_failed
        # What was done fast is as well done again.
        if is_new and seconds >= self._keep_after:
            self._store(result, parcel.committed)
        size = len(parcel.header) + len(parcel.payload)
        log.info(
            "%s: %s in %.1f s, %s in, %s out%s",
            _place(message),
            message.kind,
            seconds,
            _size(size),
            _size(answer.size),
            "" if reply.failure is None else f"; failed: {reply.failure.reason}",
        )
        return result

    def _store(self, result: Result, committed: int) -> None:
        try:
            self._journal.keep_answer(
                result.key, committed, result.answer, result.version
            )
        except StateError as error:
            # The answer is in memory still, and can be made again.
            log.warning("%s", error)

    def _work(self, message: Message, parcel: Parcel) -> tuple[Message, int]:
        assert self._host is not None  # `prepare` comes before the first work
        client = client_of(parcel.node)
        try:
            self._journal.commit(client, parcel.version, parcel.committed)
            settings = merge_settings(message.content)
            self._permissions.check_work(settings, self._train)
            self._permissions.check_disk(self._journal.size())
            # As in a simulation, whose numbers this client must give too.
            with one_thread():
                return self._host.handle(message, parcel.version)
        except (ConfigError, StateError) as error:
            # The server decides what becomes of a client that refuses, or whose disk fails.
            return message.fail(CLIENT_FAILED, str(error)), parcel.version


def _place(message: Message) -> str:
    """Say where in the experiment work belongs."""
    config = message.config()
    parts = [f"{key} {config[key]!r}" for key in (TASK, ROUND) if key in config]
    return ", ".join(parts) or "work"


def _size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e4 else counted(size, "byte")
