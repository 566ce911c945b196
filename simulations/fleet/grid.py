"""A grid whose clients have devices and links: the work is done for real, and arrives in virtual time."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
from flwr.app import Message as FlowerMessage
from flwr.app import MessageType

from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.messages import (
    EVALUATE,
    NO_ANSWER,
    OUT_OF_MEMORY,
    TRAIN,
    Message,
    Metrics,
    client_of,
    node_of,
)
from fedknow.protocols.seeds import generator, integer
from fedknow.protocols.texts import counted
from fedknow.protocols.work import FLOPS, MEMORY
from fedknow.server.checks.faults import RunError
from fedknow.server.grids.base import Answers, MessageGrid
from fedknow.server.grids.traffic import record_bytes
from fedknow.server.grids.wave import WaveOptions
from fedknow.simulations.fleet.availability import Always, Presence, make_presence
from fedknow.simulations.fleet.clock import Clock, Job, Timing
from fedknow.simulations.fleet.devices import Profile, assign, load_profiles
from fedknow.simulations.fleet.links import Links, make_links

__all__ = ["Fleet", "FleetGrid", "build_fleet"]

PATIENCE = 100_000
"""How often clients may come and go while the server waits for enough of them to be there at once."""


@dataclass(frozen=True)
class Fleet:
    """What clients are imagined to have.

    Attributes
    ----------
    names : list of str
        Of the clients' devices.
    profiles : list of Profile
        The devices themselves.
    links : Links
    presence : Presence
    """

    names: list[str]
    profiles: list[Profile]
    links: Links
    presence: Presence


def build_fleet(config: ExperimentConfig) -> Fleet:
    """The fleet of an experiment; the same for the same configuration and seed.

    Raises
    ------
    ConfigError
        If a device is unknown, their number is not that of the clients, or a file cannot be read.
    """
    clients, seed, fleet = config.data.clients, config.seed, config.fleet
    names = assign(fleet, clients, seed)
    known = load_profiles(fleet.profiles)
    links, presence = make_links(fleet, clients, seed), make_presence(fleet, seed)
    return Fleet(names, [known[name] for name in names], links, presence)


@dataclass
class _Account:
    """What a client's device did so far, while it was there: seconds, bytes, and counts of pieces
    of work."""

    computing: float = 0.0
    transfer: float = 0.0
    flops: float = 0.0
    """As far as it got."""
    down: float = 0.0
    up: float = 0.0
    memory: float = 0.0
    """Most that its work needed at once."""
    asked: int = 0
    answered: int = 0
    late: int = 0
    """Given up as the deadline, or so many others, came first."""
    lost: int = 0
    out_of_memory: int = 0


_Chance = tuple[tuple[float, float], float, bool]
"""Seconds that a request and its answer are under way, how much longer the work takes, whether the
answer is lost."""


@dataclass(frozen=True)
class _Wave:
    """What the work given out at one moment has in common; ``sizes`` are bytes of records, by
    identity."""

    due: float
    chances: Sequence[_Chance]
    is_sparse: bool
    sizes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Work:
    """A piece of work: the answer that is there already, and the job that says when it arrives."""

    message: Message
    reply: Message
    version: int
    flops: float
    job: Job

    def given_up(self) -> tuple[Message, int]:
        """What is told of work whose answer does not come."""
        return self.message.fail(
            NO_ANSWER, f"client {self.job.client}: no answer"
        ), self.version


class FleetGrid(MessageGrid):
    """Clients on imagined devices, in front of a grid that does their work.

    What an answer says it cost, and the bytes of request and answer, say when it arrives;
    whether it does is up to the device's memory, the deadline and chance. Nothing of this
    depends on real time or on the order in which the work is done for real, so neither on
    workers. Our own scoring is measurement: it takes no virtual time, and everybody is scored.

    A wave of work begins at one moment. It ends when all have answered, when the deadline is
    over, or with ``over_commit`` when as many have answered as were wanted; who has not
    answered then is told to stop. Telling clients that a task is over has no deadline, and no
    answer to it is lost.

    Parameters
    ----------
    inner : MessageGrid
        Has the work done.
    config : ExperimentConfig
    fleet : Fleet
    quorum : int
        Clients that must be there at once before any is given out; the clock goes on until they
        are.
    """

    is_timed = True

    def __init__(
        self,
        inner: MessageGrid,
        config: ExperimentConfig,
        fleet: Fleet,
        quorum: int = 1,
    ) -> None:
        super().__init__(inner.clients, inner.store, inner.versions)
        self.inner = inner
        self.settings = config.fleet
        self.devices = fleet
        self._seed = config.seed
        self._quorum = quorum
        self._clock = Clock(fleet.links, fleet.presence)
        self._accounts = [_Account() for _ in range(self.clients)]
        self._communication = self._computing = self._charged = 0.0
        self._waves = 0
        self._spare: set[str] = set()
        self._at_work: dict[str, _Work] = {}
        self._known: set[str] = set()
        self._early: list[tuple[Message, int]] = []

    # --- waves
    # ----------------------------------------------------------------------------------------------------

    def deliver(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Answers:
        """Have the work done and give the answers that arrive in time.

        See :meth:`Delivery.deliver`.

        Parameters
        ----------
        work, options
            See there.
        timeout : float or None
            Virtual seconds; ``fleet.deadline`` counts too.
        """
        if options.is_measurement:
            yield from self._perform(work, options)
            return
        self._begin(list(self._pushed.values()), options)
        wave = _Wave(self._due(work, timeout), self._chances(), options.is_sparse)
        # Else all answers that are not lost will arrive, and need not be kept until then.
        is_held_back = bool(options.enough) or wave.due < math.inf
        requests = {message.id: message for message in work}
        pieces: dict[str, _Work] = {}
        for reply, version in self._perform(work, options):
            piece = pieces[reply.reply_to] = self._piece(
                requests[reply.reply_to], reply, version, wave
            )
            if not is_held_back and not piece.job.lost:
                yield piece.reply, version
                pieces[reply.reply_to] = replace(
                    piece, reply=replace(piece.reply, content={})
                )
        # In the order given, however workers came to it: the clock depends on it.
        arrived = self._wave([pieces[message.id] for message in work], options.enough)
        if is_held_back:
            for piece in arrived:
                yield piece.reply, piece.version

    def _perform(self, work: Sequence[Message], options: WaveOptions) -> Answers:
        """Have the work done for real; who begins anew takes no virtual time for that."""
        return self.inner.perform(work, None, options)

    def _wave(self, pieces: Sequence[_Work], enough: int) -> list[_Work]:
        """Have the clock go on until a wave is over; return the pieces that arrived."""
        left = {piece.job.id for piece in pieces}
        for piece in pieces:
            self._give(piece)
        arrived: list[_Work] = []
        good = 0
        self._spare = set()
        while left and (timing := self._clock.step()):
            piece, came = self._close(timing)
            if timing.job.id not in left:  # pushed before, and to be pulled
                self._early.append(
                    (piece.reply, piece.version) if came else piece.given_up()
                )
                continue
            left.discard(timing.job.id)
            if came:
                arrived.append(piece)
                good += piece.reply.failure is None
            if enough and good == enough:
                self._spare, left = left, set()
                for beaten in self._clock.drop(sorted(self._spare)):
                    self._close(beaten)
            if not left:
                self._charge(timing)
        return arrived

    def _missed(
        self, work: Sequence[Message], answered: Collection[str]
    ) -> list[Message]:
        """See :meth:`MessageGrid._missed`; who was beaten by others is not missed."""
        missed = super()._missed(work, answered)
        return [message for message in missed if message.id not in self._spare]

    # --- pushed work
    # ----------------------------------------------------------------------------------------------

    @property
    def clock_time(self) -> float:
        """Virtual seconds since the run began."""
        return self._clock.now

    def wait(self, until: float) -> None:
        """See :meth:`MessageGrid.wait`."""
        self._clock.wait(until)

    def collect_answers(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Sequence[tuple[Message, int]]:
        """The first answer to arrive and all that arrive with it; see :meth:`Delivery.collect_answers`.

        Work that is not answered is given up at the deadline, or when its answer should have come.
        """
        self._begin(work, options)
        asked = {message.id for message in work}
        answers = [answer for answer in self._early if answer[0].reply_to in asked]
        self._early = [
            answer for answer in self._early if answer[0].reply_to not in asked
        ]
        until = math.inf if timeout is None else self.clock_time + timeout
        while timing := self._clock.step(self.clock_time if answers else until):
            piece, came = self._close(timing)
            answer = (piece.reply, piece.version) if came else piece.given_up()
            (answers if timing.job.id in asked else self._early).append(answer)
            self._charge(timing)
        self._known -= {reply.reply_to for reply, _ in answers}
        return sorted(answers, key=lambda answer: answer[0].node)

    def _begin(self, pushed: Sequence[Message], options: WaveOptions) -> None:
        """Have what was pushed and is not under way begin now."""
        new = [message for message in pushed if message.id not in self._known]
        if not new:
            return
        done = {
            reply.reply_to: (reply, version)
            for reply, version in self._perform(new, options)
        }
        wave = _Wave(self._due(new, None), self._chances(), options.is_sparse)
        for message in new:
            self._known.add(message.id)
            self._give(self._piece(message, *done[message.id], wave))

    # --- who is there
    # ---------------------------------------------------------------------------------------------

    def get_node_ids(self) -> list[int]:
        """Ids of the clients that are there; while too few are, and nobody is at work, the clock
        goes on.

        Raises
        ------
        RunError
            If there never seem to be enough at once.
        """
        self.gather(math.inf)
        return [node_of(client) for client in self._here()]

    def gather(self, until: float) -> None:
        """See :meth:`MessageGrid.gather`."""
        presence = self.devices.presence
        for _ in range(PATIENCE):
            here = self._here()
            if (
                len(here) >= self._quorum
                or not self._clock.idle
                or self.clock_time >= until
            ):
                return
            away = set(range(self.clients)) - set(here)
            self._clock.wait(
                min(
                    until,
                    *(presence.after(client, self.clock_time, 0.0) for client in away),
                )
            )
        raise RunError(
            f"fleet.availability: {counted(self._quorum, 'client')} wanted at once, which never were "
            f"there in {self.clock_time / 3600:.1f} h of virtual time"
        )

    def _here(self) -> Sequence[int]:
        presence = self.devices.presence
        if isinstance(presence, Always):
            return range(self.clients)
        return [
            client
            for client in range(self.clients)
            if presence.here(client, self.clock_time)
        ]

    def members(self) -> list[int]:
        """Ids of all clients."""
        return super().get_node_ids()

    # --- what there is to tell
    # ------------------------------------------------------------------------------------

    def elapsed(self) -> dict[str, float]:
        """See :class:`fedknow.server.run.events.VirtualTime`; what was neither communication nor computing
        was waiting."""
        return {
            "virtual_seconds": self.clock_time,
            "communication_seconds": self._communication,
            "computing_seconds": self._computing,
            "waiting_seconds": max(
                0.0, self.clock_time - self._communication - self._computing
            ),
            "energy_joules": sum(
                self._joules(client) for client in range(self.clients)
            ),
        }

    def fleet(self) -> dict[str, Any]:
        """What each client's device did: seconds computing, at messages, idle and away, joules,
        bytes, answers."""
        clients = []
        for client, account in enumerate(self._accounts):
            here = self.devices.presence.until(client, self.clock_time)
            idle = max(0.0, here - account.computing - account.transfer)
            share = account.computing / self.clock_time if self.clock_time else 0.0
            clients.append(
                {"client": client, "device": self.devices.names[client]}
                | vars(account)
                | {
                    "idle": idle,
                    "away": self.clock_time - here,
                    "utilisation": share,
                    "joules": self._joules(client),
                }
                | {"room": self.devices.profiles[client].room}
            )
        return self.elapsed() | {"clients": clients}

    def state(self) -> dict[str, Any]:
        """The clock and the accounts; work under way is not in it, as there is none between rounds."""
        accounts = {
            field.name: [getattr(account, field.name) for account in self._accounts]
            for field in fields(_Account)
        }
        spent = {"communication": self._communication, "computing": self._computing}
        return {
            "now": self.clock_time,
            "waves": self._waves,
            **spent,
            "accounts": accounts,
        }

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`MessageGrid.restore_state`."""
        self._clock = Clock(self.devices.links, self.devices.presence, state["now"])
        self._communication, self._computing = (
            state["communication"],
            state["computing"],
        )
        self._charged, self._waves = self.clock_time, state["waves"]
        columns = state["accounts"]
        self._accounts = [
            _Account(**{name: columns[name][c] for name in columns})
            for c in range(self.clients)
        ]

    # --- the grid that does the work
    # ------------------------------------------------------------------------------

    def note_unusable(self, reply: Message) -> None:
        """See :meth:`Delivery.note_unusable`."""
        self.inner.note_unusable(reply)

    def peak_memory_mb(self) -> float:
        """See :meth:`MessageGrid.peak_memory_mb`."""
        return self.inner.peak_memory_mb()

    def close(self) -> None:
        """Close the grid that does the work."""
        super().close()
        self.inner.close()

    # --- helpers
    # --------------------------------------------------------------------------------------------------

    def reserves(self, messages: Sequence[FlowerMessage]) -> list[FlowerMessage]:
        """Make messages to further present clients, drawn at random, with ``fleet.over_commit``.

        Raises
        ------
        ConfigError
            If a strategy does not send all clients the same.
        """
        sent = messages
        if (
            self.settings.over_commit <= 1
            or not sent
            or any(
                message.metadata.message_type != MessageType.TRAIN for message in sent
            )
        ):
            return []
        content = sent[0].content
        if any(message.content is not content for message in sent):
            raise ConfigError(
                f"fleet.over_commit = {self.settings.over_commit:g} needs a strategy that sends all clients the same; "
                "set it to 1"
            )
        others = sorted(
            set(self.get_node_ids())
            - {message.metadata.dst_node_id for message in sent}
        )
        count = min(
            math.ceil(len(sent) * self.settings.over_commit) - len(sent), len(others)
        )
        draw = random.Random(integer(self._seed, "fleet.more", self._waves))
        return [
            FlowerMessage(content, node, MessageType.TRAIN)
            for node in sorted(draw.sample(others, count))
        ]

    def _due(self, work: Sequence[Message], timeout: float | None) -> float:
        """Until when answers to a wave count."""
        deadline = self.settings.deadline if all(map(_can_fail, work)) else 0.0
        return self.clock_time + min(
            deadline or math.inf, math.inf if timeout is None else timeout
        )

    def _piece(
        self, message: Message, reply: Message, version: int, wave: _Wave
    ) -> _Work:
        """What becomes of a piece of work, from what its answer says it cost; a failure where
        memory lacks."""
        client = client_of(message.node)
        account, profile = self._accounts[client], self.devices.profiles[client]
        delays, slower, lost = wave.chances[client]
        account.asked += 1
        flops = seconds = 0.0
        if reply.failure is None:
            flops, memory = (_cost(reply, name) for name in (FLOPS, MEMORY))
            account.memory = max(account.memory, memory)
            if memory > profile.room:
                account.out_of_memory += 1
                flops = 0.0
                reply = message.fail(
                    OUT_OF_MEMORY,
                    f"out of memory: {self.devices.names[client]} has room for {profile.room / 1e6:,.0f} MB, "
                    f"{message.kind!r} needs {memory / 1e6:,.0f} MB",
                )
            else:
                seconds = flops / profile.speed * slower
        # Records that messages of a wave share are weighed once.
        for record in message.content.values():
            if id(record) not in wave.sizes:
                wave.sizes[id(record)] = record_bytes(record, wave.is_sparse)
        down = sum(wave.sizes[id(record)] for record in message.content.values())
        up = sum(
            record_bytes(record, wave.is_sparse) for record in reply.content.values()
        )
        account.down += down
        job = Job(
            message.id,
            client,
            down,
            seconds,
            up,
            delays,
            wave.due,
            lost and _can_fail(message),
        )
        return _Work(message, reply, version, flops, job)

    def _chances(self) -> list[_Chance]:
        """What is drawn for the work that each client may be given now."""
        self._waves += 1
        settings = self.settings
        if not (settings.jitter or settings.compute_sigma or settings.dropout):
            return [((settings.latency, settings.latency), 1.0, False)] * self.clients
        draw = generator(self._seed, "fleet.work", self._waves)
        delays = settings.latency + settings.jitter * draw.standard_exponential(
            (self.clients, 2)
        )
        slower = np.exp(settings.compute_sigma * draw.standard_normal(self.clients))
        lost = draw.random(self.clients) < settings.dropout
        down, up = delays.T.tolist()
        return list(
            zip(zip(down, up, strict=True), slower.tolist(), lost.tolist(), strict=True)
        )

    def _give(self, piece: _Work) -> None:
        self._at_work[piece.job.id] = piece
        self._clock.give(piece.job)

    def _close(self, timing: Timing) -> tuple[_Work, bool]:
        """Book what a piece of work came to; whether its answer came."""
        piece, account = (
            self._at_work.pop(timing.job.id),
            self._accounts[timing.job.client],
        )
        there = partial(self.devices.presence.between, timing.job.client)
        computing = there(timing.received, timing.computed)
        account.computing += computing
        account.transfer += there(timing.began, timing.received) + there(
            timing.computed, timing.arrived
        )
        whole = timing.computed < timing.ended or timing.complete
        account.flops += (
            piece.flops
            if whole
            else piece.flops * computing / (timing.job.seconds or math.inf)
        )
        if timing.job.lost:
            account.lost += 1
        elif not timing.complete:
            account.late += 1
        else:
            account.up += timing.job.up
            account.answered += piece.reply.failure is None
            return piece, True
        return piece, False

    def _charge(self, timing: Timing) -> None:
        """What the time since the last such moment went into: what the work did whose end the
        server waited for."""
        communication, computing = self._clock.shares(timing, self._charged)
        self._charged = self.clock_time
        self._communication += communication
        self._computing += computing

    def _joules(self, client: int) -> float:
        """Busy watts while it computed, idle watts while it was there besides; a client that is
        away draws none.

        NaN where the device's watts are not known.
        """
        profile, busy = self.devices.profiles[client], self._accounts[client].computing
        if profile.busy is None or profile.idle is None:
            return math.nan
        return profile.busy * busy + profile.idle * max(
            0.0, self.devices.presence.until(client, self.clock_time) - busy
        )


def _can_fail(message: Message) -> bool:
    """Whether the run can do without an answer: all but that a task is over."""
    return message.kind in (TRAIN, EVALUATE)


def _cost(reply: Message, name: str) -> float:
    metrics = next(
        (record for record in reply.content.values() if isinstance(record, Metrics)),
        Metrics(),
    )
    value = metrics.get(name)
    if not isinstance(value, int | float):
        client = client_of(reply.node)
        raise RunError(
            f"client {client} does not say what its work cost: a fleet needs {name!r} among its metrics"
        )
    return float(value)
