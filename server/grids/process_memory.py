"""How much memory a process has needed."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

from fedknow.client.compute.heap import give_back

__all__ = ["forget_process_peak", "process_peak_mb"]


def forget_process_peak() -> None:
    """Measure this process's peak anew from here on, where the system can (Linux), so that each
    run has its own.

    What earlier runs have freed is given back first; what they have left in use (modules,
    caches) stays in the peak.
    """
    give_back()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def process_peak_mb() -> float:
    """Largest resident memory that this process ever had, or had since
    :func:`forget_process_peak`; MB (1e6 bytes)."""
    peak = resource.getrusage(
        resource.RUSAGE_SELF
    ).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
