"""Faults of credentials and of handshakes."""

from __future__ import annotations

import ssl
from enum import StrEnum

from fedknow.protocols.errors import FedknowError

__all__ = [
    "CredentialError",
    "CredentialFault",
    "TlsError",
    "TlsFault",
    "explain_ssl",
]


class CredentialFault(StrEnum):
    """Why a credential does not let its bearer in."""

    MISSING = "no credential"
    MALFORMED = "not a credential of this run's kind"
    TOKEN = "wrong token"
    IDENTITY = "another client's credential"


class CredentialError(FedknowError):
    """A peer that cannot prove who it is.

    Attributes
    ----------
    fault : CredentialFault
        What kind of fault.
    reason : str
        A sentence for both sides; it holds no secret.
    """

    def __init__(self, fault: CredentialFault, reason: str) -> None:
        super().__init__(f"{fault}: {reason}")
        self.fault = fault
        self.reason = reason


class TlsFault(StrEnum):
    """Why two sides cannot agree on a connection."""

    EXPIRED = "expired"
    EARLY = "not yet valid"
    OTHER_CA = "issued by another CA"
    NAME = "another host's certificate"
    NO_CERTIFICATE = "no client certificate"
    PURPOSE = "the other side's kind of certificate"
    NO_TLS = "no TLS"
    UNREACHABLE = "unreachable"
    PROXY = "stopped by a proxy"
    OTHER = "refused"


_REMEDIES = {
    TlsFault.EXPIRED: "make new certificates (docs/how-to/deploy.md, Renewal), or set "
    "this machine's clock",
    TlsFault.EARLY: "set this machine's clock (a Raspberry Pi has none that runs without "
    "power: enable NTP)",
    TlsFault.OTHER_CA: "use folders that one run of `fedknow certs` made for both sides",
    TlsFault.NAME: "connect by a name that the server's certificate has, or make one "
    "with `fedknow certs --host NAME`",
    TlsFault.NO_CERTIFICATE: "give a folder with a cert.pem and a key.pem: "
    "DIR/clients/NNN of `fedknow certs DIR`",
    TlsFault.PURPOSE: "give server/ of `fedknow certs` to the server and a folder of "
    "clients/ to each client",
    TlsFault.NO_TLS: "start the server with --tls",
    TlsFault.UNREACHABLE: "is the server running, is the address right, is the port open?",
    TlsFault.PROXY: "have the proxy let CONNECT through, or leave the server out with no_proxy",
    TlsFault.OTHER: "see the server's log",
}


class TlsError(FedknowError):
    """A handshake that failed; the text says why, and what would help.

    Attributes
    ----------
    fault : TlsFault
        What kind of fault.
    """

    def __init__(self, fault: TlsFault, detail: str) -> None:
        super().__init__(f"{fault} ({detail}): {_REMEDIES[fault]}")
        self.fault = fault


# X509_V_ERR_* of OpenSSL, whose names Python does not give.
_BY_VERIFY_CODE = {
    9: TlsFault.EARLY,
    10: TlsFault.EXPIRED,
    26: TlsFault.PURPOSE,
    62: TlsFault.NAME,
    64: TlsFault.NAME,
    **dict.fromkeys((2, 7, 18, 19, 20, 21, 30), TlsFault.OTHER_CA),
}

# Parts of OpenSSL's reasons: the prefix before them names the version of TLS. The earliest that
# fits counts.
_BY_ALERT = {
    "CERTIFICATE_EXPIRED": TlsFault.EXPIRED,
    "UNKNOWN_CA": TlsFault.OTHER_CA,
    "DECRYPT_ERROR": TlsFault.OTHER_CA,
    "BAD_CERTIFICATE": TlsFault.OTHER_CA,
    "UNSUPPORTED_CERTIFICATE": TlsFault.PURPOSE,
    "CERTIFICATE_REQUIRED": TlsFault.NO_CERTIFICATE,
    "WRONG_VERSION_NUMBER": TlsFault.NO_TLS,
    "RECORD_LAYER_FAILURE": TlsFault.NO_TLS,
}


def explain_ssl(error: ssl.SSLError) -> TlsError:
    """Say in words what OpenSSL found wrong with a handshake."""
    if isinstance(error, ssl.SSLCertVerificationError):
        fault = _BY_VERIFY_CODE.get(error.verify_code, TlsFault.OTHER)
        return TlsError(fault, error.verify_message)
    reason = error.reason or str(error)
    faults = (fault for alert, fault in _BY_ALERT.items() if alert in reason)
    fault = next(faults, TlsFault.OTHER)
    return TlsError(fault, reason.lower().replace("_", " "))
