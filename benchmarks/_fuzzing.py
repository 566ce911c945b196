"""What the programs share that read hostile input."""

from __future__ import annotations

import collections
import random
import resource
import time
from collections.abc import Callable
from typing import Any

NUMBERS = (
    0,
    1,
    -1,
    2**31,
    2**62,
    -(2**63),
    0.0,
    -0.0,
    1e308,
    -1e308,
    5e-324,
    float("nan"),
    float("inf"),
)
WORDS = (
    "torch.hub:load",
    "os:system",
    "../../etc/passwd",
    "local",
    "auto",
    "\x1b[2J",
    "\u202e",
    "x" * 5000,
    "",
    "nan",
    "1e400",
)


PART = 200_000
"""Inputs after which a line says how far it is."""


class Fault(Exception):
    """A reader let something pass that it must not."""


def value(draw: random.Random) -> Any:
    """Draw a value that a peer may send for any other."""
    kind = draw.randrange(6)
    if kind == 0:
        return draw.choice(WORDS)
    if kind == 1:
        return [draw.choice(NUMBERS) for _ in range(draw.randrange(4))]
    if kind == 2:
        return draw.random() < 0.5
    if kind == 3:
        return draw.randrange(-10, 100)
    if kind == 4:
        return [draw.choice(WORDS) for _ in range(draw.randrange(3))]
    return draw.choice(NUMBERS)


def setting(draw: random.Random) -> Any:
    """Draw a value that a record of settings can have on the wire."""
    return draw.choice((value(draw), draw.randbytes(draw.choice((0, 31, 32)))))


def watched(
    run: Callable[[int | None, float, int], collections.Counter[str]],
    inputs: int | None,
    seconds: float,
    seed: int,
) -> None:
    """Read inputs, and print what came of them and how far the process grew.

    Parameters
    ----------
    run : callable
        Reads so many inputs, for so many seconds, of a seed.
    inputs : int or None
        How many; None: as many as the time allows.
    seconds : float
        How long at most.
    seed : int
    """
    # What is loaded once is loaded, and what is remembered a few times is full.
    earlier = run(max(2000, (inputs or 0) // 10), seconds, seed)
    print(f"{earlier.total()} inputs, no fault", flush=True)
    began = time.monotonic()
    memory_at_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: collections.Counter[str] = collections.Counter()
    # In parts, each with a seed of its own, so that a long run can be seen to go on.
    while inputs is None or (earlier + outcomes).total() < inputs:
        remaining = seconds - (time.monotonic() - began)
        if remaining <= 0:
            break
        part = PART if inputs is None else inputs - (earlier + outcomes).total()
        seed += 1
        outcomes += run(min(part, PART), remaining, seed)
        print(f"{(earlier + outcomes).total()} inputs, no fault", flush=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_at_start
    print(
        f"{earlier.total() + outcomes.total()} inputs, the last {outcomes.total()} of them in "
        f"{time.monotonic() - began:.0f} s, in which the peak of memory grew by "
        f"{grown / 1024:.1f} MiB to {(grown + memory_at_start) / 1024:.0f} MiB"
    )
    for outcome, times in (earlier + outcomes).most_common():
        print(f"{times:>10} {outcome}")
