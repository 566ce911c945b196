"""Answers of a hostile client to Flower's strategies, and to ours."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from fedknow.protocols.config import StrategyConfig
from fedknow.protocols.flower import (
    empty_run,
    identify,
    to_arrays,
    to_record,
)
from fedknow.protocols.messages import Arrays, node_of
from fedknow.server.checks.aggregates import check_aggregate
from fedknow.strategies import build_strategy, list_strategies

NEEDED = {
    "qfedavg": {"client_learning_rate": 0.1},
    "fedtrimmedavg": {"beta": 0.2},
    "dp-fixed-clipping": {
        "noise_multiplier": 0.0,
        "clipping_norm": 1.0,
        "num_sampled_clients": 5,
    },
    "dp-adaptive-clipping": {"noise_multiplier": 0.0, "num_sampled_clients": 5},
    # It takes no noise of 0, and noise is in proportion to this norm.
    "dp-gaussian": {"clip": 1e-9},
}
CURRENT = Arrays(
    w=np.arange(6, dtype=np.float32).reshape(2, 3), b=np.zeros(2, np.float32)
)
HOOKS_ONLY = [
    name
    for name in list_strategies()
    # These have a loop of their own, or a half of a method that must be prepared.
    if name
    not in {
        "fedasync",
        "fedbuff",
        "semisync",
        "joint-central",
        "target",
        "fot",
        "fedprotip",
        "lorm",
        "lander",
        "loci",
        "afcl",
        "stsa",
    }
]


@pytest.fixture(autouse=True)
def run():
    """Flower's messages take the run's id from class attributes."""
    identify(empty_run().run_id)


class Nodes:
    """A grid of so many clients, of which a strategy asks the ids."""

    def __init__(self, count):
        self.count = count

    def get_node_ids(self):
        return [node_of(client) for client in range(self.count)]


def build(name):
    return build_strategy(StrategyConfig(name=name, **NEEDED.get(name, {})))


def aggregate(strategy, updates, losses=None):
    """One round in which clients answer with these updates of the parameters."""
    config = ConfigRecord({"task": 0, "round": 1})
    grid = Nodes(len(updates))
    messages = strategy.configure_train(1, to_record(CURRENT), config, grid)
    replies = []
    for client, message in enumerate(messages):
        arrays = Arrays(
            {name: a + updates[client] for name, a in CURRENT.items()}
        )
        loss = losses[client] if losses else 0.5
        metrics = MetricRecord({"num-examples": 10, "loss": loss})
        records = {"arrays": to_record(arrays), "metrics": metrics}
        replies.append(Message(RecordDict(records), reply_to=message))
    returned = strategy.aggregate_train(1, replies)
    arrays, _ = check_aggregate(returned, CURRENT, "it")
    return arrays


@pytest.mark.parametrize("name", HOOKS_ONLY)
@pytest.mark.parametrize("moving", [0, 1, 4])
def test_clients_that_return_what_they_got_do_not_end_a_run(name, moving):
    ones = np.float32(1)
    updates = [ones * (client < moving) for client in range(5)]
    losses = [0.5 * (client < moving) for client in range(5)]
    arrays = aggregate(build(name), updates, losses)
    assert arrays is not None
    if not moving:
        for array, current in zip(arrays.values(), CURRENT.values(), strict=True):
            np.testing.assert_allclose(array, current, atol=1e-6)


def test_clipping_is_flowers_to_the_bit():
    updates = [np.float32(value) for value in (0.1, -0.7, 3.0, 0.01, 1.3)]
    for name, plain in (
        ("dp-fixed-clipping", flower.DifferentialPrivacyServerSideFixedClipping),
        (
            "dp-adaptive-clipping",
            flower.DifferentialPrivacyServerSideAdaptiveClipping,
        ),
    ):
        ours = build(name)
        theirs = plain(build("fedavg"), **NEEDED[name])
        for _ in range(3):  # the adaptive one moves its norm
            got, expected = (
                aggregate(strategy, updates) for strategy in (ours, theirs)
            )
            for key in CURRENT:
                np.testing.assert_array_equal(got[key], expected[key])
        assert ours.clipping_norm == theirs.clipping_norm
        assert vars(ours)["clipping_norm"] == theirs.clipping_norm


@pytest.mark.parametrize("loss", [-1.0, 1e300])
def test_one_loss_does_not_end_q_fedavg(loss):
    updates = [np.float32(1)] * 5
    honest = aggregate(build("qfedavg"), updates[:4], [0.5] * 4)
    attacked = aggregate(build("qfedavg"), updates, [0.5] * 4 + [loss])
    for key in CURRENT:
        np.testing.assert_array_equal(attacked[key], honest[key])
    assert to_arrays(to_record(honest)).keys() == CURRENT.keys()
