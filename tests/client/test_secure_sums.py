"""Sums that a learner shares stay with the client until the task ends."""

import pytest
import torch

from fedknow.client.secure_sums import UNSENT, SharedSums
from fedknow.protocols.messages import (
    END_TASK,
    EVALUATE,
    EXTRA,
    METRICS,
    TRAIN,
    Arrays,
    Message,
    Metrics,
)
from fedknow.protocols.secure.fixed import Summand

SUMS = {"a": torch.tensor([1.5, -2.0], dtype=torch.float64)}
KEPT = {"own": 3, UNSENT: SUMS}


class Learner:
    """One that shares two numbers."""

    def sum_layout(self):
        """Say so."""
        return {"a": Summand((2,), 0.5)}

    def as_sums(self, shared):
        """Give what is shared, or zeros."""
        return dict(shared) or {"a": torch.zeros(2, dtype=torch.float64)}


class Node:
    """A node that shares sums in rounds, and changes its state there."""

    learner = Learner()

    def handle(self, message, state):
        """Answer."""
        self.seen = state
        content = {METRICS: Metrics()}
        if message.kind != TRAIN:
            return message.reply(content), state
        content[EXTRA] = Arrays(a=torch.tensor([0.5, 0.5]).double().numpy())
        return message.reply(content), {"own": 4}


def shared_sums():
    node = Node()
    return node, SharedSums(node, node.learner)


def test_what_is_shared_is_kept_and_not_sent():
    node, sums = shared_sums()
    reply, new = sums.ask(Message(TRAIN, 2, "1"), {"own": 3})
    assert reply.content.keys() == {METRICS}
    assert reply.id == "1:reply"
    assert new["own"] == 4
    assert new[UNSENT]["a"].tolist() == [0.5, 0.5]
    # What was kept before is added, and is not changed itself.
    _, new = sums.ask(Message(TRAIN, 2, "1"), KEPT)
    assert node.seen == {"own": 3}
    assert new[UNSENT]["a"].tolist() == [2, -1.5]
    assert SUMS["a"].tolist() == [1.5, -2]


@pytest.mark.parametrize("kind", [EVALUATE, END_TASK])
def test_the_node_knows_nothing_of_what_is_kept(kind):
    node, sums = shared_sums()
    _, new = sums.ask(Message(kind, 2, "1"), KEPT)
    assert node.seen == {"own": 3}
    # The very object where nothing is new, so that nothing is saved.
    assert new is KEPT
    plain = {"own": 3}
    assert sums.ask(Message(kind, 2, "1"), plain)[1] is plain


def test_what_is_kept_is_sent_once():
    _, sums = shared_sums()
    numbers, new = sums.encode(KEPT, 3)
    assert numbers.tolist() == [3, 2**64 - 4]
    assert new == {"own": 3}
    assert sums.encode(new, 3)[0].tolist() == [0, 0]


def test_shares_without_a_layout_stay_in_the_answer():
    sums = SharedSums(Node(), None)
    assert sums.layout == {}
    reply, new = sums.ask(Message(TRAIN, 2, "1"), {"own": 3})
    assert EXTRA in reply.content
    assert new == {"own": 4}
