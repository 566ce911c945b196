"""Throw hostile bytes at every decoder of the wire.

    python benchmarks/fuzz_wire.py --seconds 60
    python benchmarks/fuzz_wire.py --inputs 8000000 --seconds 36000

Valid messages in every encoding are mutated - bits, bytes, numbers, lengths, order, pieces of
one in another - and read; in most ways of reading the checksums are put right first, so that
the mutation gets past them. Anything but a :class:`WireError` is a fault: it is raised, and the
input is written to ``fuzz-<crc>.bin``, which ``--input`` reads again. Prints what came of the
inputs, and how far the process grew from a tenth of the way on.
"""

from __future__ import annotations

import argparse
import collections
import random
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError

from fedknow.protocols.messages import Arrays, Config, Message, Metrics
from fedknow.protocols.wire import (
    HEARTBEAT,
    Assembler,
    Code,
    Encoding,
    Limits,
    Parcel,
    WireError,
    check_version,
    hello,
    pack,
    parse,
    refusal,
    refused,
    unpack,
    welcome,
)
from fedknow.protocols.wire.fedknow_pb2 import Header, Tensor

T = TypeVar("T")
LIMITS = Limits(
    message_bytes=1 << 20,
    header_bytes=1 << 16,
    decoded_bytes=1 << 20,
    streams=4,
    tensors=64,
    elements=1 << 18,
)
"""Small, so that an input that gets around one shows."""


def fuzz(data: bytes) -> str:
    """Read ``data`` as its first byte chooses, and return the outcome.

    Raises
    ------
    Exception
        Any but a :class:`WireError`: a fault of the decoder.
    """
    try:
        return _WAYS[data[0] % len(_WAYS)](data[1:]) if data else "empty"
    except WireError as error:
        return error.code.name


def _read_frame(data: bytes) -> str:
    frame = parse(data)
    kind = frame.WhichOneof("kind")
    if kind == "chunk":
        Assembler(LIMITS).add(frame)
    elif kind == "refusal":
        raise refused(frame.refusal)
    elif kind in ("hello", "welcome"):
        check_version(getattr(frame, kind))
    return "read"


def _read_stream(data: bytes, repair: bool = False) -> str:
    assembler, outcome = Assembler(LIMITS), "nothing whole"
    for piece in _split(data):
        frame = parse(piece)
        if frame.WhichOneof("kind") == "chunk":
            if repair:
                frame.chunk.crc32 = zlib.crc32(frame.data)
            if parcel := assembler.add(frame):
                unpack(parcel, LIMITS)
                outcome = "read"
    return outcome


def _read_repaired_stream(data: bytes) -> str:
    return _read_stream(data, repair=True)


def _read_message(data: bytes, repair: bool = False) -> str:
    """Return a header behind its length, and a payload."""
    size = int.from_bytes(data[:2], "little")
    text, payload = data[2 : 2 + size], bytearray(data[2 + size :])
    if repair:
        try:
            header = Header.FromString(text)
        except DecodeError:
            return "no header"
        for record in header.records:
            for tensor in record.arrays.tensors:
                tensor.crc32 = zlib.crc32(
                    payload[tensor.offset : tensor.offset + tensor.length]
                )
        text = header.SerializeToString()
    unpack(Parcel(2, "1", "", memoryview(text), memoryview(payload)), LIMITS)
    return "read"


def _read_repaired_message(data: bytes) -> str:
    return _read_message(data, repair=True)


_WAYS: tuple[Callable[[bytes], str], ...] = (
    _read_frame,
    _read_stream,
    _read_repaired_stream,
    _read_message,
    _read_repaired_message,
)


def corpus() -> list[bytes]:
    """Return valid inputs of :func:`fuzz`, in every way and encoding."""
    frames = [
        hello(3),
        welcome(3, "[data]\n"),
        HEARTBEAT,
        refusal(WireError(Code.MALFORMED, "bad")),
    ]
    inputs = [bytes([_WAYS.index(_read_frame)]) + frame for frame in frames]
    work = _valid_work()
    for message in (work, work.fail(2, "no such data")):
        for encoding in Encoding:
            inputs += _inputs_of(message, encoding)
    return inputs


def _valid_work() -> Message:
    """Return a message that has every kind of value."""
    rng = np.random.default_rng(0)
    sparse = np.where(
        rng.random((40, 30)) < 0.02, rng.standard_normal((40, 30)), 0
    ).astype(np.float32)
    arrays = Arrays(
        weight=rng.standard_normal((7, 5)).astype(np.float32),
        sparse=sparse,
        half=np.where(rng.random(200) < 0.5, rng.standard_normal(200), 0),
        mask=rng.random(70) < 0.3,
        count=np.array(12, np.int64),
        empty=np.empty((0, 3), np.uint16),
    )
    config = Config(
        flag=True,
        task=-3,
        lr=0.1,
        name="é",
        blob=b"\0\1",
        none=[],
        texts=["a", "b"],
        flags=[True],
    )
    metrics = Metrics(loss=float("nan"), correct=[1, 2, 3], losses=[0.5])
    records = {"arrays": arrays, "config": config, "metrics": metrics}
    return Message("train", 7, "id", "", "3", records)


def _inputs_of(message: Message, encoding: Encoding) -> list[bytes]:
    """Return a message in one encoding, for every way of reading it."""
    sent = list(pack(message, encoding, chunk_bytes=4096).frames())
    inputs = [bytes([_WAYS.index(_read_frame)]) + sent[0]]
    stream = _behind_lengths([*sent[:1], HEARTBEAT, *sent[1:]])
    inputs += [bytes([prefix]) + stream for prefix in (1, 2)]
    assembler = Assembler()
    (parcel,) = [
        complete for frame in sent if (complete := assembler.add(parse(frame)))
    ]
    body = (
        len(parcel.header).to_bytes(2, "little")
        + bytes(parcel.header)
        + bytes(parcel.payload)
    )
    return inputs + [bytes([prefix]) + body for prefix in (3, 4)]


def _behind_lengths(frames: Sequence[bytes]) -> bytes:
    """Return frames one after another, each behind its length."""
    return b"".join(struct.pack("<I", len(frame)) + frame for frame in frames)


_NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 127, 128, 255),
    *(1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 40, 1 << 62, (1 << 64) - 1),
)


def below(draw: random.Random, count: int) -> int:
    """Draw a number from 0 on, in a third of the time of ``randrange``."""
    return int(draw.random() * count)


def pick(draw: random.Random, values: Sequence[T]) -> T:
    """Draw one of some values."""
    return values[below(draw, len(values))]


def mutate(draw: random.Random, data: bytes, donor: bytes) -> bytes:
    """Damage ``data`` in one to four places, with pieces of ``donor`` too."""
    text = bytearray(data)
    for _ in range(1 + below(draw, 4)):
        at = 1 + below(draw, len(text) - 1) if len(text) > 1 else 0
        choice = below(draw, 9)
        if choice == 7:
            text = bytearray(_mutate_header(draw, bytes(text)))
        elif choice == 8 or (choice < 2 and not text):
            text = bytearray(_mutate_order(draw, bytes(text), donor))
        else:
            _mutate_bytes(draw, text, at, choice, donor)
    return bytes(text)


def _mutate_bytes(
    draw: random.Random, text: bytearray, at: int, choice: int, donor: bytes
) -> None:
    """Change, drop or insert bytes at a place of ``text``."""
    if choice == 0:
        text[at] ^= 1 << below(draw, 8)
    elif choice == 1:
        text[at] = pick(draw, (0, 1, 0x7F, 0x80, 0xFF, below(draw, 256)))
    elif choice == 2:
        del text[at:]
    elif choice == 3:
        del text[at : at + (1 + below(draw, 16))]
    elif choice == 4:
        text[at:at] = draw.randbytes(1 + below(draw, 16))
    elif choice == 5:
        start = below(draw, len(donor))
        text[at:at] = donor[start : start + (1 + below(draw, 256))]
    else:
        text[at : at + 8] = pick(draw, _NUMBERS).to_bytes(8, "little")


def _mutate_order(draw: random.Random, data: bytes, donor: bytes) -> bytes:
    """Drop, double or move frames of an input of :func:`_read_stream`.

    Or insert some of another stream.
    """
    frames = _split(data[1:])
    for _ in range(1 + below(draw, 3)):
        frames.insert(
            below(draw, len(frames) + 1),
            pick(draw, [*frames, *_split(donor[1:]), b""]),
        )
        if draw.random() < 0.5:
            frames.pop(below(draw, len(frames)))
    return data[:1] + _behind_lengths(frames)


def _split(data: bytes) -> list[bytes]:
    """Return the frames of :func:`_behind_lengths`."""
    frames = []
    while len(data) >= 4:
        size = struct.unpack("<I", data[:4])[0] % (1 << 21)
        frames.append(data[4 : 4 + size])
        data = data[4 + size :]
    return frames


def _mutate_header(draw: random.Random, data: bytes) -> bytes:
    """Change a number in the description of a tensor.

    The data are an input of :func:`_read_message`.
    """
    size = int.from_bytes(data[1:3], "little")
    try:
        header = Header.FromString(data[3 : 3 + size])
    except DecodeError:
        return data
    records = header.records
    tensors = list(
        chain.from_iterable(record.arrays.tensors for record in records)
    )
    if not tensors:
        return data
    _mutate_tensor(draw, pick(draw, tensors))
    text = header.SerializeToString()
    return (
        data[:1]
        + (len(text) & 0xFFFF).to_bytes(2, "little")
        + text
        + data[3 + size :]
    )


_FIELDS = (
    "type",
    "layout",
    "offset",
    "length",
    "count",
    "scale",
    "shape",
    "shape",
    "nudge",
)


def _mutate_tensor(draw: random.Random, tensor: Tensor) -> None:
    """Change a number in the description of one tensor."""
    number = pick(draw, (*_NUMBERS, below(draw, 1 << 12)))
    field = pick(draw, _FIELDS)
    if field == "shape":
        tensor.shape[:] = [
            *list(tensor.shape)[below(draw, 2) :],
            *[number] * below(draw, 3),
        ]
    elif field == "nudge":
        tensor.length = (tensor.length + 1) % (1 << 64)
        tensor.count = (tensor.count + below(draw, 2)) % (1 << 64)
    elif field == "scale":
        tensor.scale = pick(
            draw, (0.0, -1.0, float("nan"), float("inf"), 1e300, 5e-324)
        )
    elif field in ("type", "layout"):
        setattr(tensor, field, number % 15)
    else:
        setattr(tensor, field, number)


def run(
    inputs: int | None, seconds: float, seed: int
) -> collections.Counter[str]:
    """Fuzz with mutated inputs until the count or the time is over.

    Return how often each outcome was seen.
    """
    draw, seeds = random.Random(seed), corpus()
    outcomes: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + seconds
    with warnings.catch_warnings(
        action="error"
    ):  # a decoder has nothing to print
        number = 0
        while (inputs is None or number < inputs) and time.monotonic() < end:
            number += 1
            data = mutate(draw, pick(draw, seeds), pick(draw, seeds))
            try:
                outcomes[fuzz(data)] += 1
            except Exception:
                path = Path(f"fuzz-{zlib.crc32(data):08x}.bin")
                path.write_bytes(data)
                print(f"fault, after {outcomes.total()} inputs: {path}")
                raise
    return outcomes


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--inputs", type=int, help="stop after so many")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--input", type=Path, help="read this one input and no other"
    )
    chosen = options.parse_args()
    if chosen.input:
        print(fuzz(chosen.input.read_bytes()))
        return
    # Only here: tests load this file from another folder.
    from _fuzzing import watched

    watched(run, chosen.inputs, chosen.seconds, chosen.seed)


if __name__ == "__main__":
    main()
