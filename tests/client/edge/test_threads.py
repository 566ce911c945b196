"""The thread of work: what it holds, how it ends, and a process that ends with it."""

import asyncio
import subprocess
import sys
import threading
import weakref

import pytest

from fedknow.client.edge.threads import WorkThread
from fedknow.protocols.config import read_config
from fedknow.protocols.messages import TRAIN, Arrays, Config, Message, node_of
from fedknow.server.grids.grpc_grid import GrpcGrid

WAIT = 30
"""Seconds that nothing here takes."""

PROCESS = """
import atexit, os, sys, threading, time
from pathlib import Path
import torch
from fedknow.client.edge.client import EdgeClient, run_client

class Node:
    def handle(self, message, state):
        return message.reply({"arrays": message.arrays()}), state

    def __del__(self):
        # As a model's tensors, but for longer: each lets other threads run while it is freed.
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            torch.empty(1)

def main(port, state):
    run_client(EdgeClient(f"127.0.0.1:{port}", Path(state), node=lambda config: Node()))

@atexit.register
def tell():
    print([one.name for one in threading.enumerate()], len(os.listdir("/proc/self/task")))

main(*sys.argv[1:])
"""


class Thing:
    """Something that the thread is given or gives."""


@pytest.fixture
def thread():
    one = WorkThread()
    yield one
    one.stop()


def test_what_was_done_is_not_held(thread):
    """The thread frees what an order held before the next one comes."""
    dead = threading.Semaphore(0)

    def thing():
        made = Thing()
        weakref.finalize(made, dead.release)
        return made

    def work(given):
        assert isinstance(given, Thing)
        return thing()

    asyncio.run(thread.do(work, thing()))
    assert dead.acquire(timeout=WAIT)
    assert dead.acquire(timeout=WAIT)


def test_it_is_joined_once_it_was_stopped(thread):
    assert not thread.join(0)
    thread.stop()
    assert thread.join(WAIT)
    assert thread.join(0)


def test_it_is_not_joined_while_it_works(thread):
    has_begun, may_end = threading.Event(), threading.Event()

    def work():
        has_begun.set()
        assert may_end.wait(WAIT)

    async def main():
        task = asyncio.create_task(thread.do(work))
        await asyncio.to_thread(has_begun.wait, WAIT)
        task.cancel()

    asyncio.run(main())
    thread.stop()
    # However long one would wait.
    assert not thread.join(1e6)
    may_end.set()
    while thread.is_busy:
        pass
    assert thread.join(WAIT)


def test_a_process_ends_with_no_thread_left(tmp_path):
    """Python stops a thread wherever it is; inside PyTorch, that aborts the process."""
    grid = GrpcGrid(read_config({"data": {"clients": 1}}), "127.0.0.1:0", "run")
    command = [sys.executable, "-c", PROCESS, str(grid.port), str(tmp_path / "0")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    content = {
        "arrays": Arrays({}),
        "config": Config({"task": 0, "round": 1}),
    }
    try:
        replies = grid.exchange([Message(TRAIN, node_of(0), "", content=content)])
        assert [reply.failure for reply in replies] == [None]
        grid.finish()
    finally:
        grid.close()
    assert process.communicate(timeout=WAIT)[0] == "['MainThread'] 1\n"
    assert process.returncode == 0


def test_a_server_leaves_no_thread():
    """Neither its own nor that of gRPC."""
    code = """
import os, threading
from fedknow.protocols.config import read_config
from fedknow.server.grids.grpc_grid import GrpcGrid
grid = GrpcGrid(read_config({"data": {"clients": 1}}), "127.0.0.1:0", "run")
grid.close()
print([one.name for one in threading.enumerate()])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert done.stdout == "['MainThread']\n", done.stderr
