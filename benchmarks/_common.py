"""Shared parts of the benchmarks.

One case a process, cases in turn, medians, and the record of where and how.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}
"""Nobody is told, and a process computes with one thread."""
os.environ |= QUIET

_RESULT = "RESULT "


def give(result: Mapping[str, Any]) -> None:
    """In a case's process: hand the result to :func:`measure`."""
    print(_RESULT + json.dumps(result), flush=True)


def measure(
    command: Sequence[str], timeout: float = 1800, **environment: str
) -> dict[str, Any]:
    """Run a case in a process of its own, in this folder; return its result.

    Raises
    ------
    SystemExit
        If it gave nothing; with the end of what it wrote.
    """
    completed = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=HERE,
        env=os.environ | QUIET | environment,
    )
    lines = [
        line for line in completed.stdout.splitlines() if line.startswith(_RESULT)
    ]
    if completed.returncode or not lines:
        raise SystemExit(
            f"{' '.join(command)} failed ({completed.returncode}):\n"
            f"{completed.stdout[-2000:]}\n{completed.stderr[-4000:]}"
        )
    outcome: dict[str, Any] = json.loads(lines[-1].removeprefix(_RESULT))
    return outcome


def in_turn(
    cases: Mapping[str, Sequence[str]], repeats: int, **environment: str
) -> dict[str, list[dict[str, Any]]]:
    """Measure each case so many times, the cases in turn.

    So other work of the machine affects all cases alike.
    """
    outcome: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, command in cases.items():
            outcome[name].append(measure(command, **environment))
    return outcome


@contextmanager
def watching(seconds: float = 1.0) -> Iterator[list[float]]:
    """Watch the memory of all processes that this one has started.

    The values are in MB (1e6 bytes), one every so many seconds.

    It is the sum of their proportional set sizes, in which what processes share counts once.
    """
    import psutil

    seen = [0.0]
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(seconds):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it has ended meanwhile
                    continue
            seen.append(total / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stopped.set()
        thread.join()


def median(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the median of one figure over the repeats of a case."""
    return statistics.median(float(run[key]) for run in runs)


def ratio(
    runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], key: str
) -> float:
    """Return the median ratio to the other case's run of the same turn."""
    return statistics.median(
        a[key] / b[key] for a, b in zip(runs, base, strict=True)
    )


def spent(ends: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return seconds, and processor seconds of this process, between two ends.

    An end is (perf_counter, process_time).
    """
    return {"seconds": ends[-1][0] - ends[0][0], "cpu": ends[-1][1] - ends[0][1]}


def write(path: Path, results: Any, **details: Any) -> None:
    """Write results as JSON, with :func:`machine` and more ``details``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"about": machine() | details, "results": results}, indent=1)
        + "\n",
        "utf-8",
    )
    print(f"written to {path}")


def machine() -> dict[str, Any]:
    """Describe the command and the machine, with its load just now."""
    import psutil
    import torch

    processor = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(
            ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
        ),
        "cpu": processor[0].partition(":")[2].strip()
        if processor
        else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else None,
        "load_at_end": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {
            name: version(name)
            for name in ("fedknow", "flwr", "ray", "torch", "numpy")
        },
    }
