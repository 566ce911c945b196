"""Scoring a sample of clients: the same clients each time, with the numbers of a whole run."""

import numpy as np

from fedknow.server.run import metrics
from fedknow.server.run.checkpoint import load_checkpoint
from fedknow.server.run.evaluation import Scores, draw_sample
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.presets import load_preset
from fedknow.simulations.simulate import simulate

SMALL = [
    "data.clients=6",
    "data.tasks=2",
    "train.rounds=1",
    "train.epochs=1",
    "data.samples=0.2",
    "engine.backend=inline",
    "learner=fedrep",
    "evaluation.global_model=false",
]


def test_a_sample_is_the_same_for_a_seed_and_none_is_everybody():
    sample = draw_sample(3, 100, 10)
    assert sample == draw_sample(3, 100, 10)
    assert sample != draw_sample(4, 100, 10)
    assert len(sample) == 10
    assert sample == sorted(set(sample))
    assert all(0 <= client < 100 for client in sample)
    assert draw_sample(3, 100, 0) is None
    assert draw_sample(3, 100, 100) is None


def test_clients_in_the_sample_have_the_scores_of_a_whole_run(tmp_path):
    whole = simulate(load_preset("digits", SMALL), tmp_path / "a", report=False)
    part = simulate(
        load_preset("digits", [*SMALL, "evaluation.clients=3"]), tmp_path / "b"
    )
    assert all(
        np.array_equal(part.arrays[name], array)
        for name, array in whole.arrays.items()
    )
    config = load_preset("digits", SMALL)
    chosen = draw_sample(config.seed, 6, 3)
    before = RunFolder.open(tmp_path / "a").accuracy()["personal"]
    arrays = RunFolder.open(tmp_path / "b").accuracy()
    found = arrays["personal"]
    assert arrays["clients"].tolist() == chosen
    np.testing.assert_array_equal(found, before[chosen])
    weights = np.nan_to_num(RunFolder.open(tmp_path / "b").accuracy()["weights"])
    margins = metrics.sampling_margin(found, weights, 6)
    events = [
        event
        for event in RunFolder.open(tmp_path / "b").events()
        if event["event"] == "evaluation"
    ]
    assert [event["accuracy_margin"] for event in events] == margins.tolist()
    assert (tmp_path / "b" / "report.html").exists()
    raw = load_checkpoint(tmp_path / "b" / "checkpoint").scores
    again = Scores.from_raw(raw).arrays()
    np.testing.assert_array_equal(again["personal"], found)
    assert again["clients"].tolist() == chosen
