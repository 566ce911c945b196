"""Sums that a client gave are kept until the server could open them, and no longer."""

import pytest
import torch

from fedknow.client.secure_sums import GIVEN, SharedSums, encode_for, note_given
from fedknow.protocols.messages import END_TASK, TRAIN, Arrays, Message
from fedknow.protocols.secure.fixed import Summand

SESSION = {"session": bytes(range(32)).hex(), "mask-key": "secret"}
SUMS = {"a": torch.tensor([1.5, -2.0], dtype=torch.float64)}
KEPT = {"own": 3, GIVEN: {"session": SESSION["session"], "sums": SUMS}}


class Learner:
    """One that shares two numbers at the end of a task."""

    def sum_layout(self, ended):
        """Say so."""
        return {"a": Summand((2,), 0.5)} if ended else {}

    def as_sums(self, shared):
        """Give what is shared, or zeros."""
        return dict(shared) or {"a": torch.zeros(2, dtype=torch.float64)}


class Node:
    """A node that answers with its state, and changes it where it learns."""

    learner = Learner()

    def handle(self, message, state):
        """Answer."""
        self.seen = state
        return message.reply({}), ({"own": 4} if message.kind == TRAIN else state)


def shared_sums():
    node = Node()
    return node, SharedSums(node, node.learner)


def test_what_was_given_is_noted_for_its_session():
    state = note_given({"own": 3}, SESSION, SUMS)
    assert state == KEPT
    # No secret of the session is in it.
    assert state[GIVEN].keys() == {"session", "sums"}
    zeros = {"a": torch.zeros(2, dtype=torch.float64)}
    assert note_given(KEPT, SESSION, zeros) == {"own": 3}


@pytest.mark.parametrize(
    ("unopened", "is_kept"),
    [(bytes(range(32)), True), (bytes(32), False), (None, False), ("x", False)],
)
def test_only_the_session_that_the_server_names_is_kept(unopened, is_kept):
    _, sums = shared_sums()
    assert sums.settle(KEPT, unopened) == (KEPT if is_kept else {"own": 3})
    assert sums.settle({"own": 3}, unopened) == {"own": 3}


def test_the_node_knows_nothing_of_them():
    node, sums = shared_sums()
    for kind, expected in ((TRAIN, {**KEPT, "own": 4}), (END_TASK, KEPT)):
        _, new = sums.ask(Message(kind, 2, "1"), KEPT)
        assert node.seen == {"own": 3}
        assert new == expected
    # The very object where nothing is new, so that nothing is saved.
    assert new is KEPT
    plain = {"own": 3}
    assert sums.ask(Message(END_TASK, 2, "1"), plain)[1] is plain


def test_they_are_added_to_what_is_new():
    _, sums = shared_sums()
    message = Message(END_TASK, 2, "1")
    new = Arrays(a=torch.tensor([0.5, 0.5], dtype=torch.float64).numpy())
    with_new = message.reply({"extra": new})
    assert sums.gather(with_new, {})["a"].tolist() == [0.5, 0.5]
    assert sums.gather(with_new, KEPT)["a"].tolist() == [2, -1.5]
    assert sums.gather(message.reply({}), KEPT)["a"].tolist() == [1.5, -2]
    assert sums.gather(message.reply({}), {})["a"].tolist() == [0, 0]
    # What is kept is not changed.
    assert SUMS["a"].tolist() == [1.5, -2]
    layout = sums.layout(END_TASK)
    assert encode_for(SUMS, layout, [2, 3, 4]).tolist() == [3, 2**64 - 4]


def test_a_kind_without_sums_has_no_layout():
    _, sums = shared_sums()
    assert sums.layout(TRAIN) == {}
    assert SharedSums(Node(), None).layout(END_TASK) == {}
