"""A process's peak of memory is that of the run under way."""

import os
import sys

import numpy as np
import pytest

from fedknow.server.grids.process_memory import (
    forget_process_peak,
    process_peak_mb,
)


@pytest.mark.skipif(
    not (sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)),
    reason="the system forgets no peak",
)
def test_what_an_earlier_run_has_freed_is_forgotten():
    forget_process_peak()
    before = process_peak_mb()
    large = [
        np.ones(10_000) for _ in range(2_000)
    ]  # 160 MB in pieces that the C library would keep
    assert process_peak_mb() > before + 150
    del large
    forget_process_peak()
    assert process_peak_mb() < before + 40
