"""Checksums in the files of a run folder, checked at every reading.

A run folder has a *fingerprint*, the CRC-32 of its configuration, which the first line of
``config.toml`` holds. The checksums of all other files start from it, so a file of another run
is noticed too. Folders of earlier versions have no checksums; their fingerprint is empty, and
they are read as they are.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fedknow.server.checks.faults import RunError

__all__ = [
    "FolderDamaged",
    "chain_start",
    "is_last_event",
    "open_arrays",
    "open_json",
    "open_text",
    "read_lines",
    "seal_arrays",
    "seal_json",
    "seal_line",
    "seal_text",
]

_KEY = "crc32"
_FIRST_LINE = re.compile(r"# crc32 ([0-9a-f]{8}) of the lines below; [^\n]*\n")
_REMEDY = "to change a setting, give it with --set"
_NO_COMMENT = b"\0\0"
_COMMENT = re.compile(rb"(?s)(..)([0-9a-f]{8}|) ([0-9a-f]{8})\Z")
"""The end of a sealed archive: the comment's length, the fingerprint and the checksum."""
_LONGEST_COMMENT = 19
_LAST_KEY = re.compile(rb', "crc32": "([0-9a-f]{8})"}$')


class FolderDamaged(RunError):
    """A damaged file of a run folder.

    The text names the file and the remedy.
    """

    is_resumable = False


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


# --- config.toml


def seal_text(text: str) -> str:
    """Put a line with its checksum in front of a text."""
    return f"# crc32 {_crc(text)} of the lines below; {_REMEDY}\n{text}"


def open_text(sealed: str) -> tuple[str, str]:
    """Give a text that :func:`seal_text` sealed, and its checksum.

    The checksum is empty if the text was never sealed.

    Raises
    ------
    ValueError
        If it is not what was sealed.
    """
    matched = _FIRST_LINE.match(sealed)
    if matched is None:
        if sealed.lstrip().startswith("#") or not sealed.strip():
            raise ValueError("its first line is not what the run wrote")
        return sealed, ""
    text = sealed[matched.end() :]
    if _crc(text) != matched[1]:
        raise ValueError(f"its checksum is wrong; {_REMEDY}")
    return text, matched[1]


# --- metrics.jsonl


def chain_start(fingerprint: str) -> int:
    """Return the number that the checksums of lines start from."""
    return zlib.crc32(fingerprint.encode())


def seal_line(event: Mapping[str, Any], chain: int) -> tuple[bytes, int]:
    """Write an event as a line whose checksum covers all lines before it.

    Returns
    -------
    tuple of bytes and int
        The line with its end, and the checksum.
    """
    body = json.dumps(event, allow_nan=False).encode()
    chain = zlib.crc32(body, chain)
    # Put in by hand, so that all other bytes stay those that the checksum covers.
    return body[:-1] + f', "{_KEY}": "{chain:08x}"}}\n'.encode(), chain


def read_lines(data: bytes, chain: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Read lines of :func:`seal_line`, each with the checksum after it.

    Half a line at the end is left out.

    Lines of earlier versions have no checksum. They are covered by those of later lines.

    Raises
    ------
    ValueError
        At the first line that is not what was written; the text has its number.
    """
    # A run may begin with lines of an earlier version, but none may follow a sealed one.
    is_sealed = False
    # Without the last piece, which is empty or a line that a crash cut off.
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        body, stated = _unseal(line)
        chain = zlib.crc32(body, chain)
        if stated is None and is_sealed:
            raise ValueError(f"line {number} has no checksum")
        if stated is not None and stated != chain:
            raise ValueError(
                f"line {number}: a checksum is wrong here or in the lines before"
            )
        is_sealed = stated is not None
        yield _event(body, number), chain


def is_last_event(data: bytes, kind: str) -> bool:
    """Say whether the last whole line is an undamaged event of a kind."""
    lines = data.split(b"\n")[:-1]
    if not lines:
        return False
    body, stated = _unseal(lines[-1])
    earlier = _unseal(lines[-2])[1] if len(lines) > 1 else None
    if (
        stated is not None
        and earlier is not None
        and zlib.crc32(body, earlier) != stated
    ):
        return False
    try:
        return bool(_event(body, len(lines))["event"] == kind)
    except ValueError:
        return False


def _unseal(line: bytes) -> tuple[bytes, int | None]:
    """Split a line into its text and its checksum."""
    matched = _LAST_KEY.search(line)
    return (
        (line, None)
        if matched is None
        else (line[: matched.start()] + b"}", int(matched[1], 16))
    )


def _event(body: bytes, number: int) -> dict[str, Any]:
    try:
        event = json.loads(body)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON: {error}") from None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError(f"line {number} is no event")
    return event


# --- other files


def seal_json(tree: Mapping[str, Any], fingerprint: str) -> bytes:
    """Write a tree of plain values with its checksum."""
    sealed = {**tree, _KEY: _tree_checksum(tree, fingerprint)}
    return json.dumps(sealed, indent=1).encode() + b"\n"


def open_json(data: bytes, fingerprint: str) -> dict[str, Any]:
    """Read what :func:`seal_json` wrote, or the JSON of an earlier version.

    Raises
    ------
    ValueError
        If it is not what was written.
    """
    tree = json.loads(data)
    if not isinstance(tree, dict):
        raise ValueError("it holds no names and values")
    stated = tree.pop(_KEY, None)
    if (stated is not None or fingerprint) and stated != _tree_checksum(
        tree, fingerprint
    ):
        raise ValueError("its checksum is wrong")
    return tree


def _tree_checksum(tree: Mapping[str, Any], fingerprint: str) -> str:
    # Sorted keys, so that the sum depends on the content and not on the order.
    return _crc(fingerprint + json.dumps(tree, sort_keys=True))


def seal_arrays(arrays: Mapping[str, np.ndarray], fingerprint: str) -> bytes:
    """Write arrays as ``.npz`` with a checksum of the whole archive.

    The archive's comment holds the fingerprint and the checksum.

    The archive's own checksums do not cover its directory, so an array could go missing.
    """
    file = io.BytesIO()
    # In memory first, as the checksum goes over the whole archive.
    np.savez_compressed(file, allow_pickle=False, **dict(arrays))
    data = file.getvalue()
    comment = f"{fingerprint} {zlib.crc32(data):08x}".encode()
    # A comment at the end of a zip archive: NumPy and every other reader pass over it.
    return (
        data[: -len(_NO_COMMENT)] + len(comment).to_bytes(2, "little") + comment
    )


def open_arrays(data: bytes, fingerprint: str) -> dict[str, np.ndarray]:
    """Read an archive of :func:`seal_arrays`, or of an earlier version.

    Raises
    ------
    ValueError
        If it is not what was written.
    """
    tail = data[-_LONGEST_COMMENT:]
    matched = _COMMENT.search(tail)
    if matched is not None:
        data = data[: matched.start() - len(tail)] + _NO_COMMENT
        if zlib.crc32(data) != int(matched[3], 16):
            raise ValueError("its checksum is wrong")
    if (b"" if matched is None else matched[2]) != fingerprint.encode():
        raise ValueError("it is damaged, or another run's")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    # zipfile and NumPy raise a dozen kinds for bytes that are none of theirs.
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
