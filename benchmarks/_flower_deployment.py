"""Flower's own deployment, and processes, for ``grpc_vs_flower.py``."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent


PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "echo"
version = "0.1.0"
description = "clients that return what they got"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.42"]

[tool.flwr.app]
publisher = "fedknow"

[tool.flwr.app.components]
serverapp = "echo.apps:server"
clientapp = "echo.apps:client"

[tool.flwr.app.config]
clients = 2
parameters = 1
rounds = 1
out = ""
"""


APPS = '''
"""As one writes it for Flower: nothing of ours."""
import json
import time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    arrays = next(iter(message.content.array_records.values()))
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

@server.main()
def main(grid, context):
    config = context.run_config
    while len(list(grid.get_node_ids())) < config["clients"]:
        time.sleep(0.5)
    rng = np.random.default_rng(0)
    parts = np.array_split(rng.random(config["parameters"], np.float32), 10)
    arrays = ArrayRecord({f"w{i}": Array(part) for i, part in enumerate(parts)})
    times = [time.time()]
    clients = config["clients"]
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    rounds = config["rounds"] + 1
    strategy.start(grid, arrays, rounds, evaluate_fn=lambda *_: times.append(time.time()))
    with open(config["out"], "w") as file:
        json.dump(times[1:], file)
'''


def flowers(
    clients: int, parameters: int, rounds: int, folder: Path
) -> list[float]:
    """Seconds of each round with Flower's deployment."""
    out = folder / "times.json"
    app = write_app(folder)
    link, *node_ports = _ports(1 + clients)
    address = f"127.0.0.1:{link}"
    write_home(folder, address)
    settings = (
        f'clients={clients} parameters={parameters} rounds={rounds} out="{out}"'
    )
    with ExitStack() as stack:
        stack.enter_context(process_of(superlink(link), folder / "superlink.log"))
        _answers(link, folder)
        for client, port in enumerate(node_ports):
            command = [
                *supernode(address, port),
                "--node-config",
                f"partition-id={client} num-partitions={clients}",
            ]
            log = folder / f"supernode-{client}.log"
            stack.enter_context(process_of(command, log))
        completed = run_app(app, settings)
        # In the block: once it is left, the processes are ended and their logs cut short.
        if not out.exists():
            raise SystemExit(
                completed.stdout[-3000:]
                + completed.stderr[-3000:]
                + logs_of(folder)
            )
    times: list[float] = json.loads(out.read_text())
    return [end - start for start, end in pairwise(times)]


def write_app(folder: Path) -> Path:
    """Write the Flower app, and return its folder."""
    app = folder / "app"
    (app / "echo").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "echo" / "__init__.py").write_text("")
    (app / "echo" / "apps.py").write_text(APPS)
    return app


def write_home(folder: Path, address: str) -> None:
    """Give ``flwr`` a home of its own, which names the SuperLink."""
    home = folder / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    )
    os.environ["FLWR_HOME"] = str(home)


def superlink(port: int) -> list[str]:
    """Return the command of Flower's server."""
    command = [str(BIN / "flower-superlink"), "--insecure"]
    return [*command, "--host", "127.0.0.1", "--port", str(port)]


def supernode(address: str, port: int) -> list[str]:
    """Return the command of a client of Flower, but for what it is told."""
    command = [str(BIN / "flower-supernode"), "--insecure"]
    return [*command, "--superlink", address, "--port", str(port)]


def run_app(app: Path, settings: str) -> subprocess.CompletedProcess[str]:
    """Run the Flower app to its end."""
    command = [str(BIN / "flwr"), "run", str(app), "here", "--stream"]
    return subprocess.run(
        [*command, "--run-config", settings],
        capture_output=True,
        text=True,
        timeout=3600,
    )


@contextmanager
def process_of(
    command: Sequence[str], log: Path, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in a session of its own; end it with all that it started."""
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with log.open("wb") as file:
        options = {"stdout": file, "stderr": file} | options
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, **options
        )
    try:
        yield process
    finally:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, kind)
                process.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        process.wait()


def _ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _answers(port: int, folder: Path) -> None:
    """Wait until something listens; Flower has no other way to tell."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit(logs_of(folder))


def logs_of(folder: Path) -> str:
    return "\n".join(
        f"== {file.name}\n{file.read_text('utf-8')[-2000:]}"
        for file in sorted(folder.glob("*.log"))
    )
