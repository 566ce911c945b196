"""Measure packing, framing, assembling and unpacking on one core.

``python benchmarks/wire.py`` prints milliseconds of CPU for each step (median of the repeats)
and bytes sent, for a model of the size of ResNet-18 (47 MB, 122 tensors) and one of 62 thousand
parameters (10 tensors), in each encoding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from fedknow.protocols.messages import (
    ARRAYS,
    CONFIG,
    TRAIN,
    Arrays,
    Config,
    Message,
)
from fedknow.protocols.wire import (
    Assembler,
    Encoding,
    Parcel,
    pack,
    parse,
    unpack,
)

T = TypeVar("T")


def model(parameters: int, tensors: int) -> Arrays:
    """Draw normal weights in tensors of unequal size.

    A tenth of them is not 0, as in retained knowledge.
    """
    rng = np.random.default_rng(0)
    shares = np.arange(1, tensors + 1, dtype=np.float64)
    sizes = (shares / shares.sum() * parameters).astype(int)
    sizes[-1] += parameters - sizes.sum()
    arrays = Arrays()
    for index, size in enumerate(sizes):
        weights = rng.standard_normal(int(size), dtype=np.float32)
        arrays[f"body.layer{index}.weight"] = np.where(
            rng.random(int(size)) < 0.1, weights, np.float32(0)
        )
    return arrays


def timed(action: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    result = action()
    return 1e3 * (time.process_time() - start), result


def receive(frames: list[bytes]) -> Parcel:
    assembler = Assembler()
    parcels = [
        parcel for frame in frames if (parcel := assembler.add(parse(frame)))
    ]
    return parcels[0]


def once(message: Message, encoding: Encoding) -> list[float]:
    packing, packed = timed(lambda: pack(message, encoding))
    framing, frames = timed(lambda: list(packed.frames(3, "2")))
    assembling, parcel = timed(lambda: receive(frames))
    unpacking, _ = timed(lambda: unpack(parcel))
    return [
        packing,
        framing,
        assembling,
        unpacking,
        packing + framing + assembling + unpacking,
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=7)
    repeats = options.parse_args().repeats
    steps = ("pack", "frames", "assemble", "unpack")
    print(
        f"{'parameters':>10} {'encoding':>8} {'MB':>7} "
        + " ".join(f"{step:>9}" for step in (*steps, "all"))
        + "  ms"
    )
    for parameters, tensors in ((11_750_000, 122), (62_000, 10)):
        message = Message(
            TRAIN,
            2,
            "1",
            content={
                ARRAYS: model(parameters, tensors),
                CONFIG: Config(task=0, round=1),
            },
        )
        for encoding in Encoding:
            times = [once(message, encoding) for _ in range(repeats)]
            medians = [
                statistics.median(step) for step in zip(*times, strict=True)
            ]
            size = pack(message, encoding).size / 1e6
            print(
                f"{parameters:>10} {encoding:>8} {size:7.2f} "
                + " ".join(f"{m:9.2f}" for m in medians)
            )


if __name__ == "__main__":
    main()
