"""Our experiment on a Flower grid: the app's own functions, called as Flower would call them."""

import itertools
import random
from collections import deque

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedknow.client.data import make_benchmark
from fedknow.client.flower_app import app as client_app
from fedknow.client.host import Host
from fedknow.client.learners import build_learner, resolve
from fedknow.client.state import StateStore
from fedknow.protocols.config import ConfigError, read_config
from fedknow.protocols.flower import empty_run, identify, set_id
from fedknow.protocols.messages import ENVELOPE
from fedknow.protocols.security.signing import make_key, sign
from fedknow.server import flower_app
from fedknow.server.checks.faults import RunError
from fedknow.server.flower_app import run_on_flower
from fedknow.server.grids.flower_grid import FlowerGrid
from fedknow.server.grids.inline import InlineGrid
from fedknow.server.run.experiment import Experiment
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.parts import Parts
from fedknow.simulations import simulate as simulations
from fedknow.strategies import build_strategy

CLIENTS = 3
SETTINGS = {
    "data.clients": CLIENTS,
    "data.tasks": 2,
    "train.rounds": 2,
    "train.epochs": 1,
    "model.name": "mlp",
    "learner.name": "fedknow",
    # Heads stay on nodes unless told otherwise; numbers are compared with a simulation's.
    "evaluation.global_model": True,
}


class FlowerLike(Grid):
    """A Flower grid of nodes in this process, with random ids and order."""

    def __init__(self, nodes=CLIENTS, partitions=None):
        draw = random.Random(5)
        partitions = nodes if partitions is None else partitions
        self.configs = {
            draw.getrandbits(64): {
                "partition-id": n,
                "num-partitions": partitions,
            }
            for n in range(nodes)
        }
        self.late = deque()
        self.calls = 0
        self.kill_at = None
        self.broken = {}
        self.kinds = []
        self.draw = draw
        self.ids = itertools.count()
        identify(77)

    def set_run(self, run):
        raise NotImplementedError

    create_message = push_messages = pull_messages = set_run

    @property
    def run(self):
        return empty_run(77)

    def get_node_ids(self):
        if self.late:
            self.late.popleft()
            return list(self.configs)[: -1 - len(self.late)]
        return list(self.configs)

    def send_and_receive(self, messages, *, timeout=None):
        answers = [self._answer(message) for message in messages]
        self.draw.shuffle(answers)
        return answers

    def _answer(self, message):
        about = message.metadata
        assert (about.run_id, about.src_node_id) == (77, 1)
        set_id(message, f"flower-{next(self.ids)}")
        self.calls += about.message_type != "query"
        if self.calls == self.kill_at:
            raise KeyboardInterrupt
        self.kinds.append(about.message_type)
        if about.dst_node_id in self.broken:
            return self.broken[about.dst_node_id](message)
        context = Context(
            77,
            about.dst_node_id,
            self.configs[about.dst_node_id],
            RecordDict(),
            {},
        )
        return client_app(message=message, context=context)


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKNOW_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(
        flower_app, "write_report", lambda folders, out: out / "report.html"
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Accuracies of the same experiment on our own grid."""
    place = tmp_path_factory.mktemp("inline")
    config = resolve(read_config(flower_app._nested(SETTINGS)))
    benchmark = make_benchmark(config)
    learner = build_learner(config, benchmark.shape, benchmark.classes)
    host = Host(config, benchmark, StateStore(place / "states", 2**20))
    with (
        RunFolder.create(place / "run", config) as folder,
        InlineGrid(CLIENTS, host) as grid,
    ):
        parts = Parts(config, learner, build_strategy(config.strategy))
        return Experiment(parts, grid, folder).run().accuracy


def run(grid, out, **changes):
    return run_on_flower(grid, {**SETTINGS, "out": str(out), **changes})


def same(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(one[n], other[n], equal_nan=True) for n in one
    )


def test_the_numbers_are_our_own_grids(tmp_path, expected, capsys):
    grid = FlowerLike()
    result = run(grid, tmp_path / "run")
    assert same(result.accuracy, expected)
    assert grid.kinds[:CLIENTS] == ["query"] * CLIENTS
    assert grid.kinds.count("train") == 2 * 2 * CLIENTS
    assert grid.kinds.count("train.end_task") == 2 * CLIENTS
    assert "task 2, round 2: accuracy" in capsys.readouterr().out
    # What is kept on the clients is what the last message named, and what came of it; no more.
    kept = [
        len(list(folder.iterdir())) for folder in (tmp_path / "state").glob("*/*")
    ]
    assert len(kept) == CLIENTS
    assert all(1 <= count <= 2 for count in kept)


def test_what_passes_beside_the_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr(simulations, "write_report", lambda *_: None)
    changes = {"learner.name": "fedweit", "strategy.name": "fedavg"}
    on_flower = run(FlowerLike(), tmp_path / "run", **changes)
    config = read_config(
        flower_app._nested(SETTINGS | changes), ["engine.backend=inline"]
    )
    inline = simulations.simulate(config, tmp_path / "inline")
    assert same(on_flower.accuracy, inline.accuracy)
    assert on_flower.summary["traffic"] == inline.summary["traffic"]
    assert inline.summary["traffic"]["train.extra"]["down"] > 0


@pytest.mark.parametrize("kill_at", [2, 5, 11, 18])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, expected, kill_at):
    grid = FlowerLike()
    grid.kill_at = kill_at
    with pytest.raises(KeyboardInterrupt):
        run(grid, tmp_path / "run", resume=True)
    result = run(FlowerLike(), tmp_path / "run", resume=True)
    assert same(result.accuracy, expected)


def test_clients_are_waited_for(tmp_path, capsys):
    grid = FlowerLike()
    grid.late.extend(range(2))
    heard = []
    ours = FlowerGrid(grid, CLIENTS, "", "ab", heard.append, poll=0)
    assert sorted(ours._find_clients()) == [0, 1, 2]
    assert heard == [1, 2]


def test_a_node_that_starts_again_under_another_id_is_the_same_client(tmp_path):
    grid = FlowerLike()
    ours = FlowerGrid(grid, CLIENTS, "", "ab")
    before = ours._find_clients()
    grid.configs[4711] = grid.configs.pop(before[1])
    assert ours._find_clients() == before | {1: 4711}
    assert (
        grid.kinds.count("query") == CLIENTS + 1
    )  # the others are not asked again


@pytest.mark.parametrize(("nodes", "partitions"), [(2, 2), (4, 4), (3, 5)])
def test_another_number_of_nodes_is_refused(tmp_path, nodes, partitions):
    with pytest.raises(
        ConfigError, match=r"data\.clients = 3, but a Flower node is partition"
    ):
        run(FlowerLike(nodes, partitions), tmp_path / "run")


def _gone(message):
    return Message(Error(3, "node unavailable"), reply_to=message)


def _stranger(message):
    return Message(RecordDict(), reply_to=message)


@pytest.mark.parametrize(
    ("answer", "words"),
    [(_gone, "node unavailable"), (_stranger, "not one of fedknow.client")],
)
def test_a_node_that_fails_is_a_client_that_fails(tmp_path, answer, words):
    def broken(message):
        if message.metadata.message_type == "query":
            context = Context(77, node, grid.configs[node], RecordDict(), {})
            return client_app(message=message, context=context)
        return answer(message)

    grid = FlowerLike()
    node = list(grid.configs)[1]
    grid.broken[node] = broken
    with pytest.raises(
        RunError, match=rf"client 1, task 1, round 1 \(train\): .*{words}"
    ):
        run(grid, tmp_path / "stop")
    result = run(grid, tmp_path / "skip", **{"engine.on_client_error": "skip"})
    assert np.isnan(result.accuracy["personal"][1]).all()
    assert np.isfinite(result.accuracy["personal"][0, 0, :]).all()


def test_what_is_set_wrongly_is_refused(tmp_path):
    grid = FlowerLike()
    with pytest.raises(ConfigError, match="unknown key"):
        run(grid, tmp_path / "run", **{"train.roundz": 1})
    with pytest.raises(
        ConfigError, match="learner is set to a value and has settings too"
    ):
        run_on_flower(
            grid,
            {
                "learner": "fedknow",
                "learner.rho": 0.2,
                "out": str(tmp_path / "run"),
            },
        )
    assert grid.kinds == []


def test_work_that_is_not_the_servers_is_refused():
    identify(77)
    message = Message(RecordDict(), 5, "train")
    set_id(message, "1")
    with pytest.raises(
        ValueError, match=r"does the work of fedknow\.server\.flower_app"
    ):
        client_app(message=message, context=Context(77, 5, {}, RecordDict(), {}))
    content = RecordDict()
    content[ENVELOPE] = ConfigRecord(
        {
            "client": 0,
            "version": 0,
            "committed": 0,
            "run": "../../x",
            "config": "",
            "id": "",
        }
    )
    message = Message(content, 5, "train")
    set_id(message, "1")
    with pytest.raises(ValueError, match="hexadecimal"):
        client_app(message=message, context=Context(77, 5, {}, RecordDict(), {}))


BRIEF = {
    "data.tasks": 1,
    "train.rounds": 1,
    "learner.name": "fedrep",
    "evaluation.global_model": False,
}


def owned(settings):
    """A grid of nodes whose owner has set bounds."""
    grid = FlowerLike()
    for config in grid.configs.values():
        config.update(settings)
    return grid


def test_nodes_run_what_their_owner_signed_and_nothing_else(tmp_path):
    key = tmp_path / "owner.key"
    make_key(key)
    nodes = {"signed-by": str(key.with_name("owner.key.pub"))}
    with pytest.raises(ConfigError, match="this one is not signed"):
        run(owned(nodes), tmp_path / "unsigned", **BRIEF)
    assert not list((tmp_path / "state").glob("*/*"))
    config = resolve(read_config(flower_app._nested(SETTINGS | BRIEF)))
    signature = tmp_path / "signature"
    signature.write_bytes(sign(config, key))
    extra = {**BRIEF, "signature": str(signature)}
    result = run(owned(nodes), tmp_path / "signed", **extra)
    assert np.isfinite(result.accuracy["personal"]).all()
    with pytest.raises(ConfigError, match="of another experiment"):
        run(owned(nodes), tmp_path / "other", **extra, seed=5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limit": "epochs=7,batch_size=15"}, r"train\.batch_size = 16"),
        ({"limit": "epoch=7"}, "the keys are"),
        ({"keep-own": "yes"}, "must be true or false"),
        ({"Signed_By": "owner.key.pub"}, "is spelled 'signed-by'"),
        ({"signed-by": "nowhere.pub"}, "not a public key"),
    ],
)
def test_owners_of_nodes_set_bounds(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        run(owned(settings), tmp_path / "run", **BRIEF)


def test_no_head_leaves_a_node_unless_told(tmp_path, caplog):
    brief = {key: BRIEF[key] for key in BRIEF if "global" not in key}
    settings = {
        key: value for key, value in SETTINGS.items() if "global" not in key
    }
    result = run_on_flower(
        FlowerLike(), {**settings, **brief, "out": str(tmp_path / "run")}
    )
    assert "evaluate.global" not in result.summary["traffic"]
    assert not caplog.records
    told = {**BRIEF, "evaluation.global_model": True}
    with pytest.raises(ConfigError, match="lets no parameters go"):
        run(owned({"keep-own": "true"}), tmp_path / "kept", **told)
    run(FlowerLike(), tmp_path / "told", **told)
    senders = {entry.name for entry in caplog.records}
    assert senders == {"fedknow.server.assemble", "fedknow.client.flower_app"}
