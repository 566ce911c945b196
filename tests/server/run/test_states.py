"""Runs whose client states lie at a storage URL."""

import shutil

import pytest

from fedknow.protocols.config import ConfigError
from fedknow.server.checks.faults import RunError
from fedknow.server.run.checkpoint import load_checkpoint
from fedknow.server.run.events import RoundEnded
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.states import states_place
from fedknow.simulations.presets import load_preset
from fedknow.simulations.simulate import simulate

SMALL = [
    "data.clients=3",
    "data.tasks=2",
    "train.rounds=1",
    "train.epochs=1",
    "data.samples=0.1",
    "engine.backend=inline",
    "learner=fedrep",
    "model=mlp",
]


class Stopped(Exception):
    pass


def stop(event):
    if isinstance(event, RoundEnded) and event.server_round == 2:
        raise Stopped


def arrays(folder):
    found = load_checkpoint(folder / "checkpoint").arrays
    return {name: array.tobytes() for name, array in found.items()}


def test_a_run_is_resumed_from_its_place_and_gives_the_same_numbers(tmp_path):
    simulate(load_preset("digits", SMALL), tmp_path / "plain", report=False)
    place = tmp_path / "store"
    changes = [*SMALL, f"engine.states=file://{place}"]
    config = load_preset("digits", changes)
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        simulate(config, out, observers=[stop], report=False)
    elsewhere = load_preset("digits", SMALL)
    with pytest.raises(ConfigError, match=r"engine\.states: was 'file:"):
        simulate(elsewhere, out, resume=True, report=False)
    simulate(config, out, resume=True, report=False)
    assert arrays(out) == arrays(tmp_path / "plain")
    folder = RunFolder.open(out)
    assert states_place(folder) == f"file://{place}/{folder.run_id}"
    assert len(list((place / folder.run_id).iterdir())) == 3
    assert not (out / "clients").exists()
    folder.forget_models()
    assert list(place.iterdir()) == []


def test_a_place_that_is_gone_is_a_lost_state(tmp_path):
    place = tmp_path / "store"
    config = load_preset("digits", [*SMALL, f"engine.states=file://{place}"])
    with pytest.raises(Stopped):
        simulate(config, tmp_path / "run", observers=[stop], report=False)
    shutil.rmtree(place)
    with pytest.raises(RunError, match="no such client state"):
        simulate(config, tmp_path / "run", resume=True, report=False)


def test_a_scheme_that_is_unknown_leaves_no_folder_behind(tmp_path):
    config = load_preset("digits", [*SMALL, "engine.states=nonsense://x"])
    with pytest.raises(ConfigError, match=r"engine\.states = 'nonsense://x'"):
        simulate(config, tmp_path / "run", report=False)
    assert not (tmp_path / "run").exists()
