"""Strategies that are half of a method: what passes between the halves, what it costs, and what is
refused."""

import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedknow.client.data import make_benchmark
from fedknow.client.learners import build_learner, resolve
from fedknow.protocols.config import ConfigError, read_config
from fedknow.protocols.messages import (
    END_TASK,
    EXTRA,
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
    node_of,
)
from fedknow.protocols.work import COSTS
from fedknow.server.checks.faults import Fault, RunError
from fedknow.server.checks.replies import Inspector
from fedknow.server.reports.summary import summarise
from fedknow.server.run.folder import RunFolder
from fedknow.simulations import simulate as simulations
from fedknow.simulations.simulate import simulate
from fedknow.strategies import build_strategy
from fedknow.strategies.fedweit import mean_of_sent
from fedknow.strategies.paired import PairedStrategy

CLIENTS, TASKS, ROUNDS = 3, 3, 2
BASE = {
    "data": {
        "clients": CLIENTS,
        "tasks": TASKS,
        "classes_per_task": 2,
        "classes_max": 2,
    },
    "model": {"name": "mlp"},
    "train": {"rounds": ROUNDS, "epochs": 1, "batch_size": 16},
    "engine": {"backend": "inline"},
}
PARTS = '''
import torch
from fedknow.client.learners import Learner
from fedknow.protocols.messages import EXTRA, Arrays, client_of
from fedknow.strategies.paired import PairedStrategy


class Asks(Learner):
    """Tells its client's number, and keeps what it was told."""

    exchange = "body"
    strategy = "pair:Answers"
    told = -1.0

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.told = state.get("told", -1.0)

    def state_dict(self):
        return super().state_dict() | {"told": self.told}

    def share(self, task, round, ended):
        if ended:
            return {"told": torch.tensor([self.told])}
        return {"mine": torch.full((round.client + 1,), 10.0 * round.number + round.client)}

    def shares(self, ended):
        return {"told": ("float32", (1,))} if ended else {"mine": ("float32", (-1,))}

    def receive_extra(self, extra):
        self.told = float(extra["sum"])


class Plain(Learner):
    """Names no strategy."""


class Names(Learner):
    """Names one of ours as its own."""

    strategy = "flcn"


class Answers(PairedStrategy):
    """Sends clients the sum of what they told."""

    seen = []

    def prepare(self, setup):
        self.sum = 0.0
        has_stream = setup.stream is not None
        self.calls = [("prepare", setup.config.learner.name, has_stream)]
        type(self).seen = self.calls

    def begin_round(self, task, arrays):
        self.calls.append(("begin", task, sorted(arrays)[0]))

    def extra(self, task, client):
        return Arrays(sum=torch.tensor(self.sum).numpy()) if client else None

    def collect(self, task, extras):
        mine = {client: extra["mine"].tolist() for client, extra in extras.items()}
        self.calls.append(("collect", task, mine))
        self.sum += float(sum(extra["mine"].sum() for extra in extras.values()))

    def aggregate_end_task(self, task, arrays, replies):
        told = {client_of(reply.node): reply.content[EXTRA]["told"].item() for reply in replies}
        self.calls.append(("end", task, told))

    def state_dict(self):
        return {"sum": self.sum}

    def load_state_dict(self, state):
        self.sum = state["sum"]
'''


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pair.py").write_text(PARTS)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(simulations, "write_report", lambda *_: None)


def experiment(*changes):
    return resolve(read_config(BASE, changes))


def run(config, path):
    folder = RunFolder.open(simulate(config, path).folder)
    return folder, folder.events()[-1]["traffic"]


def test_the_two_halves_tell_each_other(pair, tmp_path):
    config = experiment("learner=pair:Asks", "data.tasks=1")
    assert config.strategy.name == "pair:Answers"
    _, traffic = run(config, tmp_path / "run")
    import pair as parts

    first, second = (
        {0: [10.0], 1: [11.0] * 2, 2: [12.0] * 3},
        {0: [20.0], 1: [21.0] * 2, 2: [22.0] * 3},
    )
    assert parts.Answers.seen == [
        ("prepare", "pair:Asks", True),
        ("begin", 0, "body.1.bias"),
        ("collect", 0, first),
        ("begin", 0, "body.1.bias"),
        ("collect", 0, second),
        ("end", 0, {0: -1.0, 1: 68.0, 2: 68.0}),
    ]
    assert traffic["train.extra"] == {
        "down": 2 * 2 * 4,
        "up": 2 * (1 + 2 + 3) * 4,
        "messages": 2 * 2 + 2 * 3,
    }
    assert traffic["train.end_task.extra"] == {
        "down": 0,
        "up": 3 * 4,
        "messages": 3,
    }


def test_what_a_strategy_knows_survives_an_interrupt(pair, tmp_path):
    config = experiment("learner=pair:Asks", "data.tasks=1")

    def stop(event):
        if event.event == "round":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "run", observers=[stop])
    simulate(config, tmp_path / "run", resume=True)
    import pair as parts

    assert parts.Answers.seen[-1] == ("end", 0, {0: -1.0, 1: 68.0, 2: 68.0})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["learner=fedavg", "strategy=joint-central"],
            ["'joint-central'", "'fedavg'", "leave strategy.name out"],
        ),
        (
            ["learner=fedavg", "strategy=fedweit"],
            ["strategy.name = 'fedweit'", "set learner.name = 'fedweit'"],
        ),
        (
            ["learner=fedper", "strategy=fedweit"],
            ["learner.name = 'fedper'", "set learner.name = 'fedweit'"],
        ),
        (
            ["learner=ewc", "strategy=flcn"],
            ["strategy.name = 'flcn'", "'ewc'", "set learner.name = 'flcn'"],
        ),
        (
            ["learner=fedknow", "strategy=fot"],
            ["strategy.name = 'fot'", "'fedknow'", "set learner.name = 'fot'"],
        ),
        (
            ["learner=finetune", "strategy=target"],
            ["'target'", "'finetune'", "leave strategy.name out"],
        ),
        (
            ["learner=flcn", "strategy=fedweit"],
            ["'fedweit'", "whose half on the server is 'flcn'"],
        ),
        (
            ["learner=pair:Plain", "strategy=flcn"],
            ["'pair:Plain'", "'flcn', strategy = 'flcn' in your class"],
        ),
        (
            ["learner=joint-central", "strategy=fedadam"],
            ["strategy.name = 'fedadam'", "leave strategy.name out"],
        ),
    ],
)
def test_halves_that_do_not_fit(pair, changes, words):
    with pytest.raises(ConfigError) as error:
        experiment(*changes)
    assert all(word in str(error.value) for word in words)


def test_what_fits(pair):
    assert (
        experiment("learner=ewc", "strategy=fedprox").strategy.name == "fedprox"
    )  # its term is in every learner
    assert experiment("learner=pair:Names").strategy.name == "flcn"
    assert (
        experiment("learner=pair:Names", "strategy=flcn").strategy.name == "flcn"
    )


def test_a_learner_that_takes_nothing_says_so(pair, tmp_path):
    with pytest.raises(
        RunError,
        match=r"strategy pair:Answers sends client 2 a record 'extra'.* own strategy",
    ):
        simulate(
            experiment("learner=fedavg", "strategy=pair:Answers"),
            tmp_path / "run",
        )


# --- what may arrive
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "fault", "words"),
    [
        (Arrays(a=np.zeros((2, 5), np.float32)), None, ""),
        (Arrays(a=np.zeros((2, 0), np.float32)), None, ""),
        (
            Arrays(a=np.zeros((3, 5), np.float32)),
            Fault.SHAPE,
            "(3, 5), not (2, -1)",
        ),
        (Arrays(a=np.zeros(2, np.float32)), Fault.SHAPE, "(2,), not (2, -1)"),
        (Arrays(a=np.zeros((2, 5))), Fault.DTYPE, "float64, not float32"),
        (
            Arrays(b=np.zeros((2, 5), np.float32)),
            Fault.NAMES,
            "extra arrays a, b",
        ),
        (
            Arrays(a=np.full((2, 5), np.nan, np.float32)),
            Fault.NOT_FINITE,
            "NaN or infinite in 10 of 10 values",
        ),
        (Config(a=1), Fault.NAMES, "must hold arrays, not Config"),
    ],
)
def test_what_clients_share_is_checked(record, fault, words):
    failures = []
    inspector = Inspector(
        failures.append, extras={END_TASK: {"a": ("float32", (2, -1))}}
    )
    inspector.begin(0, 1, Arrays())
    metrics = Metrics({"num-examples": 1, "knowledge-bytes": 0.0})
    inspector(
        Message(
            END_TASK,
            node_of(0),
            "2",
            "1",
            content={"metrics": metrics, EXTRA: record},
        )
    )
    assert [failure.fault for failure in failures] == (
        [] if fault is None else [fault]
    )
    assert words in "".join(map(str, failures))


def test_what_no_learner_declares_is_refused():
    failures = []
    inspector = Inspector(failures.append)
    inspector.begin(0, 1, Arrays())
    extra = {
        "arrays": Arrays(),
        "metrics": Metrics({"num-examples": 1}),
        EXTRA: Arrays(a=np.zeros(1)),
    }
    inspector(Message(TRAIN, node_of(0), "2", "1", content=extra))
    assert failures[0].fault is Fault.NAMES


# --- what the server keeps
# ----------------------------------------------------------------------------------------


def server_bytes(folder):
    return [
        event["server_bytes"]
        for event in folder.events()
        if event["event"] == "task_end"
    ]


def test_what_the_server_keeps_of_clients_samples(tmp_path):
    """FLCN: a tenth of each client's. Joint training in one place: all of them."""
    config = experiment("learner=flcn")
    flcn, _ = run(config, tmp_path / "flcn")
    joint, _ = run(experiment("learner=joint-central"), tmp_path / "joint")
    sizes = np.array(
        [
            [make_benchmark(config).train_size(c, t) for c in range(CLIENTS)]
            for t in range(TASKS)
        ]
    )
    labels = 2 * 8 * CLIENTS  # of the slice that a client's samples are scored in
    tenths = (np.maximum(1, sizes // 10) * (64 * 4 + 8)).sum(1) + labels
    assert server_bytes(flcn) == tenths.cumsum().tolist()
    assert server_bytes(joint) == (sizes * (64 * 4 + 8)).sum(1).cumsum().tolist()
    assert summarise(flcn).measures()["server_bytes"] == tenths.sum()


def test_a_strategy_keeps_what_it_must_save():
    class Keeps(PairedStrategy):
        def state_dict(self):
            record = ArrayRecord({"w": Array(np.zeros(5, np.float32))})
            return {
                "a": [torch.zeros(3)],
                "b": (np.zeros((2, 2)), 7.0, "text"),
                "c": {"record": record},
            }

    assert Keeps().kept_bytes() == 3 * 4 + 4 * 8 + 5 * 4
    assert PairedStrategy().kept_bytes() == 0


# --- FLCN
# --------------------------------------------------------------------------------------


def test_traffic_of_flcn_by_hand(tmp_path):
    """Up: a tenth of each client's samples, once a task. Down: one number a parameter, when there
    are proxy data."""
    config = experiment("learner=flcn")
    _, traffic = run(config, tmp_path / "run")
    benchmark = make_benchmark(config)
    counts = [
        max(1, int(0.1 * benchmark.train_size(c, t)))
        for c in range(CLIENTS)
        for t in range(TASKS)
    ]
    up = sum(count * (64 * 4 + 8) + 2 * 8 for count in counts)
    parameters = sum(
        p.numel()
        for p in build_learner(
            config, benchmark.shape, benchmark.classes
        ).model.parameters()
    )
    waves = TASKS * ROUNDS - 1  # all but the first
    assert traffic["train.extra"] == {
        "down": CLIENTS * waves * 4 * parameters,
        "up": up,
        "messages": CLIENTS * (waves + TASKS),
    }


# --- FedWEIT
# --------------------------------------------------------------------------------------


def test_traffic_of_fedweit_by_hand(tmp_path):
    """Up: the base of 70 % of each layer's units and a bit a weight, or the whole layer where that
    is smaller."""
    config = experiment(
        "learner=fedweit", "learner.sparsity=100.0"
    )  # so that no adaptive parameter is left
    folder, traffic = run(config, tmp_path / "run")
    benchmark = make_benchmark(config)
    learner = build_learner(config, benchmark.shape, benchmark.classes)
    up = 0
    for p in learner.body.parameters():
        units = math.ceil(0.7 * len(p))
        up += min(
            4 * p.numel(), 4 * units * p.numel() // len(p) + -(-p.numel() // 8)
        )
    metrics = 8 * len(
        [
            "num-examples",
            "samples",
            "loss",
            "accuracy",
            "adaptive",
            "seconds",
            *COSTS,
        ]
    )
    assert traffic[TRAIN]["up"] == CLIENTS * TASKS * ROUNDS * (up + metrics)
    assert traffic["train.end_task.extra"] == {
        "down": 0,
        "up": 0,
        "messages": CLIENTS * TASKS,
    }
    assert traffic["train.extra"] == {
        "down": 0,
        "up": 0,
        "messages": CLIENTS * (TASKS - 1),
    }
    kept = [
        event["knowledge_bytes"]
        for event in folder.events()
        if event["event"] == "task_end"
    ]
    body = sum(p.numel() for p in learner.body.parameters())
    masks, bits = (
        sum(f(p) for p in learner.body.parameters())
        for f in (len, lambda p: -(-p.numel() // 8))
    )
    borrowed = [0, bits, 2 * bits]  # all zeros, from the second task on
    assert kept == [
        4 * body + (t + 1) * (4 * masks + bits) + borrowed[t]
        for t in range(TASKS)
    ]


def test_adaptive_parameters_go_to_all_once_a_task(tmp_path):
    config = experiment(
        "learner=fedweit", "learner.sparsity=0.0", "train.lr=0.01"
    )
    _, traffic = run(config, tmp_path / "run")
    up, down = (
        traffic["train.end_task.extra"]["up"],
        traffic["train.extra"]["down"],
    )
    assert traffic["train.extra"]["messages"] == CLIENTS * (TASKS - 1)
    assert 0 < down < CLIENTS * up  # the last task's go to nobody


@given(
    st.integers(1, 4).flatmap(
        lambda n: hnp.arrays(
            np.float32, (n, 6), elements=st.sampled_from([0.0, 0.5, -1.0, 3.0])
        )
    )
)
def test_each_weight_is_averaged_over_who_sent_it(sent):
    current = np.arange(6, dtype=np.float32)
    mean = mean_of_sent(current, list(sent))
    assert mean.dtype == np.float32
    for column in range(6):
        there = sent[:, column][sent[:, column] != 0]
        assert mean[column] == pytest.approx(
            there.mean() if len(there) else current[column]
        )


def test_who_was_told_is_remembered():
    strategy = build_strategy(experiment("learner=fedweit").strategy)
    strategy._clients = CLIENTS
    answer = Message(
        END_TASK,
        node_of(1),
        "2",
        "1",
        content={EXTRA: Arrays(w=np.array([0.0, 2.0], np.float32))},
    )
    strategy.aggregate_end_task(0, Arrays(), [answer])
    strategy._informed = {2}
    other = build_strategy(experiment("learner=fedweit").strategy)
    other.load_state_dict(strategy.state_dict())
    assert other.extra(1, 2) is None
    np.testing.assert_array_equal(
        other.extra(1, 0)["w"], [[0, 0], [0, 2], [0, 0]]
    )
    fresh = build_strategy(experiment("learner=fedweit").strategy)
    fresh.load_state_dict(fresh.state_dict())
    assert fresh.extra(0, 0) is None
    fresh.aggregate_end_task(
        0, Arrays(), [Message(END_TASK, node_of(1), "2", "1", content={})]
    )  # nobody shared
    assert fresh.extra(1, 0) is None


# --- joint training in one place
# ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_equal", [False, True])
def test_joint_training_in_one_place(tmp_path, is_equal):
    """A bound passes over everything seen. The equal one learns from as many samples as FedAvg.
    There is no traffic but for scoring."""
    learner = "joint-central-equal" if is_equal else "joint-central"
    folder, traffic = run(
        experiment(f"learner={learner}", "strategy.fraction=0.7"),
        tmp_path / "run",
    )
    assert traffic.keys() == {"evaluate"}
    benchmark = make_benchmark(folder.config)
    rounds = [event for event in folder.events() if event["event"] == "round"]
    for event in rounds:
        sizes = [
            sum(benchmark.train_size(client, task) for client in range(CLIENTS))
            for task in range(event["task"] + 1)
        ]
        size = int(0.7 * sizes[-1]) if is_equal else sum(sizes)
        assert (event["clients"], event["samples"]) == (0, size)
        assert 0 <= event["accuracy"] <= 1


def test_joint_training_in_one_place_needs_the_data():
    config = experiment("learner=joint-central")
    from fedknow.strategies.paired import Setup

    with pytest.raises(ConfigError, match=r"data\.name = 'local'"):
        build_strategy(config.strategy).prepare(Setup(config, None, None))


def test_a_round_in_one_place_by_hand(tmp_path):
    """One full batch: w <- w - lr * gradient of the mean loss over all clients' samples, each in
    its own slice."""
    changes = [
        "train.rounds=1",
        "train.optimizer=sgd",
        "train.lr=0.5",
        "train.weight_decay=0.0",
    ]
    config = experiment(
        "learner=joint-central",
        "data.tasks=1",
        "train.batch_size=10000",
        *changes,
    )
    benchmark = make_benchmark(config)
    model = build_learner(config, benchmark.shape, benchmark.classes).model
    shares = [benchmark.task(client, 0) for client in range(CLIENTS)]
    total = sum(len(share.train) for share in shares)
    for share in shares:
        z = model(share.train.x)[:, list(share.classes)].log_softmax(1)
        truth = torch.tensor(
            [share.classes.index(int(label)) for label in share.train.y]
        )
        (-z[range(len(truth)), truth].sum() / total).backward()
    result = simulate(config, tmp_path / "run")
    for name, parameter in model.named_parameters():
        expected = (parameter - 0.5 * parameter.grad).detach().numpy()
        np.testing.assert_allclose(
            result.arrays[name], expected, rtol=1e-4, atol=1e-6
        )
