"""Rounds of secure aggregation: the right mean, whoever drops out, and nothing else is told."""

from dataclasses import replace

import numpy as np
import pytest

from fedknow.client.data import make_benchmark
from fedknow.client.host import Host
from fedknow.client.node import Node
from fedknow.client.secure import STATE, SecureNode
from fedknow.client.state import StateStore
from fedknow.protocols.config import ConfigError, read_config
from fedknow.protocols.messages import (
    ARRAYS,
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
    client_of,
    node_of,
)
from fedknow.protocols.secure.rounds import (
    KEYS,
    MASKED,
    NODES,
    SECURE,
    SESSION,
    SHARES,
    SURVIVORS,
    UNMASK,
)
from fedknow.server.assemble import Clients, assemble
from fedknow.server.checks.claims import Claims
from fedknow.server.grids.inline import InlineGrid
from fedknow.server.run.experiment import Experiment, RunError
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.simulate import prepare, simulate

SMALL = {
    "data": {
        "clients": 7,
        "tasks": 1,
        "classes_per_task": 2,
        "classes_max": 2,
        "test_samples": 0.5,
    },
    "model": "mlp",
    "train": {"rounds": 2, "epochs": 1},
    "learner": "fedavg",
    "engine": {"backend": "inline"},
}


def configured(*overrides):
    return read_config(SMALL, overrides)


class Lossy(InlineGrid):
    """A grid on which some messages of the first round get no answer, and all are noted."""

    def __init__(self, clients, host, lost):
        super().__init__(clients, host)
        self.lost = lost
        self.seen = []

    def deliver(self, work, timeout, options):
        """Leave the lost ones out, once."""
        present = [
            message
            for message in work
            if (message.kind, client_of(message.node)) not in self.lost
        ]
        self.lost -= {(each.kind, client_of(each.node)) for each in work}
        for reply, version in super().deliver(present, timeout, options):
            self.seen.append(reply)
            yield reply, version


def run(tmp_path, config, lost=()):
    parts = assemble(config, Clients.VIRTUAL)
    benchmark = make_benchmark(config)
    store = StateStore(tmp_path / "states", 2**20, durable=False)
    grid = Lossy(
        config.data.clients, Host(parts.config, benchmark, store), set(lost)
    )
    with RunFolder.create(tmp_path / "run", parts.config) as folder:
        result = Experiment(parts, grid, folder).run()
    return result, grid, store


def test_the_mean_is_fedavgs(tmp_path):
    secure, grid, store = run(tmp_path / "a", configured("privacy.secure=true"))
    plain, _, _ = run(tmp_path / "b", configured())
    for name, array in plain.arrays.items():
        assert secure.arrays[name].dtype == array.dtype
        assert secure.arrays[name] == pytest.approx(array, abs=1e-5)
    # What a server sees of a client is noise: numbers all over the ring, other ones each time.
    masked = [
        reply.content[ARRAYS][MASKED]
        for reply in grid.seen
        if reply.kind == TRAIN
    ]
    assert len(masked) == 14
    for numbers in masked:
        assert abs(numbers.astype(np.float64).mean() / 2.0**64 - 0.5) < 0.02
    # Nothing of a round's secrets is left.
    for client, version in grid.versions.items():
        assert STATE not in store.load(client, version)


DROPOUTS = {
    "keys": {(KEYS, 1), (KEYS, 5)},
    "shares": {(SHARES, 0), (SHARES, 4)},
    "updates": {(TRAIN, 2), (TRAIN, 6)},
    "opening": {(UNMASK, 0), (UNMASK, 3)},
    "everywhere": {(KEYS, 0), (TRAIN, 1), (UNMASK, 2)},
}


@pytest.mark.parametrize("phase", DROPOUTS)
def test_the_sum_is_that_of_those_who_sent_updates(tmp_path, phase):
    config = configured("privacy.secure=true", "train.rounds=1")
    lost = DROPOUTS[phase]
    secure, _, _ = run(tmp_path / "a", config, lost)
    # Without masks, the same clients' updates are lost.
    missing = {(TRAIN, client) for kind, client in lost if kind != UNMASK}
    plain, _, _ = run(tmp_path / "b", configured("train.rounds=1"), missing)
    whole, _, _ = run(tmp_path / "c", configured("train.rounds=1"))
    for name, array in plain.arrays.items():
        assert secure.arrays[name] == pytest.approx(array, abs=1e-5)
    if missing:
        name = next(iter(whole.arrays))
        assert not np.allclose(whole.arrays[name], secure.arrays[name], atol=1e-5)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ({(KEYS, c) for c in range(5)}, "2 of 7 clients made keys, and 3 are needed"),
        ({(SHARES, c) for c in range(3)}, "4 of 7 clients dealt shares, and 5 are"),
        ({(TRAIN, c) for c in range(3)}, "4 of 7 clients sent updates"),
        ({(UNMASK, c) for c in range(3)}, "4 of 7 clients opened the sum"),
    ],
)  # fmt: skip
def test_too_few_end_the_run_with_a_sentence(tmp_path, lost, words):
    config = configured("privacy.secure=true")
    with pytest.raises(RunError, match=words):
        run(tmp_path, config, lost)


def test_a_fleet_loses_answers_and_goes_on(tmp_path):
    config = configured(
        "privacy.secure=true",
        "fleet.devices=infinite",
        "fleet.dropout=0.3",
        "train.rounds=4",
        "data.clients=9",
    )
    result = simulate(config, tmp_path / "run", report=False)
    events = RunFolder.open(tmp_path / "run").events()
    rounds = [event for event in events if event["event"] == "round"]
    assert any(event["clients"] < 9 for event in rounds)
    assert np.isfinite(result.accuracy["personal"]).all()
    assert result.summary["traffic"][KEYS]["messages"] == 36


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy=krum"], "krum looks at single updates"),
        (["strategy=fedbuff", "strategy.buffer=2"], "fedbuff looks at single updates"),
        (["strategy=fedmedian"], "use one of fedavg, fedprox"),
        (["data.clients=2"], "a round asks 2 clients"),
        (["strategy.fraction=0.3"], "a round asks 2 clients"),
        (["learner=fedweit"], "learner fedweit sends arrays beside the parameters that are no"),
        (["learner=local"], "learner local sends nothing"),
        (["learner=fedrep", "evaluation.global_model=true"], "evaluation.global_model = true"),
        (["engine.vectorize=on"], "engine.vectorize = 'on' needs single updates"),
        (["engine.running_mean=true"], "engine.running_mean = True needs single"),
        (["attack=scaling"], "attack.name = 'scaling' needs single updates"),
        (["privacy.threshold=0.3"], "privacy.threshold = 0.3"),
    ],
)  # fmt: skip
def test_what_could_not_hide_updates_is_refused(overrides, words):
    with pytest.raises(ConfigError) as error:
        prepared("privacy.secure=true", *overrides)
    assert words in str(error.value)


def prepared(*overrides):
    config = configured(*overrides)
    return prepare(config, make_benchmark(config))


@pytest.mark.parametrize("learner", ["fedrep", "fedknow"])
def test_bodies_are_summed_and_heads_stay(tmp_path, learner):
    overrides = [f"learner={learner}", "evaluation.global_model=false"]
    secure, grid, _ = run(
        tmp_path / "a", configured("privacy.secure=true", *overrides)
    )
    plain, _, _ = run(tmp_path / "b", configured(*overrides))
    for name, array in plain.arrays.items():
        assert secure.arrays[name] == pytest.approx(array, abs=1e-3)
    names = {name for reply in grid.seen for name in reply.arrays()}
    assert names == {MASKED}


def test_fedprox_pulls_clients_under_masks_too(tmp_path):
    """Its pull is part of each client's work, so that the mean alone is needed."""
    prox = ["strategy=fedprox", "strategy.proximal_mu=0.5"]
    secure, _, _ = run(tmp_path / "a", configured("privacy.secure=true", *prox))
    plain, _, _ = run(tmp_path / "b", configured(*prox))
    free, _, _ = run(tmp_path / "c", configured())
    for name, array in plain.arrays.items():
        assert secure.arrays[name] == pytest.approx(array, abs=1e-5)
    assert any(
        not np.allclose(free.arrays[name], array, atol=1e-4)
        for name, array in plain.arrays.items()
    )


# --- a client against its server


class Client:
    """One of three clients, with a node that trains by adding 1."""

    def __init__(self, node):
        self.node = node
        config = configured("privacy.secure=true")
        self.inner = SecureNode(self, config)
        self.learner = None
        self.state = {}
        self.step = 1

    def handle(self, message, state):
        """Train."""
        arrays = message.arrays()
        trained = Arrays(
            (name, array + self.step) for name, array in arrays.items()
        )
        content = {ARRAYS: trained, "metrics": Metrics({"num-examples": 2})}
        return message.reply(content), state

    def ask(self, kind, record, **content):
        """Send a message, and take over the state."""
        message = Message(
            kind, self.node, "1", content={**content, "config": record}
        )
        reply, self.state = self.inner.handle(message, self.state)
        return reply


ID = bytes(32)


def dealt():
    """Three clients that have dealt shares, and what they sealed."""
    clients = [Client(node_of(number)) for number in range(3)]
    keys = [
        client.ask(KEYS, Config({SESSION: ID})).content[SECURE]
        for client in clients
    ]
    told = Config(
        {
            SESSION: ID,
            NODES: [client.node for client in clients],
            "share-keys": [key["share-key"] for key in keys],
            "mask-keys": [key["mask-key"] for key in keys],
        }
    )
    sealed = [
        client.ask(SHARES, told).content[SECURE]["sealed"] for client in clients
    ]
    return clients, told, sealed


def train(client, nodes):
    return client.ask(
        TRAIN,
        Config({"task": 0}),
        arrays=Arrays(w=np.zeros(2, np.float32)),
        secure=Config({SESSION: ID, NODES: nodes}),
    )


def opening(sealed, survivors, receiver=0):
    record = {SESSION: ID, SURVIVORS: survivors}
    return Config({**record, "sealed": [row[receiver] for row in sealed]})


def test_a_client_gives_its_shares_once_and_never_of_both_secrets():
    clients, told, sealed = dealt()
    nodes = told[NODES]
    assert train(clients[0], nodes).failure is None
    first = clients[0].ask(UNMASK, opening(sealed, nodes[:2]))
    assert [len(share) for share in first.content[SECURE][SHARES]] == [66] * 3
    # With the other share of the same client, the server could open its update.
    second = clients[0].ask(UNMASK, opening(sealed, nodes))
    assert "no secrets of this round" in second.failure.reason


def test_an_older_state_gives_no_share_of_the_other_secret():
    """A server says from which state a client works, so forgetting is not enough."""
    clients, told, sealed = dealt()
    nodes = told[NODES]
    train(clients[0], nodes)
    older = clients[0].state
    first = clients[0].ask(UNMASK, opening(sealed, nodes[:2]))
    clients[0].state = older
    # An answer that was lost on the way is given again.
    again = clients[0].ask(UNMASK, opening(sealed, nodes[:2]))
    assert again.content[SECURE] == first.content[SECURE]
    clients[0].state = older
    other = clients[0].ask(UNMASK, opening(sealed, nodes))
    assert "a second opening of one round" in other.failure.reason


@pytest.mark.parametrize("is_older", [True, False])
def test_one_mask_hides_one_update(is_older):
    """The difference of two answers under one mask would be that of the updates."""
    clients, told, _ = dealt()
    client, nodes = clients[0], told[NODES]
    older = client.state
    first = train(client, nodes)
    if is_older:
        client.state = older
    assert train(client, nodes).arrays().keys() == {MASKED}
    client.state = older if is_older else client.state
    client.step = 5
    second = train(client, nodes)
    assert first.failure is None
    assert "a second masked answer of one round" in second.failure.reason
    assert not second.content


def test_a_client_deals_its_secrets_to_one_set_of_clients():
    clients, told, _ = dealt()
    client = clients[0]
    more = {
        name: [*told[name][:2], told[name][2]] for name in told if name != SESSION
    }
    assert client.ask(SHARES, Config({SESSION: ID, **more})).failure is None
    more[NODES] = [*told[NODES][:2], 9]
    reply = client.ask(SHARES, Config({SESSION: ID, **more}))
    assert "a second dealing of shares of one round" in reply.failure.reason


@pytest.mark.parametrize(
    ("survivors", "words"),
    [
        ([2], "must be 2 or more"),
        ([2, 9], "nodes"),
        ([2, 2], "names a node twice"),
    ],
)
def test_a_client_opens_no_sum_of_too_few_or_of_strangers(survivors, words):
    clients, told, sealed = dealt()
    train(clients[0], told[NODES])
    reply = clients[0].ask(UNMASK, opening(sealed, survivors))
    assert words in reply.failure.reason
    # It has forgotten its secrets, so that another try gives nothing.
    assert STATE not in clients[0].state


def test_a_client_sends_nothing_in_the_clear():
    client = Client(2)
    reply = client.ask(
        TRAIN, Config({"task": 0}), arrays=Arrays(w=np.zeros(2, np.float32))
    )
    assert "in the clear" in reply.failure.reason


def test_a_client_takes_no_keys_but_its_own_and_no_key_twice():
    clients, told, _ = dealt()
    keys = list(told["mask-keys"])
    for changed in ([keys[1], keys[1], keys[2]], [keys[0], keys[1], keys[1]]):
        client = clients[0]
        client.state = {}
        fresh = client.ask(KEYS, Config({SESSION: ID})).content[SECURE]
        if changed[0] == keys[0]:
            changed[0] = fresh["mask-key"]
        reply = client.ask(SHARES, Config({**told, "mask-keys": changed}))
        assert "not those of the clients" in reply.failure.reason


def test_two_clients_are_too_few():
    client = Client(2)
    key = client.ask(KEYS, Config({SESSION: ID})).content[SECURE]
    told = {
        SESSION: ID,
        NODES: [2, 3],
        "share-keys": [key["share-key"]] * 2,
        "mask-keys": [key["mask-key"], bytes(32)],
    }
    reply = client.ask(SHARES, Config(told))
    assert "it takes 3 or more" in reply.failure.reason


def test_another_round_s_session_is_refused():
    clients, told, _ = dealt()
    reply = clients[0].ask(SHARES, Config({**told, SESSION: bytes([1] * 32)}))
    assert "no secrets of this round" in reply.failure.reason


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (Config({"share-key": bytes(32)}), "client 1 is left out"),
        (Config({"share-key": b"short"}), "share-key is not of 32 bytes"),
        (Config({"share-key": 3}), "share-key is not of 32 bytes"),
    ],
)
def test_a_client_with_bad_keys_is_left_out(tmp_path, record, words):
    config = configured("privacy.secure=true", "train.rounds=1")
    original = SecureNode._make_keys

    def make_keys(self, message, state, session):
        reply, new = original(self, message, state, session)
        if client_of(message.node) != 1:
            return reply, new
        return message.reply({**reply.content, SECURE: record}), new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SecureNode, "_make_keys", make_keys)
        run(tmp_path / "a", config)
    events = RunFolder.open(tmp_path / "a/run").events()
    warnings = [event for event in events if event["event"] == "warning"]
    assert words in warnings[0]["reason"]
    [ended] = [event for event in events if event["event"] == "round"]
    assert ended["clients"] == 6


@pytest.mark.parametrize("size", [0, 147, 149, 2**20])
def test_a_client_whose_packages_have_another_length_is_left_out(tmp_path, size):
    """Packages go to all others, whose messages have room for honest ones."""
    config = configured("privacy.secure=true", "train.rounds=1")
    original = SecureNode._deal_shares

    def deal_shares(self, message, state, session):
        reply, new = original(self, message, state, session)
        if client_of(message.node) != 1:
            return reply, new
        record = Config({"sealed": [bytes(size)] * 7})
        return message.reply({**reply.content, SECURE: record}), new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SecureNode, "_deal_shares", deal_shares)
        run(tmp_path / "a", config)
    events = RunFolder.open(tmp_path / "a/run").events()
    [warning] = [event for event in events if event["event"] == "warning"]
    assert "client 1 is left out" in warning["reason"]
    assert "are not 7 texts of 148 bytes" in warning["reason"]
    [ended] = [event for event in events if event["event"] == "round"]
    assert ended["clients"] == 6


@pytest.mark.parametrize("are_known", [True, False])
def test_a_claim_that_masks_do_not_bound_is_told(tmp_path, are_known):
    config = configured("privacy.secure=true", "engine.on_client_error=skip")
    original = Node._train

    def train_more(self, message, state):
        report, new = original(self, message, state)
        examples = 1000 if client_of(message.node) == 1 else report.examples
        return replace(report, examples=examples), new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Node, "_train", train_more)
        if not are_known:
            # As with clients that have data of their own.
            patch.setattr(Claims, "read", lambda *_: Claims(are_known=False))
        run(tmp_path / "a", config)
    events = RunFolder.open(tmp_path / "a/run").events()
    reasons = [event["reason"] for event in events if event["event"] == "warning"]
    if are_known:
        assert not any("under masks" in reason for reason in reasons)
    else:
        # Once a run, in two rounds.
        [reason] = reasons
        assert "client 1 claims 1000 samples, and under masks all" in reason
