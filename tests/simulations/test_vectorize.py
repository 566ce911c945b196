"""Clients that train at once give the numbers of one by one, up to rounding."""

import numpy as np
import pytest
import torch

from fedknow.client.host import Host
from fedknow.client.node import Node
from fedknow.client.state import StateStore, load_state
from fedknow.protocols.config import ConfigError, read_config
from fedknow.server.run.folder import RunFolder
from fedknow.simulations import simulate as simulations
from fedknow.simulations.simulate import simulate

BASE = {
    "data": {"clients": 7, "tasks": 2, "classes_max": 2, "test_samples": 0.5},
    "model": "mlp",
    "train": {"rounds": 2, "epochs": 2, "batch_size": 8, "lr": 3e-3},
    "learner": "fedper",
    "engine": {"backend": "inline"},
}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(simulations, "write_report", lambda *_: None)


@pytest.fixture
def sizes(monkeypatch):
    """How many clients trained at once, each time."""
    seen = []
    together = Node.train_together

    def counted(self, messages, states):
        seen.append(len(messages))
        return together(self, messages, states)

    monkeypatch.setattr(Node, "train_together", counted)
    return seen


def train_events(folder):
    return [
        event
        for event in RunFolder.open(folder).events()
        if event["event"] == "round"
    ]


@pytest.mark.parametrize(
    "changes",
    [
        ["strategy=fedprox", "strategy.proximal_mu=0.1"],
        ["learner=fedavg", "data.scenario=class-incremental"],
    ],
)
def test_a_run_is_the_same_up_to_rounding(tmp_path, changes, sizes):
    for vectorize in ("off", "auto"):
        simulate(
            read_config(BASE, [*changes, f"engine.vectorize={vectorize}"]),
            tmp_path / vectorize,
        )
    waves = 2 * [
        2 if "learner=fedavg" in changes else 3
    ]  # a task's two rounds, and its end where heads are personal
    assert sizes == [7] * sum(waves)  # none of them where it is off
    one_by_one, at_once = (
        RunFolder.open(tmp_path / name).accuracy() for name in ("off", "auto")
    )
    assert np.nanmax(np.abs(one_by_one["personal"] - at_once["personal"])) < 0.05
    losses = [
        [event["metrics"]["loss"] for event in train_events(tmp_path / name)]
        for name in ("off", "auto")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_messages_in_any_order_and_number(tmp_path, sizes):
    """A client twice in a wave, other work in between, and a client that fails: as one after the
    other."""
    from fedknow.client.data.benchmark import make_benchmark
    from fedknow.protocols.messages import (
        ARRAYS,
        CONFIG,
        EVALUATE,
        TRAIN,
        Arrays,
        Config,
        Message,
        node_of,
    )

    config = read_config(BASE, ["engine.vectorize=on"])
    benchmark = make_benchmark(config)
    replies = {}
    for vectorize in ("off", "on"):
        node = Node(
            read_config(config.model_dump(), [f"engine.vectorize={vectorize}"]),
            benchmark,
        )
        arrays = Arrays(
            (name, value.numpy()) for name, value in node.learner.send().items()
        )
        host = Host(config, None, StateStore(tmp_path / vectorize, 10**6), node)
        asked = [
            (0, TRAIN, 0),
            (1, TRAIN, 0),
            (0, TRAIN, 0),
            (2, TRAIN, 9),
            (1, TRAIN, 0),
            (3, TRAIN, 0),
            (4, TRAIN, 0),
        ]
        asked += [(4, TRAIN, 0), (0, EVALUATE, 0)]
        messages = [
            Message(
                kind,
                node_of(client),
                str(i),
                "0",
                content={ARRAYS: arrays, CONFIG: Config(task=task, round=1)},
            )
            for i, (client, kind, task) in enumerate(asked)
        ]
        replies[vectorize] = list(host.handle_many(messages, {}))
    assert sizes == [2, 5]
    for (expected, version), (reply, same) in zip(*replies.values(), strict=True):
        assert (reply.reply_to, reply.node, reply.kind, same) == (
            expected.reply_to, expected.node, expected.kind, version,
        )  # fmt: skip
        assert reply.failure == expected.failure
        assert (reply.failure is None) is (reply.reply_to != "3")
        for name, array in (
            reply.arrays()
            if reply.kind == TRAIN and reply.failure is None
            else {}
        ).items():
            assert np.allclose(
                array, expected.arrays()[name], rtol=1e-4, atol=1e-5
            )
            assert not np.array_equal(array, arrays[name])


def test_clients_never_chosen_train_when_the_task_ends(tmp_path):
    """Those that were are left as they are."""
    for vectorize in ("off", "auto"):
        changes = [
            "data.clients=12",
            "strategy.fraction=0.3",
            "train.rounds=1",
            f"engine.vectorize={vectorize}",
        ]
        simulate(read_config(BASE, changes), tmp_path / vectorize)
    one_by_one, at_once = (
        {
            path.name: load_state(path)["kept"]["head.weight"]
            for path in sorted((tmp_path / name / "clients").iterdir())
        }
        for name in ("off", "auto")
    )
    assert one_by_one.keys() == at_once.keys()
    for name, head in one_by_one.items():
        assert torch.allclose(head, at_once[name], rtol=1e-3, atol=1e-5)
    folders = [RunFolder.open(tmp_path / name) for name in ("off", "auto")]
    ends = [
        [
            event["samples"]
            for event in folder.events()
            if event["event"] == "task_end"
        ]
        for folder in folders
    ]
    assert ends[0] == ends[1]
    assert min(ends[0]) > 0


def test_on_where_it_cannot_be_is_said_before_the_run(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"engine\.vectorize = 'on': FedRep trains in a way of its own",
    ):
        simulate(
            read_config(BASE, ["learner=fedrep", "engine.vectorize=on"]),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()
