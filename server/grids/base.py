"""Grids: how messages reach clients. What all grids share, and the one that runs clients in this
process."""

from __future__ import annotations

import gc
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedknow.client.compute.heap import keep_freed
from fedknow.client.host import one_thread
from fedknow.client.state import StateStore
from fedknow.protocols.flower import (
    Cache,
    Run,
    empty_run,
    from_flower,
    identify,
    set_id,
    to_flower,
)
from fedknow.protocols.messages import (
    EXTRA,
    NO_ANSWER,
    STATE_LOST,
    TRAIN,
    Arrays,
    Mean,
    Message,
    Record,
    client_of,
    nbytes,
    node_of,
)
from fedknow.protocols.wire.codec import Encoding, encode
from fedknow.server.grids.process_memory import process_peak_mb
from fedknow.server.grids.running_mean import RunningMean

__all__ = ["Answers", "Hosting", "InlineGrid", "MessageGrid"]

T = TypeVar("T")

Answers = Generator[tuple[Message, int], None, None]
"""Answers, each with the version of the client's state after it."""


class Hosting(Protocol):
    """Answers messages and keeps client states by version (:class:`fedknow.client.host.Host`)."""

    def handle_many(
        self, messages: Sequence[Message], versions: Mapping[int, int]
    ) -> Iterator[tuple[Message, int]]:
        """Answer messages to clients whose states have these versions (0 where none is given), in
        order.

        Gives the version of the client's state after each, too.
        """
        ...


class MessageGrid(Grid):
    """A Flower grid over our messages: everything but the delivery.

    Any Flower strategy runs on it unchanged. Answers come back in the order of the node ids,
    whatever the order of arrival, so that sums over them are the same from run to run. One grid
    at a time is in use in a process (Flower keeps the identity of a run in class attributes).

    Parameters
    ----------
    clients : int
        Number of clients; their node ids are 2, 3, ...
    store : StateStore, optional
        Where the states of clients lie, for :meth:`prune`; nothing is pruned without.

    Attributes
    ----------
    traffic : dict
        Bytes (``down`` to clients, ``up`` from them) and ``messages`` sent so far, by kind of
        message.
    versions : dict
        Version of each client's state; clients that are not in it are fresh.
    inspect : callable, optional
        Sees each answer and gives it back, or a failure in its stead; the client's state is
        then what it was before.
    missed : callable, optional
        Told of the work of a wave that was not answered in time, where any was not.
    forgot : callable, optional
        Told of a client and why, when it begins anew because its state is lost. Without, such
        work has failed.
    sparse : bool
        Whether zeros are left out on the way (:attr:`fedknow.client.learners.Learner.sparse`)
        and not counted.
    spare : set of str
        Ids of work whose answers are not missed.
    address : callable, optional
        Told of Flower's messages before they are sent; may change what they say.
    until : float
        The moment, on the clock of :attr:`now`, from which on strategies with a loop of their
        own give out no work.
    timed : bool
        Whether that clock moves on, so that one client may answer later than another.
    running_mean : bool
        Whether :meth:`send_and_receive` averages the parameters that clients trained and gives
        one answer for all.
    """

    timed = False

    def __init__(self, clients: int, store: StateStore | None = None) -> None:
        self.clients = clients
        self.store = store
        self.traffic: dict[str, dict[str, int]] = {}
        self.versions: dict[int, int] = {}
        self.inspect: Callable[[Message], Message] | None = None
        self.sparse = False
        self.missed: Callable[[Sequence[Message]], None] | None = None
        self.forgot: Callable[[int, str], None] | None = None
        self.spare: set[str] = set()
        self.address: Callable[[Sequence[FlowerMessage]], None] | None = None
        self.until = math.inf
        self.running_mean = False
        self._pushed: dict[str, tuple[FlowerMessage, Message]] = {}
        self._sent = 0
        self._run = empty_run()
        identify(self._run.run_id)
        # A wave makes many small objects, and Python's collector would time and again walk
        # through all that was there before it (modules, mostly): 0.1 s each time.
        gc.freeze()
        keep_freed()

    @abstractmethod
    def deliver(self, work: Sequence[Message], timeout: float | None) -> Answers:
        """Have clients do the work, each from the state that ``versions`` says.

        Work for one client is done in the order given, each piece from the state the one before
        left.

        Parameters
        ----------
        work : sequence of Message
            The work.
        timeout : float or None
            Seconds after which what was not answered is given up.

        Yields
        ------
        tuple of Message and int
            The answers as they arrive, each with the version of the client's state after it.
        """

    def perform(self, work: Sequence[Message], timeout: float | None) -> Answers:
        """Have clients do the work as :meth:`deliver` does; those whose states are lost do it anew
        where they may.

        A client's state goes back to none, as the server's versions say, so the same happens on
        every grid.

        Parameters
        ----------
        work : sequence of Message
            The work.
        timeout : float or None
            As of :meth:`deliver`; work that is done anew has as long again.

        Yields
        ------
        tuple of Message and int
            As :meth:`deliver`.
        """
        asked = {message.id: message for message in work}
        lost: dict[str, Message] = {}
        with closing(self.deliver(work, timeout)) as answers:
            for reply, version in answers:
                if self.begins_anew(reply, version):
                    lost[reply.reply_to] = asked[reply.reply_to]
                else:
                    yield reply, version
        if lost:
            again = [message for message in work if message.id in lost]
            with closing(self.deliver(again, timeout)) as answers:
                yield from answers

    def begins_anew(self, reply: Message, version: int) -> bool:
        """Whether an answer tells of a lost state whose client may begin anew; if so, it is put on
        record.

        Parameters
        ----------
        reply : Message
            The answer.
        version : int
            Of the state that the client was to start from.
        """
        if (
            self.forgot is None
            or reply.failure is None
            or reply.failure.code != STATE_LOST
            or not version
        ):
            return False
        client = client_of(reply.node)
        if self.versions.pop(
            client, 0
        ):  # else another piece of its work said so before
            self.forgot(client, reply.failure.reason)
        return True

    @property
    def now(self) -> float:
        """Seconds on the clock by which pulls wait; it stands still where no client is slower than
        another."""
        return 0.0

    def wait(self, until: float) -> None:
        """Let time pass in which nobody has work, up to a moment on the clock of :attr:`now`.

        Raises
        ------
        RuntimeError
            If that clock stands still.
        """
        raise RuntimeError(
            f"{type(self).__name__}: a clock that stands still never shows {until:g} s"
        )

    def gather(self, until: float) -> None:
        """Let time pass until as many clients are there as the strategy needs, and up to a moment
        at most.

        Nothing by default: they are all there, or are waited for when they are given work.
        """

    @property
    def occupied(self) -> bool:
        """Whether clients that do pushed work can be asked nothing else."""
        return False

    @property
    def at_work(self) -> set[int]:
        """Clients with pushed work whose answers have not been pulled."""
        return {client_of(work.node) for _, work in self._pushed.values()}

    def arrivals(
        self, work: Sequence[Message], timeout: float | None
    ) -> Sequence[tuple[Message, int]]:
        """Answers to work that was pushed, as far as they are there; where there is none, wait for
        the first.

        Here clients are equally fast, so all answers arrive at once. A grid with a clock gives
        those that are due, in the order in which they arrive, and is asked again for the
        others.

        Parameters
        ----------
        work : sequence of Message
            Work pushed and not answered yet. What of it was pushed since the last call is to be
            begun.
        timeout : float or None
            Seconds, on the clock of :attr:`now`, to wait for the first; None: as long as it takes.

        Returns
        -------
        sequence of tuple of Message and int
            Answers, each with the version of the client's state after it. A failure with the
            code ``NO_ANSWER`` is work that is given up. Empty: none came in time, or none can
            come any more.
        """
        with closing(self.perform(work, None)) as answers:
            return sorted(answers, key=lambda answer: answer[0].node)

    def refused(self, reply: Message) -> None:
        """An answer could be read but not used, and ``reply`` is the failure in its stead; nothing
        more by default."""

    # --- our messages
    # ---------------------------------------------------------------------------------------------

    def exchange(
        self,
        messages: Sequence[Message],
        timeout: float | None = None,
        label: str | None = None,
    ) -> list[Message]:
        """Send our own messages and wait for the answers.

        Parameters
        ----------
        messages : sequence of Message
            Work; the grid gives it ids of its own.
        timeout : float, optional
            Seconds to wait; clients that did not answer by then are missing from the list.
        label : str, optional
            The name under which traffic is counted; by default the kind of each message.

        Returns
        -------
        list of Message
            The answers (failures too), ordered by node id, then as sent.

        Raises
        ------
        ValueError
            If a message goes to a node that does not exist.
        """
        work = [replace(message, id=self._next_id()) for message in messages]
        return self._collect(work, timeout, label, lambda reply: reply)

    def _collect(
        self,
        work: Sequence[Message],
        timeout: float | None,
        label: str | None,
        convert: Callable[[Message], T],
    ) -> list[T]:
        self._give_out(work, label)
        replies: dict[str, T] = {}
        with closing(self.perform(work, timeout)) as answers:
            for (
                reply,
                version,
            ) in (
                answers
            ):  # each is dealt with as it arrives, while other clients still work
                replies[reply.reply_to] = convert(self._take_in(reply, version, label))
        missing = [
            message
            for message in work
            if message.id not in replies and message.id not in self.spare
        ]
        if missing and self.missed:
            self.missed(missing)
        by_node = sorted(work, key=lambda message: message.node)
        return [replies[message.id] for message in by_node if message.id in replies]

    def _give_out(self, work: Sequence[Message], label: str | None = None) -> None:
        """See that there is somebody to do the work, and count it."""
        strangers = sorted(
            {message.node for message in work}
            - {node_of(client) for client in range(self.clients)}
        )
        if strangers:
            raise ValueError(
                f"no such nodes: {strangers}; they are {node_of(0)} to {node_of(self.clients - 1)}"
            )
        sizes: dict[int, int] = {}
        for message in work:
            self._book(label or message.kind, "down", message.content, sizes)
            self.traffic[label or message.kind]["messages"] += 1

    def _take_in(
        self, reply: Message, version: int, label: str | None = None
    ) -> Message:
        """Count and check an answer; it, or a failure in its stead."""
        self._book(label or reply.kind, "up", reply.content, {})
        checked = self.inspect(reply) if self.inspect else reply
        if checked.failure is None:
            self.versions[client_of(reply.node)] = version
        elif reply.failure is None:
            self.refused(checked)
        return checked

    def _book(
        self, kind: str, way: str, content: Mapping[str, Record], sizes: dict[int, int]
    ) -> None:
        """Count a message's bytes, those of its ``extra`` record apart; ``sizes`` remembers what
        messages share."""
        self.traffic.setdefault(kind, {"down": 0, "up": 0, "messages": 0})
        for name, record in content.items():
            if id(record) not in sizes:
                sizes[id(record)] = self._size(name, record)
            label = f"{kind}.{EXTRA}" if name == EXTRA else kind
            count = self.traffic.setdefault(label, {"down": 0, "up": 0, "messages": 0})
            count[way] += sizes[id(record)]
            count["messages"] += name == EXTRA

    def _size(self, name: str, record: Record) -> int:
        """Bytes of a record on its way; of a mean, those of one client's parameters."""
        if isinstance(record, Mean):
            return record.bytes
        return _sparse_bytes(record) if self.sparse else nbytes({name: record})

    def _next_id(self) -> str:
        self._sent += 1
        return str(self._sent)

    # --- Flower's messages
    # ----------------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run that this grid works for."""
        self._run = run
        identify(run.run_id)

    @property
    def run(self) -> Run:
        """The run, as Flower describes it."""
        return self._run

    def get_node_ids(self) -> list[int]:
        """Ids of all clients, ascending."""
        return [node_of(client) for client in range(self.clients)]

    def members(self) -> list[int]:
        """Ids of all clients that work may be given that can wait for them; ascending."""
        return list(self.get_node_ids())

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> FlowerMessage:
        """A Flower message (Flower's own constructor does the same)."""
        return FlowerMessage(
            content, dst_node_id, message_type, ttl=ttl, group_id=group_id
        )

    def push_messages(self, messages: Iterable[FlowerMessage]) -> list[str]:
        """Take messages in, as they are now; they are worked on from the next pull on, at the latest.

        Returns
        -------
        list of str
            Ids under which to pull the answers.

        Raises
        ------
        ValueError
            If a message goes to a node that does not exist.
        """
        cache: Cache = {}
        pushed = list(messages)
        if self.address:
            self.address(pushed)
        for message in pushed:
            set_id(message, self._next_id())
        work = [from_flower(message, cache) for message in pushed]
        self._give_out(work)
        self._pushed |= {
            ours.id: (theirs, ours) for theirs, ours in zip(pushed, work, strict=True)
        }
        return [message.id for message in work]

    def pull_messages(
        self, message_ids: Iterable[str], timeout: float | None = None
    ) -> list[FlowerMessage]:
        """Answers to messages pushed before, as far as they are there; where there is none yet,
        wait for the first.

        Parameters
        ----------
        message_ids : iterable of str
            What :meth:`push_messages` gave. An id that was pulled already or never pushed gives
            nothing.
        timeout : float, optional
            Seconds, on the clock of :attr:`now`, to wait for the first answer; by default as
            long as it takes.

        Returns
        -------
        list of flwr.app.Message
            Answers (errors too) in the order of arrival, those that arrived together in the
            order of nodes. Empty: none came in time, or none can come any more.
        """
        wanted = [self._pushed[id][1] for id in message_ids if id in self._pushed]
        replies = []
        for reply, version in self.arrivals(wanted, timeout) if wanted else ():
            asked, work = self._pushed.pop(reply.reply_to)
            if reply.failure is not None and reply.failure.code == NO_ANSWER:
                if self.missed:
                    self.missed([work])
            else:
                reply = self._take_in(reply, version)
            replies.append(to_flower(reply, asked))
        return replies

    def send_and_receive(
        self, messages: Iterable[FlowerMessage], *, timeout: float | None = None
    ) -> list[FlowerMessage]:
        """Send Flower's messages and wait for the answers, at most ``timeout`` seconds.

        Returns
        -------
        list of flwr.app.Message
            The answers (errors too), ordered by node id, then as sent; after a timeout those
            that arrived. With ``running_mean`` the good answers to training are one, their mean
            in the name of the first (:mod:`fedknow.server.grids.running_mean`).
        """
        sent = list(messages)
        if self.address:
            self.address(sent)
        for message in sent:
            set_id(message, self._next_id())
        return self._flower(sent, timeout)

    def _flower(
        self, sent: Sequence[FlowerMessage], timeout: float | None
    ) -> list[FlowerMessage]:
        cache: Cache = {}
        work = [from_flower(message, cache) for message in sent]
        asked = {message.metadata.message_id: message for message in sent}
        if not self.averages(work):
            return self._collect(
                work,
                timeout,
                None,
                lambda reply: to_flower(reply, asked[reply.reply_to]),
            )
        running = RunningMean()
        replies = self._collect(work, timeout, None, running.take)
        good = [reply for reply in replies if reply.failure is None]
        mean = [running.reply(good)] if good else []
        failed = [reply for reply in replies if reply.failure is not None]
        return [to_flower(reply, asked[reply.reply_to]) for reply in mean + failed]

    def averages(self, work: Sequence[Message]) -> bool:
        """Whether the answers to this work are to be one mean."""
        return self.running_mean and all(message.kind == TRAIN for message in work)

    # --- client states
    # --------------------------------------------------------------------------------------------

    def restore(
        self,
        versions: Mapping[int, int],
        traffic: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        """Go back to the client states, and the traffic, of a checkpoint."""
        self.versions = dict(versions)
        if traffic is not None:
            self.traffic = {kind: dict(count) for kind, count in traffic.items()}

    def state(self) -> dict[str, Any]:
        """What else belongs into a checkpoint, as JSON can hold it; nothing where no time is kept."""
        return {}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state` gave."""

    def elapsed(self) -> dict[str, float]:
        """Virtual time so far, and what it went into, for events; nothing where no time is kept."""
        return {}

    def fleet(self) -> dict[str, Any]:
        """What the clients' devices did so far, for ``fleet.json``; nothing where they have none."""
        return {}

    def prune(self) -> None:
        """Delete all client states but the present ones; call it when a checkpoint of these is
        safe on disk.

        States are never overwritten by others (each version has its own file), so that the last
        checkpoint stays whole until then.
        """
        if self.store is not None:
            self.store.prune(self.versions)

    def peak_memory_mb(self) -> float:
        """Largest resident memory so far of the processes at work, MB (1e6 bytes).

        Each process's own peak, added up; memory they share (Ray's object store) counts in each
        that has touched it.
        """
        return process_peak_mb()

    # --- life
    # -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of what the grid holds; it is of no use afterwards."""
        gc.unfreeze()
        if self.store is not None:
            self.store.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _sparse_bytes(record: Record) -> int:
    """Bytes of a record whose arrays travel without their zeros."""
    if not isinstance(record, Arrays):
        return nbytes({"": record})
    return sum(
        encode(name, array, Encoding.SPARSE)[0].length for name, array in record.items()
    )


class InlineGrid(MessageGrid):
    """Clients in this process, one after the other, with one thread as in a worker: tests,
    debugging, tiny runs.

    Parameters
    ----------
    clients : int
        Number of clients.
    host : Hosting
        What answers (:class:`fedknow.client.host.Host`).
    store : StateStore, optional
        Where the host keeps states; by default the host's own ``store``, where it has one.
    """

    def __init__(
        self, clients: int, host: Hosting, store: StateStore | None = None
    ) -> None:
        super().__init__(
            clients, store if store is not None else getattr(host, "store", None)
        )
        self.host = host

    def deliver(self, work: Sequence[Message], timeout: float | None) -> Answers:
        """Do the work in the order given; see :meth:`MessageGrid.deliver`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        answers = self.host.handle_many(work, self.versions)
        while deadline is None or time.monotonic() < deadline:
            with one_thread():
                answer = next(answers, None)
            if answer is None:
                return
            yield answer
