"""The edge client and a proxy, over real sockets."""

import asyncio
import socket
import threading

import numpy as np
import pytest

from fedknow.client.edge.client import EdgeClient
from fedknow.client.edge.errors import EdgeError
from fedknow.client.edge.status import fetch_status
from fedknow.protocols.config import read_config
from fedknow.protocols.messages import (
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
    node_of,
)
from fedknow.protocols.security import (
    TlsError,
    TlsFault,
    handshake,
    server_credentials,
)
from fedknow.server.certs import make_certificates
from fedknow.server.grids.grpc_grid import GrpcGrid

NAME = "fl.example.test"
"""A name that only the proxy knows: whoever reaches it went through the proxy."""
WAIT = 30
VARIABLES = (
    "grpc_proxy",
    "https_proxy",
    "http_proxy",
    "no_grpc_proxy",
    "no_proxy",
    "NO_PROXY",
)


class FakeProxy:
    """An HTTP proxy that notes what it is asked for.

    It refuses, or tunnels to a port of this machine, whatever the name.
    """

    def __init__(self, port=None):
        self.requests = []
        self.target = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:  # closed
                return
            threading.Thread(
                target=self._answer, args=[client], daemon=True
            ).start()

    def _answer(self, client):
        with client:
            request = b""
            while b"\r\n\r\n" not in request:
                data = client.recv(4096)
                if not data:
                    return
                request += data
            self.requests.append(request.decode())
            if self.target is None:
                client.sendall(
                    b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
                )
                return
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(
                    target=pump, args=[server, client], daemon=True
                )
                back.start()
                pump(client, server)
                back.join(WAIT)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def pump(source, target):
    """Hand on what comes, to the end of either side."""
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # the other side is gone, which ends the tunnel
        return


class Echo:
    """A node that sends back what it gets."""

    def handle(self, message, state):
        content = {
            "arrays": message.arrays(),
            "metrics": Metrics({"num-examples": 1}),
        }
        return message.reply(content), state


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def proxy():
    made = []

    def make(port=None):
        made.append(FakeProxy(port))
        return made[-1]

    yield make
    for it in made:
        it.close()


@pytest.fixture
def grid():
    made = []

    def make(**options):
        made.append(
            GrpcGrid(
                read_config({"data": {"clients": 1}}),
                "127.0.0.1:0",
                "run",
                **options,
            )
        )
        return made[-1]

    yield make
    for it in made:
        it.close()


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certs") / "run"
    make_certificates(folder, 1, [NAME])
    return folder


def take_part(it, server, state, tls=None):
    """Have a client do one piece of work, and end."""
    client = EdgeClient(server, state, tls=tls, node=lambda config: Echo())
    thread = threading.Thread(
        target=lambda: asyncio.run(client.run()), daemon=True
    )
    thread.start()
    content = {
        "arrays": Arrays({"w": np.ones(2, np.float32)}),
        "config": Config({"task": 0, "round": 1}),
    }
    (reply,) = it.exchange([Message(TRAIN, node_of(0), "", content=content)])
    assert reply.failure is None
    it.finish()
    thread.join(WAIT)
    assert not thread.is_alive()


def give_up(server, state, tls=None):
    """What a client says that cannot connect."""
    client = EdgeClient(server, state, tls=tls, give_up=0.01)
    with pytest.raises(EdgeError) as caught:
        asyncio.run(client.run())
    return str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_reached_without_the_proxy(
    grid, proxy, tmp_path, monkeypatch, host
):
    fake = proxy()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{fake.port}")
    it = grid()
    assert fetch_status(f"{host}:{it.port}")
    take_part(it, f"{host}:{it.port}", tmp_path)
    assert fake.requests == []


def test_another_machine_is_reached_through_the_proxy(
    grid, proxy, tmp_path, monkeypatch
):
    it = grid()
    fake = proxy(it.port)
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{fake.port}")
    assert fetch_status(f"{NAME}:8700")
    take_part(it, f"{NAME}:8700", tmp_path)
    assert len(fake.requests) == 2
    for request in fake.requests:
        assert request.startswith(f"CONNECT {NAME}:8700 HTTP/1.1\r\n")
        assert "Basic bWU6c2VjcmV0" in request


def test_tls_goes_through_the_proxy(grid, proxy, certs, tmp_path, monkeypatch):
    it = grid(credentials=server_credentials(certs / "server"))
    fake = proxy(it.port)
    monkeypatch.setenv("https_proxy", f"127.0.0.1:{fake.port}")
    tls = certs / "clients" / "000"
    handshake(f"{NAME}:8700", tls)
    take_part(it, f"{NAME}:8700", tmp_path, tls)
    assert len(fake.requests) == 2


@pytest.mark.parametrize(
    "exceptions", ["*", NAME, "*.example.test", ".test", "a, example.test"]
)
def test_no_proxy_leaves_a_server_out(proxy, tmp_path, monkeypatch, exceptions):
    fake = proxy()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{fake.port}")
    monkeypatch.setenv("no_proxy", exceptions)
    text = give_up(f"{NAME}:8700", tmp_path)
    assert "proxy" not in text
    assert fake.requests == []


def test_a_proxy_that_refuses_is_named_without_its_password(
    proxy, tmp_path, monkeypatch
):
    fake = proxy()
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{fake.port}")
    named = f"goes through the proxy http://127.0.0.1:{fake.port} (http_proxy); no_proxy leaves"
    text = give_up(f"{NAME}:8700", tmp_path)
    assert named in text
    assert "403" in text
    with pytest.raises(EdgeError) as caught:
        fetch_status(f"{NAME}:8700")
    assert named in str(caught.value)
    assert "secret" not in text + str(caught.value)


def test_a_proxy_that_refuses_tls_is_named(proxy, certs, tmp_path, monkeypatch):
    fake = proxy()
    monkeypatch.setenv("https_proxy", f"http://me:secret@127.0.0.1:{fake.port}")
    tls = certs / "clients" / "000"
    with pytest.raises(TlsError) as caught:
        handshake(f"{NAME}:8700", tls)
    assert caught.value.fault is TlsFault.PROXY
    refusal = (
        f"the proxy http://127.0.0.1:{fake.port} (https_proxy) refuses {NAME}:8700: "
        f"403 Forbidden"
    )
    assert refusal in str(caught.value)
    text = give_up(f"{NAME}:8700", tmp_path, tls)
    assert refusal in text
    assert "secret" not in text + str(caught.value)
