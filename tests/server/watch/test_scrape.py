"""Metrics as Prometheus scrapes them, and whom they are refused."""

import ssl
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedknow.protocols.config import ConfigError
from fedknow.protocols.security import Tokens
from fedknow.server.certs import make_certificates
from fedknow.server.run.events import ClientFailed, Evaluated
from fedknow.server.watch.exposition import Exposition
from fedknow.server.watch.scrape import MetricsServer

STATUS = {
    "clients": 3, "connected": 2, "waiting_for": [1], "seconds": 4.5, "bytes_in": 10,
    "bytes_out": 20, "left_out": 1, "refusals": {"CREDENTIAL": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certs") / "ours"
    make_certificates(folder, 2, ["localhost"], 30)
    return folder


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certs") / "theirs"
    make_certificates(folder, 1, ["localhost"], 30)
    return folder


@pytest.fixture
def exposition():
    made = Exposition(lambda: STATUS)
    made(
        Evaluated(
            task=0,
            round=1,
            accuracy=0.75,
            accuracy_global=0.5,
            forgetting=float("nan"),
            per_task=(0.75,),
            seconds=1.0,
        )
    )
    made(
        ClientFailed(
            fault="not_finite",
            client=1,
            task=0,
            round=1,
            kind="train",
            tensor="w",
            reason="NaN",
        )
    )
    return made


def scrape(port, certs, identity=None, token=None):
    context = ssl.create_default_context(cafile=certs / "server" / "ca.pem")
    if identity is not None:
        context.load_cert_chain(identity / "cert.pem", identity / "key.pem")
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = Request(f"https://localhost:{port}/metrics", headers=headers)
    with urlopen(request, timeout=10, context=context) as response:
        return response.read().decode()


def samples(text):
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("identity", ["server", "clients/001"])
def test_a_certificate_of_the_run_may_scrape(certs, exposition, identity):
    with MetricsServer(
        "localhost:0", exposition.text, certs / "server"
    ) as server:
        values = samples(scrape(server.port, certs, certs / identity))
    assert values[("fedknow_clients",)] == 3
    assert values[("fedknow_clients_connected",)] == 2
    assert values[("fedknow_clients_working",)] == 1
    assert values[("fedknow_received_bytes_total",)] == 10
    assert values[("fedknow_client_failures_total",)] == 1
    assert values[("fedknow_refusals_total", "CREDENTIAL")] == 2
    assert values[("fedknow_accuracy",)] == 0.75


def test_nobody_else_may(certs, strangers, exposition):
    with MetricsServer(
        "localhost:0", exposition.text, certs / "server"
    ) as server:
        for identity in (None, strangers / "server"):
            # The handshake itself fails, during it or at the first read.
            with pytest.raises((URLError, ssl.SSLError, OSError)):
                scrape(server.port, certs, identity)
        with pytest.raises(OSError):
            urlopen(f"http://localhost:{server.port}/metrics", timeout=10)


def test_tokens_are_bearer_tokens(certs, exposition):
    tokens = Tokens.load(certs / "server")
    token = (certs / "clients" / "000" / "token").read_text().strip()
    with MetricsServer(
        "localhost:0", exposition.text, certs / "server", tokens
    ) as server:
        assert ("fedknow_clients",) in samples(
            scrape(server.port, certs, token=token)
        )
        for wrong in (None, token[:-1], "0.x"):
            with pytest.raises(HTTPError, match="401"):
                scrape(server.port, certs, token=wrong)


def test_an_address_that_cannot_be_had_is_refused(exposition):
    with (
        MetricsServer("127.0.0.1:0", exposition.text) as server,
        pytest.raises(ConfigError, match="--metrics-listen"),
    ):
        MetricsServer(f"127.0.0.1:{server.port}", exposition.text)
