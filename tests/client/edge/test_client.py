"""The edge client over real sockets: connections break, servers and clients die, and no work is
done twice."""

import asyncio
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import numpy as np
import pytest

from fedknow.client.edge import client as edge
from fedknow.client.edge import session
from fedknow.client.edge.client import EdgeClient
from fedknow.client.edge.errors import EdgeError
from fedknow.client.edge.status import fetch_status
from fedknow.client.permissions import Limits as OwnerLimits
from fedknow.client.permissions import Permissions
from fedknow.protocols.config import ConfigError, read_config
from fedknow.protocols.messages import (
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
    node_of,
)
from fedknow.protocols.wire import (
    JOIN,
    SERVICE,
    Frame,
    Limits,
    goodbye,
    pack,
    parse,
    refused,
    welcome,
)
from fedknow.server.grids.grpc_grid import GrpcGrid

WAIT = 30
"""Seconds that nothing here takes."""


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(edge, "LONGEST_DELAY", 0.1)


class Counter:
    """A node that adds what it is told, counts its work in the state, and works only while the
    gate is open."""

    def __init__(self):
        self.calls = queue.SimpleQueue()
        self.gate = threading.Event()
        self.gate.set()

    def handle(self, message, state):
        self.calls.put(message.config()["round"])
        assert self.gate.wait(WAIT)
        count = state.get("count", 0) + 1
        arrays = Arrays(
            {
                name: array + np.float32(count)
                for name, array in message.arrays().items()
            }
        )
        return message.reply(
            {
                "arrays": arrays,
                "metrics": Metrics({"num-examples": 1, "count": count}),
            }
        ), {"count": count}

    def done(self):
        """Rounds worked on so far."""
        rounds = []
        while not self.calls.empty():
            rounds.append(self.calls.get())
        return rounds


class Running:
    """An edge client in a thread with an event loop of its own."""

    def __init__(self, port, state, node, **options):
        make = None if node is None else lambda config: node
        self.client = EdgeClient(f"127.0.0.1:{port}", state, node=make, **options)
        self.end = queue.SimpleQueue()
        started = threading.Event()
        threading.Thread(target=self._run, args=[started], daemon=True).start()
        assert started.wait(WAIT)

    def _run(self, started):
        async def main():
            self.loop, self.task = (
                asyncio.get_running_loop(),
                asyncio.current_task(),
            )
            started.set()
            await self.client.run()

        try:
            asyncio.run(main())
        except BaseException as error:  # what it came to
            self.end.put(error)
        else:
            self.end.put(None)

    def result(self):
        return self.end.get(timeout=WAIT)

    def stop(self):
        """As SIGTERM does."""
        self.loop.call_soon_threadsafe(self.task.cancel)
        return self.result()


@pytest.fixture
def grid():
    made = []

    def make(clients=1, *changes, port=0, run="run", **options):
        config = read_config({"data": {"clients": clients}}, changes)
        made.append(GrpcGrid(config, f"127.0.0.1:{port}", run, **options))
        return made[-1]

    yield make
    for it in made:
        it.close()


@pytest.fixture
def client(tmp_path):
    made = []

    def make(it, node, name="0", **options):
        made.append(
            Running(getattr(it, "port", it), tmp_path / name, node, **options)
        )
        return made[-1]

    yield make
    for one in made:
        if one.end.empty() and one.loop.is_running():
            one.stop()


def work(*clients, round=1):
    content = {
        "arrays": Arrays({"w": np.zeros(200_000, np.float32)}),
        "config": Config({"task": 0, "round": round}),
    }
    return [
        Message(TRAIN, node_of(client), "", content=content) for client in clients
    ]


def small(message):
    return message.content | {"arrays": Arrays({"w": np.zeros(2, np.float32)})}


def exchange(it, messages):
    """An exchange in a thread of its own; gives a function that waits for the answers."""
    result = queue.SimpleQueue()
    threading.Thread(
        target=lambda: result.put(it.exchange(messages)), daemon=True
    ).start()
    return lambda: result.get(timeout=WAIT)


def counts(replies):
    for reply in replies:
        assert reply.failure is None, reply.failure
        assert set(reply.arrays()["w"]) == {reply.content["metrics"]["count"]}
    return [reply.content["metrics"]["count"] for reply in replies]


def test_clients_work_and_their_states_go_on(grid, client):
    it = grid(2)
    nodes = Counter(), Counter()
    running = [
        client(it, node, str(number), client=number)
        for number, node in enumerate(nodes)
    ]
    assert counts(it.exchange(work(0, 1))) == [1, 1]
    assert counts(it.exchange(work(1, round=2))) == [2]
    assert counts(it.exchange(work(0, 1, round=3))) == [2, 3]
    it.prune()
    assert counts(it.exchange(work(0, 1, round=4))) == [3, 4]
    it.finish()
    assert [one.result() for one in running] == [None, None]
    assert [node.done() for node in nodes] == [[1, 3, 4], [1, 2, 3, 4]]


def test_a_client_has_a_device_of_its_own(grid, tmp_path):
    """Whatever the server says; without ``device`` it is as the server says."""
    it = grid(2, "engine.device=auto")
    devices = queue.SimpleQueue()

    def make(config):
        devices.put(config.engine.device)
        return Counter()

    for number, device in enumerate(("cpu", None)):
        one = EdgeClient(
            f"127.0.0.1:{it.port}",
            tmp_path / str(number),
            client=number,
            device=device,
            node=make,
        )
        threading.Thread(
            target=asyncio.run, args=[one.run()], daemon=True
        ).start()
    it.exchange(work(0, 1))
    it.finish()
    assert {devices.get(timeout=WAIT), devices.get(timeout=WAIT)} == {
        "cpu",
        "auto",
    }


def test_training_outlives_the_server_and_is_not_done_twice(grid, client):
    """The server dies while a client trains; another one, resumed, asks for the same."""
    node = Counter()
    node.gate.clear()
    it = grid()
    wait = exchange(it, work(0))
    one = client(it, node)
    assert node.calls.get(timeout=WAIT) == 1
    it.close()  # as if killed: the exchange above never ends well
    again = grid(port=it.port)
    wait = exchange(again, work(0))
    node.gate.set()
    assert counts(wait()) == [1]
    assert node.done() == []
    again.finish()
    assert one.result() is None


def test_a_client_that_comes_back_while_it_trains_hears_the_server(grid, client):
    """Its thread is busy, and what it was sent before is sent again."""
    node = Counter()
    node.gate.clear()
    it = grid()
    exchange(it, work(0))
    one = client(it, node)
    assert node.calls.get(timeout=WAIT) == 1
    it.close()
    again = grid(port=it.port)
    exchange(again, work(0))
    while "0" not in again.status()["each"]:
        threading.Event().wait(0.01)
    again.finish()
    assert one.result() is None
    node.gate.set()


def test_an_answer_that_was_lost_is_sent_again(grid, client):
    node = Counter()
    it = grid()
    one = client(it, node)
    assert counts(it.exchange(work(0))) == [1]
    it.close()  # before its checkpoint
    again = grid(port=it.port)
    assert counts(again.exchange(work(0))) == [1]
    assert counts(again.exchange(work(0, round=2))) == [2]
    assert node.done() == [1, 2]
    again.finish()
    assert one.result() is None


def test_an_answer_that_the_server_finds_too_large_is_a_failure(grid, client):
    it = grid(1, limits=Limits(message_bytes=500_000))
    node = Counter()
    client(it, node)
    (reply,) = exchange(it, work(0))()
    assert (
        "the server does not take the answer: messages under way of 8"
        in reply.failure.reason
    )
    assert it.status()["refusals"] == {"TOO_LARGE": 1}
    assert it.versions == {}
    it = exchange(
        it,
        [
            replace(message, content=small(message))
            for message in work(0, round=2)
        ],
    )
    assert counts(it()) == [1]  # it went on from the state before
    assert node.done() == [1, 2]


@pytest.mark.parametrize("is_sealed", [False, True])
def test_a_client_that_was_restarted_has_its_answers_still(
    grid, client, tmp_path, is_sealed
):
    options = {"keep_after": 0.0}
    if is_sealed:
        options["state_key"] = tmp_path / "key"
        options["state_key"].touch(0o600)
        options["state_key"].write_bytes(bytes(range(32)))
    it = grid()
    first, second = Counter(), Counter()
    one = client(it, first, **options)
    assert counts(it.exchange(work(0))) == [1]
    versions = dict(it.versions)
    assert isinstance(one.stop(), asyncio.CancelledError)
    it.close()
    again = grid(port=it.port)
    client(again, second, **options)
    assert counts(again.exchange(work(0))) == [1]
    assert second.done() == []
    assert again.versions == versions
    assert counts(again.exchange(work(0, round=2))) == [2]
    assert second.done() == [2]


def test_work_done_again_gives_the_same_state(grid, client):
    """Short work is not kept on disk but done again, from the same state to the same version."""
    it = grid()
    one = client(it, Counter())
    assert counts(it.exchange(work(0))) == [1]
    versions = dict(it.versions)
    one.stop()
    it.restore({})
    second = Counter()
    client(it, second)
    assert counts(it.exchange(work(0))) == [1]
    assert it.versions == versions
    assert second.done() == [1]


def test_a_server_may_go_back_to_its_checkpoint_and_no_further(grid, client):
    it = grid()
    client(it, Counter())
    for round in (1, 2):
        it.exchange(work(0, round=round))
        if round == 1:
            it.prune()
            checkpoint = dict(it.versions)
    for round in (3, 4):
        it.exchange(work(0, round=round))
    it.restore(checkpoint)
    assert counts(it.exchange(work(0, round=7))) == [2]
    it.prune()
    it.exchange(work(0, round=8))
    it.restore(checkpoint)
    (lost,) = it.exchange(work(0, round=9))
    assert "no such client state" in lost.failure.reason


def test_a_new_run_begins_with_a_fresh_client(grid, client):
    it = grid(run="one")
    client(it, Counter())
    assert counts(it.exchange(work(0))) == [1]
    it.close()
    again = grid(port=it.port, run="two")
    assert counts(again.exchange(work(0))) == [1]


def test_newer_work_takes_the_place_of_older(grid, client):
    it = grid(1, "engine.round_timeout=0.3")
    node = Counter()
    node.gate.clear()
    one = client(it, node)
    assert it.exchange(work(0, round=1)) == []
    assert it.exchange(work(0, round=2)) == []
    older = one.client.desk.job
    wait = exchange(it, work(0, round=3))
    while one.client.desk.job is older:  # until the newest is there
        pass
    node.gate.set()
    replies = wait()
    while not replies:  # the machine is slow, and the deadline was over
        replies = it.exchange(work(0, round=3))
    assert counts(replies) == [1]
    assert node.done() == [1, 3]


def test_heartbeats_go_on_while_it_trains(grid, client, monkeypatch):
    monkeypatch.setattr(session, "HEARTBEAT_SECONDS", 0.02)
    it = grid()
    node = Counter()
    node.gate.clear()
    wait = exchange(it, work(0))
    client(it, node)
    node.calls.get(timeout=WAIT)
    status = it.status()["bytes_in"]
    while it.status()["bytes_in"] < status + 20:  # 10 heartbeats of 2 bytes
        pass
    node.gate.set()
    assert counts(wait()) == [1]


def test_it_comes_back_to_its_place_without_being_told_which(grid, client):
    it = grid(2)
    node = Counter()
    ones = [client(it, node, name) for name in ("a", "b")]
    it.exchange(work(0, 1))
    for one in ones:
        one.stop()
    back = [client(it, node, name) for name in ("b", "a")]
    it.exchange(work(0, 1, round=2))
    assert sorted(node.done()) == [1, 1, 2, 2]
    it.finish()
    assert [one.result() for one in back] == [None, None]


def test_the_edge_is_light():
    """What a client's process imports, data and learners included."""
    code = (
        "import sys, fedknow.cli, fedknow.client.edge.client, "
        "fedknow.client.node, fedknow.client.data;"
        "print({'flwr', 'ray', 'matplotlib', 'scipy', 'sklearn', 'pyarrow', "
        "'cryptography'} & sys.modules.keys())"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        ).stdout
        == "set()\n"
    )


# --- ends
# --------------------------------------------------------------------------------------


def test_a_client_that_there_is_not_ends(grid, client):
    error = client(grid(1), Counter(), client=4).result()
    assert isinstance(error, ConfigError)
    assert "there is no client 4; this experiment has 1" in str(error)


def test_a_second_holder_of_an_identity_does_not_push_the_first_one_out(
    grid, client
):
    it = grid()
    node = Counter()
    old = client(it, node, client=0)
    assert counts(it.exchange(work(0))) == [1]
    thief = client(it, Counter(), "other", client=0, give_up=0.5)
    error = thief.result()
    assert isinstance(error, EdgeError)
    assert "another holder of the identity of client 0 is connected" in str(error)
    assert counts(it.exchange(work(0, round=2))) == [2]
    (change,) = it.news()
    assert (change.kind, change.client) == ("conflict", 0)
    assert "did not prove that it was here before" in change.reason
    it.finish()
    assert old.result() is None


def test_whoever_was_here_before_takes_the_place_back(grid, client):
    """A thief came while the client was away; both hold its certificate."""
    it = grid()
    one = client(it, Counter(), client=0)
    assert counts(it.exchange(work(0))) == [1]
    one.stop()
    thief = client(it, Counter(), "other", client=0)
    while it.status()["each"]["0"]["joined"] < 2:
        assert thief.end.empty()
        threading.Event().wait(0.01)
    back = client(it, Counter(), client=0)
    error = thief.result()
    assert isinstance(error, EdgeError)
    assert "client 0 has connected anew" in str(error)
    (change,) = it.news()
    assert "the second proved that it was here before" in change.reason
    it.finish()
    assert back.result() is None


def test_without_a_server_it_gives_up_when_told_to(client, grid):
    it = grid()
    it.close()
    error = client(it, Counter(), give_up=0.3).result()
    assert isinstance(error, EdgeError)
    assert "no connection for" in str(error)
    with pytest.raises(EdgeError, match="does not answer: UNAVAILABLE"):
        fetch_status(f"127.0.0.1:{it.port}")


def test_what_it_cannot_do_is_told_to_the_server_too(grid, client, caplog):
    it = grid(1, 'data.name="local"', "data.shape=[1,8,8]", "data.classes=10")
    with caplog.at_level("INFO", "fedknow"):
        error = client(it, None).result()
        it.close()
    assert isinstance(error, ConfigError)
    assert "say where they are with --data DIR" in str(error)
    assert (
        "client 0 is gone: it refuses: BAD_VALUE: this experiment is on the clients' own data"
        in caplog.text
    )


class Script:
    """A server that says what a test says, and notes what it hears."""

    def __init__(self, *sessions):
        self.sessions = iter(sessions)
        self.heard = queue.SimpleQueue()
        self.server = grpc.server(ThreadPoolExecutor(4))
        methods = {"Join": grpc.stream_stream_rpc_method_handler(self._join)}
        self.server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, methods),)
        )
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def _join(self, requests, context):
        assert JOIN.endswith("/Join")
        next(requests)  # hello
        for frame in next(self.sessions, ()):
            if frame is None:  # until the client has said why
                for data in requests:
                    if parse(data).WhichOneof("kind") == "refusal":
                        self.heard.put(parse(data).refusal)
                        break
                return
            yield frame


def corrupted(frame):
    broken = parse(frame)
    broken.chunk.crc32 ^= 1
    return broken.SerializeToString()


def test_bytes_it_cannot_read_are_refused_and_it_tries_again(client):
    greeting = welcome(2, read_config({}).to_toml(), "run")
    node = Counter()
    sessions = [
        [greeting, b"\xff\xff", None],
        [greeting, corrupted(next(pack(work(0)[0]).frames(id="1"))), None],
        [greeting, *pack(work(1)[0]).frames(id="1"), None],
        [greeting, Frame(hello={}).SerializeToString(), None],
        [b"\xff\xff"],
        [goodbye(True, "no welcome")],
        [],
        [greeting, goodbye(False, "back soon")],
        [greeting, goodbye(True, "the run is over")],
    ]
    script = Script(*sessions)
    assert client(script, node).result() is None
    codes = [refused(script.heard.get(timeout=WAIT)).code.name for _ in range(4)]
    assert codes == ["MALFORMED", "BAD_CHECKSUM", "FOREIGN", "OUT_OF_ORDER"]
    script.server.stop(0).wait()
    assert node.done() == []


DEEP = "a = " + "[" * 5000
LONG = "a = " + "1" * 5000


@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        (welcome(2, DEEP, "run"), "nested too deeply"),
        (welcome(2, LONG, "run"), "Exceeds the limit"),
        (welcome(2, "seed = 1", "a run"), "which is no name of a run"),
        (welcome(2, "seed = 1", "../../x"), "which is no name of a run"),
        (welcome(1, "seed = 1", "run"), "calls this client node 1"),
        (welcome(2**60, "seed = 1", "run"), "which no experiment has"),
        (welcome(2, "seed = 1", "run", bytes(99)), "a fence of 99 bytes"),
    ],
)
def test_hostile_invitations_are_refused_in_a_sentence(client, greeting, words):
    script = Script([greeting, None])
    error = client(script, Counter()).result()
    told = refused(script.heard.get(timeout=WAIT))
    script.server.stop(0).wait()
    assert isinstance(error, ConfigError)
    assert words in str(error)
    assert words in told.reason


def test_what_fails_at_a_servers_words_is_told_to_it(client, monkeypatch):
    def broken(data, permissions, config):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(edge, "_make_node", broken)
    script = Script([welcome(2, "seed = 1", "run"), None])
    error = client(script, None).result()
    told = refused(script.heard.get(timeout=WAIT))
    script.server.stop(0).wait()
    assert isinstance(error, ConfigError)
    assert "not made ready: RuntimeError: no such kernel" in told.reason


def test_what_is_not_permitted_deletes_nothing(client, tmp_path):
    """Another run begins with an empty folder; whoever may not begin one may not empty it."""
    kept = tmp_path / "0" / "states" / "000000"
    first = Script(
        [welcome(2, "seed = 1", "first"), goodbye(True, "the run is over")]
    )
    assert client(first, Counter()).result() is None
    first.server.stop(0).wait()
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "old").touch()
    hostile = "model = 'torch.hub:load'"
    second = Script([welcome(2, hostile, "second"), None])
    assert "--allow" in str(client(second, Counter()).result())
    second.server.stop(0).wait()
    assert (kept / "old").exists()
    assert (tmp_path / "0" / "run").read_bytes().endswith(b"2 first")


def test_another_version_of_the_server_ends_it(client):
    other = Frame()
    other.welcome.protocol = 99
    script = Script([other.SerializeToString()])
    error = client(script, Counter()).result()
    script.server.stop(0).wait()
    assert isinstance(error, ConfigError)
    assert "protocol 99" in str(error)


class Failing(Counter):
    """A node that fails while its data are missing."""

    def __init__(self):
        super().__init__()
        self.has_data = False

    def handle(self, message, state):
        reply, after = super().handle(message, state)
        return (
            (reply, after)
            if self.has_data
            else (message.fail(2, "no data"), state)
        )


def test_a_failure_is_no_work_done_and_a_resumed_server_has_it_tried_again(
    grid, client
):
    node, first = Failing(), grid()
    running = client(first, node)
    [reply] = first.exchange(work(0))
    assert reply.failure.reason == "no data"
    port = first.port
    first.close()
    again = grid(port=port)
    [reply] = again.exchange(work(0))
    assert reply.failure.reason == "no data"
    assert node.done() == [1, 1]
    again.close()
    node.has_data = True  # the cause is gone; the client was not restarted
    last = grid(port=port)
    assert counts(last.exchange(work(0))) == [1]
    assert node.done() == [1]
    last.finish()
    assert running.result() is None


def test_a_failure_is_tried_again_by_the_same_server_too(grid, client):
    node, it = Failing(), grid()
    client(it, node)
    assert it.exchange(work(0))[0].failure.reason == "no data"
    node.has_data = True
    assert counts(it.exchange(work(0))) == [1]
    assert node.done() == [1, 1]


HOSTILE = """
import pathlib
pathlib.Path({proof!r}).write_text("the server's code ran")
def build(**settings):
    raise RuntimeError
"""


@pytest.mark.parametrize(
    "part",
    [
        "model=torch.hub:load",
        "model=hostile_part:build",
        "learner=hostile_part:build",
    ],
)
def test_a_server_cannot_have_code_run(grid, client, tmp_path, monkeypatch, part):
    proof = tmp_path / "proof"
    attack = tmp_path / "attack"
    attack.mkdir()
    (attack / "hostile_part.py").write_text(HOSTILE.format(proof=str(proof)))
    (attack / "hubconf.py").write_text(HOSTILE.format(proof=str(proof)))
    # The working directory is what an attacker may find or have written files in.
    monkeypatch.chdir(attack)
    hub = [
        f"model.repo_or_dir={attack}",
        "model.source=local",
        "model.model=build",
    ]
    it = grid(1, part, *(hub if "torch.hub" in part else []))
    one = client(it, None)
    error = one.result()
    assert isinstance(error, ConfigError)
    assert "--allow" in str(error)
    assert not proof.exists()


def announcement(size, node):
    """Give the first chunk of a message that is said to be that large."""
    whole = pack(replace(work(0)[0], node=node))
    whole.envelope.size = size
    return next(whole.frames(id="1"))


def test_a_message_that_does_not_fit_the_model_is_refused_at_once(client):
    """A server that announces 1 GiB: not a byte of it is taken."""
    greeting = welcome(2, read_config({"data": {"clients": 1}}).to_toml(), "run")
    script = Script(
        [greeting, announcement(1 << 30, 2), None],
        [greeting, goodbye(True, "the run is over")],
    )
    assert client(script, None).result() is None
    told = refused(script.heard.get(timeout=WAIT))
    script.server.stop(0).wait()
    assert told.code.name == "TOO_LARGE"
    assert f"at most {16 * 2**20} are taken" in told.reason


def test_its_owner_says_how_large_a_message_may_be(client):
    greeting = welcome(2, read_config({"data": {"clients": 1}}).to_toml(), "run")
    script = Script(
        [greeting, announcement(2**21 + 8, 2), None],
        [greeting, goodbye(True, "the run is over")],
    )
    small = Permissions(limits=OwnerLimits(message_mb=2))
    assert client(script, Counter(), permissions=small).result() is None
    told = refused(script.heard.get(timeout=WAIT))
    script.server.stop(0).wait()
    assert f"at most {2**21} are taken" in told.reason


def test_a_full_state_folder_is_a_failure_that_names_the_limit(
    grid, client, tmp_path
):
    it = grid()
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "old").write_bytes(bytes(3 << 20))
    small = Permissions(limits=OwnerLimits(disk_mb=2))
    client(it, Counter(), permissions=small)
    (reply,) = it.exchange(work(0))
    assert "limit of 2 (disk_mb)" in reply.failure.reason


def test_the_names_of_its_files_stay_at_home(grid, client, tmp_path, caplog):
    """The issue's eight file names, and the folder's own."""
    folder = tmp_path / "patients of ward 7"
    folder.mkdir()
    for name in ("alice.npz", "bob.npz", "eve.npz"):
        (folder / name).touch()
    it = grid(1, 'data.name="local"', "data.shape=[1,8,8]", "data.classes=10")
    with caplog.at_level("INFO", "fedknow"):
        error = client(it, None, data=folder).result()
        it.close()
    assert isinstance(error, ConfigError)
    by_server = [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("fedknow.server")
    ]
    told = "\n".join(by_server)
    assert "--data/task-000.npz: no such file; the folder holds 3 files" in told
    for word in ("alice", "bob", "eve", "ward", str(tmp_path)):
        assert word not in told
    assert "alice.npz, bob.npz, eve.npz" in caplog.text


def test_texts_of_the_server_are_bounded_and_escaped(client, caplog):
    hostile = "\x1b[2J" + "x" * 900_000
    refusing = Frame()
    refusing.refusal.code, refusing.refusal.reason = 8, hostile
    greeting = welcome(2, read_config({}).to_toml(), "run")
    script = Script(
        [greeting, refusing.SerializeToString()],
        [greeting, goodbye(False, hostile)],
        [goodbye(True, "the run is over")],
        [greeting, goodbye(True, hostile)],
    )
    with caplog.at_level("INFO", "fedknow"):
        assert client(script, Counter()).result() is None
    script.server.stop(0).wait()
    assert "\x1b" not in caplog.text
    assert caplog.text.count("(898004 characters more)") == 3
    assert len(caplog.text) < 20_000
