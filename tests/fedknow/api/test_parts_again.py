"""Runs with parts of a notebook, opened by another process or after a change."""

import json
import linecache

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from torch import nn

import fedknow
from fedknow.api.parts import adopt
from fedknow.protocols import parts
from fedknow.server.run.integrity import FolderDamaged

SMALL = {
    "data": {"clients": 2, "tasks": 1},
    "train": {"rounds": 2, "epochs": 1},
    "engine": {"backend": "inline"},
}

CELL = """
class Celled(fedknow.Learner):
    'A learner of a cell.'

    def loss(self, logits, batch):
        return {factor} * super().loss(logits, batch)
"""


def cell(factor):
    """Run a notebook's cell: no file has its text, but Python has kept it."""
    text, name = CELL.format(factor=factor), f"<cell {factor}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    space = {"fedknow": fedknow, "__name__": "__main__"}
    exec(compile(text, name, "exec"), space)
    return space["Celled"]


def squares(shade=0):
    rows = np.random.default_rng(shade).integers(0, 255, (40, 1, 8, 8))
    images = rows.astype(np.uint8)
    labels = np.arange(40) % 4
    return fedknow.Dataset.from_arrays(
        "squares", images[:20], labels[:20], images[20:], labels[20:]
    )


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2))


@pytest.fixture
def restart(monkeypatch):
    """Forget all registered objects, as a kernel does that is started again."""

    def forget():
        monkeypatch.setattr(parts, "_registered", {})

    return forget


def run(out, **parts_given):
    changes = {"learner": "fedavg", "model": "mlp"} | parts_given
    data = SMALL["data"]
    if "data" in changes:
        data = {"name": changes.pop("data"), **data}
    others = {key: SMALL[key] for key in ("train", "engine")}
    return fedknow.simulate(data=data, out=out, **others, **changes)


def state(run):
    return run.deployed().state_dict()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_two_data_sets_in_turn_keep_their_own(tmp_path):
    first = state(run(tmp_path / "a", data=squares(1)))
    second = state(run(tmp_path / "b", data=squares(2)))
    assert not torch.equal(first["mean"], second["mean"])
    assert same(first, state(fedknow.load_run(tmp_path / "a")))


def test_another_process_is_given_the_parts_again(tmp_path, restart):
    given = {"learner": cell(1), "data": squares(), "model": net()}
    before = state(run(tmp_path / "run", **given))
    restart()
    with pytest.raises(fedknow.ConfigError, match="simulate or load_run"):
        fedknow.load_run(tmp_path / "run").model()
    again = {"learner": cell(1), "data": squares(), "model": net()}
    assert same(before, state(fedknow.load_run(tmp_path / "run", **again)))


def test_another_data_set_is_no_stand_in(tmp_path, restart):
    run(tmp_path / "run", data=squares(1))
    restart()
    with pytest.raises(fedknow.ConfigError, match="not the data set of the run"):
        fedknow.load_run(tmp_path / "run", data=squares(2))


def test_a_name_takes_no_objects_place():
    with pytest.raises(fedknow.ConfigError, match="class or object itself"):
        adopt("learner", "gem", "__main__:Celled")


def test_a_named_part_needs_no_object(tmp_path):
    run(tmp_path / "run", data=squares())
    with pytest.raises(fedknow.ConfigError, match="leave model out"):
        fedknow.load_run(tmp_path / "run", model=net())


def test_a_changed_learner_is_warned_of_and_both_are_recorded(tmp_path):
    out = tmp_path / "run"

    class Stop(fedknow.Callback):
        def on_round_end(self, event):
            raise fedknow.StopRun("enough")

    run(out, learner=cell(1), callbacks=[Stop()])
    changed = cell(2)
    with pytest.warns(UserWarning, match=r"learner.name = '__main__:Celled'"):
        run(out, learner=changed, resume=True)
    sources = json.loads((out / "parts.json").read_text())["learner.name"]
    assert ["return 1 *" in text for text in sources["sources"]] == [True, False]
    # The newest is the one that the model is built by.
    fedknow.load_run(out).model()


def test_the_source_is_the_objects_own_and_not_what_holds_it(tmp_path):
    class Halved(FedAvg):
        """Of this test."""

    run(tmp_path / "run", strategy=Halved(fraction_train=0.5))
    recorded = json.loads((tmp_path / "run" / "parts.json").read_text())
    assert "class Halved(FedAvg)" in recorded["strategy.name"]["sources"][0]


def test_a_damaged_record_is_said(tmp_path):
    found = run(tmp_path / "run", learner=cell(1))
    (found.path / "parts.json").write_text("[1")
    with pytest.raises(FolderDamaged, match=r"parts\.json is damaged"):
        found.model()


def test_a_network_of_ready_made_layers_is_recorded_by_its_layers(tmp_path):
    run(tmp_path / "run", data=squares(), model=net())
    recorded = json.loads((tmp_path / "run" / "parts.json").read_text())
    text = recorded["model.name"]["sources"][0]
    assert "Linear(in_features=64, out_features=8" in text
    assert "SplitModel" in text
