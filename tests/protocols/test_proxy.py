"""Which connections go through a proxy, and what is said of it; gRPC itself is in
``tests/client/edge/test_proxied.py``."""

import socket

import pytest

from fedknow.protocols.config import ConfigError
from fedknow.protocols.proxy import (
    Proxy,
    ProxyError,
    connect,
    find_proxy,
    proxy_options,
)

PROXY = "http://proxy:3128"


@pytest.mark.parametrize(
    "address",
    [
        "localhost:8700",
        "LOCALHOST:8700",
        "127.0.0.1:8700",
        "127.9.9.9:1",
        "[::1]:8700",
    ],
)
def test_this_machine_is_never_reached_through_a_proxy(address):
    assert (
        find_proxy(address, {"http_proxy": PROXY, "https_proxy": "socks5://x"})
        is None
    )


@pytest.mark.parametrize(
    ("exceptions", "address", "is_direct"),
    [
        ("fl.example.org", "fl.example.org:1", True),
        ("FL.example.org", "fl.EXAMPLE.org:1", True),
        ("fl.example.org", "afl.example.org:1", False),
        ("example.org", "fl.example.org:1", True),
        (".example.org", "fl.example.org:1", True),
        (".example.org", "example.org:1", True),
        ("*.example.org", "fl.example.org:1", True),
        ("*.example.org", "fl.example.com:1", False),
        ("a, fl.example.org ,b", "fl.example.org:1", True),
        ("a fl.example.org b", "fl.example.org:1", True),
        ("fl.example.org:8700", "fl.example.org:8700", True),
        ("fl.example.org:8700", "fl.example.org:8701", False),
        ("*", "fl.example.org:1", True),
        ("a,*", "192.0.2.7:1", True),
        ("192.0.2.7", "192.0.2.7:1", True),
        ("192.0.2.0/24", "192.0.2.7:1", True),
        ("192.0.2.1/24", "192.0.2.7:1", True),
        ("192.0.2.0/24", "192.0.3.7:1", False),
        ("192.0.2.0/24", "fl.example.org:1", False),
        ("2001:db8::/32", "[2001:db8::7]:1", True),
        ("2001:db8::7", "[2001:DB8::0:7]:1", True),
        ("[2001:db8::7]", "[2001:db8::7]:1", True),
        ("2001:db8::/32", "192.0.2.7:1", False),
        ("", "fl.example.org:1", False),
        (",.,*.", "fl.example.org:1", False),
    ],
)
@pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY", "no_grpc_proxy"])
def test_no_proxy_is_honoured_as_users_write_it(
    variable, exceptions, address, is_direct
):
    found = find_proxy(address, {"http_proxy": PROXY, variable: exceptions})
    assert (found is None) is is_direct


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({}, None),
        ({"http_proxy": ""}, None),
        ({"HTTP_PROXY": PROXY}, None),
        ({"http_proxy": PROXY}, "http_proxy"),
        ({"http_proxy": "http://other", "https_proxy": PROXY}, "https_proxy"),
        ({"https_proxy": "http://other", "grpc_proxy": PROXY}, "grpc_proxy"),
        ({"https_proxy": "", "http_proxy": PROXY}, None),
        (
            {"http_proxy": PROXY, "no_grpc_proxy": "a", "no_proxy": "*"},
            "http_proxy",
        ),
    ],
)
def test_the_variables_are_those_of_grpc(environ, variable):
    found = find_proxy("fl.example.org:1", environ)
    assert (found and found.variable) == variable
    assert found is None or found == Proxy(variable, "proxy", 3128)


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("http://proxy:3128/", "http://proxy:3128"),
        ("proxy:3128", "http://proxy:3128"),
        ("http://proxy", "http://proxy:80"),
        ("http://[fd00::1]:3128", "http://[fd00::1]:3128"),
        ("http://me:se%40cret@proxy:3128", "http://me:se%40cret@proxy:3128"),
        ("me:secret@proxy:3128", "http://me:secret@proxy:3128"),
    ],
)
def test_a_proxy_is_given_to_grpc_and_named_without_its_password(value, url):
    proxy = find_proxy("fl.example.org:1", {"http_proxy": value})
    assert proxy_options(proxy) == [("grpc.http_proxy", url)]
    assert proxy_options(None) == [("grpc.enable_http_proxy", 0)]
    shown = url.replace(url.partition("//")[2].rpartition("@")[0] + "@", "")
    assert shown in str(proxy)
    for text in (str(proxy), repr(proxy), proxy.hint()):
        assert "cret" not in text


@pytest.mark.parametrize(
    "value",
    [
        "socks5://proxy:1080",
        "https://me:secret@proxy",
        "me:secret@proxy:x",
        "http://",
        "http://p:x",
        "http://[::1",
        "proxy:99999",
    ],
)
def test_a_proxy_that_cannot_be_used_is_refused(value):
    with pytest.raises(
        ConfigError, match=r"^https_proxy = .*write http://HOST:PORT.*no_proxy"
    ) as caught:
        find_proxy("fl.example.org:1", {"https_proxy": value})
    assert value.replace("me:secret@", "") in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_password_is_sent_to_the_proxy():
    request = Proxy("http_proxy", "proxy", 1, "me:se%40cret").request(
        "fl.example.org:8700"
    )
    assert request == (
        b"CONNECT fl.example.org:8700 HTTP/1.1\r\nHost: fl.example.org:8700\r\n"
        b"Proxy-Authorization: Basic bWU6c2VAY3JldA==\r\n\r\n"
    )


def test_a_proxy_that_is_not_there_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        proxy = Proxy("http_proxy", *free.getsockname())
        with pytest.raises(
            ProxyError,
            match=rf"http://127\.0\.0\.1:{proxy.port} \(http_proxy\) cannot be reached",
        ):
            connect("fl.example.org:1", proxy, 5)
