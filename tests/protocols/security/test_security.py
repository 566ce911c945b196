"""Real handshakes on loopback: who gets in as whom, and what the others are told."""

import asyncio
import datetime as dt
import json
import os
import shutil
import socket
import stat
import threading

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedknow.protocols.config import ConfigError
from fedknow.protocols.security import (
    CredentialError,
    CredentialFault,
    TlsError,
    TlsFault,
    Tokens,
    authenticate,
    channel_credentials,
    client_of_peer,
    client_uri,
    handshake,
    is_server,
    new_token,
    server_credentials,
)
from fedknow.server.certs import make_certificates

WHO = "/test/Who"


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certs") / "run"
    make_certificates(folder, 3, ["fl.example.org"])
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certs") / "other"
    make_certificates(folder, 3)
    return folder


@pytest.fixture
def copy(certs, tmp_path):
    """A client's folder to spoil."""
    return shutil.copytree(certs / "clients" / "001", tmp_path / "client")


class Server:
    """A gRPC server in a thread that says who it thinks the caller is."""

    def __init__(self, credentials, tokens=None):
        self.credentials, self.tokens = credentials, tokens
        self.refused = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)

    async def _who(self, request, context):
        claimed = int(request) if request else None
        try:
            client = authenticate(
                context.auth_context(),
                context.invocation_metadata(),
                self.tokens,
                claimed,
            )
        except CredentialError as error:
            self.refused.append(error.fault)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        return str(client).encode()

    async def _start(self):
        self.server = grpc.aio.server()
        handlers = {"Who": grpc.unary_unary_rpc_method_handler(self._who)}
        self.server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("test", handlers)]
        )
        if self.credentials is None:
            self.port = self.server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self.server.add_secure_port(
                "127.0.0.1:0", self.credentials
            )
        await self.server.start()

    def __enter__(self):
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(10)
        self.address = f"localhost:{self.port}"
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(
            self.server.stop(None), self.loop
        ).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def ask(self, folder, claim=b"", credentials=None):
        with grpc.secure_channel(
            self.address, credentials or channel_credentials(folder)
        ) as channel:
            return channel.unary_unary(WHO)(claim, timeout=10)

    def refuses(self, folder, claim=b"", credentials=None):
        with pytest.raises(grpc.RpcError) as caught:
            self.ask(folder, claim, credentials)
        return caught.value.code()


@pytest.fixture(scope="module")
def server(certs):
    with Server(server_credentials(certs / "server")) as running:
        yield running


@pytest.fixture
def token_server(certs):
    with Server(
        server_credentials(certs / "server", client_certificates=False),
        Tokens.load(certs / "server"),
    ) as s:
        yield s


def test_a_client_is_who_its_certificate_says(server, certs):
    for client in range(3):
        folder = certs / "clients" / f"{client:03d}"
        assert server.ask(folder) == b"%d" % client
        assert server.ask(folder, b"%d" % client) == b"%d" % client
        handshake(server.address, folder)


def test_another_clients_identity_cannot_be_claimed(server, certs):
    before = len(server.refused)
    assert (
        server.refuses(certs / "clients" / "001", b"2")
        is grpc.StatusCode.UNAUTHENTICATED
    )
    assert server.refused[before:] == [CredentialFault.IDENTITY]


def test_a_client_of_another_ca_is_refused_and_refuses(
    server, certs, others, tmp_path
):
    folder = others / "clients" / "001"
    assert server.refuses(folder) is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(TlsError) as caught:
        handshake(server.address, folder)  # it does not believe the server
    assert caught.value.fault is TlsFault.OTHER_CA
    believer = shutil.copytree(folder, tmp_path / "client")
    shutil.copy(certs / "ca.pem", believer / "ca.pem")
    with pytest.raises(ConfigError, match="issued by another CA"):
        channel_credentials(believer)
    ca, key, cert = (
        ((believer / name).read_bytes())
        for name in ("ca.pem", "key.pem", "cert.pem")
    )
    bare = grpc.ssl_channel_credentials(ca, key, cert)
    assert (
        server.refuses(believer, credentials=bare) is grpc.StatusCode.UNAVAILABLE
    )


def test_no_certificate_is_refused(server, certs, copy):
    (copy / "cert.pem").unlink()
    (copy / "key.pem").unlink()
    assert (
        server.refuses(copy) is grpc.StatusCode.UNAVAILABLE
    )  # its token is of no use here
    with pytest.raises(TlsError) as caught:
        handshake(server.address, copy)
    assert caught.value.fault is TlsFault.NO_CERTIFICATE
    (copy / "token").unlink()
    with pytest.raises(
        ConfigError, match=r"there is no cert\.pem; give clients/NNN"
    ):
        channel_credentials(copy)


def test_an_expired_certificate_is_refused_by_both_sides(server, certs, tmp_path):
    past = tmp_path / "past"
    shutil.copytree(certs, past)
    shutil.rmtree(past / "clients")
    shutil.rmtree(past / "server")
    make_certificates(
        past, 1, days=30, issued=dt.datetime.now(dt.UTC) - dt.timedelta(days=31)
    )
    folder = past / "clients" / "000"
    with pytest.raises(ConfigError, match=r"cert\.pem: expired .*Renewal"):
        channel_credentials(folder)
    with pytest.raises(ConfigError, match="expired"):
        server_credentials(past / "server")
    with pytest.raises(ConfigError, match="expired"):
        handshake(server.address, folder)
    expired = grpc.ssl_channel_credentials(
        *(
            (folder / name).read_bytes()
            for name in ("ca.pem", "key.pem", "cert.pem")
        )
    )
    assert (
        server.refuses(folder, credentials=expired) is grpc.StatusCode.UNAVAILABLE
    )


def test_a_clock_that_is_behind_is_named(certs, tmp_path):
    future = tmp_path / "future"
    make_certificates(
        future, 1, issued=dt.datetime.now(dt.UTC) + dt.timedelta(days=2)
    )
    with pytest.raises(ConfigError, match=r"not yet valid .*clock"):
        channel_credentials(future / "clients" / "000")


def test_a_server_of_another_name_is_not_believed(server, certs):
    address = f"127.0.0.2:{server.port}"  # no name of the certificate
    with grpc.secure_channel(
        address, channel_credentials(certs / "clients" / "000")
    ) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(WHO)(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_handshake_names_what_is_wrong_with_the_server(server, certs):
    folder = certs / "clients" / "000"
    with Server(None) as plain, pytest.raises(TlsError) as caught:
        handshake(plain.address, folder)
    assert caught.value.fault is TlsFault.NO_TLS
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(TlsError) as caught:
            handshake(f"127.0.0.1:{free.getsockname()[1]}", folder)
    assert caught.value.fault is TlsFault.UNREACHABLE


def test_a_token_lets_its_client_in(token_server, certs, copy):
    assert token_server.ask(copy) == b"1"
    (copy / "cert.pem").unlink()
    (copy / "key.pem").unlink()
    assert token_server.ask(copy) == b"1"
    assert token_server.refuses(copy, b"0") is grpc.StatusCode.UNAUTHENTICATED
    (copy / "token").write_text(new_token(1))
    assert token_server.refuses(copy) is grpc.StatusCode.UNAUTHENTICATED
    (copy / "token").write_text(new_token(77))
    assert token_server.refuses(copy) is grpc.StatusCode.UNAUTHENTICATED
    without = grpc.ssl_channel_credentials((copy / "ca.pem").read_bytes())
    assert (
        token_server.refuses(copy, credentials=without)
        is grpc.StatusCode.UNAUTHENTICATED
    )
    odd = grpc.composite_channel_credentials(
        without, grpc.metadata_call_credentials(_Basic())
    )
    assert (
        token_server.refuses(copy, credentials=odd)
        is grpc.StatusCode.UNAUTHENTICATED
    )
    assert token_server.refused == [
        CredentialFault.IDENTITY,
        CredentialFault.TOKEN,
        CredentialFault.TOKEN,
        CredentialFault.MISSING,
        CredentialFault.MALFORMED,
    ]


class _Basic(grpc.AuthMetadataPlugin):
    def __call__(self, context, callback):
        callback((("authorization", "Basic dXNlcg=="),), None)


@given(st.text())
def test_no_text_but_a_token_is_a_token(text):
    tokens = Tokens({})
    token = new_token(4)
    tokens.add(token)
    assert tokens.client(token) == 4
    assert text == token or tokens.client(text) is None
    assert tokens.client(token + text) == (None if text else 4)
    assert tokens.client(token[:-1]) is None
    assert token not in tokens.to_json().decode()


def test_a_token_with_another_clients_number_is_nobodys():
    tokens = Tokens({})
    for token in (mine := new_token(0), new_token(1)):
        tokens.add(token)
    assert tokens.client("1" + mine[1:]) is None


@pytest.mark.parametrize(
    ("names", "client"),
    [
        ([client_uri(0)], 0),
        ([client_uri(12), "client.example.org"], 12),
        ([client_uri(1), client_uri(2)], None),
        (["fedknow://client/"], None),
        (["fedknow://client/01"], None),
        (["fedknow://client/-1"], None),
        (["fedknow://client/1/x"], None),
        (["fedknow://client/\u0663"], None),
        (["other://client/1"], None),
        ([], None),
    ],
)
def test_only_one_plain_number_in_the_certificate_counts(names, client):
    assert (
        client_of_peer(
            {"x509_subject_alternative_name": [name.encode() for name in names]}
        )
        == client
    )
    assert client_of_peer({"x509_common_name": [client_uri(1).encode()]}) is None


def test_the_server_may_be_asked_with_its_own_certificate(server, certs):
    assert (
        server.refuses(certs / "server") is grpc.StatusCode.UNAUTHENTICATED
    )  # but it is no client
    assert is_server(
        {"x509_subject_alternative_name": [b"localhost", b"fedknow://server"]}
    )
    assert not is_server(
        {"x509_subject_alternative_name": [b"fedknow://client/1", b"server"]}
    )
    assert not is_server({})


def test_the_server_has_no_identity_and_strangers_are_told_apart():
    with pytest.raises(CredentialError) as caught:
        authenticate({"x509_subject_alternative_name": [b"localhost"]})
    assert caught.value.fault is CredentialFault.MALFORMED
    with pytest.raises(CredentialError) as caught:
        authenticate({"transport_security_type": [b"ssl"]})
    assert caught.value.fault is CredentialFault.MISSING


def test_a_folder_that_is_wrong_is_explained(certs, copy):
    with pytest.raises(
        ConfigError, match=r"there is no ca\.pem; give clients/NNN"
    ):
        channel_credentials(copy / "nowhere")
    with pytest.raises(
        ConfigError, match=r"no cert\.pem; give server .*; give .*/server$"
    ):
        server_credentials(certs)
    with pytest.raises(ConfigError, match="the other side's kind of certificate"):
        server_credentials(copy)
    shutil.copy(certs / "clients" / "002" / "key.pem", copy / "key.pem")
    with pytest.raises(ConfigError, match="not the key of"):
        channel_credentials(copy)
    (copy / "key.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match="damaged"):
        channel_credentials(copy)
    (copy / "ca.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match="not a certificate"):
        channel_credentials(copy)
    (copy / "token").write_text("nonsense")
    with pytest.raises(ConfigError, match="not a token"):
        channel_credentials(copy)
    (copy / "tokens.json").write_text('{"clients": [1]}')
    with pytest.raises(ConfigError, match="not a list of tokens"):
        Tokens.load(copy)


def test_a_key_open_to_others_is_warned_of(copy, caplog):
    channel_credentials(copy)
    assert not caplog.records
    os.chmod(copy / "key.pem", 0o644)
    channel_credentials(copy)
    assert "chmod 600" in caplog.text


# --- fedknow certs
# --------------------------------------------------------------------------------------


def test_what_exists_is_never_changed_and_clients_are_added(tmp_path):
    folder = tmp_path / "certs"
    made = make_certificates(folder, 2)
    assert made == [
        folder / "server",
        folder / "clients" / "000",
        folder / "clients" / "001",
    ]
    files = [path for path in folder.rglob("*") if path.is_file()]
    before = {
        path: path.read_bytes()
        for path in files
        if path.name not in ("tokens.json", "certificates.json")
    }
    assert len(before) == 2 + 3 + 2 * 4
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in before)
    assert make_certificates(folder, 2) == []
    assert make_certificates(folder, 3) == [folder / "clients" / "002"]
    assert {path: path.read_bytes() for path in before} == before
    tokens = Tokens.load(folder / "server")
    read = [
        (folder / "clients" / f"{client:03d}" / "token").read_text().strip()
        for client in range(3)
    ]
    assert [tokens.client(token) for token in read] == [0, 1, 2]


def test_a_folder_that_moved_to_its_machine_is_not_made_again(tmp_path):
    folder = tmp_path / "certs"
    make_certificates(folder, 2)
    (folder / "clients" / "000").rename(tmp_path / "device")
    assert make_certificates(folder, 3) == [folder / "clients" / "002"]
    token = (tmp_path / "device" / "token").read_text().strip()
    assert Tokens.load(folder / "server").client(token) == 0


def test_a_new_server_certificate_leaves_clients_alone(tmp_path):
    folder = tmp_path / "certs"
    make_certificates(folder, 2)
    with pytest.raises(
        ConfigError, match=r"without --host new\.example\.org; remove .*server"
    ):
        make_certificates(folder, 2, ["new.example.org", "localhost"])
    shutil.rmtree(folder / "server")
    assert make_certificates(folder, 2, ["new.example.org"]) == [
        folder / "server"
    ]
    assert (
        len(
            json.loads((folder / "server" / "tokens.json").read_text())["clients"]
        )
        == 2
    )
    with Server(server_credentials(folder / "server")) as server:
        assert server.ask(folder / "clients" / "001") == b"1"


def test_a_folder_that_cannot_be_used_is_explained(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="holds something, but no CA"):
        make_certificates(tmp_path, 1)
    with pytest.raises(ConfigError, match="Not a directory"):
        make_certificates(tmp_path / "mine.txt" / "x", 1)
    with pytest.raises(ConfigError, match="a whole number from 1"):
        make_certificates(tmp_path / "certs", 0)
    folder = tmp_path / "certs"
    make_certificates(folder, 1)
    with pytest.raises(ConfigError, match=r"write xn--bcher-kva\.example"):
        make_certificates(tmp_path / "odd", 1, ["b\u00fccher.example"])
    (folder / "ca.key").rename(tmp_path / "key")
    with pytest.raises(ConfigError, match=r"ca\.key: missing"):
        make_certificates(folder, 2)
    shutil.copy(folder / "server" / "key.pem", folder / "ca.key")
    with pytest.raises(ConfigError, match="not the key of"):
        make_certificates(folder, 2)
    (folder / "ca.key").write_text("nonsense")
    with pytest.raises(ConfigError, match="damaged"):
        make_certificates(folder, 2)


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("https://fl.example.org:8700", "a URL; write fl.example.org"),
        ("fl.example.org:8700", "holds a port; write fl.example.org"),
        ("192.0.2.0/24", "a network"),
        ("fl example", "a space"),
        ("", "empty"),
        ("*.org", "two parts behind *"),
        ("0.0.0.0", "nobody can connect to this address"),
        ("::", "nobody can connect to this address"),
        ("224.0.0.1", "nobody can connect to this address"),
    ],
)
def test_a_host_that_can_never_match_is_refused_before_anything_is_written(
    tmp_path, host, text
):
    with pytest.raises(ConfigError) as caught:
        make_certificates(tmp_path / "certs", 1, ["fl.example.org", host])
    assert str(caught.value).startswith(f"--host {host!r}: ")
    assert text in str(caught.value)
    assert not (tmp_path / "certs").exists()


def test_each_kind_of_host_is_believed(tmp_path):
    folder = tmp_path / "certs"
    hosts = [
        "*.example.org",
        "my_server",
        "FL.Example.com",
        "pi3",
        "2001:DB8::0:7",
        "192.0.2.7",
    ]
    make_certificates(folder, 1, hosts)
    assert (
        make_certificates(folder, 1, ["fl.example.COM", "2001:db8::7"]) == []
    )  # they are there
    credentials = channel_credentials(folder / "clients" / "000")

    def ask(server, host):
        options = [("grpc.ssl_target_name_override", host)]
        with grpc.secure_channel(server.address, credentials, options) as channel:
            return channel.unary_unary(WHO)(b"", timeout=10)

    with Server(server_credentials(folder / "server")) as server:
        for host in (
            "a.example.org",
            "my_server",
            "fl.example.com",
            "pi3",
            "2001:db8::7",
            "192.0.2.7",
        ):
            assert ask(server, host) == b"0"
        for host in ("example.org", "a.b.example.org", "pi4"):
            with pytest.raises(grpc.RpcError):
                ask(server, host)
