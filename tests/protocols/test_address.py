"""What is a host and what is not, each refused with what would be right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedknow.protocols.address import check_host, is_loopback, split_address
from fedknow.protocols.config import ConfigError
from fedknow.protocols.transport import check_address

GOOD = {
    "fl.example.org": "fl.example.org",
    "FL.Example.ORG": "fl.example.org",
    "pi3": "pi3",
    "my_server": "my_server",
    "xn--bcher-kva.example": "xn--bcher-kva.example",
    "7.example.org": "7.example.org",
    "192.0.2.7": "192.0.2.7",
    "2001:DB8::0:7": "2001:db8::7",
    "::1": "::1",
}
EXAMPLES = "fl.example.org, or an IP address"
REFUSED = {
    "": ("empty", EXAMPLES),
    "  ": ("empty", EXAMPLES),
    "https://fl.example.org:8700/x": ("a URL", "write fl.example.org"),
    "https://me@[2001:db8::7]:8700": ("a URL", "write 2001:db8::7"),
    "fl.example.org:8700": ("holds a port", "write fl.example.org"),
    "192.0.2.7:8700": ("holds a port", "write 192.0.2.7"),
    "[2001:db8::7]": ("no brackets", "write 2001:db8::7"),
    "[2001:db8::7]:8700": ("holds a port", "write 2001:db8::7"),
    "192.0.2.0/24": ("a network", "write 192.0.2.0"),
    "2001:db8::/32": ("a network", "write 2001:db8::"),
    "/run/socket": ("a path", EXAMPLES),
    "my server": ("a space", EXAMPLES),
    " fl.example.org": ("a space", "write fl.example.org"),
    "fl.example.org\n": ("a space", "write fl.example.org"),
    "a.example,b.example": ("a comma", EXAMPLES),
    "me@fl.example.org": ("a user's name", "write fl.example.org"),
    "fl.example.org.": ("no dot at its end", "write fl.example.org"),
    "fe80::1%eth0": ("the zone", "write fe80::1"),
    "b\u00fccher.example": ("other letters", "write xn--bcher-kva.example"),
    "fl..example": ("'' is no part", EXAMPLES),
    "-a.example": ("'-a' is no part", EXAMPLES),
    "a-.example": ("'a-' is no part", EXAMPLES),
    f"{'a' * 64}.example": ("no part of a name", EXAMPLES),
    ".".join(["a" * 60] * 5): ("at most 253", EXAMPLES),
    "300.0.0.1": ("neither an IP address nor a name", EXAMPLES),
    "192.0.2": ("neither an IP address nor a name", EXAMPLES),
    "8700": ("neither an IP address nor a name", EXAMPLES),
    "*": ("a pattern", EXAMPLES),
    "*.example.org": ("a pattern is no name", EXAMPLES),
    "a*.example.org": ("whole first part", EXAMPLES),
    "a.*.org": ("whole first part", EXAMPLES),
}


@pytest.mark.parametrize(("host", "usual"), GOOD.items())
def test_a_host_is_given_in_its_usual_form(host, usual):
    assert check_host(host) == usual


@pytest.mark.parametrize(("host", "texts"), REFUSED.items())
def test_what_is_no_host_is_refused_with_what_would_be_right(host, texts):
    with pytest.raises(ValueError) as caught:
        check_host(host)
    for text in texts:
        assert text in str(caught.value)


def test_a_pattern_stands_for_the_first_part_where_it_may():
    assert check_host("*.Example.org", wildcard=True) == "*.example.org"
    for pattern in (
        "*",
        "*.org",
        "*.*.org",
        "a.*.org",
        "*a.example.org",
        "*.-a.org",
    ):
        with pytest.raises(ValueError):
            check_host(pattern, wildcard=True)


@given(st.text())
def test_no_text_is_taken_for_a_host_by_mistake(text):
    try:
        usual = check_host(text)
    except ValueError as error:
        usual, message = None, str(error)
    if usual is None:
        assert "; write " in message
    else:
        assert check_host(usual) == usual


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("http://localhost:8700", "a URL; write localhost"),
        ("local host:8700", "a space"),
        ("127.0.0.0/8:8700", "a network"),
        ("b\u00fccher.example:8700", "write xn--bcher-kva.example"),
        ("localhost", "write HOST:PORT"),
        (":8700", "write HOST:PORT"),
        ("localhost:70000", "write HOST:PORT"),
    ],
)
def test_an_address_without_a_host_is_refused(address, text):
    with pytest.raises(ConfigError) as caught:
        check_address(address, None, insecure=True)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "address", ["0.0.0.0:0", "[::]:8700", "[fd00::7]:1", "fl.example.org:1"]
)
def test_an_address_is_taken(address):
    check_address(address, None, insecure=True)


def test_an_address_comes_apart():
    assert split_address("[fd00::7]:1") == ("fd00::7", 1)
    assert split_address("pi3:8700") == ("pi3", 8700)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:80", True), ("127.8.8.8:1", True), ("localhost:1", True), ("LocalHost:1", True),
        ("[::1]:0", True), ("unix:/run/s", True), ("0.0.0.0:1", False), ("[::]:1", False),
        ("192.168.1.2:1", False), ("server:1", False), (":1", False),
        ("localhost.example.org:1", False),
    ],
)  # fmt: skip
def test_loopback(address, loopback):
    assert is_loopback(address) is loopback
