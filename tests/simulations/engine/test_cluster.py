"""Ray: one of our own whatever else runs or ran, or a cluster joined on purpose, in sentences."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import ray

from fedknow.protocols.config import ConfigError
from fedknow.simulations.engine import cluster
from fedknow.simulations.engine.cluster import one_ray, start_ray

WAIT = 120
"""Seconds that nothing takes, not even on a busy machine."""

CLOSED = "127.0.0.1:1"
"""An address at which nothing listens."""


@pytest.fixture
def place(monkeypatch):
    """A folder for Ray's files, with a short name, as Ray's sockets are in it."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield folder
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def head(place):
    """A Ray that somebody else started on this machine; its address."""
    line = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--num-cpus=1",
    ]
    with socket.create_server(
        ("127.0.0.1", 0)
    ) as free:  # Ray takes no 0 for this port
        line += [f"--ray-client-server-port={free.getsockname()[1]}"]
    line += ["--port=0", "--dashboard-agent-listen-port=0"]
    line += [
        "--include-dashboard=false",
        "--disable-usage-stats",
        "--object-store-memory=100000000",
    ]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    processes = []
    try:
        for text in process.stdout:
            if (
                "block forever" in text
            ):  # what it says when its address is written down
                break
        processes = psutil.Process(process.pid).children(recursive=True)
        yield (place / "ray" / "ray_current_cluster").read_text().strip()
    finally:
        ray.shutdown()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT)
        for left in psutil.wait_procs(processes, timeout=10)[1]:
            left.kill()


def joined():
    """The address of the Ray that this process is in."""
    return ray.get_runtime_context().gcs_address


def test_ray_is_our_own_beside_dead_clusters(place, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_REDIS_ADDRESS"):
        monkeypatch.setenv(name, CLOSED)
    (place / "ray").mkdir()
    (place / "ray" / "ray_current_cluster").write_text(CLOSED)
    handler = signal.getsignal(signal.SIGTERM)
    start_ray("")
    assert joined() != CLOSED
    assert os.environ["RAY_ADDRESS"] == CLOSED  # hidden from Ray alone
    assert signal.getsignal(signal.SIGTERM) is handler


def test_beside_a_cluster_that_runs(head, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", head)
    with one_ray(""):
        assert joined() != head
    start_ray(head)
    assert joined() == head
    ray.shutdown()
    monkeypatch.setattr(ray, "__version__", "1.2.3")
    with pytest.raises(
        ConfigError, match=r"cannot be joined: .*ersion mismatch.*2\.\d.*1\.2\.3"
    ) as told:
        start_ray(head)
    assert str(told.value).startswith(f"engine.address = {head!r}")
    assert "\n" not in str(told.value)


def refused(address):
    with pytest.raises(ConnectionError) as told:
        start_ray(address)
    assert not ray.is_initialized()
    return str(told.value)


@pytest.mark.parametrize("address", [CLOSED, "nowhere.invalid:6379"])
def test_nobody_at_the_address(place, address):
    text = refused(address)
    assert text.startswith(
        f"engine.address = {address!r}: no Ray cluster answers"
    )
    assert "HOST:PORT" in text


def test_what_listens_at_the_address_is_no_ray(place, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("", 0)) as server:
        assert "what listens is none" in refused(
            f"127.0.0.1:{server.getsockname()[1]}"
        )


def test_the_cluster_that_is_looked_up_is_gone(place):
    (place / "ray").mkdir()
    (place / "ray" / "ray_current_cluster").write_text(CLOSED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "RAY_ADDRESS", CLOSED
        )  # so that no other Ray on this machine is found
        assert refused("auto").startswith(
            "engine.address = 'auto': no Ray cluster answers"
        )


@pytest.mark.parametrize("address", ["nonsense", "local", "host:port"])
def test_an_address_that_is_none(place, address):
    with pytest.raises(
        ConfigError, match=f"engine.address = '{address}': .* cannot be joined"
    ):
        start_ray(address)


def test_ray_cannot_start(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    with pytest.raises(
        ConfigError,
        match=r"cannot be started.*RAY_TMPDIR.*engine\.backend=inline",
    ):
        start_ray("")


def test_what_cannot_be_imported_meanwhile_is_raised(monkeypatch):
    monkeypatch.setattr(cluster, "start_ray", lambda address, code: None)
    with (
        pytest.raises(ModuleNotFoundError, match="no_such_module"),
        one_ray("", "no_such_module"),
    ):
        pass


def test_sigterm_while_ray_starts_is_left_to_the_handler_before(monkeypatch):
    class Ended(BaseException):
        pass

    def end(number, frame):
        raise Ended

    def init(**options):
        signal.signal(
            signal.SIGTERM, lambda number, frame: sys.exit(number)
        )  # as Ray does
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(Ended):
            start_ray("")
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)
