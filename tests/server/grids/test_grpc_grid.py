"""The gRPC grid over real sockets, with clients that do what a test says."""

import json
import queue
import socket
import threading
from dataclasses import replace

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from puppets import (
    WAIT,
    Exchange,
    Puppet,
    all_in,
    eventually,
    sums,
    work,
)

from fedknow.client.edge.status import fetch_status
from fedknow.protocols.config import ConfigError, read_config
from fedknow.protocols.flower import from_flower, to_flower
from fedknow.protocols.messages import (
    EVALUATE,
    NO_ANSWER,
    TRAIN,
    Arrays,
    Message,
    node_of,
)
from fedknow.protocols.security import server_credentials
from fedknow.protocols.wire import (
    JOIN,
    SERVICE,
    Frame,
    Limits,
    WireError,
    hello,
    pack,
    parse,
    unpack,
)
from fedknow.server.certs import make_certificates
from fedknow.server.checks.faults import RunError
from fedknow.server.grids import grpc_gate, grpc_link, grpc_wave
from fedknow.server.grids.activity import Listener
from fedknow.server.grids.grpc_grid import GrpcGrid
from fedknow.server.grids.strategy_grid import StrategyGrid
from fedknow.server.grids.wave import WaveOptions


@pytest.fixture
def grid():
    """Makes grids, and closes them."""
    made = []

    def make(clients=3, *changes, **options):
        config = read_config({"data": {"clients": clients}}, changes)
        made.append(GrpcGrid(config, "127.0.0.1:0", **options))
        return made[-1]

    yield make
    for it in made:
        it.close()


@pytest.fixture
def puppet():
    """Makes puppets, and cuts their strings."""
    made = []

    def make(it, *arguments, **options):
        made.append(Puppet(it.port, *arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.drop()


def test_texts_of_a_client_are_bounded_and_escaped(grid, puppet, caplog):
    """A refusal of 900 kB with escapes, and a failure with the same."""
    hostile = "\x1b[2J\n" + "x" * 900_000
    it = grid(2)
    first, second = all_in(it, puppet, 2)
    exchange = Exchange(it, work(0))
    failed = unpack(first.parcel()).fail(2, hostile)
    first.say(*pack(failed).frames(version=7))
    (reply,) = exchange.replies()
    assert reply.failure.reason.startswith(r"\x1b[2J\nxxx")
    assert len(reply.failure.reason) < 2100
    refusing = Frame()
    refusing.refusal.code, refusing.refusal.reason = 7, hostile
    with caplog.at_level("INFO", "fedknow"):
        second.say(refusing.SerializeToString())
        eventually(lambda: "is gone" in caplog.text)
    assert "\x1b" not in caplog.text
    assert "(898005 characters more)" in caplog.text
    assert len(caplog.text) < 5000


# --- waves
# --------------------------------------------------------------------------------------


def test_a_broadcast_is_serialised_once_and_answers_are_in_order(
    grid, puppet, monkeypatch
):
    packs = []
    monkeypatch.setattr(
        grpc_wave, "pack", lambda *a, **k: packs.append(a) or pack(*a, **k)
    )
    it = grid()
    exchange = Exchange(it, work(2, 0, 1))
    puppets = all_in(it, puppet)
    parcels = [one.parcel() for one in puppets]
    assert [parcel.node for parcel in parcels] == [2, 3, 4]
    assert len({parcel.id for parcel in parcels}) == 3
    for add, one, parcel in zip((3, 1, 2), puppets, parcels, strict=True):
        one.answer(parcel, add)
    replies = exchange.replies()
    assert [reply.node for reply in replies] == [2, 3, 4]
    assert sums(replies) == {2: 12.0, 3: 6.0, 4: 9.0}
    assert len(packs) == 1
    assert it.traffic.counts() == {
        "train": {"down": 3 * 28, "up": 3 * 20, "messages": 3}
    }
    assert it.versions == {0: 7, 1: 7, 2: 7}


def test_what_clients_may_send_does_not_bound_what_they_are_sent(grid, puppet):
    it = grid(1, limits=Limits(decoded_bytes=1000))
    (one,) = all_in(it, puppet, 1)
    large = Message(
        TRAIN,
        node_of(0),
        "",
        content={"arrays": Arrays({"w": np.ones(1000, np.float32)})},
    )
    exchange = Exchange(it, [large])
    parcel = one.parcel()
    assert unpack(parcel).arrays()["w"].sum() == 1000
    small = Message(TRAIN, parcel.node, f"{parcel.id}:reply", parcel.id)
    one.say(*pack(small).frames())
    assert exchange.replies()[0].failure is None
    with pytest.raises(RunError, match="the train work for client 0: TOO_LARGE"):
        it.exchange([replace(large, group="x" * 1000)])


def test_the_first_wave_waits_for_all_clients(grid, puppet):
    it = grid(2)
    exchange = Exchange(it, work(0))
    first = puppet(it, 0)
    first.welcome()
    assert it.status()["waiting_for"] == []
    puppet(it, 1).welcome()
    first.answer(first.parcel())
    assert len(exchange.replies()) == 1


def test_min_clients_says_how_many_are_enough(grid, puppet):
    it = grid(3, "engine.min_clients=1")
    exchange = Exchange(it, work(1))
    one = puppet(it, 1)
    one.welcome()
    one.answer(one.parcel())
    assert sums(exchange.replies()) == {3: 6.0}
    with pytest.raises(
        ConfigError, match=r"engine\.min_clients = 4: more than data\.clients = 3"
    ):
        grid(3, "engine.min_clients=4")


def test_work_says_from_which_version_it_starts_and_which_is_committed(
    grid, puppet
):
    it = grid(1)
    (one,) = all_in(it, puppet, 1)

    def wave(version):
        exchange = Exchange(it, work(0))
        parcel = one.parcel()
        one.answer(parcel, version=version)
        exchange.replies()
        return parcel.version, parcel.committed

    assert wave(11) == (0, 0)
    assert wave(12) == (11, 0)
    it.prune()  # a checkpoint is on disk
    assert wave(13) == (12, 12)
    assert wave(14) == (13, 12)
    it.restore({0: 12})
    assert wave(15) == (12, 12)


def test_several_pieces_for_one_client_are_done_in_order(grid, puppet):
    it = grid(1)
    (one,) = all_in(it, puppet, 1)
    exchange = Exchange(it, work(0, 0, 0))
    seen = []
    for version in (21, 22, 23):
        parcel = one.parcel()
        seen.append(parcel.version)
        one.answer(parcel, version, version)
    assert seen == [0, 21, 22]
    assert [float(r.arrays()["w"][0]) for r in exchange.replies()] == [
        21.0,
        22.0,
        23.0,
    ]


def test_an_inspector_that_refuses_an_answer_leaves_the_client_where_it_was(
    grid, puppet
):
    it = grid(1)
    (one,) = all_in(it, puppet, 1)

    def refuse(reply):
        return Message(reply.kind, reply.node, reply.reply_to).fail(2, "refused")

    exchange = Exchange(it, work(0), WaveOptions(inspect=refuse))
    one.answer(one.parcel(), version=5)
    exchange.replies()
    eventually(lambda: it.status()["refused"] == 1)
    exchange = Exchange(it, work(0))
    parcel = one.parcel()
    assert parcel.version == 0
    one.answer(parcel)
    exchange.replies()


# --- pushed and pulled
# ------------------------------------------------------------------------------------------------


def pushed(it, *clients):
    return it.push_messages([to_flower(message) for message in work(*clients)])


class Pull(Exchange):
    """A pull in a thread of its own."""

    def __init__(self, it, ids, timeout=None):
        self.result = queue.SimpleQueue()

        def pull():
            replies = it.pull_messages(ids, timeout)
            self.result.put([from_flower(reply) for reply in replies])

        threading.Thread(target=pull, daemon=True).start()


def test_answers_are_there_while_others_still_work(grid, puppet):
    it = grid()
    face = StrategyGrid(it)
    ids = pushed(face, 0, 1, 2)
    pull = Pull(face, ids)
    zero, one, two = all_in(it, puppet)
    parcels = [each.parcel() for each in (zero, one, two)]
    one.answer(parcels[1], 1)
    assert sums(pull.replies()) == {3: 6.0}
    ids += pushed(face, 1)
    pull = Pull(face, ids)
    one.answer(one.parcel(), 2, version=8)
    assert sums(pull.replies()) == {3: 9.0}
    assert it.versions == {1: 8}
    with pytest.raises(
        RuntimeError, match="pull its answers before other work is sent"
    ):
        it.exchange(work(1))
    zero.answer(parcels[0], 3)
    two.answer(parcels[2], 4)
    assert sums(Pull(face, ids[2:3]).replies()) == {4: 15.0}
    assert sums(Pull(face, ids).replies()) == {2: 12.0}
    assert face.pull_messages(ids) == []
    exchange = Exchange(it, work(1))
    one.answer(one.parcel(), 5)
    assert sums(exchange.replies()) == {3: 18.0}


def test_a_pull_waits_no_longer_than_it_is_told_to(grid, puppet):
    it = grid(1)
    face = StrategyGrid(it)
    ids = pushed(face, 0)
    (one,) = all_in(it, puppet, 1)
    before = it.clock_time
    assert face.pull_messages(ids, 0.05) == []
    assert 0.05 <= it.clock_time - before < WAIT
    one.answer(one.parcel())
    assert sums(Pull(face, ids, WAIT).replies()) == {2: 6.0}


def test_pushed_work_is_given_up_when_its_time_is_over(grid, puppet):
    it = grid(2, "engine.round_timeout=1.0")
    missed = []
    face = StrategyGrid(it, WaveOptions(on_missed=missed.append))
    pull = Pull(face, ids := pushed(face, 0, 1))
    zero, one = all_in(it, puppet, 2)
    late = one.parcel()
    zero.answer(zero.parcel())
    assert sums(pull.replies()) == {2: 6.0}
    (given_up,) = Pull(face, ids).replies()
    assert (given_up.node, given_up.failure.code) == (3, NO_ANSWER)
    assert [[message.node for message in work] for work in missed] == [[3]]
    one.answer(late)
    eventually(lambda: it.status()["dropped"]["late"] == 1)
    assert it.status()["left_out"] == 1
    pull = Pull(face, pushed(face, 1))
    parcel = one.parcel()
    assert parcel.version == 0
    one.answer(parcel, 2)
    assert sums(pull.replies()) == {3: 9.0}


# --- clients that come and go
# -----------------------------------------------------------------------------------------


def test_a_client_that_drops_gets_its_work_again_and_counts_once(grid, puppet):
    it = grid(2)
    exchange = Exchange(it, work(0, 1))
    zero, one = all_in(it, puppet, 2)
    asked = zero.parcel()
    zero.drop()
    again = puppet(it, 0)
    again.welcome()
    parcel = again.parcel()
    assert (parcel.id, parcel.node, bytes(parcel.header)) == (
        asked.id,
        asked.node,
        bytes(asked.header),
    )
    again.answer(parcel, 1)
    again.answer(parcel, 100)  # said twice
    eventually(lambda: it.status()["dropped"]["duplicate"] == 1)
    one.answer(one.parcel(), 2)
    assert sums(exchange.replies()) == {2: 6.0, 3: 9.0}
    again.answer(parcel, 100)  # and long after
    eventually(lambda: it.status()["dropped"]["late"] == 1)
    assert it.status()["each"]["0"]["joined"] == 2


def test_a_second_stream_takes_the_place_of_the_first(grid, puppet):
    it = grid(1)
    exchange = Exchange(it, work(0))
    (old,) = all_in(it, puppet, 1)
    parcel = old.parcel()
    new = puppet(it, 0)
    new.welcome()
    old.answer(parcel, 50)
    assert old.refusal().code.name == "REPLACED"
    new.answer(new.parcel(), 1)
    assert sums(exchange.replies()) == {2: 6.0}
    assert it.status()["refusals"] == {"REPLACED": 1}


def test_one_that_stays_away_is_left_out_and_comes_back_in_the_next_wave(
    grid, puppet
):
    it = grid(2, "engine.round_timeout=1.0")
    exchange = Exchange(it, work(0, 1))
    zero, one = all_in(it, puppet, 2)
    late = one.parcel()
    zero.answer(zero.parcel())
    assert sums(exchange.replies()) == {2: 6.0}
    assert it.get_node_ids() == [2, 3]
    one.answer(late, 9, 99)
    eventually(lambda: it.status()["dropped"]["late"] == 1)
    assert it.status()["left_out"] == 1
    exchange = Exchange(it, work(0, 1))
    zero.answer(zero.parcel())
    parcel = one.parcel()
    assert parcel.version == 0  # what it did too late never was
    one.answer(parcel, 2)
    assert sums(exchange.replies()) == {2: 6.0, 3: 9.0}


def test_with_a_deadline_the_nodes_are_those_connected(grid, puppet):
    it = grid(2, "engine.round_timeout=30")
    _, one = all_in(it, puppet, 2)
    assert it.get_node_ids() == [2, 3]
    one.drop()
    eventually(lambda: it.get_node_ids() == [2])
    puppet(it, 1).welcome()
    eventually(lambda: it.get_node_ids() == [2, 3])
    assert grid(2).get_node_ids() == [2, 3]  # without one, all, there or not


def test_a_timeout_of_the_caller_counts_too(grid, puppet):
    it = grid(1)
    all_in(it, puppet, 1)
    assert it.exchange(work(0), timeout=0.05) == []


def test_a_client_that_falls_silent_is_let_go(grid, puppet, monkeypatch):
    monkeypatch.setattr(grpc_link, "SILENCE_SECONDS", 0.2)
    it = grid(1)
    (one,) = all_in(it, puppet, 1)
    assert one.hear() is None
    eventually(lambda: it.status()["connected"] == 0)


def test_heartbeats_come_when_there_is_nothing_to_say(grid, puppet, monkeypatch):
    monkeypatch.setattr(grpc_link, "HEARTBEAT_SECONDS", 0.05)
    (one,) = all_in(grid(1), puppet, 1)
    assert [parse(next(one.stream)).WhichOneof("kind") for _ in range(3)] == [
        "heartbeat"
    ] * 3


# --- greeting
# --------------------------------------------------------------------------------------


def test_a_client_is_given_its_node_the_experiment_and_the_run(grid, puppet):
    it = grid(2, "seed=5", run="ab12")
    greeting = puppet(it).welcome()
    assert (greeting.node, greeting.run) == (2, "ab12")
    assert "seed = 5" in greeting.config
    assert puppet(it).welcome().node == 3
    assert puppet(it).refusal().code.name == "NO_ROOM"
    error = puppet(it, 7).refusal()
    assert (
        str(error)
        == "NO_ROOM: there is no client 7; this experiment has 2 (data.clients), from 0 on"
    )


def test_other_versions_and_other_talk_are_refused(grid, puppet):
    it = grid(1)
    other = Frame()
    other.hello.protocol = 99
    error = puppet(it, first=other.SerializeToString()).refusal()
    assert error.code.name == "VERSION"
    assert "protocol 99" in error.reason
    assert puppet(it, first=b"\xff\xff").refusal().code.name == "MALFORMED"
    assert (
        puppet(it, first=next(pack(work(0)[0]).frames())).refusal().code.name
        == "OUT_OF_ORDER"
    )
    assert it.status()["refusals"] == {
        "VERSION": 1,
        "MALFORMED": 1,
        "OUT_OF_ORDER": 1,
    }


def test_who_says_nothing_is_let_go(grid, monkeypatch):
    monkeypatch.setattr(grpc_gate, "HELLO_SECONDS", 0.1)
    it = grid(1)
    with grpc.insecure_channel(f"127.0.0.1:{it.port}") as channel:
        waiting = queue.SimpleQueue()
        (data,) = list(channel.stream_stream(JOIN)(iter(waiting.get, None)))
        waiting.put(None)
    assert parse(data).refusal.reason == "no hello within 0 s"


def test_an_address_in_use_is_refused(grid):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            ConfigError, match=f"--listen {listen}: cannot be had"
        ):
            GrpcGrid(read_config({}), listen)


def test_two_grids_do_not_share_a_port(grid):
    with pytest.raises(ConfigError, match="cannot be had"):
        GrpcGrid(read_config({}), f"127.0.0.1:{grid(1).port}")


# --- hostile clients
# --------------------------------------------------------------------------------------------------


def test_an_answer_in_anothers_name_is_refused(grid, puppet):
    it = grid(2)
    exchange = Exchange(it, work(0, 1))
    zero, one = all_in(it, puppet, 2)
    mine, others = zero.parcel(), one.parcel()
    zero.answer(mine, 100, node=others.node, id=others.id)
    assert zero.refusal().code.name == "FOREIGN"
    again = puppet(it, 0)
    again.welcome()
    again.answer(
        again.parcel(), 100, id=others.id
    )  # in its own name, another's work
    assert again.refusal().code.name == "FOREIGN"
    last = puppet(it, 0)
    last.welcome()
    last.answer(last.parcel(), 1)
    one.answer(others, 2)
    assert sums(exchange.replies()) == {2: 6.0, 3: 9.0}
    assert it.status()["refusals"] == {"FOREIGN": 2}


@pytest.mark.parametrize(
    "bad", ["frame", "checksum", "kind", "second hello", "welcome"]
)
def test_bad_bytes_end_their_stream_and_nothing_else(grid, puppet, bad):
    it = grid(2)
    exchange = Exchange(it, work(0, 1))
    zero, one = all_in(it, puppet, 2)
    parcel = zero.parcel()
    if bad == "frame":
        zero.say(b"\xff" * 100)
    elif bad == "checksum":
        frame = parse(next(pack(unpack(parcel).reply({})).frames()))
        frame.chunk.crc32 ^= 1
        zero.say(frame.SerializeToString())
    elif bad == "kind":
        zero.answer(parcel, kind=EVALUATE)
    elif bad == "second hello":
        zero.say(hello())
    else:
        zero.say(Frame(welcome={}).SerializeToString())
    error = zero.refusal()
    assert isinstance(error, WireError)
    one.answer(one.parcel(), 2)
    again = puppet(it, 0)
    again.welcome()
    again.answer(again.parcel(), 1)
    assert sums(exchange.replies()) == {2: 6.0, 3: 9.0}
    assert sum(it.status()["refusals"].values()) == 1


def test_a_client_that_never_answers_readably_fails(grid, puppet):
    it = grid(2)
    exchange = Exchange(it, work(0, 1))
    zero, one = all_in(it, puppet, 2)
    one.answer(one.parcel())
    for _ in range(3):
        zero.answer(zero.parcel(), kind=EVALUATE)
        assert zero.refusal().code.name == "MALFORMED"
        zero = puppet(it, 0)
        zero.welcome()
    first, second = exchange.replies()
    assert "could not be read 3 times" in first.failure.reason
    assert second.failure is None


def test_only_the_bearer_of_a_credential_is_that_client(grid, puppet, tmp_path):
    make_certificates(tmp_path, 2, [])
    it = grid(2, credentials=server_credentials(tmp_path / "server"))

    def bearer(number, client=None):
        folder = tmp_path / "clients" / f"{number:03d}"
        names = ("ca.pem", "key.pem", "cert.pem")
        credentials = grpc.ssl_channel_credentials(
            *((folder / name).read_bytes() for name in names)
        )
        return puppet(it, client, credentials=credentials)

    assert bearer(1).welcome().node == 3
    error = bearer(1, client=0).refusal()
    assert (error.code.name, it.status()["refusals"]) == (
        "CREDENTIAL",
        {"CREDENTIAL": 1},
    )
    assert (
        json.loads(
            fetch_status(f"127.0.0.1:{it.port}", tmp_path / "clients" / "000")
        )["connected"]
        == 1
    )


# --- status, health, the end
# ------------------------------------------------------------------------------------------


def test_status_and_health(grid, puppet):
    it = grid(2, run="r1")
    exchange = Exchange(it, work(0, 1))
    zero, one = all_in(it, puppet, 2)
    zero.answer(zero.parcel())
    asked = one.parcel()
    eventually(lambda: it.status()["waiting_for"] == [1])
    status = json.loads(fetch_status(f"127.0.0.1:{it.port}"))
    expected = {
        "run": "r1", "clients": 2, "connected": 2, "waiting_for": [1], "refusals": {},
        "left_out": 0,
    }  # fmt: skip
    assert {key: status[key] for key in expected} == expected
    assert {key: status["work"][key] for key in ("kind", "task", "round", "messages")} == {
        "kind": "train", "task": 0, "round": 1, "messages": 2,
    }  # fmt: skip
    assert status["bytes_out"] > 2 * 12
    assert status["each"]["0"]["bytes_in"] > 12
    with grpc.insecure_channel(f"127.0.0.1:{it.port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for name in ("", SERVICE):
            serving = check(
                health_pb2.HealthCheckRequest(service=name), timeout=WAIT
            ).status
            assert serving == health_pb2.HealthCheckResponse.SERVING
    one.answer(asked)
    exchange.replies()


def test_clients_are_told_that_the_run_is_over_also_one_that_was_away(
    grid, puppet
):
    it = grid(2)
    zero, one = all_in(it, puppet, 2)
    one.drop()
    eventually(lambda: it.status()["connected"] == 1)
    ending = threading.Thread(target=lambda: it.finish(linger=WAIT))
    ending.start()
    farewell = zero.hear()
    assert farewell.goodbye.finished
    back = puppet(it, 1)
    back.welcome()
    assert back.hear().goodbye.finished
    ending.join(WAIT)
    assert not ending.is_alive()


def test_a_resumed_server_tells_clients_too_that_have_not_come_to_it(
    grid, puppet
):
    it = grid(2)
    ending = threading.Thread(
        target=lambda: it.finish(linger=WAIT, everyone=True)
    )
    ending.start()
    for node in (0, 1):
        late = puppet(it, node)
        late.welcome()
        assert late.hear().goodbye.finished
    ending.join(WAIT)
    assert not ending.is_alive()


def test_clients_are_told_when_the_server_means_to_come_back(grid, puppet):
    it = grid(1)
    (one,) = all_in(it, puppet, 1)
    it.close()
    frame = one.hear()
    assert frame.WhichOneof("kind") == "goodbye"
    assert not frame.goodbye.finished


def test_a_listener_hears_of_clients_that_come_and_go(grid, puppet):
    heard = queue.Queue()

    class Ear(Listener):
        def presence(self, absent):
            heard.put(absent)

    it = grid(2, listener=Ear())
    visitor = puppet(it, 1)
    absent = [heard.get(timeout=WAIT), heard.get(timeout=WAIT)]
    assert absent == [[0, 1], [0]]
    visitor.drop()
    assert heard.get(timeout=WAIT) == [0, 1]
