"""Heads stay at home: all that real clients send is looked at, name by name and byte by byte."""

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedknow.client.data import make_benchmark
from fedknow.client.edge import worker
from fedknow.client.edge.client import EdgeClient
from fedknow.client.node import Node
from fedknow.protocols.config import read_config
from fedknow.protocols.messages import Arrays
from fedknow.server import serve as serving
from fedknow.server.run.folder import RunFolder

WAIT = 60
BASE = {
    "data": {"clients": 2, "tasks": 1, "classes_max": 2, "test_samples": 0.5},
    "model": "mlp",
    "train": {"rounds": 1, "epochs": 1},
}


@pytest.fixture
def sent(monkeypatch):
    """What clients send: names of arrays, and all bytes."""
    names, payloads = set(), []
    pack = worker.pack

    def watched(reply, *arguments, **keywords):
        packed = pack(reply, *arguments, **keywords)
        for record in reply.content.values():
            if isinstance(record, Arrays):
                names.update(record)
        frames = packed.frames(0, "0", "0", 0)
        payloads.append(b"".join(bytes(frame) for frame in frames))
        return packed

    monkeypatch.setattr(worker, "pack", watched)
    monkeypatch.setattr(serving, "write_report", lambda *_: None)
    return names, payloads


def run(tmp_path, *changes):
    """Run real clients; give the heads that they had at the end, as bytes, and the traffic."""
    config = read_config(BASE, changes)
    at_work = threading.Lock()
    heads = []

    class Watched:
        """A node; the clients are threads here, which share torch's generator."""

        def __init__(self, config):
            with at_work:
                self.node = Node(config, make_benchmark(config))
                self.learner = self.node.learner

        def handle(self, message, state):
            with at_work:
                answer = self.node.handle(message, state)
                kept = self.learner.local_parameters()
                heads.append(kept["head.weight"].numpy().tobytes())
                return answer

    with ThreadPoolExecutor(2) as threads:
        clients = []

        def start(port):
            for client in range(2):
                edge = EdgeClient(
                    f"127.0.0.1:{port}",
                    tmp_path / f"state{client}",
                    client=client,
                    node=Watched,
                )
                clients.append(threads.submit(asyncio.run, edge.run()))

        serving.serve(config, tmp_path / "run", "127.0.0.1:0", ready=start)
        for client in clients:
            client.result(WAIT)
    traffic = RunFolder.open(tmp_path / "run").events()[-1]["traffic"]
    return set(heads), traffic


@pytest.mark.parametrize("learner", ["fedknow", "fedrep", "fedper"])
def test_no_head_leaves_a_device(tmp_path, sent, learner):
    heads, traffic = run(tmp_path, f"learner={learner}")
    names, payloads = sent
    assert names
    assert not [name for name in names if name.startswith("head")]
    assert heads
    assert not [head for head in heads if any(head in it for it in payloads)]
    assert "evaluate.global" not in traffic


def test_heads_leave_where_the_user_wants_it_and_all_are_told(
    tmp_path, sent, caplog
):
    caplog.set_level(logging.WARNING)
    heads, traffic = run(
        tmp_path, "learner=fedrep", "evaluation.global_model=true"
    )
    names, payloads = sent
    assert {"head.weight", "head.bias"} <= names
    assert [head for head in heads if any(head in it for it in payloads)]
    assert traffic["evaluate.global"]["up"] > 0
    told = {
        entry.name
        for entry in caplog.records
        if "evaluation.global_model = true" in entry.message
    }
    assert told == {"fedknow.server.assemble", "fedknow.client.edge.worker"}
