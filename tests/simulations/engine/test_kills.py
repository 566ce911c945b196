"""Whole runs on a cluster whose machines, workers and drivers die: numbers stay the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).parents[3] / "benchmarks" / "cluster_kills.py"


def can_hide_folders():
    """Whether a process may have a disk of its own here."""
    if shutil.which("unshare") is None:
        return False
    line = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(line, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(
    not can_hide_folders(), reason="mount namespaces need root"
)


def kill(*options, timeout):
    """Run the command; fails if numbers differ or a run hangs."""
    completed = subprocess.run(
        [sys.executable, str(KILLS), *options],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_fifty_kills_change_no_number():
    told = kill("--kills", "50", timeout=5000)
    assert told.count('"same": true') == len(told.splitlines())
