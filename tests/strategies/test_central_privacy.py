"""Noise of the server's: by hand, by its deviation, and in whole runs."""

import random

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedknow.protocols.config import ConfigError, StrategyConfig, read_config
from fedknow.protocols.flower import identify, set_id, to_arrays, to_record
from fedknow.protocols.messages import Arrays
from fedknow.server.assemble import Clients, assemble
from fedknow.server.reports.page import write_report
from fedknow.server.run.accounting import epsilon_of
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.simulate import simulate
from fedknow.strategies import build_strategy, quiet_flower

NODES = 4


class Nodes:
    """A grid of which strategies ask the nodes alone."""

    def get_node_ids(self):
        return [node + 2 for node in range(NODES)]


def aggregate(strategy, rows, model):
    """A round's new model, from what clients answer to a model."""
    identify()
    answers = []
    for node, row in enumerate(rows):
        request = Message(RecordDict(), node + 2, "train")
        set_id(request, str(node))
        arrays = Arrays(w=np.asarray(row, np.float32))
        metrics = MetricRecord({"num-examples": 10**node, "loss": 0.5})
        content = RecordDict({"arrays": to_record(arrays), "metrics": metrics})
        answers.append(Message(content, reply_to=request))
    sent = to_record(Arrays(w=np.asarray(model, np.float32)))
    with quiet_flower():
        list(strategy.configure_train(1, sent, ConfigRecord(), Nodes()))
        record, metrics = strategy.aggregate_train(1, answers)
    return to_arrays(record)["w"], metrics


def build(**options):
    return build_strategy(StrategyConfig(name="dp-gaussian", **options))


def test_changes_are_clipped_and_count_alike():
    strategy = build(clip=1.0, noise=0.01)
    # Norms 5 and 0.5; the second claims ten times the samples, which is nothing here.
    new, metrics = aggregate(strategy, [[3, 4], [0.3, 0.4]], [0, 0])
    np.testing.assert_allclose(new, [(0.6 + 0.3) / 2, (0.8 + 0.4) / 2], atol=0.05)
    assert metrics["clipped-share"] == 0.5


def test_one_client_changes_the_sum_by_its_bound_at_most():
    model = [5.0, 5.0]
    results = []
    for row in ([5.0, 5.0], [1e6, -1e6]):
        random.seed(3)
        rows = [[5.1, 5.0], [5.0, 5.2], row]
        results.append(aggregate(build(clip=2.0, noise=0.5), rows, model)[0])
    assert np.linalg.norm(results[1] - results[0]) <= 2.0 / 3 + 1e-5


def test_the_noise_has_the_deviation_that_is_said():
    random.seed(1)
    size = 40_000
    strategy = build(clip=3.0, noise=2.0)
    new, _ = aggregate(strategy, [np.zeros(size)] * 4, np.zeros(size))
    assert new.std() == pytest.approx(2.0 * 3.0 / 4, rel=0.02)
    assert abs(new.mean()) < 0.03


def test_only_simulations_can_be_repeated():
    def draw(is_secret):
        random.seed(7)
        strategy = build()
        strategy.is_secret = is_secret
        return aggregate(strategy, [[0.0, 0.0]], [0, 0])[0].tolist()

    assert draw(False) == draw(False)
    assert draw(True) != draw(True)
    config = read_config({"strategy": "dp-gaussian"})
    assert assemble(config, Clients.REAL).strategy.is_secret
    assert not assemble(config, Clients.VIRTUAL).strategy.is_secret


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["strategy.clip=0"], "clip = 0: must be above 0"),
        (["strategy.noise=0.001"], "protects nobody"),
        (["strategy.delta=1"], "must be above 0 and below 1"),
        (["privacy.clip=1", "privacy.noise=1"], "there is one epsilon"),
        (["privacy.secure=true"], "looks at single updates"),
    ],
)
def test_what_would_promise_nothing_is_refused(changes, words):
    config = read_config(
        {"strategy": "dp-gaussian", "learner": "fedavg"}, changes
    )
    with pytest.raises(ConfigError, match=words):
        assemble(config, Clients.VIRTUAL)


def test_a_run_says_epsilon(tmp_path):
    tree = {
        "data": {"clients": 3, "tasks": 1, "classes_max": 2},
        "model": "linear",
        "train": {"rounds": 2, "epochs": 1},
        "learner": "fedavg",
        "strategy": {"name": "dp-gaussian", "noise": 4.0, "delta": 1e-4},
        "engine": {"backend": "inline"},
    }
    simulate(read_config(tree), tmp_path / "run", report=False)
    folder = RunFolder.open(tmp_path / "run")
    said = [e["epsilon"] for e in folder.events() if e["event"] == "round"]
    expected = [epsilon_of(4.0, rounds, 1e-4) for rounds in (1, 2)]
    assert said == [pytest.approx(value) for value in expected]
    page = write_report([folder], tmp_path / "run").read_text("utf-8")
    assert f"epsilon {expected[1]:.3g} for delta 0.0001" in page
