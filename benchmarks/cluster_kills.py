"""Kill nodes, workers and drivers of a cluster at random.

    python benchmarks/cluster_kills.py                  50 kills, a few minutes each ten
    python benchmarks/cluster_kills.py --kills 1 --only node

The cluster is a Ray head and two further nodes on this machine. Each of the two has a disk of its
own where the run folders lie (a mount namespace, which needs root), so client states must travel.
A killed node is started again, a killed driver is resumed. The numbers must stay the same: each
run's last checkpoint is compared with that of a run in one process, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import psutil

EXPERIMENT = [
    "data.clients=6",
    "data.tasks=2",
    "train.rounds=3",
    "train.epochs=1",
    "learner=fedknow",
    "engine.memory_mb=16",
]
KINDS = ("node", "worker", "driver")
HANG_SECONDS = 60.0
"""Seconds without a word of a run, in its metrics or its log, after which it hangs."""
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
QUIET = [
    "--disable-usage-stats",
    "--object-store-memory=100000000",
    "--num-cpus=1",
]


class Node:
    """A Ray node in processes of its own.

    Parameters
    ----------
    line : list of str
        What starts it.
    runs : Path or None
        Folder in whose place it has an empty disk of its own; None: it sees all.
    environment : dict of str to str
    """

    def __init__(
        self, line: list[str], runs: Path | None, environment: dict[str, str]
    ) -> None:
        self._line = line
        if runs is not None:
            hide = f'mount -t tmpfs none "{runs}" && exec "$@"'
            self._line = ["unshare", "--mount", "bash", "-c", hide, "bash", *line]
        self._environment = environment
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        process = subprocess.Popen(
            self._line,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment,
        )
        for text in process.stdout:
            # What it says once it is up.
            if "block forever" in text:
                return process
        raise RuntimeError(f"{' '.join(self._line)}: ended")

    def kill(self) -> None:
        """End all its processes at once, as a power cut does."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        for process in [*family, self.process]:
            if process.pid != os.getpid():
                process.kill() if psutil.pid_exists(process.pid) else None
        self.process.wait()
        psutil.wait_procs(family, timeout=10)

    def restart(self) -> None:
        """Start it again."""
        self.process = self._start()

    def workers(self) -> list[psutil.Process]:
        """Return its processes that are workers of a run."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in family if is_worker(process)]


def is_worker(process: psutil.Process) -> bool:
    """Return whether a process is a Ray actor of ours."""
    try:
        return "ray::Worker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


class Cluster:
    """A head and further nodes, to be closed.

    Parameters
    ----------
    place : Path
        For Ray's files.
    runs : Path or None
        Folder that the further nodes do not see.
    nodes : int
        Further nodes.
    notice : float
        Seconds after which Ray notices a node's death; 0: its default, 15 or more.
    """

    def __init__(
        self, place: Path, runs: Path | None, nodes: int, notice: float = 0
    ) -> None:
        self._stack = ExitStack()
        environment = dict(os.environ, RAY_TMPDIR=str(place))
        environment.pop("RAY_ADDRESS", None)
        if notice:
            environment |= {
                "RAY_health_check_initial_delay_ms": "0",
                "RAY_health_check_period_ms": str(int(notice * 1000 / 3)),
                "RAY_health_check_failure_threshold": "3",
            }
        self._runs, self._environment = runs, environment
        port = free_port()
        # Not the loopback address, which Ray takes for its own.
        self.host = subprocess.run(
            ["hostname", "-I"], capture_output=True, text=True, check=True
        ).stdout.split()[0]
        self.address = f"{self.host}:{port}"
        head = [
            *RAY,
            "--head",
            f"--port={port}",
            f"--node-ip-address={self.host}",
        ]
        head += [f"--ray-client-server-port={free_port()}"]
        head += [
            "--include-dashboard=false",
            *QUIET,
            "--dashboard-agent-listen-port=0",
        ]
        self.nodes = [self._add(head, None, environment)]
        for _ in range(nodes):
            self.add_node()

    def add_node(self) -> Node:
        """Have a machine join."""
        further = [*RAY, f"--address={self.address}", *QUIET]
        further += ["--dashboard-agent-listen-port=0"]
        node = self._add(further, self._runs, self._environment)
        self.nodes.append(node)
        return node

    def _add(
        self, line: list[str], runs: Path | None, environment: dict[str, str]
    ) -> Node:
        node = Node(line, runs, environment)
        self._stack.callback(node.kill)
        return node

    def close(self) -> None:
        """End all nodes."""
        self._stack.close()


def free_port() -> int:
    with socket.create_server(("", 0)) as free:
        return int(free.getsockname()[1])


def simulate(change: str) -> list[str]:
    """Return the command of a run with one more change."""
    line = [sys.executable, "-m", "fedknow", "simulate", "digits"]
    for setting in [*EXPERIMENT, change]:
        line += ["--set", setting]
    return line


class Driver:
    """A run of ``fedknow simulate`` in a process of its own."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        line = [*simulate(f"engine.address={address}"), "--out", str(folder)]
        if (folder / "config.toml").exists():
            line.append("--resume")
        self.log = folder.with_suffix(".log")
        with self.log.open("a") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log)
        self.longest = 0.0
        self._seen = (0, time.monotonic())

    def poll(self) -> int | None:
        """Return the exit code, or None; note for how long nothing was said."""
        # Its log counts too: a run that waits says for what.
        size = sum(
            path.stat().st_size
            for path in (self.folder / "metrics.jsonl", self.log)
            if path.exists()
        )
        if size != self._seen[0]:
            self._seen = (size, time.monotonic())
        self.longest = max(self.longest, time.monotonic() - self._seen[1])
        return self.process.poll()

    def kill(self) -> None:
        """End it at once."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def numbers(folder: Path) -> str:
    """Return the checksums of the last checkpoint's parameters."""
    from fedknow.server.run.checkpoint import load_checkpoint

    arrays = load_checkpoint(folder / "checkpoint").arrays
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


def strike(
    kind: str, cluster: Cluster, driver: Driver, draw: random.Random
) -> str:
    """Kill something, and start again what does not come back by itself."""
    if kind == "driver":
        driver.kill()
        return "driver"
    node = draw.choice(cluster.nodes[1:])
    workers = node.workers()
    if kind == "worker" and workers:
        draw.choice(workers).kill()
        return "worker"
    node.kill()
    node.restart()
    return "node"


def run_once(
    cluster: Cluster,
    folder: Path,
    plan: list[tuple[float, str]],
    draw: random.Random,
) -> dict:
    """Do one run, and strike by plan; return what happened."""
    driver = Driver(folder, cluster.address)
    start, strikes, longest = time.monotonic(), Counter(), 0.0
    moment = start
    while True:
        code = driver.poll()
        longest = max(longest, driver.longest)
        if code == 0:
            break
        if code is not None:
            raise SystemExit(f"{folder}: exit code {code}; see {driver.log}")
        if driver.longest > HANG_SECONDS:
            driver.kill()
            raise SystemExit(
                f"{folder}: nothing for {driver.longest:.0f} s; it hangs"
            )
        if plan and time.monotonic() - moment >= plan[0][0]:
            kind = strike(plan.pop(0)[1], cluster, driver, draw)
            strikes[kind] += 1
            moment = time.monotonic()
            if kind == "driver":
                driver = Driver(folder, cluster.address)
        time.sleep(0.05)
    return {
        "seconds": round(time.monotonic() - start, 1),
        "longest_silence": round(longest, 1),
        "kills": dict(strikes),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per-run", type=int, default=3, help="kills in one run")
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument(
        "--notice",
        type=float,
        default=0,
        help="seconds after which Ray notices that a node died; 0: its default",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON of the results")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    place = Path(tempfile.mkdtemp(prefix="kills"))
    runs = place / "runs"
    runs.mkdir()
    line = [*simulate("engine.backend=inline"), "--out", str(place / "expected")]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    expected = numbers(place / "expected")
    results: list[dict] = []
    remaining = options.kills
    cluster = Cluster(place, runs, options.nodes, options.notice)
    try:
        while remaining > 0 or not results:
            count = min(remaining, options.per_run)
            # Some come while a run starts, and others late.
            plan = [
                (draw.uniform(1, 8), options.only or draw.choice(KINDS))
                for _ in range(count)
            ]
            folder = runs / f"run-{len(results)}"
            result = run_once(cluster, folder, plan, draw)
            result["same"] = numbers(folder) == expected
            remaining -= max(sum(result["kills"].values()), 0)
            results.append(result)
            print(json.dumps(result), flush=True)
    finally:
        cluster.close()
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    shutil.rmtree(place)
    return 0 if all(result["same"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
