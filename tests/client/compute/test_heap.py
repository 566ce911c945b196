"""What is freed is kept, unless someone chose otherwise; and it is given back when asked for."""

import os
import platform
import subprocess
import sys

import pytest

from fedknow.client.compute import heap
from fedknow.client.compute.heap import release_freed_memory, retain_freed_memory

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="glibc's thresholds"
)

PROGRAM = """
import resource
import sys
from fedknow.client.compute.heap import release_freed_memory, retain_freed_memory
if "keep" in sys.argv:
    retain_freed_memory()

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        held = [b"1" * 2**23, b"2" * 2**23]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

step()
again = step()
if "give" in sys.argv:
    release_freed_memory()
print(again, step())
"""


def faults(*words, **environment):
    """Pages taken from the system by a step, and by one after it."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        env=clean | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return [int(word) for word in done.stdout.split()]


def test_a_step_takes_what_the_one_before_has_freed():
    assert min(faults()) > 2000  # of 4 KiB: three times 8 or 16 MiB
    assert max(faults("keep")) < 100


def test_what_is_given_back_is_taken_anew():
    again, after = faults("keep", "give")
    assert again < 100
    assert after > 2000


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
    ],
    ids=["MALLOC_", "GLIBC_TUNABLES"],
)
def test_thresholds_from_the_environment_are_left_alone(environment):
    assert min(faults("keep", **environment)) > 2000


class Old:
    """An older glibc, which refuses large thresholds."""

    def __init__(self, limit):
        self.limit, self.set = limit, {}

    def mallopt(self, name, value):
        if name == heap._M_MMAP_THRESHOLD and value > self.limit:
            return 0
        self.set[name] = value
        return 1


@pytest.mark.parametrize(
    ("limit", "memory", "found"),
    [
        (2**40, 2**34, {-3: 2**27, -1: 2**29}),
        (2**25, 2**34, {-3: 2**25, -1: 2**29}),
        (2**25, 2**30, {-3: 2**24, -1: 2**26}),  # a small box
        (
            2**20,
            2**34,
            {},
        ),  # as if nothing had been asked: one threshold alone does harm
    ],
)
def test_an_older_library_gets_what_it_takes(monkeypatch, limit, memory, found):
    for name in [
        name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))
    ]:
        monkeypatch.delenv(name)
    library = Old(limit)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(heap, "_memory", lambda: memory)
    retain_freed_memory.cache_clear()
    retain_freed_memory()
    assert library.set == found
    retain_freed_memory.cache_clear()


def test_giving_back_twice_is_harmless():
    release_freed_memory()
    release_freed_memory()
