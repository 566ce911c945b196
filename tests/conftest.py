"""All tests: one thread, as a worker has, so that many may run on few cores without waiting for
each other."""

import os
import signal
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
import torch

import fedknow.cli.output  # noqa: F401  # its consoles keep the width that COLUMNS has then
from fedknow.protocols import parts

torch.set_num_threads(1)

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would the
# processes they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def hooks_as_before():
    """Put back the hooks that trackers install in a process and leave there."""
    exit_function, excepthook = sys.exit, sys.excepthook
    yield
    sys.exit, sys.excepthook = exit_function, excepthook


@pytest.fixture(autouse=True)
def modules_as_before(monkeypatch):
    """Forget the modules and objects that a test made up, so that none meets another's."""
    before = set(sys.modules)
    monkeypatch.setattr(parts, "_registered", parts.snapshot())
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(tempfile.gettempdir()):
            del sys.modules[name]
