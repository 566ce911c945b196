"""The edge installation: without the extras each command works, or says which extra it needs.

Short form: processes that cannot import what the extras bring. Long form: a virtual environment
with the base dependencies alone.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fedknow.protocols.config import read_config
from fedknow.server import serve as servers
from fedknow.server.grids.grpc_grid import GrpcGrid

ROOT = Path(__file__).parents[2]
EDGE_ONLY = Path(__file__).parent / "edge_only"
WAIT = 120
"""Seconds that nothing takes, not even on a busy machine."""

CLOSED = "127.0.0.1:1"
"""An address at which no server listens."""

WORKING = [
    ["--version"],
    ["list", "learners"],
    ["list", "models"],
    ["list", "datasets"],
    ["list", "devices"],
    ["list", "devices", "jetson-nano"],
    ["list", "presets"],
    ["show", "digits", "--set", "learner=fedrep"],
]
NEEDING_AN_EXTRA = [
    (["list", "strategies"], "server"),
    (["certs", "certs", "--clients", "1"], "server"),
    (["report", "."], "server"),
    (["server", "digits", "--set", "data.name=local"], "server"),
    (["server", "digits"], "server,data"),
    (["simulate", "digits"], "sim"),
    (["simulate", "digits", "--set", "engine.backend=inline"], "sim"),
    (["compare", "digits"], "sim"),
    (["search", "digits"], "sim"),
    (["paper", "5.1"], "sim"),
    (["calibrate", "digits"], "sim"),
    (["split", "digits"], "sim"),
]
FAILING = [
    (["status", "--server", CLOSED], 1, f"{CLOSED} does not answer"),
    (
        ["status", "--server", "fl.invalid:1", "--insecure"],
        1,
        "fl.invalid:1 does not answer",
    ),
    (["status", "--server", "fl.invalid:1"], 2, "--insecure"),
    (["client", "--server", "fl.invalid:1"], 2, "--insecure"),
    (
        ["client", "--server", CLOSED, "--tls", "nowhere"],
        2,
        "nowhere: there is no",
    ),
]


def environment(**variables):
    path = os.pathsep.join(
        filter(None, [str(EDGE_ONLY), os.environ.get("PYTHONPATH")])
    )
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "200"} | variables


def named(line):
    return " ".join(line)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each command of the tables comes to, all in one process."""
    lines = [*WORKING, *(line for line, *_ in [*NEEDING_AN_EXTRA, *FAILING])]
    done = subprocess.run(
        [sys.executable, EDGE_ONLY / "commands.py"],
        input=json.dumps(lines),
        cwd=tmp_path_factory.mktemp("edge"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=WAIT,
    )
    assert done.returncode == 0, done.stderr
    found = dict(zip(map(named, lines), json.loads(done.stdout), strict=True))
    assert [outcome["traceback"] for outcome in found.values()] == [None] * len(
        lines
    )
    return found


@pytest.mark.parametrize("line", WORKING, ids=named)
def test_a_command_that_needs_no_extra_works(outcomes, line):
    outcome = outcomes[named(line)]
    assert outcome["code"] == 0, outcome
    assert outcome["out"]


@pytest.mark.parametrize(
    ("line", "extra"), NEEDING_AN_EXTRA, ids=lambda value: str(value)
)
def test_a_command_names_the_extra_that_is_enough_for_it(outcomes, line, extra):
    outcome = outcomes[named(line)]
    assert outcome["code"] == 2, outcome
    assert f"pip install '.[{extra}]'" in outcome["err"]
    assert "pip install 'fedknow" not in outcome["err"]  # it is on no index


@pytest.mark.parametrize(
    ("line", "code", "text"), FAILING, ids=lambda value: str(value)
)
def test_a_command_that_fails_says_why(outcomes, line, code, text):
    outcome = outcomes[named(line)]
    assert outcome["code"] == code, outcome
    assert text in outcome["err"]
    assert "pip install" not in outcome["err"]


# --- ways for a client to end
# -----------------------------------------------------------------------------------------


class EdgeProcess:
    """``fedknow client`` as a process of its own."""

    def __init__(self, program, server, place, *arguments, env=None):
        line = [
            *program,
            "client",
            "--server",
            server,
            "--state",
            place / "state",
            *arguments,
        ]
        self.process = subprocess.Popen(
            line,
            cwd=place,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines = []

    def read_until(self, text):
        """Read its log up to a line with this text."""
        for line in self.process.stderr:
            self.lines.append(line)
            if text in line:
                return
        raise AssertionError(f"ended without {text!r}: {self.lines}")

    def end(self):
        """Wait for its end; the exit code and all that it wrote."""
        rest = self.process.communicate(timeout=WAIT)[1]
        text = "".join(self.lines) + rest
        assert "Traceback" not in text, text
        assert ".[server]" not in text, text
        return self.process.returncode, text

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate(timeout=WAIT)


@pytest.fixture(scope="session")
def real_installation(tmp_path_factory):
    """``fedknow`` in a virtual environment with the base dependencies alone."""
    place = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    pip = [
        place / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        ROOT / "constraints.txt",
    ]
    source = place / "source"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, source], check=True)
    return place / "bin" / "fedknow"


@pytest.fixture(params=["blocked", pytest.param("venv", marks=pytest.mark.slow)])
def start(request, tmp_path):
    """Start a client on an edge installation: an imitated one, or in the long form a real one."""
    if request.param == "venv":
        program = [request.getfixturevalue("real_installation")]
        env = {
            key: value for key, value in os.environ.items() if key != "PYTHONPATH"
        }
    else:
        program, env = [sys.executable, "-m", "fedknow"], environment()
    started = []

    def make(server, *arguments, **variables):
        client = EdgeProcess(
            program, server, tmp_path, *arguments, env=env | variables
        )
        started.append(client)
        return client

    yield make
    for client in started:
        client.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_client_that_waits_for_its_server(start, number):
    client = start(CLOSED)
    client.read_until("reconnecting in")
    client.process.send_signal(number)
    code, text = client.end()
    assert code == 130, text
    assert text.endswith("Interrupted.\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("module", ["typer", "pydantic", "torch", "grpc"])
def test_a_signal_ends_a_client_that_is_loading(tmp_path, number, module):
    env = environment(SIGNAL_AT=module, SIGNAL=str(int(number)))
    client = EdgeProcess(
        [sys.executable, "-m", "fedknow"], CLOSED, tmp_path, env=env
    )
    assert client.end() == (130, "Interrupted.\n")


def test_a_client_gives_up(start):
    code, text = start(CLOSED, "--give-up", "0.1").end()
    assert code == 1, text
    assert "no connection for 0 s" in text


def test_an_unknown_server_ends_a_client_that_gives_up(start):
    code, text = start("fl.invalid:1", "--insecure", "--give-up", "0.1").end()
    assert code == 1, text
    assert "fl.invalid" in text


def test_a_client_that_is_refused_ends(start):
    grid = GrpcGrid(read_config({"data": {"clients": 1}}), "127.0.0.1:0", "run")
    try:
        code, text = start(f"127.0.0.1:{grid.port}", "--client", "4").end()
    finally:
        grid.close()
    assert code == 2, text
    assert "there is no client 4" in text


def test_a_client_whose_server_goes_gives_up(start):
    config = read_config(
        {
            "data": {
                "name": "local",
                "shape": [1, 8, 8],
                "classes": 2,
                "clients": 1,
            }
        }
    )
    grid = GrpcGrid(config, "127.0.0.1:0", "run")
    try:
        client = start(
            f"127.0.0.1:{grid.port}", "--data", ".", "--give-up", "0.1"
        )
        client.read_until("connected to")
    finally:
        grid.close()
    code, text = client.end()
    assert code == 1, text


def test_a_client_that_lacks_a_package_for_its_data_names_the_extra(start):
    grid = GrpcGrid(read_config({"data": {"clients": 1}}), "127.0.0.1:0", "run")
    try:
        code, text = start(f"127.0.0.1:{grid.port}", "--client", "0").end()
    finally:
        grid.close()
    assert code == 2, text
    assert "pip install '.[data]'" in text


def write_task(place):
    draw = np.random.default_rng(0)
    train, test = (
        draw.integers(0, 256, (count, 1, 8, 8), np.uint8) for count in (8, 4)
    )
    labels = [np.arange(len(images)) % 2 for images in (train, test)]
    np.savez(
        place / "task-000.npz",
        train_x=train,
        train_y=labels[0],
        test_x=test,
        test_y=labels[1],
    )


def test_a_client_takes_part_to_the_end(start, tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "write_report", lambda *_: None)
    write_task(tmp_path)
    data = {
        "name": "local",
        "shape": [1, 8, 8],
        "classes": 2,
        "clients": 1,
        "tasks": 1,
    }
    config = read_config(
        {
            "data": data,
            "model": {"name": "mlp", "hidden": 4},
            "train": {"rounds": 2, "epochs": 1},
        }
    )
    port, result = queue.SimpleQueue(), queue.SimpleQueue()

    def run():
        result.put(
            servers.serve(config, tmp_path / "run", "127.0.0.1:0", ready=port.put)
        )

    threading.Thread(target=run, daemon=True).start()
    code, text = start(f"127.0.0.1:{port.get(timeout=WAIT)}", "--data", ".").end()
    assert code == 0, text
    assert result.get(timeout=WAIT) is not None
