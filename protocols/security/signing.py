"""Signed experiments: a client runs only what its owner's key has signed.

The signature (Ed25519, RFC 8032) is over the experiment as the client reads it: all settings but
those that mean nothing to it, which are the section ``engine``, trackers and the server's folder
of data.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.extras import how_to_install
from fedknow.protocols.files import write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
    )

__all__ = [
    "PublicKey",
    "canonical",
    "make_key",
    "read_signature",
    "sign",
]

_PURPOSE = b"fedknow experiment 1\n"
"""Before what is signed, so that no signature of other things will do."""


def canonical(config: ExperimentConfig) -> bytes:
    """Give the bytes of an experiment that are signed.

    Parameters
    ----------
    config : ExperimentConfig
        With every setting of its learner.
    """
    tree: dict[str, Any] = config.for_clients().model_dump(mode="json")
    for section in ("engine", "tracking"):
        tree.pop(section, None)
    # Each machine keeps its data in a place of its own.
    tree["data"].pop("dir", None)
    # In one order and without spaces: the same experiment must give the same bytes.
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return _PURPOSE + text.encode()


class PublicKey:
    """The key of a client's owner, which checks signatures.

    Parameters
    ----------
    path : Path
        A PEM file that ``fedknow sign`` wrote beside the private key.

    Raises
    ------
    ConfigError
        If it is no such key, or the extra ``signing`` is not installed.
    """

    def __init__(self, path: Path) -> None:
        _require()
        # Imported late: a client that checks no signature needs no such package.
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import (
            Ed25519PublicKey,
        )
        from cryptography.hazmat.primitives.serialization import (
            load_pem_public_key,
        )

        try:
            key = load_pem_public_key(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(
                f"--signed-by {path}: not a public key ({error}); give the file KEY.pub of "
                "`fedknow sign`"
            ) from None
        # A PEM file may hold a key of any kind.
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(
                f"--signed-by {path}: not an Ed25519 key; `fedknow sign` makes one"
            )
        self._key = key
        self._path = path

    def check(self, config: ExperimentConfig, signature: bytes) -> None:
        """Refuse an experiment that this key did not sign.

        Raises
        ------
        ConfigError
            Saying what is missing or wrong.
        """
        from cryptography.exceptions import InvalidSignature

        if not signature:
            raise ConfigError(
                "this client runs only experiments that its owner signed, and this one is "
                "not signed; give `fedknow server` the file of `fedknow sign` by --signature"
            )
        try:
            self._key.verify(signature, canonical(config))
        except InvalidSignature:
            raise ConfigError(
                "this client runs only experiments that its owner signed, and the signature "
                f"is not of this experiment by the key {self._path.name}"
            ) from None


def make_key(path: Path) -> None:
    """Make a private key, and the public key beside it as ``PATH.pub``.

    Raises
    ------
    ConfigError
        If a file is there already or cannot be written.
    """
    _require()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
    )
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    try:
        # Readable by its owner alone from the start, and never over another key.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            file.write(private)
        write_atomic(path.with_name(f"{path.name}.pub"), public)
    except OSError as error:
        raise ConfigError(
            f"--key {path}: cannot be made: {error.strerror}"
        ) from None


def sign(config: ExperimentConfig, key: Path) -> bytes:
    """Sign an experiment.

    Parameters
    ----------
    config : ExperimentConfig
        With every setting of its learner.
    key : Path
        The owner's private key.

    Returns
    -------
    bytes
        The content of a signature's file (:func:`read_signature`).

    Raises
    ------
    ConfigError
        If it is no such key.
    """
    content = canonical(config)
    signature = _private_key(key).sign(content)
    entries = {
        "experiment": hashlib.sha256(content).hexdigest(),
        "signature": base64.b64encode(signature).decode(),
    }
    return json.dumps(entries, indent=1).encode() + b"\n"


def read_signature(path: Path, config: ExperimentConfig) -> bytes:
    """Read the signature of an experiment from its file.

    Raises
    ------
    ConfigError
        If the file is none, or another experiment's.
    """
    try:
        entries = json.loads(path.read_bytes())
        # Strict, as lenient decoding skips characters that do not belong there.
        signature = base64.b64decode(entries["signature"], validate=True)
        digest = str(entries["experiment"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--signature {path}: not a signature ({error!r}); `fedknow sign` makes one"
        ) from None
    # Here, before all clients come and refuse it one by one.
    if digest != hashlib.sha256(canonical(config)).hexdigest():
        raise ConfigError(
            f"--signature {path}: of another experiment, or of other settings; sign this "
            "one with the same --set"
        )
    return signature


def _private_key(path: Path) -> Ed25519PrivateKey:
    _require()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
    )
    from cryptography.hazmat.primitives.serialization import (
        load_pem_private_key,
    )

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--key {path}: not a private key ({error}); --make-key makes one"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            f"--key {path}: not an Ed25519 key; --make-key makes one"
        )
    return key


def _require() -> None:
    """Refuse to go on without the library that signs and checks."""
    try:
        import cryptography  # noqa: F401  # only whether it is there
    except ModuleNotFoundError:
        raise ConfigError(
            "signed experiments need the package cryptography: "
            + how_to_install("signing")
        ) from None
