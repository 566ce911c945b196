"""Asynchronous strategies on a grid with a clock, on schedules worked out by hand; at the end real
learners."""

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedknow.client.host import Host
from fedknow.client.state import StateStore
from fedknow.protocols.config import ConfigError, StrategyConfig, read_config
from fedknow.protocols.flower import to_arrays, to_record
from fedknow.protocols.messages import (
    NO_ANSWER,
    TRAIN,
    Arrays,
    Metrics,
    client_of,
)
from fedknow.server.grids.inline import InlineGrid
from fedknow.server.grids.strategy_grid import StrategyGrid
from fedknow.server.grids.wave import WaveOptions
from fedknow.simulations.simulate import simulate
from fedknow.strategies import build_strategy, quiet_flower


class Adder:
    """Client c adds c + 1 to what it is sent."""

    def __init__(self):
        self.seen = []
        self.fail = set()  # (client, round)

    def handle(self, message, state):
        assert message.kind == TRAIN
        client, config = client_of(message.node), message.config()
        self.seen.append(
            (
                client,
                config["round"],
                float(message.arrays()["w"][0]),
                dict(config),
            )
        )
        if (client, config["round"]) in self.fail:
            return message.fail(2, "broken"), state
        arrays = Arrays(
            {
                k: np.asarray(v + v.dtype.type(client + 1))
                for k, v in message.arrays().items()
            }
        )
        metrics = Metrics({"num-examples": 1, "loss": 0.0})
        return message.reply({"arrays": arrays, "metrics": metrics}), state


class ClockedGrid(InlineGrid):
    """Client c takes ``seconds[c]``; an infinite time is a lost answer, and given up 50 s after it
    was asked for."""

    def __init__(self, tmp_path, node, seconds):
        super().__init__(
            len(seconds),
            Host(None, None, StateStore(tmp_path / "clients", 2**20), node),
        )
        self.seconds = seconds
        self.clock = 0.0
        self.due = {}
        self.pushed_at = {}

    @property
    def clock_time(self):
        return self.clock

    def push(self, work, options):
        super().push(work, options)
        self.pushed_at |= {message.id: self.clock for message in work}

    def collect_answers(self, work, timeout, options):
        new = [message for message in work if message.id not in self.due]
        for reply, version in self.deliver(new, None, options):
            seconds = self.seconds[client_of(reply.node)]
            lost = seconds == np.inf
            asked = next(
                message for message in new if message.id == reply.reply_to
            )
            answer = (
                (asked.fail(NO_ANSWER, "lost"), 0) if lost else (reply, version)
            )
            self.due[reply.reply_to] = (
                self.pushed_at[reply.reply_to] + (50 if lost else seconds),
                answer,
            )
        waited = {message.id: self.due[message.id] for message in work}
        first = min(time for time, _ in waited.values())
        if timeout is not None and first > self.clock + timeout:
            self.clock += timeout
            return []
        self.clock = max(self.clock, first)
        there = [
            (time, answer)
            for time, answer in waited.values()
            if time <= self.clock
        ]
        return [
            answer
            for _, answer in sorted(
                there, key=lambda entry: (entry[0], entry[1][0].node)
            )
        ]


class Run:
    def __init__(
        self, tmp_path, seconds, name, rounds, fail=(), w=0.0, **options
    ):
        self.node = Adder()
        self.node.fail = set(fail)
        self.rounds = []
        start = to_record(
            {"w": np.array([w], np.float32), "n": np.array([3], np.int64)}
        )
        with (
            ClockedGrid(tmp_path, self.node, seconds) as self.grid,
            quiet_flower(),
        ):
            self.strategy = build_strategy(
                StrategyConfig(name=name, **options), len(seconds)
            )
            self.missed = []
            options = WaveOptions(on_missed=self.missed.append)
            told = ConfigRecord({"task": 0, "round": 1, "server-round": 10})

            def evaluate_fn(number, arrays):
                self.rounds.append(
                    (
                        number,
                        self.grid.clock_time,
                        float(to_arrays(arrays)["w"][0]),
                    )
                )

            self.result = self.strategy.start(
                StrategyGrid(self.grid, options),
                start,
                num_rounds=rounds,
                train_config=told,
                evaluate_fn=evaluate_fn,
            )
            assert not self.grid._pushed  # nobody is at work

    @property
    def trained(self):
        """Client, round and model it began with, as the work was done."""
        return [entry[:3] for entry in self.node.seen]


# --- FedAsync
# --------------------------------------------------------------------------------------


def test_fedasync_mixes_each_answer_as_it_arrives(tmp_path):
    run = Run(tmp_path, [2, 3], "fedasync", 2, alpha=0.5, staleness="constant")
    # t = 2: client 0 trained 0 -> 1; model 0.5, and it goes on from that, round 2
    # t = 3: client 1 trained 0 -> 2, one step late; model 1.25, round 3
    # t = 4: client 0 trained 0.5 -> 1.5; model 1.375; of 4 answers all are asked for
    # t = 6: client 1 trained 1.25 -> 3.25; model 2.3125
    assert run.trained == [(0, 1, 0.0), (1, 1, 0.0), (0, 2, 0.5), (1, 3, 1.25)]
    assert run.rounds == [(0, 0.0, 0.0), (1, 3.0, 1.25), (2, 6.0, 2.3125)]
    assert [dict(m) for m in run.result.train_metrics_clientapp.values()] == [
        {"staleness": 0.5, "staleness-max": 1}, {"staleness": 1.0, "staleness-max": 1},
    ]  # fmt: skip
    assert float(to_arrays(run.result.arrays)["w"][0]) == 2.3125


def test_fedasync_trusts_late_answers_less(tmp_path):
    run = Run(tmp_path, [2, 3], "fedasync", 1, alpha=0.5, staleness_a=1)
    assert run.rounds[-1] == (1, 3.0, 0.5 + 0.25 * (2 - 0.5))


def test_fedasync_tells_clients_of_the_proximal_term(tmp_path):
    run = Run(tmp_path, [1], "fedasync", 1, proximal_mu=0.25)
    assert run.node.seen[0][3] == {
        "task": 0,
        "round": 1,
        "server-round": 11,
        "proximal-mu": 0.25,
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"staleness": "constant"}, [1, 1, 1, 1]),
        (
            {"staleness": "polynomial", "staleness_a": 0.5},
            [1, 2**-0.5, 5**-0.5, 7**-0.5],
        ),
        (
            {"staleness": "hinge", "staleness_a": 10.0, "staleness_b": 4.0},
            [1, 1, 1, 1 / 21],
        ),
    ],
)
def test_what_staleness_costs(options, expected):
    strategy = build_strategy(StrategyConfig(name="fedasync", **options))
    assert [strategy.discount(late) for late in (0, 1, 4, 6)] == pytest.approx(
        expected
    )


# --- FedBuff
# --------------------------------------------------------------------------------------


def test_fedbuff_steps_when_the_buffer_is_full(tmp_path):
    run = Run(tmp_path, [1, 2, 4], "fedbuff", 2, buffer=2, staleness_a=1)
    # All begin with 0. t = 2: clients 0 and 1 are in the buffer: + (1 + 2) / 2 = 1.5. Two
    # answers are still wanted, and client 2 is at work: one of the two free ones is given work.
    # Whoever it is (3 s or 4 s) ends before or with client 2, which is one step late: its 3
    # counts half.
    (again,) = [client for client, round, _ in run.trained if round == 2]
    assert run.trained == [(0, 1, 0.0), (1, 1, 0.0), (2, 1, 0.0), (again, 2, 1.5)]
    assert run.rounds == [
        (0, 0.0, 0.0),
        (1, 2.0, 1.5),
        (2, 4.0, 1.5 + ((again + 1) + 0.5 * 3) / 2),
    ]
    assert dict(run.strategy.round_metrics) == {
        "loss": 0.0,
        "staleness": 0.5,
        "staleness-max": 1,
    }


def test_fedbuff_gives_nobody_the_same_model_twice(tmp_path):
    run = Run(tmp_path, [1, 100, 100], "fedbuff", 3, buffer=2, concurrency=3)
    given = [(client, round) for client, round, _ in run.trained]
    assert len(set(given)) == len(given) == 6


def test_fedbuff_keeps_concurrency(tmp_path):
    run = Run(tmp_path, [1] * 6, "fedbuff", 4, buffer=1, concurrency=2)
    assert [time for _, time, _ in run.rounds] == [0, 1, 1, 2, 2]
    assert len(run.trained) == 4


def test_the_server_has_a_learning_rate(tmp_path):
    run = Run(tmp_path, [1, 1], "fedbuff", 1, buffer=2, server_lr=0.5)
    assert run.rounds[-1] == (1, 1.0, 0.75)


def test_whole_numbers_stay_whole(tmp_path):
    run = Run(tmp_path, [1, 1], "fedbuff", 2, buffer=2)
    arrays = to_arrays(run.result.arrays)
    assert arrays["n"].dtype == np.int64
    # each round the mean of n + 1 and n + 2, rounded to even: 4.5 -> 4, 5.5 -> 6
    assert arrays["n"].tolist() == [6]


# --- semi-synchronous
# ---------------------------------------------------------------------------------------------


def test_who_is_late_counts_in_the_next_round(tmp_path):
    run = Run(tmp_path, [1, 2, 7], "semisync", 3, deadline=5, staleness_a=1)
    # Round 1 ends at 5 with clients 0 and 1: 1.5. Round 2: these two again; client 2 arrives at
    # 7, one step late, and counts half; the round is over at 7, as nobody is at work: 1.5 + (1
    # + 2 + 3 / 2) / 3 = 3. Round 3 has no deadline and waits for all three until 14: 3 + (1 + 2
    # + 3) / 3.
    assert run.rounds == [
        (0, 0.0, 0.0),
        (1, 5.0, 1.5),
        (2, 7.0, 3.0),
        (3, 14.0, 5.0),
    ]
    assert [client for client, _, _ in run.trained] == [0, 1, 2, 0, 1, 0, 1, 2]


def test_where_nobody_is_in_time_the_first_is_waited_for(tmp_path):
    run = Run(tmp_path, [20, 30], "semisync", 2, deadline=5, staleness="constant")
    assert run.rounds[1] == (1, 20.0, 1.0)
    assert run.rounds[2] == (2, 40.0, 1.0 + (1 + 2) / 2)


# --- what goes wrong
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("fedbuff", {"buffer": 3}), ("fedasync", {}), ("semisync", {})],
)
def test_without_a_client_that_fails(tmp_path, name, options):
    run = Run(
        tmp_path,
        [1, 2, 3],
        name,
        2,
        fail=[(1, round) for round in range(1, 9)],
        **options,
    )
    assert run.rounds[-1][0] == 2


def test_lost_answers_are_given_up_and_told(tmp_path):
    run = Run(tmp_path, [1, np.inf, 3], "fedbuff", 1, buffer=3)
    assert run.rounds[-1] == (1, 150.0, (1 + 3) / 2)  # it is asked three times
    assert [
        [client_of(message.node) for message in work] for work in run.missed
    ] == [[1]] * 3


def test_a_round_without_any_answer_is_the_end(tmp_path):
    with pytest.raises(RuntimeError, match="no client gave a usable answer"):
        Run(tmp_path, [1, 1], "fedbuff", 2, buffer=2, fail=[(0, 2), (1, 2)])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fedbuff", {"buffer": 5}, "buffer = 5, but data.clients = 4"),
        (
            "fedbuff",
            {"buffer": 0},
            "buffer = 0: must be a whole number, 1 or more",
        ),
        (
            "fedbuff",
            {"buffer": 2, "server_lr": 0},
            "server_lr = 0: must be above 0",
        ),
        ("fedasync", {"concurrency": 5}, "concurrency = 5, but"),
        (
            "fedasync",
            {"concurrency": 1.5},
            "concurrency = 1.5: must be a whole number",
        ),
        ("fedasync", {"alpha": 2}, "alpha = 2: must be above 0 and at most 1"),
        (
            "fedasync",
            {"proximal_mu": -1},
            "proximal_mu = -1: must be a number, at least 0",
        ),
        ("fedasync", {"staleness": "linear"}, "polynomial, hinge or constant"),
        (
            "fedasync",
            {"staleness_a": -1},
            "staleness_a = -1: must not be below 0",
        ),
        ("semisync", {"deadline": 0}, "deadline = 0: must be above 0"),
    ],
)
def test_impossible_options_are_refused(name, options, words):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        build_strategy(StrategyConfig(name=name, **options), 4)


# --- in an experiment
# ---------------------------------------------------------------------------------------------

BASE = {
    "data": {"clients": 3, "tasks": 2, "classes_max": 2, "test_samples": 0.5},
    "train": {"rounds": 2, "epochs": 1, "batch_size": 8, "lr": 3e-3},
    "learner": {"name": "finetune"},
    "engine": {"backend": "inline"},
}


def experiment(out, strategy, *changes, **options):
    config = read_config(
        {**BASE, "strategy": {"name": strategy, **options}}, changes
    )
    return simulate(config, out, report=False)


def test_with_everybody_in_the_buffer_fedbuff_is_fedavg(tmp_path):
    a, b = (
        experiment(tmp_path / "a", "fedavg"),
        experiment(tmp_path / "b", "fedbuff", buffer=3, concurrency=3),
    )
    assert a.summary["accuracy"] > 0.4
    for name, array in a.arrays.items():
        np.testing.assert_array_equal(array, b.arrays[name])
    for name, array in a.accuracy.items():
        np.testing.assert_array_equal(array, b.accuracy[name])


@pytest.mark.parametrize(
    ("name", "options"),
    [("fedasync", {}), ("fedbuff", {"buffer": 2}), ("semisync", {})],
)
def test_the_same_seed_gives_the_same_numbers(tmp_path, name, options):
    a, b = (experiment(tmp_path / folder, name, **options) for folder in "ab")
    assert a.summary["accuracy"] == b.summary["accuracy"] > 0.4
    for key, array in a.arrays.items():
        np.testing.assert_array_equal(array, b.arrays[key])
