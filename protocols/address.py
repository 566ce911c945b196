"""Names and addresses of machines."""

from __future__ import annotations

import ipaddress
import re

__all__ = ["check_host", "is_loopback", "split_address"]

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
"""A part of a DNS name; Docker and Windows networks have names with underscores."""
_LONGEST_NAME = 253
_EXAMPLES = "a DNS name such as fl.example.org, or an IP address such as 192.0.2.7 or 2001:db8::7"


def split_address(address: str) -> tuple[str, int]:
    """Split ``HOST:PORT``.

    The host comes without the brackets of an IPv6 address.

    Examples
    --------
    >>> split_address("[::1]:8700")
    ('::1', 8700)
    """
    # From the right: an IPv6 address has colons of its own.
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(address: str) -> bool:
    """Say if an address can be reached from this machine alone.

    It is ``HOST:PORT`` or a Unix socket.

    A name is loopback only if it is ``localhost``: what another one resolves to may change.
    """
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # Any other name may mean another machine, whatever it resolves to today.
        return host.lower() == "localhost"


def check_host(host: str, wildcard: bool = False) -> str:
    """Check that a text is a DNS name or an IP address, and nothing besides.

    Parameters
    ----------
    host : str
        The text.
    wildcard : bool
        Whether ``*`` may stand for the first part of a name, as certificates have it.

    Returns
    -------
    str
        The host in its usual form: names in lower case, IPv6 addresses shortened.

    Raises
    ------
    ValueError
        If it is neither; the text says why, and what would be right.

    Examples
    --------
    >>> check_host("FL.example.org"), check_host("2001:DB8::0:7")
    ('fl.example.org', '2001:db8::7')
    >>> check_host("https://fl.example.org:8700/")
    Traceback (most recent call last):
    ValueError: this is a URL; write fl.example.org
    """
    fault = _fault(host, wildcard)
    if fault is None:
        return _usual(host)
    nearest = _nearest(host)
    # Only advice that would be accepted is given.
    right = nearest if _fault(nearest, wildcard) is None else _EXAMPLES
    raise ValueError(f"{fault}; write {right}")


def _usual(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower()


def _fault(host: str, wildcard: bool) -> str | None:
    """Why a text is no host."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # The commonest slips come first, as they have the clearest messages.
        return _shape_fault(host) or _name_fault(host.lower(), wildcard)
    has_zone = (
        isinstance(address, ipaddress.IPv6Address)
        and address.scope_id is not None
    )
    return (
        "the zone (%) of an address is this machine's own affair"
        if has_zone
        else None
    )


def _shape_fault(host: str) -> str | None:
    """Say what a text is that holds more than a name."""
    if not host.strip():
        return "this is empty"
    if "://" in host:
        return "this is a URL"
    if re.search(r"[\s,;]", host):
        return "this holds a space or a comma, and one name or address is wanted"
    if "/" in host:
        return "this is a network or a path"
    if "@" in host:
        return "this holds a user's name"
    if ":" in host:
        brackets = host.startswith("[") and host.endswith("]")
        return "an address has no brackets" if brackets else "this holds a port"
    return None


def _name_fault(name: str, wildcard: bool) -> str | None:
    """Why a text that holds no more than a name is none."""
    if name.endswith("."):
        return "a name has no dot at its end"
    labels = name.split(".")
    if labels[0] == "*":
        if not wildcard:
            return "a pattern is no name"
        if len(labels) <= 2:
            # TLS libraries do not match a pattern for a whole top-level domain.
            return "a pattern needs two parts behind *, as in *.example.org"
        labels = labels[1:]
    elif "*" in name:
        return "* can stand for the whole first part of a name alone"
    if not name.isascii():
        return "a name in other letters has a form for machines"
    if len(name) > _LONGEST_NAME:
        return f"a name has at most {_LONGEST_NAME} characters"
    bad_label = next(
        (label for label in labels if not _LABEL.fullmatch(label)), None
    )
    if bad_label is not None:
        return f"{bad_label!r} is no part of a name"
    # Resolvers take 10.1 for an address, so no name may end in a number.
    if labels[-1].isdecimal():
        return "this is neither an IP address nor a name"
    return None


def _nearest(text: str) -> str:
    """Return the host that someone may have meant."""
    bare = text.strip()
    bare = bare.partition("://")[2] if "://" in bare else bare
    bare = bare.partition("/")[0].rpartition("@")[2]
    if bare.startswith("["):
        bare = bare[1:].partition("]")[0]
    elif bare.count(":") == 1:
        bare = bare.partition(":")[0]
    bare = bare.partition("%")[0].rstrip(".")
    try:
        # The form that certificates and DNS hold.
        return bare if bare.isascii() else bare.encode("idna").decode()
    except UnicodeError:
        return ""
