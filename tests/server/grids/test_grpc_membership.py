"""Who may take part, while a server runs: credentials, operators, and two with one identity."""

import datetime as dt
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from puppets import WAIT, Exchange, Puppet, eventually, sums, work

from fedknow.client.edge.client import EdgeClient
from fedknow.client.edge.renewal import replace_certificate
from fedknow.protocols.config import ConfigError, read_config
from fedknow.protocols.messages import NO_ANSWER, node_of
from fedknow.protocols.security import (
    Tokens,
    channel_credentials,
    server_credentials,
)
from fedknow.protocols.security.fingerprints import fingerprint_of
from fedknow.protocols.wire import hello
from fedknow.server.certs import make_certificates, revoke
from fedknow.server.grids import grpc_service
from fedknow.server.grids.fences import FENCE_BYTES, Fences
from fedknow.server.grids.grpc_grid import GrpcGrid
from fedknow.server.grids.grpc_membership import Membership
from fedknow.server.renewal import Renewer, expiry_of


@pytest.fixture(autouse=True)
def watchful(monkeypatch):
    monkeypatch.setattr(grpc_service, "WATCH_SECONDS", 0.02)


@pytest.fixture
def certs(tmp_path):
    folder = tmp_path / "certs"
    make_certificates(folder, 2)
    return folder


@pytest.fixture
def grid(tmp_path):
    """Makes grids, and closes them."""
    made = []

    def make(certs=None, has_tokens=False, clients=2, **options):
        config = read_config({"data": {"clients": clients}})
        credentials = None
        if certs is not None:
            server = certs / "server"
            credentials = server_credentials(server, not has_tokens)
            options["tls"] = server
            options["tokens"] = Tokens.load(server) if has_tokens else None
        membership = Membership(**options)
        it = GrpcGrid(
            config, "127.0.0.1:0", credentials=credentials, membership=membership
        )
        made.append(it)
        return it

    yield make
    for it in made:
        it.close()


@pytest.fixture
def puppet():
    made = []

    def make(it, client, folder=None, **options):
        credentials = None if folder is None else channel_credentials(folder)
        made.append(Puppet(it.port, client, credentials=credentials, **options))
        return made[-1]

    yield make
    for one in made:
        one.drop()


# --- credentials that count no more
# --------------------------------------------------------------------------------------


def test_an_old_certificate_does_not_count_after_renewal(grid, puppet, certs):
    it = grid(certs)
    old = certs.parent / "stolen"
    shutil.copytree(certs / "clients" / "001", old)
    puppet(it, 1, old).welcome()
    revoke(certs, 1)
    make_certificates(certs, 2)
    eventually(lambda: "revoked" in {change.kind for change in it.news()})
    error = puppet(it, 1, old).refusal()
    assert error.code.name == "CREDENTIAL"
    assert "was renewed or revoked" in error.reason
    assert puppet(it, 1, certs / "clients" / "001").welcome().node == 3
    assert puppet(it, 0, certs / "clients" / "000").welcome().node == 2


def test_a_revoked_certificate_ends_an_open_stream(grid, puppet, certs):
    it = grid(certs)
    one = puppet(it, 1, certs / "clients" / "001")
    other = puppet(it, 0, certs / "clients" / "000")
    one.welcome()
    other.welcome()
    revoke(certs / "server", 1)  # on the server's machine
    error = one.refusal()
    assert error.code.name == "CREDENTIAL"
    assert it.server.connected() == [2]


def test_a_removed_token_does_not_count_and_ends_its_stream(grid, puppet, certs):
    it = grid(certs, has_tokens=True)
    folder = certs.parent / "token"
    folder.mkdir()
    for name in ("ca.pem", "token"):
        shutil.copy(certs / "clients" / "001" / name, folder)
    one = puppet(it, 1, folder)
    one.welcome()
    revoke(certs, 1)
    assert one.refusal().code.name == "CREDENTIAL"
    assert puppet(it, 1, folder).refusal().code.name == "CREDENTIAL"


def test_a_new_folder_of_the_server_forgets_no_revocation(grid, puppet, certs):
    stolen = certs.parent / "stolen"
    shutil.copytree(certs / "clients" / "001", stolen)
    revoke(certs, 1)
    shutil.rmtree(certs / "server")
    make_certificates(certs, 1)
    error = puppet(grid(certs), 1, stolen).refusal()
    assert "was renewed or revoked" in error.reason


def test_a_damaged_list_changes_nothing(grid, puppet, certs, caplog):
    it = grid(certs)
    (certs / "server" / "certificates.json").write_text("[]")
    eventually(lambda: "the members stay as they were" in caplog.text)
    assert puppet(it, 1, certs / "clients" / "001").welcome().node == 3


def test_a_folder_of_an_earlier_version_has_no_list(grid, puppet, certs):
    (certs / "server" / "certificates.json").unlink()
    assert puppet(grid(certs), 1, certs / "clients" / "001").welcome().node == 3


def test_an_expired_certificate_ends_its_stream(grid, puppet, certs, monkeypatch):
    monkeypatch.setattr(grpc_service, "expiry_of", lambda pem: 0.0)
    one = puppet(grid(certs), 1, certs / "clients" / "001")
    one.welcome()
    frame = one.hear()
    assert frame.WhichOneof("kind") == "goodbye"
    assert not frame.goodbye.finished


# --- renewal by the client itself
# --------------------------------------------------------------------------------------


def days_ago(days):
    return dt.datetime.now(dt.UTC) - dt.timedelta(days=days)


def test_a_certificate_is_renewed_in_its_last_third(tmp_path):
    make_certificates(tmp_path, 1, days=30, issued=days_ago(21))
    folder = tmp_path / "clients" / "000"
    pem = (folder / "cert.pem").read_bytes()
    renew = Renewer(tmp_path)
    assert renew(pem, days_ago(2)) == b""
    new = renew(pem)
    assert expiry_of(new) - expiry_of(pem) == pytest.approx(21 * 86400, abs=60)
    replace_certificate(folder, new)
    channel_credentials(folder)  # goes with its key


@pytest.mark.parametrize("pem", [b"", b"no certificate", b"x" * 100_000])
def test_what_is_no_certificate_is_not_taken(certs, pem):
    folder = certs / "clients" / "000"
    before = (folder / "cert.pem").read_bytes()
    with pytest.raises(ConfigError):
        replace_certificate(folder, pem)
    other = (certs / "clients" / "001" / "cert.pem").read_bytes()
    with pytest.raises(ConfigError, match="does not go with"):
        replace_certificate(folder, other)
    assert (folder / "cert.pem").read_bytes() == before


def test_a_client_renews_its_certificate_by_itself(grid, puppet, tmp_path):
    certs = tmp_path / "certs"
    make_certificates(certs, 1, days=30, issued=days_ago(25))
    folder = certs / "clients" / "000"
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    before = (folder / "cert.pem").read_bytes()
    it = grid(certs, clients=1, issuer=Renewer(certs))
    running = _Running(it, tmp_path / "state", folder)
    eventually(lambda: (folder / "cert.pem").read_bytes() != before)
    new = (folder / "cert.pem").read_bytes()
    assert {change.kind for change in it.news()} == {"renewed"}
    running.stop()
    eventually(lambda: not it.server.connected())
    # The first stream that shows the new one is the end of the old one.
    puppet(it, 0, folder).welcome()
    assert puppet(it, 0, old).refusal().code.name == "CREDENTIAL"
    assert fingerprint_of(new) != fingerprint_of(before)


class _Running:
    """An edge client that is connected and gets no work."""

    def __init__(self, it, state, tls):
        import asyncio

        self.client = EdgeClient(f"localhost:{it.port}", state, tls=tls)
        self.loop = asyncio.new_event_loop()
        self.threads = ThreadPoolExecutor(1)
        started = threading.Event()

        async def main():
            self.task = asyncio.current_task()
            started.set()
            await self.client.run()

        self.end = self.threads.submit(self.loop.run_until_complete, main())
        assert started.wait(WAIT)

    def stop(self):
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.end.exception(WAIT)


# --- operators
# --------------------------------------------------------------------------------------


def test_an_ejected_client_is_not_waited_for_and_may_come_back(
    grid, puppet, tmp_path
):
    ejected = {}
    path = tmp_path / "members.json"

    def change(clients):
        ejected.clear()
        ejected.update(clients)
        path.write_text(str(clients))

    it = grid(members=path, ejections=lambda: dict(ejected))
    exchange = Exchange(it, work(0, 1))
    zero, one = puppet(it, 0), puppet(it, 1)
    zero.welcome()
    one.welcome()
    zero.answer(zero.parcel())
    one.parcel()  # it is at work when the operator loses patience
    change({1: "too slow"})
    assert sums(exchange.replies()) == {2: 6.0}
    error = one.refusal()
    assert (error.code.name, it.get_node_ids()) == ("EJECTED", [2])
    assert "too slow" in error.reason
    assert puppet(it, 1).refusal().code.name == "EJECTED"
    assert it.status()["ejected"] == [1]
    # Work that was addressed to it before is not waited for either.
    exchange = Exchange(it, work(0, 1))
    zero.answer(zero.parcel())
    assert sums(exchange.replies()) == {2: 6.0}
    change({})
    eventually(lambda: it.get_node_ids() == [2, 3])
    puppet(it, 1).welcome()
    kinds = [change.kind for change in it.news()]
    assert kinds == ["ejected", "admitted"]


def test_pushed_work_of_an_ejected_client_is_missed(grid, puppet, tmp_path):
    ejected = {}
    path = tmp_path / "members.json"
    it = grid(members=path, ejections=lambda: dict(ejected))
    for client in (0, 1):
        puppet(it, client).welcome()
    messages = [
        message.__class__(**{**vars(message), "id": str(number)})
        for number, message in enumerate(work(1))
    ]
    it.push(messages)
    with ThreadPoolExecutor(1) as threads:
        pulled = threads.submit(it.pull, ["0"])
        eventually(lambda: it.status()["waiting_for"] == [1])
        ejected[1] = "gone"
        path.write_text("changed")
        (reply,) = pulled.result(WAIT)
    assert reply.failure.code == NO_ANSWER


# --- two with one identity
# --------------------------------------------------------------------------------------


@given(st.binary(max_size=40), st.integers(2, 2**63))
def test_no_fence_can_be_made_up(made_up, node):
    fences = Fences(b"secret")
    fence = fences.issue(node)
    assert len(fence) == FENCE_BYTES
    assert fences.is_known(node, fence)
    assert not fences.is_known(node, made_up)
    assert not fences.is_known(node + 1, fence)
    assert not Fences(b"another").is_known(node, fence)


def test_a_stolen_certificate_does_not_push_the_honest_client_out(
    grid, puppet, certs
):
    it = grid(certs)
    folder = certs / "clients" / "001"
    honest = puppet(it, 1, folder, first=hello(0, b""))
    fence = honest.welcome().fence
    for attempt in (b"", b"x" * FENCE_BYTES):
        thief = puppet(it, 1, folder, first=hello(0, attempt))
        assert thief.refusal().code.name == "DUPLICATE"
    (change,) = it.news()  # told once, however often it tries
    assert change.kind == "conflict"
    assert "two hold the identity of client 1" in change.reason
    again = puppet(it, 1, folder, first=hello(0, fence))
    again.welcome()
    assert honest.refusal().code.name == "REPLACED"
    assert not it.news()


def test_an_older_client_is_replaced_as_it_always_was(grid, puppet):
    it = grid()
    old = puppet(it, 1)
    old.welcome()
    puppet(it, 1, first=hello(node_of(1), b"")).welcome()
    assert old.refusal().code.name == "REPLACED"


def test_a_renewal_needs_a_credential(grid, certs):
    it = grid(certs, issuer=lambda pem: pem)
    ca = (certs / "ca.pem").read_bytes()
    channel = grpc.secure_channel(
        f"localhost:{it.port}", grpc.ssl_channel_credentials(ca)
    )
    with channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/fedknow.v1.Fedknow/Renew")(b"", timeout=WAIT)
