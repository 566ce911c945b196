"""What all grids share, on the one that runs in this process."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp.strategy import FedAvg, FedMedian

from fedknow.client.host import Host
from fedknow.client.state import State, StateStore
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.flower import empty_run
from fedknow.protocols.messages import (
    CLIENT_FAILED,
    EVALUATE,
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
    client_of,
    node_of,
)
from fedknow.server.grids.activity import Listener
from fedknow.server.grids.inline import InlineGrid
from fedknow.server.grids.strategy_grid import StrategyGrid
from fedknow.server.grids.wave import WaveOptions


class Adder:
    """Adds the client's number plus one to all it receives, and counts its train messages; some
    clients fail."""

    def __init__(
        self, failing: tuple[int, ...] = (), seconds: float = 0.0
    ) -> None:
        self.failing = failing
        self.seconds = seconds
        self.order: list[int] = []
        self.threads: set[int] = set()

    def handle(self, message: Message, state: State) -> tuple[Message, State]:
        client = client_of(message.node)
        self.order.append(client)
        self.threads.add(torch.get_num_threads())
        if self.seconds:
            time.sleep(self.seconds)  # stands for training
        if client in self.failing:
            return message.fail(CLIENT_FAILED, f"client {client} fails"), state
        count = state.get("count", 0) + 1
        arrays = Arrays(
            {
                name: array + np.float32(client + 1)
                for name, array in message.arrays().items()
            }
        )
        metrics = Metrics({"num-examples": 10, "count": count})
        return message.reply({"arrays": arrays, "metrics": metrics}), {
            "count": count
        }


class Ear(Listener):
    """Notes what it hears."""

    def __init__(self):
        self.heard = []

    def send(self, work, absent, is_pushed=False):
        clients = [client_of(message.node) for message in work]
        self.heard.append(("send", clients, is_pushed))

    def answer(self, reply):
        self.heard.append(("answer", client_of(reply.node), not reply.failure))

    def miss(self, work):
        clients = [client_of(message.node) for message in work]
        self.heard.append(("miss", clients))


class Liar:
    """Makes 7 of all that client 1 sends."""

    def falsify(self, work, answers):
        for reply, version in answers:
            if client_of(reply.node) == 1:
                lie = Arrays({"w": np.full(3, 7, np.float32)})
                content = {**reply.content, "arrays": lie}
                yield replace(reply, content=content), version
            else:
                yield reply, version


def grid(tmp_path, clients=4, node=None, **options):
    host = Host(
        ExperimentConfig(),
        None,
        StateStore(tmp_path / "clients", 10**6),
        node or Adder(),
    )
    return InlineGrid(clients, host, **options)


def work(*clients, kind=TRAIN):
    content = {
        "arrays": Arrays({"w": np.zeros(3, np.float32)}),
        "config": Config({"task": 0}),
    }
    return [
        Message(kind, node_of(client), "mine", content=content)
        for client in clients
    ]


def counts(replies):
    return [(client_of(r.node), r.content["metrics"]["count"]) for r in replies]


def start(strategy, it, rounds=2):
    random.seed(0)
    arrays = ArrayRecord([np.zeros(3, np.float32), np.ones((2, 2), np.float32)])
    return strategy.start(StrategyGrid(it), arrays, num_rounds=rounds)


def test_exchange_orders_answers_by_node_whatever_the_order_of_work(tmp_path):
    node = Adder()
    replies = grid(tmp_path, node=node).exchange(work(2, 0, 3, 1))
    assert node.order == [2, 0, 3, 1]
    assert [client_of(reply.node) for reply in replies] == [0, 1, 2, 3]
    for reply in replies:
        np.testing.assert_array_equal(
            reply.arrays()["w"], np.full(3, reply.node - 1, np.float32)
        )


def test_messages_get_ids_of_their_own(tmp_path):
    it = grid(tmp_path)
    replies = it.exchange(work(0, 1)) + it.exchange(work(0, 1))
    assert len({reply.id for reply in replies}) == 4
    assert len({reply.reply_to for reply in replies} | {"mine"}) == 5


def test_states_go_on_from_wave_to_wave_and_within_one(tmp_path):
    it = grid(tmp_path)
    assert counts(it.exchange(work(1, 0))) == [(0, 1), (1, 1)]
    assert counts(it.exchange(work(1, 1, 2, 1))) == [
        (1, 2),
        (1, 3),
        (1, 4),
        (2, 1),
    ]
    assert sorted(it.versions) == [0, 1, 2]


def test_traffic_is_counted_by_kind_or_label(tmp_path):
    it = grid(tmp_path, node=Adder(failing=(3,)))
    it.exchange(work(0, 1, 3))
    it.exchange(work(0, kind=EVALUATE))
    it.exchange(
        work(0, 1, kind=EVALUATE), options=WaveOptions(label="evaluate.global")
    )
    # down: 3 float32 and a number; up: 3 float32 and two numbers, nothing from the client that
    # failed
    assert it.traffic.counts() == {
        "train": {"down": 3 * 20, "up": 2 * 28, "messages": 3},
        "evaluate": {"down": 20, "up": 28, "messages": 1},
        "evaluate.global": {"down": 40, "up": 56, "messages": 2},
    }


def test_work_for_a_node_that_does_not_exist_is_refused(tmp_path):
    it = grid(tmp_path)
    with pytest.raises(
        ValueError, match=r"no such nodes: \[1, 6\]; they are 2 to 5"
    ):
        it.exchange(
            [Message(TRAIN, 6, ""), Message(TRAIN, 1, ""), Message(TRAIN, 2, "")]
        )
    assert it.traffic.counts() == {}


def test_a_client_that_fails_answers_so_and_keeps_its_state(tmp_path):
    node = Adder(failing=(1,))
    it = grid(tmp_path, node=node)
    replies = it.exchange(work(0, 1, 2))
    assert replies[1].failure is not None
    assert replies[1].failure.reason == "client 1 fails"
    assert it.versions.get(1, 0) == 0
    node.failing = ()
    assert counts(it.exchange(work(0, 1))) == [(0, 2), (1, 1)]


def test_an_answer_that_is_refused_leaves_the_client_as_it_was(tmp_path):
    it = grid(tmp_path)
    it.exchange(work(0, 1))
    before = dict(it.versions)

    def inspect(reply):
        if reply.node == 2:
            return reply
        request = Message(reply.kind, reply.node, reply.reply_to)
        return request.fail(CLIENT_FAILED, "refused")

    replies = it.exchange(work(0, 1), WaveOptions(inspect=inspect))
    assert counts(replies[:1]) == [(0, 2)]
    assert replies[1].failure.reason == "refused"
    assert it.versions[1] == before[1]
    assert it.versions[0] != before[0]
    assert counts(it.exchange(work(0, 1))) == [(0, 3), (1, 2)]


def test_a_listener_hears_work_and_answers_from_the_beginning(tmp_path):
    ear = Ear()
    it = grid(tmp_path, node=Adder(failing=(1,)), listener=ear)
    it.exchange(work(0, 1))
    it.push([replace(work(2)[0], id="pushed")])
    assert ear.heard == [
        ("send", [0, 1], False),
        ("answer", 0, True),
        ("answer", 1, False),
        ("send", [2], True),
    ]


def test_a_listener_hears_of_answers_that_came_too_late(tmp_path):
    ear = Ear()
    it = grid(tmp_path, node=Adder(seconds=0.01), listener=ear)
    it.exchange(work(0, 1), timeout=0.001)
    assert ear.heard[0] == ("send", [0, 1], False)
    assert ear.heard[-1] == ("miss", [1])


def test_an_adversary_changes_answers_before_they_are_inspected(tmp_path):
    seen = []
    options = WaveOptions(inspect=lambda reply: seen.append(reply) or reply)
    it = grid(tmp_path, adversary=Liar())
    replies = it.exchange(work(0, 1), options)
    assert [reply.arrays()["w"].tolist() for reply in replies] == [
        [1] * 3,
        [7] * 3,
    ]
    assert seen == replies


def test_after_a_timeout_the_answers_so_far_are_given(tmp_path):
    it = grid(tmp_path, clients=50, node=Adder(seconds=0.02))
    replies = it.exchange(work(*range(50)), timeout=0.1)
    assert 1 <= len(replies) < 50
    assert sorted(it.versions) == [client_of(reply.node) for reply in replies]
    assert it.exchange(work(0), timeout=0) == []


def test_work_is_done_with_one_thread(tmp_path):
    before = torch.get_num_threads()
    node = Adder()
    grid(tmp_path, node=node).exchange(work(0, 1))
    assert node.threads == {1}
    assert torch.get_num_threads() == before


def test_restore_goes_back_and_prune_keeps_what_is_present(tmp_path):
    it = grid(tmp_path)
    it.exchange(work(0, 1))
    checkpoint, traffic = (
        dict(it.versions),
        {kind: dict(count) for kind, count in it.traffic.counts().items()},
    )
    it.prune()
    it.store.settle()
    files = {
        path.name: path.read_bytes() for path in (tmp_path / "clients").iterdir()
    }
    assert len(files) == 2
    it.exchange(work(0, 1, 2))
    for (
        name,
        data,
    ) in files.items():  # what the checkpoint names is untouched by later work
        assert (tmp_path / "clients" / name).read_bytes() == data

    again = grid(tmp_path)
    again.restore(checkpoint, traffic)
    assert again.traffic.counts() == traffic
    assert counts(again.exchange(work(0, 1, 2))) == [(0, 2), (1, 2), (2, 1)]
    again.prune()
    again.close()
    assert len(list((tmp_path / "clients").iterdir())) == 3
    assert counts(again.exchange(work(0))) == [(0, 3)]


def test_prune_does_nothing_without_a_store():
    class Plain:
        def handle_many(self, messages, versions):
            return (
                (message.reply({}), versions.get(0, 0) + 1)
                for message in messages
            )

    it = InlineGrid(2, Plain())
    it.exchange(work(0))
    it.prune()
    assert it.versions == {0: 1}


# --- Flower's side
# --------------------------------------------------------------------------------------------------


def test_fedavg_runs_unmodified(tmp_path):
    it = grid(tmp_path)
    result = start(FedAvg(fraction_evaluate=0.0), it)
    a, b = result.arrays.to_numpy_ndarrays()
    # each round adds the mean of 1, 2, 3 and 4
    np.testing.assert_array_equal(a, np.full(3, 5.0, np.float32))
    np.testing.assert_array_equal(b, np.full((2, 2), 6.0, np.float32))
    assert [
        dict(m)["count"] for m in result.train_metrics_clientapp.values()
    ] == [
        1.0,
        2.0,
    ]
    assert it.traffic.counts()["train"]["messages"] == 8


def test_a_strategy_meets_failures_as_errors(tmp_path):
    result = start(
        FedAvg(fraction_evaluate=0.0),
        grid(tmp_path, node=Adder(failing=(0, 3))),
        rounds=1,
    )
    np.testing.assert_array_equal(
        result.arrays.to_numpy_ndarrays()[0], np.full(3, 2.5, np.float32)
    )


def test_another_strategy_and_its_evaluation_run_too(tmp_path):
    it = grid(tmp_path)
    result = start(FedMedian(), it, rounds=3)
    np.testing.assert_array_equal(
        result.arrays.to_numpy_ndarrays()[0], np.full(3, 7.5, np.float32)
    )
    assert it.traffic.counts()["evaluate"]["messages"] == 12


def flower_work(*nodes):
    record = RecordDict(
        {
            "arrays": ArrayRecord([np.zeros(2)]),
            "config": ConfigRecord({"task": 0}),
        }
    )
    return [FlowerMessage(record, node, "train", group_id="4") for node in nodes]


def test_send_and_receive_gives_a_list_in_order_of_the_nodes(tmp_path):
    it = StrategyGrid(grid(tmp_path, node=Adder(failing=(2,))))
    replies = it.send_and_receive(iter(flower_work(5, 4, 2)))
    assert isinstance(replies, list)
    assert [reply.metadata.src_node_id for reply in replies] == [2, 4, 5]
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.reason == "client 2 fails"
    assert {reply.metadata.group_id for reply in replies} == {"4"}


def test_messages_pushed_are_answered_when_pulled_and_once(tmp_path):
    node = Adder()
    it = StrategyGrid(grid(tmp_path, node=node))
    sent = flower_work(3, 2, 4)
    ids = it.push_messages(sent)
    assert [message.metadata.message_id for message in sent] == ids
    assert node.order == []
    first = it.pull_messages(ids[:2])
    assert [reply.metadata.reply_to_message_id for reply in first] == [
        ids[1],
        ids[0],
    ]
    assert [
        reply.metadata.src_node_id
        for reply in it.pull_messages([*ids, "unknown"])
    ] == [4]
    assert it.pull_messages(ids) == []


def test_the_rest_of_flowers_grid(tmp_path):
    with grid(tmp_path, clients=3) as inner:
        it = StrategyGrid(inner)
        assert it.get_node_ids() == [2, 3, 4]
        assert [info.node_id for info in it.get_nodes()] == [2, 3, 4]
        assert it.run.run_id == 1
        it.set_run(empty_run(9))
        assert it.run.run_id == 9
        message = it.create_message(RecordDict(), "train", 3, "1")
        assert (message.metadata.run_id, message.metadata.dst_node_id) == (9, 3)
        it.set_run(empty_run())
