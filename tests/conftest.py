"""All tests: one thread, as a worker has, so that many may run on few cores without waiting for
each other."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch

torch.set_num_threads(1)

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would the
# processes they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
