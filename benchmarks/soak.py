"""Honest clients under thousands of hostile connections.

    python benchmarks/soak.py --connections 5000 --clients 20
    python benchmarks/soak.py --kinds --connections 400      # what each kind costs the server

Honest clients do rounds of work twice: undisturbed, and while another process opens hostile
connections of every kind: silent ones, noise, streams without a word, watchers of health, bad
hellos, and streams that are reset at once. Prints the mean time of a round in both cases, their
ratio and what the server turned away. Both processes share this machine, so the hostile one
takes its time from the honest ones too.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedknow.client.edge.client import EdgeClient
from fedknow.protocols.config import read_config
from fedknow.protocols.messages import (
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
    node_of,
)
from fedknow.protocols.wire import JOIN
from fedknow.server.grids.grpc_grid import GrpcGrid

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WATCH = "/grpc.health.v1.Health/Watch"
DATA, HEADERS, RESET, SETTINGS = 0, 1, 3, 4
END_HEADERS = 4


@dataclass(frozen=True)
class Soak:
    """How large a soak is.

    Attributes
    ----------
    connections : int
        Hostile connections, all held open at once.
    clients, rounds : int
        Honest clients, and rounds of their work.
    seconds : float
        How long a client takes for a piece of work.
    parameters : int
        Numbers that travel each way.
    """

    connections: int = 5000
    clients: int = 20
    rounds: int = 100
    seconds: float = 0.2
    parameters: int = 50_000


# --- hostile connections


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    """Make a frame of HTTP/2 (RFC 9113, section 4.1)."""
    head = len(body).to_bytes(3, "big") + bytes([kind, flags])
    return head + stream.to_bytes(4, "big") + body


def call(path: str, stream: int) -> bytes:
    """Make the headers of a gRPC call, as literals without an index."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    block = b""
    for name, value in headers.items():
        block += b"\0" + bytes([len(name)]) + name.encode()
        block += bytes([len(value)]) + value.encode()
    return frame(HEADERS, END_HEADERS, stream, block)


def message(body: bytes, stream: int) -> bytes:
    """Make a gRPC message of a call."""
    return frame(DATA, 0, stream, b"\0" + len(body).to_bytes(4, "big") + body)


def opening() -> bytes:
    """Make what a client of HTTP/2 says first."""
    return PREFACE + frame(SETTINGS, 0, 0)


def resets() -> bytes:
    """Make many calls, each reset at once."""
    text = opening()
    for stream in range(1, 101, 2):
        text += call(JOIN, stream)
        text += frame(RESET, 0, stream, (8).to_bytes(4, "big"))
    return text


ATTACKS: dict[str, Callable[[], bytes]] = {
    "silent": bytes,
    "noise": lambda: random.randbytes(512),
    "no stream": opening,
    "no hello": lambda: opening() + call(JOIN, 1),
    "watcher": lambda: opening() + call(WATCH, 1) + message(b"", 1),
    "bad hello": lambda: opening() + call(JOIN, 1) + message(b"\xff" * 64, 1),
    "resets": resets,
}
"""What hostile connections say, by kind."""


async def attack(port: int, connections: int, kinds: Sequence[str]) -> None:
    """Open hostile connections of some kinds, and hold them until stdin ends."""
    held: list[asyncio.StreamWriter] = []
    failures: collections.Counter[int] = collections.Counter()
    makers = itertools.cycle([ATTACKS[kind] for kind in kinds])
    for number, words in zip(range(connections), makers, strict=False):
        # Of many addresses: the whole of 127.0.0.0/8 is this machine.
        source = f"127.0.{1 + number % 200}.{1 + number // 200 % 200}"
        try:
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port, local_addr=(source, 0)
            )
            writer.write(words())
            held.append(writer)
        except OSError as error:
            # A server may close it, which is its good right.
            failures[error.errno or 0] += 1
    print(len(held), flush=True)
    print(f"failures by errno: {dict(failures)}", file=sys.stderr)
    await asyncio.to_thread(sys.stdin.read)


@contextmanager
def under_attack(
    port: int,
    connections: int,
    opened: list[int],
    kinds: Sequence[str] = tuple(ATTACKS),
) -> Iterator[threading.Event]:
    """Have another process attack meanwhile.

    Parameters
    ----------
    port : int
    connections : int
        How many to open.
    opened : list of int
        Is told how many came through.
    kinds : sequence of str
        Of :data:`ATTACKS`.

    Yields
    ------
    threading.Event
        Set once all have been tried.
    """
    is_open = threading.Event()
    words = [sys.executable, __file__, "--attack", str(port)]
    words += ["--connections", str(connections), "--only", *kinds]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def wait(lines: IO[bytes]) -> None:
            opened.append(int(lines.readline() or 0))
            is_open.set()

        thread = threading.Thread(target=wait, args=[process.stdout])
        thread.start()
        try:
            yield is_open
        finally:
            process.stdin.close()
            process.wait(60)
            thread.join(60)


# --- honest clients


class Waiting:
    """A node that takes its time and adds one to what it is sent."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def handle(self, work: Message, state: Any) -> tuple[Message, Any]:
        """Answer work."""
        time.sleep(self._seconds)
        arrays = Arrays(
            {name: array + np.float32(1) for name, array in work.arrays().items()}
        )
        metrics = Metrics({"num-examples": 1})
        return work.reply({"arrays": arrays, "metrics": metrics}), state


@contextmanager
def honest(grid: GrpcGrid, soak: Soak, folder: Path) -> Iterator[None]:
    """Have honest clients take part meanwhile."""
    threads = []
    for client in range(soak.clients):
        edge = EdgeClient(
            f"127.0.0.1:{grid.port}",
            folder / str(client),
            client=client,
            node=lambda config: Waiting(soak.seconds),
        )
        thread = threading.Thread(target=asyncio.run, args=[edge.run()])
        thread.start()
        threads.append(thread)
    try:
        yield
    finally:
        grid.finish()
        for thread in threads:
            thread.join(60)


def rounds(
    grid: GrpcGrid, soak: Soak, is_open: threading.Event | None = None
) -> float:
    """Do all rounds, and more until the attack is complete.

    Returns
    -------
    float
        Mean seconds of a round.

    Raises
    ------
    AssertionError
        If an answer is missing or wrong.
    """
    arrays = Arrays({"w": np.zeros(soak.parameters, np.float32)})
    began = time.perf_counter()
    number = 0
    while number < soak.rounds or not (is_open is None or is_open.is_set()):
        number += 1
        content = {
            "arrays": arrays,
            "config": Config({"task": 0, "round": number}),
        }
        work = [
            Message(TRAIN, node_of(client), "", content=content)
            for client in range(soak.clients)
        ]
        replies = grid.exchange(work)
        assert len(replies) == soak.clients
        for reply in replies:
            assert reply.failure is None, reply.failure
            assert (reply.arrays()["w"] == 1).all()
    return (time.perf_counter() - began) / number


def run(soak: Soak) -> dict[str, Any]:
    """Do the rounds undisturbed and under attack.

    Returns
    -------
    dict
        ``alone`` and ``attacked``, mean seconds of a round; their ``ratio``; the server's
        ``doors`` and ``refusals``; ``peak_mb``: the largest memory of the process of server
        and clients; ``opened``: hostile connections that came through.
    """
    config = read_config({"data": {"clients": soak.clients}})
    seconds: dict[str, float] = {}
    opened: list[int] = []
    with tempfile.TemporaryDirectory() as name:
        for kind in ("alone", "attacked"):
            grid = GrpcGrid(config, "127.0.0.1:0")
            with honest(grid, soak, Path(name) / kind):
                # All are here before the clock starts.
                grid.exchange([Message(TRAIN, node_of(0), "", content={})])
                if kind == "alone":
                    seconds[kind] = rounds(grid, soak)
                else:
                    attacked = under_attack(grid.port, soak.connections, opened)
                    with attacked as is_open:
                        seconds[kind] = rounds(grid, soak, is_open)
                status = grid.status()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "connections": soak.connections,
        "opened": sum(opened),
        "clients": soak.clients,
        "alone": round(seconds["alone"], 3),
        "attacked": round(seconds["attacked"], 3),
        "ratio": round(seconds["attacked"] / seconds["alone"], 3),
        "doors": status["doors"],
        "refusals": status["refusals"],
        "peak_mb": round(peak, 1),
    }


def costs(connections: int, seconds: float = 15.0) -> dict[str, float]:
    """Measure what a hostile connection costs an idle server.

    Each kind is held open until the server has ended what it ends by itself.

    Returns
    -------
    dict of str to float
        Milliseconds of processor time of a connection, by kind.
    """
    spent: dict[str, float] = {}
    for kind in ATTACKS:
        grid = GrpcGrid(read_config({"data": {"clients": 20}}), "127.0.0.1:0")
        began = time.process_time()
        with under_attack(grid.port, connections, [], [kind]) as is_open:
            is_open.wait()
            time.sleep(seconds)
            used = time.process_time() - began
        spent[kind] = round(1e3 * used / connections, 2)
        grid.close()
    return spent


def main() -> None:
    """Run the command."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--connections", type=int, default=Soak.connections)
    options.add_argument("--clients", type=int, default=Soak.clients)
    options.add_argument("--rounds", type=int, default=Soak.rounds)
    options.add_argument("--kinds", action="store_true")
    options.add_argument("--attack", type=int, help=argparse.SUPPRESS)
    options.add_argument(
        "--only", nargs="+", default=list(ATTACKS), help=argparse.SUPPRESS
    )
    chosen = options.parse_args()
    # Each connection takes a descriptor, here and in the process that attacks.
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    if chosen.attack:
        asyncio.run(attack(chosen.attack, chosen.connections, chosen.only))
        return
    if chosen.kinds:
        print(json.dumps(costs(chosen.connections), indent=1))
        return
    soak = Soak(chosen.connections, chosen.clients, chosen.rounds)
    print(json.dumps(run(soak), indent=1))


if __name__ == "__main__":
    main()
