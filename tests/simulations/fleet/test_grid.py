"""The fleet's grid: who answers when, by hand; and whole runs."""

import json

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.app import Message as FlowerMessage

from fedknow.protocols.config import ConfigError, FleetConfig, read_config
from fedknow.protocols.messages import (
    ARRAYS,
    CONFIG,
    END_TASK,
    EVALUATE,
    METRICS,
    OUT_OF_MEMORY,
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
    client_of,
    node_of,
)
from fedknow.server.checks.faults import RunError
from fedknow.server.grids.activity import Listener
from fedknow.server.grids.base import MessageGrid
from fedknow.server.grids.strategy_grid import StrategyGrid
from fedknow.server.grids.wave import WaveOptions
from fedknow.server.run.folder import RunFolder
from fedknow.server.serve import serve
from fedknow.simulations.fleet import timeline
from fedknow.simulations.fleet.availability import Always, Trace
from fedknow.simulations.fleet.build import Fleet
from fedknow.simulations.fleet.devices import Profile, shipped_profiles
from fedknow.simulations.fleet.grid import FleetGrid
from fedknow.simulations.fleet.links import Links
from fedknow.simulations.simulate import simulate

SOURCE = dict.fromkeys(
    ("peak", "memory", "busy", "idle"), "made up for this test"
)
DEVICE = Profile(peak=10, memory=1000, busy=4, idle=1, source=SOURCE)

MEASUREMENT = WaveOptions(is_measurement=True)


class Cheap(MessageGrid):
    """Client n answers work of 100 (n + 1) FLOP with 4 bytes of arrays; client 3 needs more memory
    than others."""

    backwards = False

    def deliver(self, work, timeout, options):
        for message in reversed(work) if self.backwards else work:
            client = client_of(message.node)
            cost = Metrics(
                {
                    "flops": 100.0 * (client + 1),
                    "memory-bytes": 5000.0 if client == 3 else 500.0,
                }
            )
            yield (
                message.reply(
                    {ARRAYS: Arrays(w=np.zeros(1, np.float32)), METRICS: cost}
                ),
                7,
            )


def fleet(
    clients=4,
    presence=None,
    rate=4.0,
    quorum=1,
    seed=0,
    listener=None,
    **settings,
):
    config = read_config({"data": {"clients": clients}, "seed": seed})
    config = config.model_copy(
        update={"fleet": FleetConfig(devices=["infinite"], **settings)}
    )
    links = Links([rate] * clients, [rate] * clients)
    it = Fleet(
        [f"box-{c}" for c in range(clients)],
        [DEVICE] * clients,
        links,
        presence or Always(),
    )
    return FleetGrid(Cheap(clients), config, it, quorum, listener)


def work(*clients, kind=TRAIN):
    content = {ARRAYS: Arrays(w=np.zeros(2, np.float32)), CONFIG: Config(task=0)}
    return [
        Message(kind, node_of(client), "", content=content) for client in clients
    ]


def flower(*clients):
    content = RecordDict(
        {
            "arrays": ArrayRecord([np.zeros(2, np.float32)]),
            "config": ConfigRecord({"task": 0}),
        }
    )
    return [FlowerMessage(content, node_of(client), TRAIN) for client in clients]


def answered(replies):
    return [client_of(reply.node) for reply in replies if reply.failure is None]


# A request is 8 bytes of arrays and a number: 4 s. Client n computes 10 (n + 1) s. An answer is
# 4 bytes and 2 numbers: 5 s.


def test_a_wave_takes_as_long_as_its_slowest():
    it = fleet()
    assert answered(it.exchange(work(0, 2))) == [0, 2]
    assert it.clock_time == 4 + 30 + 5
    assert it.elapsed() == {
        "virtual_seconds": 39.0,
        "communication_seconds": 9.0,
        "computing_seconds": 30.0,
        "waiting_seconds": 0.0,
        # busy: 10 and 30 s at 4 W; else 1 W, and two who do nothing
        "energy_joules": 4 * 10 + 29 + 4 * 30 + 9 + 2 * 39,
    }
    first, _, third, _ = it.fleet()["clients"]
    assert (first["computing"], first["transfer"], first["idle"]) == (
        10.0,
        9.0,
        20.0,
    )
    assert third["utilisation"] == 30 / 39
    assert (first["down"], first["up"], first["flops"], first["answered"]) == (
        16.0,
        20.0,
        100.0,
        1,
    )


def test_scoring_is_free_and_the_end_of_a_task_is_not():
    it = fleet(deadline=1.0)
    assert answered(it.exchange(work(0, 1, 2, kind=EVALUATE), MEASUREMENT)) == [
        0,
        1,
        2,
    ]
    assert it.clock_time == 0
    assert answered(it.exchange(work(0, 1, kind=END_TASK))) == [0, 1]
    assert it.clock_time == 29


def test_a_device_that_lacks_the_memory_fails_and_says_so():
    it = fleet()
    replies = it.exchange(work(0, 3))
    assert answered(replies) == [0]
    assert replies[1].failure.code == OUT_OF_MEMORY
    assert (
        "out of memory: box-3 has room for 0 MB, 'train' needs 0 MB"
        in replies[1].failure.reason
    )
    assert it.versions == {0: 7}
    assert it.fleet()["clients"][3]["out_of_memory"] == 1
    assert it.clock_time == 19


def test_who_is_late_is_left_out():
    it = fleet(deadline=30.0)
    missed = []
    options = WaveOptions(on_missed=missed.extend)
    assert answered(it.exchange(work(0, 1, 2), options)) == [0, 1]
    assert it.clock_time == 30
    assert [client_of(message.node) for message in missed] == [2]
    assert it.versions == {0: 7, 1: 7}
    third = it.fleet()["clients"][2]
    assert (
        third["late"],
        third["answered"],
        third["computing"],
        third["transfer"],
    ) == (1, 0, 26.0, 4.0)
    assert third["flops"] == pytest.approx(
        260.0
    )  # of 300: what was not computed any more is not counted


def test_time_away_is_booked_as_such():
    # Each is there for 5 s in each hour. Down 4 s; 10 s of work as 1 + 5 + 4, up 1 + 4 s: done
    # at 10804.
    it = fleet(presence=Trace([[(0.0, 5.0)]], 3600.0))
    it.exchange(work(0))
    assert it.clock_time == 10804.0
    elapsed = it.elapsed()
    parts = {
        key: elapsed[f"{key}_seconds"]
        for key in ("communication", "computing", "waiting")
    }
    assert parts == {"communication": 9.0, "computing": 10.0, "waiting": 10785.0}
    first, second, *_ = it.fleet()["clients"]
    assert {
        key: first[key] for key in ("computing", "transfer", "idle", "away")
    } == {
        "computing": 10.0,
        "transfer": 9.0,
        "idle": 0.0,
        "away": 10785.0,
    }
    assert (
        second["computing"],
        second["transfer"],
        second["idle"],
        second["away"],
    ) == (0.0, 0.0, 19.0, 10785.0)
    # 4 W for 10 s and 1 W for the other 9 s that it was there; the other three 1 W for 19 s.
    # Away: none.
    assert elapsed["energy_joules"] == 4 * 10 + 9 + 3 * 19


def test_work_that_never_began_costs_nothing():
    # Client 0 is there at once, the others in an hour: what they were to do is given up before
    # they see it.
    it = fleet(
        presence=Trace([[(0.0, 30.0)], [(3600.0, 3630.0)]], 7200.0),
        deadline=100.0,
    )
    assert answered(it.exchange(work(0, 1))) == [0]
    assert it.clock_time == 100.0
    second = it.fleet()["clients"][1]
    assert (
        second["late"],
        second["flops"],
        second["computing"],
        second["transfer"],
        second["away"],
    ) == (
        1,
        0,
        0,
        0,
        100,
    )
    assert (it.elapsed()["waiting_seconds"], it.elapsed()["energy_joules"]) == (
        100.0,
        4 * 10 + 20 + 30,
    )


def test_a_lost_answer_is_waited_for_but_not_under_way(monkeypatch):
    it = fleet(deadline=50.0)
    chances = [((0.0, 0.0), 1.0, client == 1) for client in range(4)]
    monkeypatch.setattr(timeline, "draw_chances", lambda *_: chances)
    assert answered(it.exchange(work(0, 1))) == [0]
    second = it.fleet()["clients"][1]
    assert (
        second["computing"],
        second["transfer"],
        second["idle"],
        second["flops"],
    ) == (20.0, 9.0, 21.0, 200.0)
    elapsed = it.elapsed()
    assert [
        elapsed[f"{key}_seconds"]
        for key in ("communication", "computing", "waiting")
    ] == [9.0, 20.0, 21.0]


def test_over_commit_asks_more_and_takes_the_first():
    it = fleet(over_commit=1.5)
    missed = []
    face = StrategyGrid(it, WaveOptions(on_missed=missed.extend))
    replies = face.send_and_receive(
        flower(1, 2)
    )  # and 0 or 3: two good ones are wanted
    assert len([reply for reply in replies if not reply.has_error()]) == 2
    assert it.traffic.counts()[TRAIN]["messages"] == 3
    assert not missed
    late = [
        client["client"] for client in it.fleet()["clients"] if client["late"]
    ]
    # With 0, client 2 comes third and is told to stop when 1 is done; 3 fails at once and does
    # not count.
    assert (late, it.clock_time) in (([2], 29.0), ([], 39.0))


def test_over_commit_needs_the_same_for_all():
    it = fleet(over_commit=2.0)
    with pytest.raises(
        ConfigError,
        match=r"fleet.over_commit = 2 needs a strategy that sends all clients the same",
    ):
        StrategyGrid(it).send_and_receive(flower(0) + flower(1))


def test_chance_does_not_depend_on_who_is_first():
    def seconds(backwards):
        it = fleet(jitter=1.0, compute_sigma=0.5, dropout=0.3, seed=3)
        it.inner.backwards = backwards
        came = [answered(it.exchange(work(0, 1, 2))) for _ in range(20)]
        return came, it.state()

    assert seconds(True) == seconds(False)
    came, state = seconds(False)
    lost = sum(state["accounts"]["lost"])
    assert sum(map(len, came)) == 60 - lost
    assert 8 <= lost <= 30  # 18 expected


def test_state_goes_on_as_it_was():
    def grid():
        return fleet(jitter=1.0, dropout=0.2, deadline=40.0)

    whole, first, second = grid(), grid(), grid()
    for _ in range(6):
        whole.exchange(work(0, 1, 2, 3))
    for _ in range(3):
        first.exchange(work(0, 1, 2, 3))
    second.restore_state(json.loads(json.dumps(first.state())))
    for _ in range(3):
        second.exchange(work(0, 1, 2, 3))
    assert second.state() == whole.state()
    assert second.elapsed() == whole.elapsed()


def test_pushed_work_is_pulled_in_the_order_of_virtual_time():
    it = fleet()
    face = StrategyGrid(it)
    ids = face.push_messages(flower(2, 0))
    (first,) = face.pull_messages(ids)
    assert (first.metadata.src_node_id, it.clock_time) == (node_of(0), 19.0)
    ids += face.push_messages(flower(0, 1))
    assert face.pull_messages(ids, timeout=1.0) == []
    assert it.clock_time == 20.0
    order = []
    while answers := face.pull_messages(ids):
        order += [
            (client_of(answer.metadata.src_node_id), it.clock_time)
            for answer in answers
        ]
    assert order == [(0, 38.0), (2, 39.0), (1, 48.0)]
    # The server waited for 0 (4 + 10 + 5, twice), then for the last second of 2's answer, then
    # for 1: 4 + 5.
    assert (
        it.elapsed()["communication_seconds"],
        it.elapsed()["computing_seconds"],
    ) == (9 + 9 + 1 + 5, 20 + 4)


def test_pushed_work_that_is_late_is_given_up():
    it = fleet(deadline=25.0)
    missed = []
    face = StrategyGrid(it, WaveOptions(on_missed=missed.extend))
    ids = face.push_messages(flower(0, 2))
    assert [
        answer.has_error() for _ in range(2) for answer in face.pull_messages(ids)
    ] == [False, True]
    assert it.clock_time == 25.0
    assert [client_of(message.node) for message in missed] == [2]


def test_only_clients_that_are_there_can_be_chosen():
    presence = Trace(
        [[(0.0, 10.0)], [(20.0, 30.0)], [(5.0, 30.0)], [(25.0, 30.0)]], 30.0
    )
    it = fleet(presence=presence)
    assert it.get_node_ids() == [node_of(0)]
    assert it.members() == [node_of(client) for client in range(4)]
    patient = fleet(presence=presence, quorum=2)
    assert patient.get_node_ids() == [node_of(0), node_of(2)]
    assert patient.clock_time == 5.0
    with pytest.raises(RunError, match="4 clients wanted at once"):
        fleet(presence=presence, quorum=4).get_node_ids()


def test_answers_must_say_what_they_cost():
    it = fleet()
    it.inner.deliver = lambda work, timeout, options: (
        answer for answer in [(work[0].reply({METRICS: Metrics()}), 1)]
    )
    with pytest.raises(
        RunError,
        match="client 0 does not say what its work cost: a fleet needs 'flops'",
    ):
        it.exchange(work(0))


# --- whole runs
# --------------------------------------------------------------------------------------

SMALL = {
    "data": {
        "tasks": 2,
        "clients": 4,
        "classes_min": 2,
        "classes_max": 2,
        "share": "overlapping",
    },
    "model": {"name": "mlp", "hidden": 16},
    "train": {"rounds": 2, "epochs": 1},
    "learner": "fedknow",
    "engine": {"backend": "inline"},
}
DEVICES = 'fleet=["jetson-nano", "raspberry-pi-4-2gb", "jetson-agx-xavier"]'
LINK = ["fleet.down=1e5", "fleet.up=5e4", "fleet.latency=0.02"]
CLOCK = (
    "virtual_seconds",
    "communication_seconds",
    "computing_seconds",
    "waiting_seconds",
    "energy_joules",
)
REAL = ("time", "seconds", "peak_memory_mb")
"""What is measured, and not the same twice."""


def run(path, *changes, **options):
    config = read_config(SMALL, changes)
    result = simulate(config, path, report=False, **options)
    return result, RunFolder.open(path)


def plain(events, *without):
    """Events without what is real time."""
    kept = []
    for event in events:
        metrics = {
            key: value
            for key, value in event.get("metrics", {}).items()
            if key != "seconds"
        }
        kept.append(
            {k: v for k, v in event.items() if k not in (*REAL, *without)}
            | {"metrics": metrics}
        )
    return kept


def same(one, other):
    assert one[0].arrays.keys() == other[0].arrays.keys()
    for name, array in one[0].arrays.items():
        np.testing.assert_array_equal(array, other[0].arrays[name])
    np.testing.assert_array_equal(
        one[0].accuracy["personal"], other[0].accuracy["personal"]
    )


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedasync", "fedbuff"])
def test_infinitely_fast_devices_change_nothing(tmp_path, strategy):
    changes = [
        f"strategy={strategy}",
        *(["strategy.buffer=2"] if strategy == "fedbuff" else []),
    ]
    without = run(tmp_path / "without", *changes)
    infinite = run(tmp_path / "infinite", *changes, "fleet=infinite")
    same(without, infinite)
    assert plain(without[1].events()) == plain(infinite[1].events(), *CLOCK)
    assert {infinite[0].summary[key] for key in CLOCK} == {0.0}
    assert without[1].fleet == {}


def test_a_slow_fleet_changes_the_time_and_nothing_else(tmp_path):
    without = run(tmp_path / "without")
    slow = run(tmp_path / "slow", DEVICES, *LINK)
    same(without, slow)
    end = slow[0].summary
    assert end["virtual_seconds"] == pytest.approx(
        end["communication_seconds"] + end["computing_seconds"]
    )
    # Two rounds of two tasks: 5,248 bytes and a few numbers each way, and at the end of a task
    # the model down.
    down, up = (5248 + 5 * 8, 5248 + 18 * 8)
    rounds = 4 * (down / 1e5 + up / 5e4 + 0.04)
    assert end["communication_seconds"] == pytest.approx(
        rounds + 2 * (5248 / 1e5 + 0.04), rel=0.02
    )
    # The Raspberry Pi is waited for, and every FLOP takes its time.
    for client in slow[1].fleet["clients"]:
        speed = shipped_profiles()[client["device"]].speed
        assert client["computing"] == pytest.approx(client["flops"] / speed)
    times = [
        event["virtual_seconds"]
        for event in slow[1].events()
        if "virtual_seconds" in event
    ]
    assert times == sorted(times)


def test_a_resumed_run_has_the_same_clock(tmp_path):
    changes = [
        DEVICES,
        *LINK,
        "fleet.jitter=0.01",
        "fleet.dropout=0.2",
        "fleet.availability=markov",
    ]
    changes += [
        "fleet.online=1",
        "fleet.offline=0.5",
        "fleet.over_commit=1.5",
        "strategy.fraction=0.5",
    ]
    whole = run(tmp_path / "whole", *changes)

    def stop(event):
        if event.event == "round" and event.server_round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", *changes, observers=[stop])
    resumed = run(tmp_path / "part", *changes, resume=True)
    same(whole, resumed)
    for key in CLOCK:
        assert whole[0].summary[key] == resumed[0].summary[key]
    assert whole[1].fleet == resumed[1].fleet


def test_a_device_too_small_is_recorded_and_the_run_goes_on(tmp_path):
    own = tmp_path / "own.toml"
    source = json.dumps("made up")
    own.write_text(
        "[tiny]\npeak = 1e9\nmemory = 7.5e4\nbusy = 1\nidle = 1\n"
        f"source = {{ peak = {source}, memory = {source}, busy = {source}, idle = {source} }}\n"
    )
    _, folder = run(
        tmp_path / "run",
        f"fleet.profiles={own}",
        'fleet.devices=["infinite", "tiny"]',
    )
    failures = [event for event in folder.events() if event["event"] == "failure"]
    assert {event["fault"] for event in failures} == {"out_of_memory"}
    # The second task's signature gradients are what no longer fits.
    assert {(event["client"], event["task"]) for event in failures} == {
        (1, 1),
        (3, 1),
    }
    assert "tiny has room for 0 MB" in failures[0]["reason"]
    assert [
        event["clients"] for event in folder.events() if event["event"] == "round"
    ] == [4, 4, 2, 2]
    with pytest.raises(
        RunError,
        match=r"does not fit the fleet: too little memory on 4 of 4 devices",
    ):
        run(tmp_path / "none", f"fleet.profiles={own}", "fleet.devices=tiny")
    with pytest.raises(RunError, match=r"does not fit the fleet"):
        run(
            tmp_path / "push",
            f"fleet.profiles={own}",
            "fleet.devices=tiny",
            "strategy=fedasync",
        )


def test_rounds_without_answers_leave_the_model_and_are_no_result(tmp_path):
    with pytest.raises(RunError, match="aggregated nothing in the whole run"):
        run(tmp_path, DEVICES, "fleet.deadline=0.001", *LINK)
    folder = RunFolder.open(tmp_path)
    warnings = [
        event["reason"]
        for event in folder.events()
        if event["event"] == "warning"
    ]
    assert any("no answer to 'train' in time" in reason for reason in warnings)
    assert any("the global model stays as it is" in reason for reason in warnings)
    rounds = [event for event in folder.events() if event["event"] == "round"]
    assert [(event["clients"], event["loss"]) for event in rounds] == [
        (0, None)
    ] * 4
    assert rounds[-1]["virtual_seconds"] > 0.004


def test_a_fleet_that_cannot_be_leaves_no_folder(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"20 devices for data.clients = 4|fleet.devices: 20 devices",
    ):
        run(tmp_path / "run", "fleet=testbed-a")
    assert not (tmp_path / "run").exists()


def test_real_clients_have_no_imagined_devices(tmp_path):
    with pytest.raises(ConfigError, match="real clients are devices themselves"):
        serve(
            read_config(SMALL, ["fleet=infinite"]),
            tmp_path / "run",
            "127.0.0.1:0",
        )


def test_the_same_on_one_worker_and_on_four(tmp_path):
    changes = [
        DEVICES,
        *LINK,
        "fleet.jitter=0.01",
        "fleet.deadline=0.5",
        "engine.backend=ray",
        "data.clients=8",
    ]
    one = run(tmp_path / "one", *changes, "engine.workers=1")
    four = run(tmp_path / "four", *changes, "engine.workers=4")
    same(one, four)
    assert plain(one[1].events()) == plain(four[1].events())
    assert one[1].fleet == four[1].fleet


def test_a_listener_hears_of_the_devices_and_of_each_answer_once():
    heard = []

    class Ear(Listener):
        def describe(self, devices):
            heard.append(list(devices))

        def answer(self, reply):
            heard.append(client_of(reply.node))

    it = fleet(2, listener=Ear())
    it.exchange(work(0, 1))
    assert heard[0] == ["box-0", "box-1"]
    # The inner grid has no listener, else each answer would be heard twice.
    assert sorted(heard[1:]) == [0, 1]
