"""Clients as a Flower app, reached through Flower's own grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from flwr.app import ConfigRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid

from fedknow.protocols.config import ConfigError
from fedknow.protocols.flower import FlowerCache, from_flower, to_records
from fedknow.protocols.messages import (
    CLIENT_FAILED,
    ENVELOPE,
    Config,
    Message,
    client_of,
)
from fedknow.server.grids.activity import Listener
from fedknow.server.grids.base import Answers, MessageGrid
from fedknow.server.grids.wave import WaveOptions

__all__ = ["FlowerGrid"]


class FlowerGrid(MessageGrid):
    """Clients that a SuperLink, or Flower's simulation, reaches.

    Each runs :mod:`fedknow.client.flower_app`.

    Flower knows its nodes by random ids. Each is asked once for its ``partition-id``, which is
    our client's number. So answers are put in the order of our clients, and sums over them are
    the same as on our other grids.

    Each message carries an ``ENVELOPE`` record. It holds the experiment, the message's own id,
    and two versions: of the state that the client is to start from, and of the state in the
    latest checkpoint. Older states need not be kept.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
        Flower's grid.
    clients : int
        Number of clients.
    config : str
        The experiment, as TOML.
    run : str
        The name under which clients keep their states; the same when a run is resumed.
    waiting : callable, optional
        Called with the number of connected clients when it changes while others are waited
        for.
    poll : float
        Seconds between two looks for new nodes. Flower does not report them.
    listener : Listener, optional
        Hears which clients are at work.
    signature : bytes
        Of the experiment, by the nodes' owner; empty without one.
    """

    def __init__(  # noqa: PLR0913 - settings of a public class
        self,
        grid: Grid,
        clients: int,
        config: str,
        run: str,
        waiting: Callable[[int], None] | None = None,
        poll: float = 0.5,
        listener: Listener | None = None,
        signature: bytes = b"",
    ) -> None:
        # Flower has set the run of this process already.
        super().__init__(clients, run=grid.run, listener=listener)
        self._grid = grid
        self._experiment = Config(config=config, run=run)
        if signature:
            self._experiment["signature"] = signature
        self._waiting = waiting
        self._poll = poll
        self._committed: dict[int, int] = {}
        self._nodes: dict[int, int] = {}

    def deliver(
        self,
        work: Sequence[Message],
        timeout: float | None,
        options: WaveOptions,
    ) -> Answers:
        """Do the work on Flower's nodes; see :meth:`Delivery.deliver`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        # A copy that is moved on here: the grid's own is changed when an answer is accepted.
        versions = dict(self.versions)
        clients = self._find_clients()
        cache: FlowerCache = {}
        for wave in _waves(work):
            seconds = None if deadline is None else deadline - time.monotonic()
            # No answer would count any more, so clients are not made to work in vain.
            if seconds is not None and seconds <= 0:
                return
            sent = [
                self._to_flower(message, clients, versions, cache)
                for message in wave
            ]
            replies = self._grid.send_and_receive(sent, timeout=seconds)
            # Known only now: Flower's grid writes the ids into the messages that it sends.
            requests = {
                flower_message.metadata.message_id: message
                for flower_message, message in zip(sent, wave, strict=True)
            }
            for flower_reply in replies:
                message = requests[flower_reply.metadata.reply_to_message_id]
                client = client_of(message.node)
                reply, version = _answer(message, from_flower(flower_reply))
                # A failed client keeps its state.
                if version is None:
                    version = versions.get(client, 0)
                versions[client] = version
                yield reply, version

    def prune(self) -> None:
        """Let clients delete their older states, with their next message."""
        self._committed = dict(self.versions)

    def _to_flower(
        self,
        message: Message,
        clients: dict[int, int],
        versions: dict[int, int],
        cache: FlowerCache,
    ) -> FlowerMessage:
        client = client_of(message.node)
        envelope = ConfigRecord(
            {
                **self._experiment,
                "client": client,
                "id": message.id,
                "version": versions.get(client, 0),
                "committed": self._committed.get(client, 0),
            }
        )
        records = RecordDict(
            {**to_records(message.content, cache), ENVELOPE: envelope}
        )
        return FlowerMessage(
            records, clients[client], message.kind, group_id=message.group
        )

    def _find_clients(self) -> dict[int, int]:
        """Wait for all clients, and return Flower's node for each."""
        seen = -1
        while True:
            connected = set(self._grid.get_node_ids())
            # Nodes that went away are forgotten, and asked anew when they are back.
            self._nodes = {
                node: client
                for node, client in self._nodes.items()
                if node in connected
            }
            self._ask(sorted(connected - self._nodes.keys()))
            clients = {
                client: node for node, client in sorted(self._nodes.items())
            }
            if len(clients) == self.clients:
                return clients
            if self._waiting and len(clients) != seen:
                self._waiting(len(clients))
            seen = len(clients)
            # Flower's grid has no call that waits for nodes.
            time.sleep(self._poll)

    def _ask(self, nodes: Sequence[int]) -> None:
        """Ask nodes which clients they are.

        A node that cannot say is asked again at the next look.
        """
        questions = [
            FlowerMessage(RecordDict({ENVELOPE: ConfigRecord()}), node, "query")
            for node in nodes
        ]
        for reply in self._grid.send_and_receive(questions) if questions else ():
            config = (
                Config() if reply.has_error() else from_flower(reply).config()
            )
            client = config.get("partition-id")
            partitions = config.get("num-partitions")
            # The node has answered with an error, or is still starting; it is asked again.
            if not isinstance(client, int):
                continue
            if not 0 <= client < self.clients or partitions not in (
                None,
                self.clients,
            ):
                raise ConfigError(
                    f"data.clients = {self.clients}, but a Flower node is partition {client} of "
                    f"{partitions!r}; start as many nodes as the experiment has clients, or set "
                    "data.clients to their number"
                )
            self._nodes[reply.metadata.src_node_id] = client


def _waves(work: Sequence[Message]) -> Iterator[list[Message]]:
    """Cut work so that no client has two pieces of it at once."""
    waiting = list(work)
    while waiting:
        # Reversed: the earliest message of a node is written over the later ones.
        next_of = {message.node: message for message in reversed(waiting)}
        wave = [
            message for message in waiting if next_of[message.node] is message
        ]
        yield wave
        waiting = [
            message for message in waiting if next_of[message.node] is not message
        ]


def _answer(message: Message, reply: Message) -> tuple[Message, int | None]:
    """Make a client's answer of a reply, and read the version of its state."""
    if reply.failure is not None:
        return message.fail(reply.failure.code, reply.failure.reason), None
    content = dict(reply.content)
    envelope = content.pop(ENVELOPE, None)
    version = envelope.get("version") if isinstance(envelope, Config) else None
    if not isinstance(version, int):
        return message.fail(
            CLIENT_FAILED, "its answer is not one of fedknow.client.flower_app"
        ), None
    return message.reply(content), version
