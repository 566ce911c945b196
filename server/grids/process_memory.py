"""The memory that a process has needed."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

from fedknow.client.compute.heap import release_freed_memory

__all__ = ["forget_process_peak", "process_peak_mb"]


def forget_process_peak() -> None:
    """Measure this process's peak anew, so that each run has its own.

    Only Linux can; elsewhere the peak goes on. Memory that earlier runs have freed is given back
    before. Memory that they still use (modules, caches) stays in the peak.
    """
    # Memory that is free but not given back would count in the next run's peak.
    release_freed_memory()
    # "5" resets the high-water mark; a container may forbid it.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def process_peak_mb() -> float:
    """Return this process's peak of resident memory, MB (1e6 bytes).

    It is counted since :func:`forget_process_peak`, or since the process began.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # KiB on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return peak * unit / 1e6
