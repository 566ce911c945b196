"""The host: a node's states from message to message."""

import pytest
import torch

from fedknow.client.host import Host, one_thread, successor
from fedknow.client.state import State, StateStore
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.messages import (
    CLIENT_FAILED,
    EVALUATE,
    STATE_LOST,
    TRAIN,
    Message,
    Metrics,
    node_of,
)


class Counter:
    """Counts the train messages of each client in its state; fails on request; answers evaluation
    without change."""

    def handle(self, message: Message, state: State) -> tuple[Message, State]:
        count = state.get("count", 0)
        if message.group == "fail":
            return message.fail(CLIENT_FAILED, "asked to"), state
        if message.kind == TRAIN:
            count += 1
            state = {"count": count, "x": torch.full((3,), float(count))}
        return message.reply({"metrics": Metrics({"count": count})}), state


class Forgetful:
    def handle(self, message: Message, state: State) -> tuple[Message, State]:
        return message.reply({}), {}


def host(folder, node, memory=10**6):
    return Host(ExperimentConfig(), None, StateStore(folder, memory), node)


def count(reply):
    return reply.content["metrics"]["count"]


@pytest.mark.parametrize("memory", [0, 10**6])
def test_states_go_from_message_to_message(tmp_path, memory):
    it = host(tmp_path, Counter(), memory)
    versions = {0: 0, 1: 0}
    seen = []
    for id, client in enumerate([0, 1, 0, 0, 1]):
        reply, versions[client] = it.handle(
            Message(TRAIN, node_of(client), str(id)), versions[client]
        )
        assert reply.reply_to == str(id)
        seen.append((client, count(reply)))
    assert seen == [(0, 1), (1, 1), (0, 2), (0, 3), (1, 2)]
    assert len(list(tmp_path.iterdir())) == 5


def test_nothing_is_saved_where_nothing_changed(tmp_path):
    it = host(tmp_path, Counter())
    reply, version = it.handle(Message(TRAIN, 2, "1"), 0)
    for message in (
        Message(EVALUATE, 2, "2"),
        Message(TRAIN, 2, "3", group="fail"),
    ):
        reply, after = it.handle(message, version)
        assert after == version
    assert reply.failure is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_a_client_that_keeps_nothing_stays_fresh(tmp_path):
    assert host(tmp_path, Forgetful()).handle(Message(TRAIN, 2, "1"), 0)[1] == 0
    assert list(tmp_path.iterdir()) == []


def test_work_done_again_writes_the_same_file_with_the_same_content(tmp_path):
    a, b = host(tmp_path, Counter()), host(tmp_path, Counter())
    _, first = a.handle(Message(TRAIN, 2, "1"), 0)
    _, second = a.handle(Message(TRAIN, 2, "2"), first)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert b.handle(Message(TRAIN, 2, "2"), first)[1] == second
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_other_work_on_the_same_state_gets_a_version_of_its_own(tmp_path):
    # A reply that was refused or came too late leaves its file; the next work on the same state
    # must not meet it.
    it = host(tmp_path, Counter())
    _, first = it.handle(Message(TRAIN, 2, "1"), 0)
    versions = {it.handle(Message(TRAIN, 2, id), first)[1] for id in "234"}
    assert len(versions | {first, 0}) == 5


def test_versions_are_48_bit_numbers_and_never_fresh():
    versions = {
        successor(version, str(id)) for version in range(100) for id in range(100)
    }
    assert len(versions) == 10_000
    assert min(versions) > 0
    assert max(versions) < 2**48


def test_a_lost_state_is_a_failure_of_its_own_kind(tmp_path):
    it = host(tmp_path, Counter())
    reply, version = it.handle(Message(TRAIN, 2, "1"), 99)
    assert reply.failure.code == STATE_LOST
    assert "000000-63.safetensors: no such client state" in reply.failure.reason
    assert version == 99
    (first, _), (second, after) = it.handle_many(
        [Message(TRAIN, 2, "1"), Message(TRAIN, 3, "2")], {0: 99}
    )
    assert first.failure.code == STATE_LOST
    assert second.failure is None
    assert after


def test_a_lost_state_costs_those_that_train_with_it_nothing(tmp_path):
    class Together(Counter):
        at_once = 3

        def train_together(self, messages, states):
            return [
                self.handle(message, state)
                for message, state in zip(messages, states, strict=True)
            ]

    work = [Message(TRAIN, node, str(node)) for node in (2, 3, 4)]
    answers = list(host(tmp_path, Together()).handle_many(work, {1: 99}))
    assert [reply.node for reply, _ in answers] == [2, 3, 4]
    assert [reply.failure is None for reply, _ in answers] == [True, False, True]
    assert answers[1][0].failure.code == STATE_LOST
    assert answers[1][1] == 99


def test_one_thread_is_restored():
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def fail_inside():
        with one_thread():
            assert torch.get_num_threads() == 1
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == 2
