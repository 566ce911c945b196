"""Who may speak to whom: TLS both ways, and who a credential proves.

``fedknow certs`` (:mod:`fedknow.server.certs`) makes one folder a machine, and each side is
given its own::

    server/        ca.pem  cert.pem  key.pem  tokens.json
    clients/000/   ca.pem  cert.pem  key.pem  token

A client's number is in its certificate (``fedknow://client/0``) or its token, so that it cannot
claim another's. Light: gRPC and the standard library, which is all that an edge box has.
"""

from fedknow.protocols.security.credentials import (
    channel_credentials,
    server_credentials,
)
from fedknow.protocols.security.faults import (
    CredentialError,
    CredentialFault,
    TlsError,
    TlsFault,
)
from fedknow.protocols.security.files import CA, CERTIFICATE, KEY, TOKEN, TOKENS
from fedknow.protocols.security.handshake import handshake
from fedknow.protocols.security.identity import (
    SERVER_URI,
    Tokens,
    authenticate,
    client_of_peer,
    client_uri,
    is_server,
    new_token,
)

__all__ = [
    "CA",
    "CERTIFICATE",
    "KEY",
    "SERVER_URI",
    "TOKEN",
    "TOKENS",
    "CredentialError",
    "CredentialFault",
    "TlsError",
    "TlsFault",
    "Tokens",
    "authenticate",
    "channel_credentials",
    "client_of_peer",
    "client_uri",
    "handshake",
    "is_server",
    "new_token",
    "server_credentials",
]
