"""Sums under masks: the solution of those who answered, whoever drops out, and nothing lost."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedknow.client.learners import build_learner
from fedknow.client.learners.frames.learner import Round
from fedknow.client.secure import STATE, SecureNode
from fedknow.client.secure_sums import UNSENT
from fedknow.protocols.config import read_config
from fedknow.protocols.messages import (
    ARRAYS,
    END_TASK,
    EXTRA,
    METRICS,
    Arrays,
    Config,
    Message,
    Metrics,
    node_of,
)
from fedknow.protocols.secure.rounds import (
    KEYS,
    MASKED,
    SECURE,
    SHARES,
    UNMASK,
)
from fedknow.protocols.work import COSTS
from fedknow.server.checks.faults import RunError
from fedknow.server.checks.replies import Inspector
from fedknow.server.run.secure import SecureRounds
from fedknow.server.run.state import RunState
from fedknow.strategies.closed_form import Afcl

CLASSES = 3
WAVES = (KEYS, SHARES, END_TASK, UNMASK)


class Summer:
    """A node that shares the sums of its samples once."""

    def __init__(self, learner, x, y):
        self.learner = learner
        self.sums = learner.sums(x, y, Round(1, 0)) if len(x) else {}

    def handle(self, message, state):
        """End a task."""
        metrics = dict.fromkeys(COSTS, 0.0)
        metrics |= {"num-examples": 1, "knowledge-bytes": 0.0}
        content = {METRICS: Metrics(metrics)}
        if self.sums and not state.get("has_shared"):
            pairs = ((name, value.numpy()) for name, value in self.sums.items())
            content[EXTRA] = Arrays(pairs)
        return message.reply(content), {"has_shared": True}


class Wire:
    """Clients, and a run that reaches them; what is in ``lost`` does not arrive."""

    def __init__(self, parts, width, ridge=1.0, threshold=0.66):
        options = [
            f"model.hidden={width}",
            f"learner.ridge={ridge}",
            f"privacy.threshold={threshold}",
        ]
        self.config = read_config(
            {
                "model": {"name": "mlp", "train": "head"},
                "learner": "afcl",
                "privacy": {"secure": True},
                "data": {"clients": len(parts)},
            },
            options,
        )
        self.learner = build_learner(self.config, (1, 2, 2), CLASSES)
        self.clients = {
            node_of(number): SecureNode(Summer(self.learner, x, y), self.config)
            for number, (x, y) in enumerate(parts)
        }
        self.states = {node: {} for node in self.clients}
        self.lost = set()
        self.seen = []
        self.failures = []
        self.spoil = lambda reply: reply
        inspector = Inspector(self.failures.append)
        inspector.begin(0, 1, Arrays())
        self.run = SimpleNamespace(
            grid=self,
            options=None,
            parts=SimpleNamespace(config=self.config, learner=self.learner),
            state=RunState(Arrays(), None),
            incidents=SimpleNamespace(inspector=inspector, warn=print),
        )
        self.inspector = inspector
        self.server = Afcl(ridge)
        self.server._is_new = False
        self.server.reset(width, CLASSES)

    def exchange(self, messages, options):
        """Have clients answer; only what arrives changes their states."""
        replies = []
        for message in sorted(messages, key=lambda each: each.node):
            self.seen.append(message)
            answer, new = self.clients[message.node].handle(
                message, self.states[message.node]
            )
            if (message.kind, message.node) in self.lost:
                continue
            self.seen.append(answer)
            reply = self.inspector(self.spoil(answer))
            if reply.failure is None:
                self.states[message.node] = new
            replies.append(reply)
        return replies

    def end(self, lost=()):
        """End a task, and add up what comes; gives who was heard."""
        self.lost = set(lost)
        self.inspector.begin(0, 1, Arrays())
        content = {ARRAYS: Arrays(), "config": Config({"task": 0})}
        work = [
            Message(END_TASK, node, "1", content=content) for node in self.clients
        ]
        before = dict(self.states)
        try:
            replies = SecureRounds(self.run).end(work)
        except RunError:
            # A run that stopped goes on from its checkpoint, which has these states.
            self.states = before
            raise
        self.server.aggregate_end_task(0, self.learner_arrays(), replies)
        return [reply.node for reply in replies]

    def learner_arrays(self):
        """Give parameters as the strategy gets them."""
        return Arrays((n, v.numpy()) for n, v in self.learner.send().items())


def ridge_of(parts, ridge):
    """Solve the ridge regression of all samples in one place, in float64."""
    x = torch.cat([features for features, _ in parts]).numpy()
    targets = F.one_hot(torch.cat([y for _, y in parts]), CLASSES).numpy()
    gram = x.T @ x + ridge * np.eye(x.shape[1])
    return np.linalg.solve(gram, x.T @ targets)


def part(count, width, seed, scale=1.0):
    draws = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(count, width, generator=draws, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (count,), generator=draws)


def test_three_clients_by_hand():
    rows = [[[1.0, 0.0]], [[0.0, 2.0]], [[1.0, 1.0]]]
    labels = [[0], [1], [0]]
    parts = [
        (torch.tensor(x, dtype=torch.float64), torch.tensor(y))
        for x, y in zip(rows, labels, strict=True)
    ]
    wire = Wire(parts, 2)
    assert wire.end() == [2, 3, 4]
    # G = [[2, 1], [1, 5]] and P = [[2, 0], [1, 2]], without a rounding.
    assert wire.server._gram.tolist() == [[2, 1], [1, 5]]
    assert wire.server._moment.tolist() == [[2, 0, 0], [1, 2, 0]]
    # W = (G + I)^-1 P = 1/17 [[6, -1], [-1, 3]] P.
    np.testing.assert_allclose(
        wire.server.solution(), [[11 / 17, -2 / 17, 0], [1 / 17, 6 / 17, 0]]
    )


def test_a_server_sees_noise_and_no_record_in_the_clear():
    wire = Wire([part(5, 4, seed) for seed in range(4)], 4)
    wire.end()
    wire.end()
    answers = [each for each in wire.seen if each.reply_to and each.arrays()]
    assert len(answers) == 8
    for answer in answers:
        assert answer.content.keys() == {ARRAYS, METRICS}
        assert answer.arrays().keys() == {MASKED}
        # The second time all are zeros, which look like any other numbers.
        noise = answer.arrays()[MASKED].astype(np.float64) / 2.0**64
        assert abs(noise.mean() - 0.5) < 0.35
        assert noise.std() > 0.15
    assert not any(EXTRA in each.content for each in wire.seen)
    assert all(UNSENT not in state for state in wire.states.values())


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_split_and_any_dropouts_give_the_solution_of_those_heard(data):
    clients = data.draw(st.integers(3, 7))
    width = data.draw(st.integers(1, 9))
    scale = data.draw(st.sampled_from([1e-3, 1.0, 1e3]))
    ridge = data.draw(st.sampled_from([0.03, 1.0, 300.0])) * scale**2
    counts = data.draw(
        st.lists(st.integers(0, 12), min_size=clients, max_size=clients)
    )
    parts = [part(n, width, seed, scale) for seed, n in enumerate(counts)]
    wire = Wire(parts, width, ridge)
    heard = set()
    # Whoever drops out at whatever wave, three times; too few may stay, too.
    for _ in range(3):
        drops = st.tuples(
            st.sampled_from(WAVES), st.sampled_from(list(wire.clients))
        )
        lost = data.draw(st.sets(drops, max_size=clients // 2))
        absent = {node for kind, node in lost if kind != UNMASK}
        try:
            now = set(wire.end(lost))
        except RunError:
            continue
        assert now == set(wire.clients) - absent
        heard |= now
        close(wire, [parts[node - 2] for node in sorted(heard)], ridge)
    # Who was not heard gives its sums later, and nobody gives any twice.
    wire.end()
    close(wire, parts, ridge)


def close(wire, parts, ridge):
    expected = ridge_of(parts, ridge)
    size = max(np.abs(expected).max(), 1e-300)
    difference = np.abs(wire.server.solution().numpy() - expected).max()
    assert difference <= 1e-6 * size


TOO_FEW = {
    END_TASK: "4 of 7 clients sent updates, and 5 are needed",
    UNMASK: "4 of 7 clients opened the sum",
}


@pytest.mark.parametrize("wave", TOO_FEW)
def test_too_few_end_the_run_and_nothing_is_added(wave):
    parts = [part(4, 5, seed) for seed in range(7)]
    wire = Wire(parts, 5)
    with pytest.raises(RunError, match=TOO_FEW[wave]):
        wire.end({(wave, node_of(client)) for client in range(3)})
    assert not wire.server._gram.any()
    wire.end()
    close(wire, parts, 1.0)


def masked(change):
    def spoil(reply):
        if reply.kind != END_TASK or reply.node != node_of(1):
            return reply
        arrays = Arrays({MASKED: change(reply.arrays()[MASKED])})
        return Message(
            **{**vars(reply), "content": {**reply.content, ARRAYS: arrays}}
        )

    return spoil


@pytest.mark.parametrize(
    "change",
    [
        lambda numbers: numbers + np.uint64(2**63),
        lambda numbers: numbers - np.uint64(2**44),
        lambda numbers: numbers[::-1].copy(),
    ],
)
def test_a_spoilt_sum_is_refused(change):
    wire = Wire([part(4, 5, seed) for seed in range(4)], 5)
    wire.spoil = masked(change)
    with pytest.raises(RunError, match=r"is impossible: .*a client sent wrong"):
        wire.end()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda numbers: numbers[1:], "shape"),
        (lambda numbers: numbers.astype(np.float64), "dtype"),
    ],
)
def test_other_arrays_are_the_clients_failure(change, words):
    wire = Wire([part(4, 5, seed) for seed in range(4)], 5)
    wire.spoil = masked(change)
    assert wire.end() == [2, 4, 5]
    [failure] = wire.failures
    assert words in str(failure)


@pytest.mark.parametrize(
    ("place", "words"), [(9, "do not fit together"), (-1, "is impossible")]
)
def test_a_wrong_share_of_a_mask_is_found(place, words):
    """A secret out of range tells at once, and another one spoils the sum."""
    wire = Wire([part(4, 5, seed) for seed in range(3)], 5, threshold=1.0)

    def spoil(reply):
        if reply.kind != UNMASK or reply.node != node_of(1):
            return reply
        shares = []
        for share in map(bytearray, reply.content[SECURE][SHARES]):
            share[place] ^= 1
            shares.append(bytes(share))
        content = {**reply.content, SECURE: Config({SHARES: shares})}
        return Message(**{**vars(reply), "content": content})

    wire.spoil = spoil
    with pytest.raises(RunError, match=words):
        wire.end()


def test_a_dealer_of_junk_ends_the_run_and_is_named():
    """Each client that was dealt junk says whose it is: the operator knows whom to eject."""
    wire = Wire([part(4, 5, seed) for seed in range(5)], 5)

    def spoil(reply):
        if reply.kind != SHARES or reply.node != node_of(0):
            return reply
        count = len(reply.content[SECURE]["sealed"])
        record = Config({"sealed": [bytes(148)] * count})
        content = {**reply.content, SECURE: record}
        return Message(**{**vars(reply), "content": content})

    wire.spoil = spoil
    with pytest.raises(RunError, match=r"0 of 5 .* name a client .* eject it"):
        wire.end()
    assert len(wire.failures) == 5
    for failure in wire.failures:
        assert f"the shares of node {node_of(0)} were not" in str(failure)
    assert not wire.server._gram.any()


def test_a_sum_of_one_client_with_samples_is_its_own():
    """The stated limit: zeros of others hide nobody."""
    parts = [part(6, 4, 0), part(0, 4, 1), part(0, 4, 2)]
    wire = Wire(parts, 4)
    wire.end()
    x = parts[0][0]
    np.testing.assert_allclose(wire.server._gram, x.T @ x, atol=1e-6)


def test_too_large_sums_name_a_remedy():
    parts = [part(4, 5, seed, scale=2e4) for seed in range(3)]
    wire = Wire(parts, 5)
    with pytest.raises(RunError, match="0 of 3 clients sent"):
        wire.end()
    reason = str(wire.failures[0])
    assert "gram is too large for secure aggregation" in reason
    assert "raise learner.ridge" in reason
    # In proportion to the ridge they fit.
    wire = Wire(parts, 5, ridge=4e8)
    wire.end()
    close(wire, parts, 4e8)


def test_a_server_gets_no_sums_in_the_clear():
    wire = Wire([part(4, 5, seed) for seed in range(3)], 5)
    client = wire.clients[2]
    work = {ARRAYS: Arrays(), "config": Config({"task": 0})}
    reply, state = client.handle(Message(END_TASK, 2, "9", content=work), {})
    assert "in the clear" in reply.failure.reason
    assert not reply.content
    # Other work takes the sums into the state, and not into the answer.
    reply, state = client.handle(Message("other", 2, "9", content=work), {})
    assert reply.content.keys() == {METRICS}
    assert state.keys() == {"has_shared", UNSENT}
    keys = Message(
        KEYS, 2, "9", content={"config": Config({"session": bytes(32)})}
    )
    assert client.handle(keys, state)[1].keys() == {*state, STATE}


def test_shares_that_are_no_sums_leave_no_client():
    wire = Wire([part(4, 5, seed) for seed in range(3)], 5)
    wire.learner.sum_layout = dict
    client = wire.clients[2]
    work = {ARRAYS: Arrays(), "config": Config({"task": 0})}
    reply, _ = client.handle(Message(END_TASK, 2, "9", content=work), {})
    assert "that are no sums" in reply.failure.reason
    assert not reply.content
