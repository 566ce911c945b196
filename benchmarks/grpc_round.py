"""Measure a round over gRPC, with clients that return what they received.

    python benchmarks/grpc_round.py [--quick] [--tls] [--out FILE]

Each setting is one server (a process of its own, as all of them) and so many clients over
loopback; a round is one wave: serialise, send, read, work through the clients' own code,
answer, read, check that the answers are finite. 100 connections are in 4 processes with 25
clients each: this machine has not the memory for 100 interpreters. Prints a line a setting;
``--out`` writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil

os.environ.setdefault("OMP_NUM_THREADS", "1")

RESNET = [
    *[(512, 512, 3, 3)] * 3,
    (512, 256, 3, 3),
    *[(256, 256, 3, 3)] * 3,
    (256, 128, 3, 3),
    *[(128, 128, 3, 3)] * 3,
]
"""The large tensors of a ResNet-18; small ones make up the rest of 122 tensors and 47 MB."""

SETTINGS = {
    "2 clients, 62 k": (2, 2, "62k", 100),
    "10 clients, 62 k": (10, 10, "62k", 100),
    "2 clients, 1 M": (2, 2, "1M", 50),
    "10 clients, 1 M": (10, 10, "1M", 30),
    "2 clients, 47 MB in 122 tensors": (2, 2, "resnet", 10),
    "100 connections, 62 k": (100, 4, "62k", 20),
    "100 connections, 1 M": (100, 4, "1M", 10),
}
"""Clients, processes that they are in, model, rounds."""


def model(name: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    if name == "resnet":
        shapes: list[tuple[int, ...]] = [*RESNET]
        remaining = 47_000_000 // 4 - sum(int(np.prod(shape)) for shape in shapes)
        tensors_more = 122 - len(shapes)
        shapes += [
            (remaining // tensors_more + (number < remaining % tensors_more),)
            for number in range(tensors_more)
        ]
    elif name == "62k":  # ten tensors, as a small convolutional network has
        shapes = [
            (6, 3, 5, 5),
            (6,),
            (16, 6, 5, 5),
            (16,),
            (120, 400),
            (120,),
            (84, 120),
            (84,),
            (10, 84),
            (10,),
        ]
    else:
        shapes = [(500, 500)] * 4
    return {
        f"w{number}": generator.normal(size=shape).astype(np.float32)
        for number, shape in enumerate(shapes)
    }


class Echo:
    """Answers with what it got."""

    def handle(self, message: Any, state: Any) -> tuple[Any, Any]:
        """Give the arrays back."""
        from fedknow.protocols.messages import ARRAYS, METRICS, Metrics

        return message.reply(
            {ARRAYS: message.arrays(), METRICS: Metrics({"num-examples": 1})}
        ), state


def serve(clients: int, name: str, rounds: int, tls: str) -> None:
    """Serve, and print the times of the rounds as JSON."""
    from fedknow.protocols.config import read_config
    from fedknow.protocols.messages import (
        ARRAYS,
        CONFIG,
        TRAIN,
        Arrays,
        Config,
        Message,
    )
    from fedknow.protocols.security import server_credentials
    from fedknow.server.grids.grpc_grid import GrpcGrid

    arrays = Arrays(model(name))
    config = read_config({"data": {"clients": clients}})
    credentials = server_credentials(Path(tls) / "server") if tls else None
    with GrpcGrid(config, "127.0.0.1:0", credentials=credentials) as grid:
        print(grid.port, flush=True)
        seconds = []
        for number in range(rounds + 3):
            content = {
                ARRAYS: arrays,
                CONFIG: Config({"task": 0, "round": number}),
            }
            work = [
                Message(TRAIN, node, "", content=content)
                for node in range(2, clients + 2)
            ]
            began = time.perf_counter()
            replies = grid.exchange(work)
            arrays = chain.from_iterable(
                reply.arrays().values() for reply in replies
            )
            finite = all(np.isfinite(array).all() for array in arrays)
            seconds.append(time.perf_counter() - began)
            assert finite
            assert len(replies) == clients
            del replies, content, work
        print("idle", flush=True)
        used = time.process_time()
        time.sleep(3)
        idle = (time.process_time() - used) / 3
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        figures = {"seconds": seconds[3:], "idle": idle, "memory": memory}
        print(json.dumps(figures), flush=True)
        grid.finish()


def take_part(port: int, start: int, count: int, tls: str) -> None:
    """Run a process of clients."""
    import torch

    from fedknow.client.edge.client import EdgeClient

    torch.set_num_threads(1)

    async def main(folder: Path) -> None:
        clients = []
        for number in range(start, start + count):
            identity = Path(tls) / "clients" / f"{number:03d}" if tls else None
            clients.append(
                EdgeClient(
                    f"127.0.0.1:{port}",
                    folder / str(number),
                    tls=identity,
                    client=number,
                    node=lambda _: Echo(),
                )
            )
        await asyncio.gather(*(client.run() for client in clients))

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))


def measure(
    clients: int, processes: int, name: str, rounds: int, tls: str
) -> dict[str, Any]:
    me = [sys.executable, __file__]
    server = subprocess.Popen(
        [*me, "--serve", str(clients), name, str(rounds), tls], stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert server.stdout is not None
    port = int(server.stdout.readline())
    share = clients // processes
    parts = [
        subprocess.Popen(
            [*me, "--take-part", str(port), str(number * share), str(share), tls]
        )
        for number in range(processes)
    ]
    assert server.stdout.readline() == "idle\n"
    used = sum(_cpu_seconds(part.pid) for part in parts)
    began = time.perf_counter()
    result: dict[str, Any] = json.loads(server.stdout.readline())
    idle = (
        (sum(_cpu_seconds(part.pid) for part in parts) - used)
        / (time.perf_counter() - began)
        / clients
    )
    for process in (*parts, server):
        assert process.wait(60) == 0
    seconds = result.pop("seconds")
    return {
        "clients": clients,
        "processes": processes,
        "model": name,
        "tls": bool(tls),
        "rounds": len(seconds),
        "median_seconds": statistics.median(seconds),
        "p90_seconds": sorted(seconds)[int(0.9 * len(seconds))],
        "min_seconds": min(seconds),
        "server_idle_cpu": result["idle"],
        "client_idle_cpu": idle,
        "server_peak_mb": result["memory"],
    }


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the rounds"
    )
    parser.add_argument(
        "--tls", action="store_true", help="over TLS, as between machines"
    )
    parser.add_argument(
        "--only", default="", help="settings that contain this text"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--take-part", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = read_options()
    if options.serve:
        serve(
            int(options.serve[0]),
            options.serve[1],
            int(options.serve[2]),
            options.serve[3],
        )
        return
    if options.take_part:
        take_part(*map(int, options.take_part[:3]), options.take_part[3])
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.tls:
            from fedknow.server.certs import make_certificates

            make_certificates(Path(folder), 100, [])
        for title, (clients, processes, name, rounds) in SETTINGS.items():
            if options.only not in title:
                continue
            rounds = max(5, rounds // 10) if options.quick else rounds
            result = measure(
                clients, processes, name, rounds, folder if options.tls else ""
            )
            result["load_before"] = os.getloadavg()[0]
            results[title] = result
            print(
                f"{title}: {1e3 * result['median_seconds']:.0f} ms (90 %: "
                f"{1e3 * result['p90_seconds']:.0f}), "
                f"idle CPU: server {100 * result['server_idle_cpu']:.1f} %, a client "
                f"{100 * result['client_idle_cpu']:.1f} %; server "
                f"{result['server_peak_mb']:.0f} MB",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
