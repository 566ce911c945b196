"""A node and the states of its clients: what one worker runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, cast

import torch

from fedknow.client.compute.heap import retain_freed_memory
from fedknow.client.state import State, StateLost, StateStore
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.extras import how_to_install
from fedknow.protocols.messages import (
    END_TASK,
    STATE_LOST,
    TRAIN,
    Message,
    client_of,
)

if TYPE_CHECKING:
    from fedknow.client.data.stream import TaskStream
    from fedknow.client.node import Node

__all__ = ["Answerer", "Host", "one_thread", "secured", "successor"]


class Answerer(Protocol):
    """A pure node: state in, state out (:class:`fedknow.client.node.Node`)."""

    def handle(self, message: Message, state: State) -> tuple[Message, State]:
        """Answer a message.

        The state given is not changed, and is given back itself where nothing is new.
        """
        ...


class Host:
    """Answers messages to any client.

    It takes the client's state from a store and puts it back under a new version.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment.
    stream : TaskStream or None
        The clients' data; ``None`` where a node is given.
    store : StateStore
        The clients' states.
    node : Answerer, optional
        What answers; by default :class:`fedknow.client.node.Node` of the two above.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        stream: TaskStream | None,
        store: StateStore,
        node: Answerer | None = None,
    ) -> None:
        if node is None:
            from fedknow.client.node import Node

            assert stream is not None  # as said above
            node = secured(Node(config, stream), config)
        self.node = node
        self.store = store
        retain_freed_memory()

    def handle(self, message: Message, version: int) -> tuple[Message, int]:
        """Answer a message for a client whose state has the given version.

        Returns
        -------
        tuple of Message and int
            The answer and the version of the client's state after it: the same where the state
            did not change. A state that is missing or damaged is a failure with the code
            ``STATE_LOST``: the server decides what follows.

        Raises
        ------
        StateError
            If the state cannot be written, or could be read at another time.
        """
        try:
            state = self.store.load(client_of(message.node), version)
        except StateLost as error:
            # The server decides what becomes of the client: its own failure says why.
            return message.fail(STATE_LOST, str(error)), version
        reply, new = self.node.handle(message, state)
        return reply, self._store_state(message, version, state, new)

    def handle_many(
        self, messages: Sequence[Message], versions: Mapping[int, int]
    ) -> Iterator[tuple[Message, int]]:
        """Answer messages, each from the state that the client's last one left.

        Clients that the node can train at once (:attr:`fedknow.client.node.Node.at_once`) are.

        Parameters
        ----------
        messages : sequence of Message
            The work.
        versions : mapping of int to int
            Versions of the clients' states; clients that are not in it are fresh.

        Yields
        ------
        tuple of Message and int
            The answers, in the order of the messages, as :meth:`handle` gives them.
        """
        # A copy, as a client may have several pieces of work in one batch.
        current = dict(versions)
        for group in self._groups(messages):
            clients = [client_of(message.node) for message in group]
            answers = self._handle_group(
                group, [current.get(client, 0) for client in clients]
            )
            current.update(
                (client, version)
                for client, (_, version) in zip(clients, answers, strict=True)
            )
            yield from answers

    def _handle_group(
        self, group: Sequence[Message], versions: Sequence[int]
    ) -> list[tuple[Message, int]]:
        """Answer messages that the node takes at once."""
        # The plain way: stacking one client would only cost time.
        if len(group) == 1:
            return [self.handle(group[0], versions[0])]
        answers: dict[int, tuple[Message, int]] = {}
        states: dict[int, State] = {}
        for place, (message, version) in enumerate(
            zip(group, versions, strict=True)
        ):
            try:
                states[place] = self.store.load(client_of(message.node), version)
            except StateLost as error:
                answers[place] = message.fail(STATE_LOST, str(error)), version
        readable = [group[place] for place in states]
        node = cast("Node", self.node)
        for place, (reply, new) in zip(
            states,
            node.train_together(readable, list(states.values())),
            strict=True,
        ):
            version = self._store_state(
                group[place], versions[place], states[place], new
            )
            answers[place] = reply, version
        return [answers[place] for place in range(len(group))]

    def _groups(self, messages: Sequence[Message]) -> Iterator[list[Message]]:
        """Group neighbouring messages that the node answers at once.

        They are of one kind of training, and for different clients.
        """
        # A user's node need not have it.
        limit = getattr(self.node, "at_once", 1)
        group: list[Message] = []
        for message in messages:
            # The same client twice: its second work starts from the state that the first one
            # leaves.
            is_trainable = message.kind in (
                TRAIN,
                END_TASK,
            ) and message.node not in {member.node for member in group}
            if group and not (
                is_trainable
                and group[0].kind == message.kind
                and len(group) < limit
            ):
                yield group
                group = []
            group.append(message)
        if group:
            yield group

    def _store_state(
        self, message: Message, version: int, old: State, new: State
    ) -> int:
        """Store a client's state where it has changed; give its version."""
        # Scoring changes nothing, and a learner without a state needs no file.
        if new is old or not (new or old):
            return version
        # From the work's id: the same work done twice gives the same file.
        version = successor(version, message.id)
        self.store.save(client_of(message.node), version, new)
        return version


def secured(
    node: Answerer, config: ExperimentConfig, is_real: bool = False
) -> Answerer:
    """Have a node protect its updates where the experiment says so.

    First noise is added (:mod:`fedknow.client.noise`), then masks.

    Parameters
    ----------
    node : Answerer
        Does the work.
    config : ExperimentConfig
        With the section ``privacy``.
    is_real : bool
        The client is a real one, whose noise nobody else may know.

    Raises
    ------
    ConfigError
        If the package for it is not installed.
    """
    if config.privacy.clip:
        # Only here: it is an answerer itself, and knows this module.
        from fedknow.client.noise import NoisyNode

        node = NoisyNode(node, config, is_real)
    if not config.privacy.secure:
        return node
    try:
        from fedknow.client.secure import SecureNode
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"privacy.secure = true: the package {error.name} is missing; "
            f"{how_to_install('secure')}"
        ) from None
    return SecureNode(node, config)


def successor(version: int, id: str) -> int:
    """Give the version of a client's state after it answered a message.

    It is a 48-bit digest of the version before and the message's id, never 0.

    The same work done again gives the same version, and other work on the same state another,
    so that a file is never replaced by one with other content, whatever was lost, refused or
    done twice in between.
    """
    return (
        int.from_bytes(
            hashlib.blake2b(f"{version}:{id}".encode(), digest_size=6).digest(),
            "big",
        )
        # 0 stands for a client without a state.
        or 1
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, as every worker does.

    Sums are then taken in one order everywhere.
    """
    old = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(old)
