"""Strategies' instructions to clients are honoured, handed on or refused."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.server.strategy import FedAvg as OldFedAvg
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg

from fedknow.client.learners import Learner
from fedknow.protocols.config import ConfigError, StrategyConfig, read_config
from fedknow.server.checks.faults import RunError
from fedknow.simulations.simulate import simulate
from fedknow.strategies import build_strategy

DATA = {
    "clients": 4,
    "tasks": 2,
    "classes_per_task": 2,
    "classes_max": 2,
    "test_samples": 0.2,
}
BASE = {
    "data": DATA,
    "model": "mlp",
    "train": {"rounds": 1, "epochs": 1, "batch_size": 16},
    "learner": "fedavg",
    "engine": {"backend": "inline"},
}
SAID = {}


class Says(FedAvg):
    """Puts settings into the config that clients get."""

    def configure_train(self, server_round, arrays, config, grid):
        config.update(SAID)
        return super().configure_train(server_round, arrays, config, grid)


class OwnRecords(FedAvg):
    """Makes messages of its own, without settings, under names of its own."""

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(
            super().configure_train(server_round, arrays, config, grid)
        )
        for message in messages:
            content = {"weights": arrays, "mine": ConfigRecord(dict(SAID))}
            message.content = RecordDict(
                content | {"drift": ArrayRecord({"c": arrays["head.bias"]})}
            )
        return messages


class Extra(FedAvg):
    """Sends a record that has a meaning of its own here."""

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(
            super().configure_train(server_round, arrays, config, grid)
        )
        for message in messages:
            message.content["extra"] = arrays
        return messages


class Loop(FedAvg):
    """Has a loop of its own, as Flower's is."""

    def start(self, *args, train_config, **kwargs):
        train_config.update(SAID)
        return super().start(*args, train_config=train_config, **kwargs)


HEARD = []


class Hears(Learner):
    """Reads a setting and a record."""

    reads = ("beta", "drift")

    def fit(self, task, round):
        drift = {
            name: value.shape
            for name, value in round.settings.get("drift", {}).items()
        }
        HEARD.append((round.settings.get("beta"), drift))
        return super().fit(task, round)


@pytest.fixture
def run(tmp_path):
    def run(said, strategy="Says", *changes):
        SAID.clear()
        SAID.update(said)
        name = f"run{len(list(tmp_path.iterdir()))}"
        changes = [
            *([f"strategy={__name__}:{strategy}"] if strategy else []),
            *changes,
        ]
        events = []
        result = simulate(
            read_config(BASE, changes),
            tmp_path / name,
            observers=[lambda event: events.append(event.line())],
            report=False,
        )
        return result.arrays, events

    return run


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def warnings(events):
    return [event["reason"] for event in events if event["event"] == "warning"]


@pytest.mark.parametrize("strategy", ["Says", "OwnRecords", "Loop"])
@pytest.mark.parametrize("vectorize", ["off", "on"])
def test_clients_train_as_the_strategy_says(run, strategy, vectorize):
    """Numbers equal those of the experiment's settings; real work is counted."""
    own = [
        "train.lr=0.02",
        "train.epochs=3",
        "train.batch_size=5",
        f"engine.vectorize={vectorize}",
    ]
    expected, as_configured = run({}, "", *own)
    said = {"lr": 0.02, "local-epochs": 3, "batch-size": 5}
    arrays, events = run(said, strategy, f"engine.vectorize={vectorize}")
    assert_equal(arrays, expected)
    for counted in ("samples", "flops"):
        now, before = (
            [e[counted] for e in each if e["event"] == "round"]
            for each in (events, as_configured)
        )
        assert now == before
    plain, _ = run({}, "", f"engine.vectorize={vectorize}")
    assert not all(np.array_equal(arrays[name], plain[name]) for name in plain)
    assert not [
        text
        for text in warnings(events)
        if "lr" in text.split(", which learner")[0]
    ]


def test_the_proximal_term_may_come_from_any_strategy(run):
    expected, _ = run(
        {}, "", "strategy=fedprox", "strategy.proximal_mu=0.5", "train.epochs=2"
    )
    arrays, events = run({"proximal-mu": 0.5}, "Says", "train.epochs=2")
    assert_equal(arrays, expected)
    assert not warnings(events)


@pytest.mark.parametrize("strategy", ["Says", "OwnRecords", "Loop"])
@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"lr": -1.0}, "lr = -1.0: Input should be greater than 0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"epochs": 2.5}, "epochs = 2.5"),
        ({"batch-size": "many"}, "batch-size = 'many': must be a number"),
        ({"proximal-mu": -1.0}, "proximal-mu = -1.0"),
    ],
)
def test_nonsense_is_the_strategys_fault(run, tmp_path, strategy, said, words):
    with pytest.raises(
        RunError, match=f"strategy {__name__}:{strategy} sends client 0 {words}"
    ):
        run(said, strategy)
    assert '"failure"' not in (tmp_path / "run0" / "metrics.jsonl").read_text()


def test_an_extra_record_that_the_learner_does_not_take_is_the_strategys_fault(
    run,
):
    with pytest.raises(
        RunError,
        match=r"strategy .*:Extra sends client 0 a record 'extra', which learner.name",
    ):
        run({}, "Extra")


def test_a_batch_too_small_for_the_model_is_the_strategys_fault(run):
    with pytest.raises(
        RunError,
        match=r"batch-size = 1: model.name = 'resnet18' has BatchNorm, which needs 2 or more",
    ):
        run({"batch-size": 1}, "Says", "model=resnet18")


def test_what_nobody_reads_is_said_once_a_run(run):
    _, events = run({"beta": 1.5, "batch_size": 4})
    (said,) = warnings(events)
    assert said.startswith(
        f"strategy {__name__}:Says sends clients beta, batch_size, which learner fedavg does not"
    )
    assert "this changes nothing" in said
    assert "it reads lr, epochs, local-epochs, batch-size, proximal-mu" in said


def test_the_learner_is_handed_all_else(run):
    HEARD.clear()
    _, events = run({"beta": 1.5}, "OwnRecords", f"learner={__name__}:Hears")
    assert len(HEARD) == DATA["clients"] * DATA["tasks"]
    assert set(map(str, HEARD)) == {str((1.5, {"c": HEARD[0][1]["c"]}))}
    assert not warnings(events)


# --- strategies that clients here cannot serve
# ------------------------------------------------------------------------


def clips_on_clients():
    return flower.DifferentialPrivacyClientSideFixedClipping(
        FedAvg(), 1.0, 1.0, 2
    )


def clips_on_clients_adaptively():
    return flower.DifferentialPrivacyClientSideAdaptiveClipping(
        FedAvg(), 0.1, 100
    )


def bagging():
    return flower.FedXgbBagging()


def old():
    return OldFedAvg()


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (
            "clips_on_clients",
            [
                "noise would protect nobody",
                "'dp-fixed-clipping' or 'dp-adaptive-clipping'",
            ],
        ),
        (
            "clips_on_clients_adaptively",
            ["ClientSideAdaptiveClipping", "ServerSideFixedClipping"],
        ),
        ("bagging", ["trees of XGBoost", "'fedavg'"]),
        (
            "old",
            [
                "made a FedAvg",
                "flwr.server.strategy must be ported",
                "configure_fit becomes configure_train",
            ],
        ),
        (
            "OldFedAvg",
            ["neither a class derived", "configure_fit becomes configure_train"],
        ),
    ],
)
def test_strategies_that_would_not_do_what_they_say_are_refused(made, words):
    with pytest.raises(ConfigError) as refused:
        build_strategy(StrategyConfig(name=f"{__name__}:{made}"))
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_flowers_own_are_refused_by_reference_too():
    with pytest.raises(ConfigError, match="trees of XGBoost"):
        build_strategy(
            StrategyConfig(name="flwr.serverapp.strategy:FedXgbCyclic")
        )
