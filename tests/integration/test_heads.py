"""Heads stay at home: all that real clients send is looked at, name by name and byte by byte."""

import logging

import pytest
from real_clients import plain_node, run_real_clients

from fedknow.client.edge import worker
from fedknow.protocols.config import read_config
from fedknow.protocols.messages import Arrays
from fedknow.server.run.folder import RunFolder

pytestmark = pytest.mark.usefixtures("no_report")

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
    return names, payloads


def run(tmp_path, *changes):
    """Run real clients; give the heads that they had at the end, as bytes, and the traffic."""
    config = read_config(BASE, changes)
    heads = []

    class Watched:
        def __init__(self, config, client):
            self.node = plain_node(config, client)

        def handle(self, message, state):
            answer = self.node.handle(message, state)
            kept = self.node.learner.local_parameters()
            heads.append(kept["head.weight"].numpy().tobytes())
            return answer

    run_real_clients(config, tmp_path / "run", Watched)
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
