"""Averaging on the way: the same mean as a strategy takes of all answers, whoever adds up what."""

import math
from fractions import Fraction

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from fedknow.client.host import Host
from fedknow.client.state import StateStore
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.flower import to_record
from fedknow.protocols.messages import (
    CLIENT_FAILED,
    TRAIN,
    Arrays,
    Config,
    Mean,
    Message,
    Metrics,
    client_of,
    nbytes,
    node_of,
)
from fedknow.server.checks.faults import Fault, RunError
from fedknow.server.checks.replies import Inspector
from fedknow.server.grids import running_mean
from fedknow.server.grids.inline import InlineGrid
from fedknow.server.grids.running_mean import RunningMean, averaged
from fedknow.server.grids.strategy_grid import StrategyGrid
from fedknow.server.grids.wave import WaveOptions
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.presets import load_preset
from fedknow.simulations.simulate import simulate

SENT = Arrays({"w": np.zeros(2, np.float32), "steps": np.zeros((), np.int64)})


def asked(client):
    return Message(
        TRAIN,
        node_of(client),
        str(client),
        content={"arrays": SENT, "config": Config()},
    )


def answer(client, w, examples, steps=0, **metrics):
    arrays = Arrays({"w": np.array(w, np.float32), "steps": np.array(steps)})
    numbers = Metrics({"num-examples": examples, **metrics})
    return asked(client).reply({"arrays": arrays, "metrics": numbers})


def inspector():
    return Inspector(lambda failure: None)


def test_a_mean_by_hand():
    running = RunningMean()
    lean = [
        running.take(answer(0, [1, 2], 1, steps=3, loss=0.5, per_task=[1, 0])),
        running.take(answer(1, [5, -2], 3, steps=4, loss=1.5, per_task=[0, 1])),
    ]
    assert all("arrays" not in reply.content for reply in lean)
    reply = running.reply(lean)
    arrays, metrics = reply.arrays(), reply.content["metrics"]
    assert (reply.node, reply.reply_to, type(arrays)) == (node_of(0), "0", Mean)
    np.testing.assert_array_equal(
        arrays["w"], [4, -1]
    )  # (1 + 3 * 5) / 4, (2 - 3 * 2) / 4
    assert (arrays["w"].dtype, float(arrays["steps"])) == (np.float32, 3.75)
    assert (arrays.weight, arrays.clients) == (4, 2)
    assert metrics == {"num-examples": 4, "loss": 1.25, "per_task": [0.25, 0.75]}
    assert isinstance(metrics["num-examples"], int)


def mean_by(groups, answers):
    """The mean of answers whose workers average theirs; None: it comes as it is."""
    running = RunningMean()
    for place, members in groups:
        replies = [(answers[i], 1) for i in members]
        if place is not None:
            replies = averaged([asked(i) for i in members], replies, inspector())
        for reply, _ in list(replies):
            running.take(reply)
    return running.mean()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_order_and_grouping_gives_the_same_bits(data):
    """Weights, values of very different sizes, orders and workers drawn at random."""
    count = data.draw(st.integers(1, 14))
    values = data.draw(
        st.lists(
            st.tuples(
                st.floats(width=32, allow_nan=False, allow_infinity=False),
                st.floats(-(2.0**-20), 2.0**-20, width=32),
            ),
            min_size=count,
            max_size=count,
        )
    )
    examples = data.draw(
        st.lists(st.integers(1, 10**6), min_size=count, max_size=count)
    )
    answers = [answer(i, values[i], examples[i], steps=i) for i in range(count)]
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            running_mean, "FEWEST_AVERAGED", data.draw(st.integers(0, 4))
        )
        for _ in range(3):
            order = data.draw(st.permutations(range(count)))
            workers = data.draw(st.integers(1, 4))
            groups = [
                (place or None, order[place::workers]) for place in range(workers)
            ]
            found.append(
                mean_by([group for group in groups if group[1]], answers)
            )
    exact = [
        sum(Fraction(v[j]) * n for v, n in zip(values, examples, strict=True))
        / sum(examples)
        for j in (0, 1)
    ]
    for mean in found:
        assert mean["w"].tobytes() == found[0]["w"].tobytes()
        assert mean["steps"].tobytes() == found[0]["steps"].tobytes()
        assert (mean.weight, mean.clients) == (sum(examples), count)
    # Far below the largest term, digits are left out.
    largest = max(
        abs(v) * n for pair, n in zip(values, examples, strict=True) for v in pair
    )
    slack = count * float(largest) * 2.0**-52 / sum(examples)
    for value, right in zip(found[0]["w"], exact, strict=True):
        assert (
            abs(float(value) - float(right))
            <= slack + abs(float(right)) * 2.0**-23 + 2.0**-149
        )


def test_a_bad_answer_is_not_in_a_workers_mean_and_is_named_by_the_server(
    monkeypatch,
):
    monkeypatch.setattr(running_mean, "FEWEST_AVERAGED", 0)
    answers = [
        answer(0, [1, 1], 1),
        answer(1, [math.nan, 0], 1),
        asked(2).fail(CLIENT_FAILED, "no"),
        answer(3, [3, 5], 1),
    ]
    told = []
    server = Inspector(told.append)
    server.begin(2, 1, SENT)
    work = [asked(client) for client in range(4)]
    replies = [
        server(reply)
        for reply, _ in averaged(
            work, [(reply, 1) for reply in answers], inspector()
        )
    ]
    assert [
        (failure.client, failure.fault, failure.tensor) for failure in told
    ] == [
        (1, Fault.NOT_FINITE, "w"),
        (2, Fault.FAILED, ""),
    ]
    running = RunningMean()
    lean = [running.take(reply) for reply in replies]
    found = running.reply(
        [reply for reply in lean if reply.failure is None]
    ).arrays()
    np.testing.assert_array_equal(found["w"], [2, 3])
    assert found.clients == 2


def test_an_answer_of_a_mean_that_turns_out_unusable_ends_the_run(monkeypatch):
    monkeypatch.setattr(running_mean, "FEWEST_AVERAGED", 0)
    work = [asked(0), asked(1)]
    replies = [
        reply
        for reply, _ in averaged(
            work, [(answer(i, [1, 1], 1), 1) for i in (0, 1)], inspector()
        )
    ]
    running = RunningMean()
    lean = [
        running.take(replies[0]),
        running.take(asked(1).fail(CLIENT_FAILED, "other metrics")),
    ]
    with pytest.raises(RunError, match=r"1 answer .* engine\.running_mean=false"):
        running.reply(lean[:1])


class Adder:
    """Adds the client's number plus one to what it receives, which is its number of samples too;
    client 2 fails."""

    def handle(self, message, state):
        number = client_of(message.node) + 1
        if number == 3:
            return message.fail(CLIENT_FAILED, "client 2 fails"), state
        arrays = Arrays(
            (name, array + np.float32(number))
            for name, array in message.arrays().items()
        )
        metrics = Metrics({"num-examples": number, "loss": 1.0 / number})
        return message.reply({"arrays": arrays, "metrics": metrics}), {
            "count": state.get("count", 0) + 1
        }


@pytest.mark.parametrize("strategy", [FedAvg, FedAdam])
def test_a_strategy_gets_one_answer_and_makes_the_same_of_it(tmp_path, strategy):
    results = []
    for mean in (False, True):
        host = Host(
            ExperimentConfig(),
            None,
            StateStore(tmp_path / str(mean), 10**6),
            Adder(),
        )
        grid = InlineGrid(5, host)
        told = []
        inspector = Inspector(told.append)
        options = WaveOptions(inspect=inspector, is_averaged=mean)
        face = StrategyGrid(grid, options)
        inspector.begin(0, 1, Arrays({"w": np.zeros(3, np.float32)}))
        it = strategy(fraction_evaluate=0)
        record = to_record({"w": np.zeros(3, np.float32)})
        messages = list(
            it.configure_train(1, record, ConfigRecord({"task": 0}), face)
        )
        replies = face.send_and_receive(messages)
        assert [reply.has_error() for reply in replies].count(True) == 1
        assert len(replies) == (2 if mean else 5)
        arrays, metrics = it.aggregate_train(
            1, [reply for reply in replies if not reply.has_error()]
        )
        results.append((arrays["w"].numpy(), metrics["loss"]))
        assert len(told) == 1
        assert len(inspector.trained) == 4
        assert len(grid.versions) == 4
        assert grid.traffic.counts()[TRAIN]["up"] == 4 * (12 + 16)
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1])
    if strategy is FedAvg:
        np.testing.assert_allclose(
            results[1][0], np.full(3, (1 + 4 + 16 + 25) / 12), rtol=1e-6
        )


SMALL = [
    "data.clients=6",
    "data.tasks=2",
    "train.rounds=2",
    "train.optimizer=sgd",
    "train.lr=0.05",
    "learner=fedrep",
]


@pytest.mark.parametrize(
    "fleet",
    [
        [],
        [
            "fleet.devices=testbed-a",
            "data.clients=20",
            "fleet.deadline=0.12",
            "fleet.down=1e6",
            "fleet.up=1e6",
            "fleet.link_sigma=0.5",  # some are late, and others are not
        ],
    ],
)
def test_a_run_comes_to_the_same_up_to_rounding(tmp_path, fleet):
    found = []
    for mean in ("false", "true"):
        changes = ["engine.backend=inline", f"engine.running_mean={mean}", *fleet]
        config = load_preset("digits", [*SMALL, *changes])
        found.append(simulate(config, tmp_path / mean, report=False))
    for name, array in found[0].arrays.items():
        np.testing.assert_allclose(
            found[1].arrays[name], array, rtol=1e-3, atol=1e-5
        )
    late = [
        event
        for event in RunFolder.open(tmp_path / "true").events()
        if event["event"] == "warning"
    ]
    assert bool(late) is bool(fleet)
    same = ["traffic", *(["virtual_seconds"] if fleet else [])]
    assert all(found[0].summary[name] == found[1].summary[name] for name in same)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("krum", "krum may look at each client's answer"),
        (
            "{name = 'dp-fixed-clipping', noise_multiplier = 0.1, clipping_norm "
            "= 1.0, num_sampled_clients = 2}",
            "dp-fixed-clipping may look at each client's answer",
        ),
        (
            "{name = 'fedbuff', buffer = 2, concurrency = 3}",
            "fedbuff may look at each client's answer",
        ),
        (
            "{name = 'fedavg', weighted_by_key = 'loss'}",
            "strategy.weighted_by_key = 'loss'",
        ),
    ],
)
def test_strategies_that_need_more_are_refused(tmp_path, strategy, words):
    changes = [
        "engine.backend=inline",
        "engine.running_mean=true",
        f"strategy={strategy}",
    ]
    with pytest.raises(
        ConfigError, match=r"engine\.running_mean = true"
    ) as error:
        simulate(load_preset("digits", [*SMALL, *changes]), tmp_path / "run")
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()


def worst(records, weighted_by):
    return MetricRecord(
        {
            "loss": max(
                next(iter(record.metric_records.values()))["loss"]
                for record in records
            )
        }
    )


def watching():
    """Flower's strategy, and a function that looks at each client's metrics."""
    return FedAvg(
        fraction_evaluate=0,
        min_train_nodes=1,
        min_available_nodes=1,
        train_metrics_aggr_fn=worst,
    )


def test_a_function_that_sees_each_clients_metrics_is_refused(tmp_path):
    changes = [
        "engine.backend=inline",
        "engine.running_mean=true",
        f"strategy={__name__}:watching",
    ]
    with pytest.raises(ConfigError, match="may look at each client's answer"):
        simulate(load_preset("digits", [*SMALL, *changes]), tmp_path / "run")


def test_metrics_that_have_no_mean_are_named():
    running = RunningMean()
    lean = [
        running.take(answer(0, [1, 2], 1, per_class=[1, 0])),
        running.take(answer(1, [1, 2], 1, per_class=[1])),
    ]
    with pytest.raises(
        RunError, match=r"metric 'per_class'\. Its lengths differ: 1, 2;"
    ):
        running.reply(lean)


def test_traffic_is_that_of_each_client(monkeypatch):
    monkeypatch.setattr(running_mean, "FEWEST_AVERAGED", 0)
    """Means of counters are wider than what clients send."""
    work = [asked(0), asked(1)]
    answers = [(answer(client, [1, 1], 1), 1) for client in (0, 1)]
    sizes = [nbytes({"arrays": reply.arrays()}) for reply, _ in answers]
    assert [
        reply.arrays().bytes for reply, _ in averaged(work, answers, inspector())
    ] == sizes


class Own(FedAvg):
    """A user's strategy that looks at nothing but the mean."""

    of_the_mean = True


def test_a_strategy_of_ones_own_may_say_so(tmp_path):
    changes = [
        "engine.backend=inline",
        "engine.running_mean=true",
        f"strategy={__name__}:Own",
        "data.tasks=1",
    ]
    config = load_preset("digits", [*SMALL, *changes])
    assert (
        simulate(config, tmp_path / "run", report=False).summary["accuracy"] > 0.5
    )
