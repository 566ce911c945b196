"""The presets of sensors, speech and sentences, in short form."""

import os

import numpy as np
import pytest
from real_clients import run_real_clients

from fedknow.client.learners import resolve
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.presets import load_preset
from fedknow.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_report")

CHANCE = {"har-wharf": 1 / 2, "speech-digits": 1 / 2, "clinc150": 1 / 15}
"""Share of right answers by a guess among the classes of a task."""
PRESETS = list(CHANCE)
SHORT = [
    "train.rounds=1",
    "train.epochs=1",
    "data.tasks=2",
    # Real clients keep their heads at home unless told otherwise.
    "evaluation.global_model=true",
]


def experiment(preset, *changes):
    inline = "engine.backend=inline"
    return resolve(load_preset(preset, [inline, *SHORT, *changes]))


@pytest.fixture
def generated(tmp_path, monkeypatch, parts):
    """Generated files in the place of the published ones."""
    monkeypatch.syspath_prepend(parts)
    pytest.importorskip("pyarrow")
    public_files = pytest.importorskip("public_files")
    folder = tmp_path / "data"
    folder.mkdir()
    public_files.write_all(folder)
    monkeypatch.setenv("FEDKNOW_DATA", str(folder))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.usefixtures("generated")
def test_real_clients_come_to_the_same(tmp_path, numbers, preset):
    config = experiment(preset)
    expected = simulate(config, tmp_path / "inline").folder
    accuracy = RunFolder.open(expected).accuracy()["personal"]
    assert np.isfinite(accuracy[:, 0, 0]).all()
    run_real_clients(config, tmp_path / "real")
    assert numbers(tmp_path / "real") == numbers(expected)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.usefixtures("generated")
def test_workers_come_to_the_same(tmp_path, numbers, preset):
    expected = simulate(experiment(preset), tmp_path / "inline").folder
    on_ray = experiment(preset, "engine.backend=ray", "engine.workers=2")
    simulate(on_ray, tmp_path / "ray")
    assert numbers(tmp_path / "ray") == numbers(expected)


@pytest.mark.data
@pytest.mark.skipif(
    "FEDKNOW_DATA" not in os.environ, reason="FEDKNOW_DATA is not set"
)
@pytest.mark.parametrize("preset", PRESETS)
def test_published_files(tmp_path, preset):
    """Better than a guess, on samples held out."""
    changes = ["data.holdout=0.25", "learner=fedavg", "train.rounds=3"]
    config = experiment(preset, *changes)
    run = RunFolder.open(simulate(config, tmp_path / "run").folder)
    accuracy = np.nanmean(run.accuracy()["global"][:, 0, 0])
    assert accuracy > 1.2 * CHANCE[preset]
