"""The C library's heap, where freed memory is kept for the next step.

It is given back between clients.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

__all__ = ["release_freed_memory", "retain_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's ``mallopt`` (malloc.h)."""
_KEPT = 2**29
"""Bytes at the end of a heap that are kept at most: what a batch of 256 CIFAR images needs in a
small network."""
_OLD_LIMIT = 2**25
"""The largest ``M_MMAP_THRESHOLD`` that older versions of glibc take, on 64 bit."""


@cache  # once a process is enough, and a Flower app makes a host for each message
def retain_freed_memory() -> None:
    """Have this process keep freed memory for its next step.

    It keeps up to 512 MiB, or a sixteenth of a small machine's memory.

    glibc gives large arrays back to the system as soon as they are freed, and each training
    step then takes the same pages anew, which the system has to clear: a tenth of a small CNN's
    step, a quarter and more of a large batch's scoring (``benchmarks/heap.py``). Each process
    keeps its own. Other C libraries, and whoever has set glibc's thresholds in the environment,
    are left alone.
    """
    system = ctypes.CDLL(None)
    chosen = (
        "MALLOC_TRIM_THRESHOLD_",
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TOP_PAD_",
        "MALLOC_MMAP_MAX_",
    )
    # A user's own setting counts more than ours; other C libraries have no such call.
    if not hasattr(system, "mallopt") or any(
        name in os.environ for name in chosen
    ):
        return
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    # A small device runs a client or two, and must not lose its memory to a heap.
    room = min(_KEPT, _memory() // 16)
    # Either threshold ends glibc's own adjusting of both, so without the first the second would
    # do harm.
    if any(
        system.mallopt(_M_MMAP_THRESHOLD, size)
        for size in (room // 4, min(room // 4, _OLD_LIMIT))
    ):
        system.mallopt(_M_TRIM_THRESHOLD, room)


def _memory() -> int:
    """Bytes of memory of this machine, or of its container if less."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(
        OSError, ValueError
    ):  # there is no limit ("max"), or no control group
        size = min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return size


def release_freed_memory() -> None:
    """Give memory that is free back to the system.

    The C library keeps it for later, but what stays of one client (a state, the small parts of
    its tensors) comes to lie in the room that its training has left, and the next client's
    training needs new room: with thousands of clients that is ten times what is in use.
    """
    system = ctypes.CDLL(None)
    if hasattr(system, "malloc_trim"):  # glibc's
        system.malloc_trim(0)
