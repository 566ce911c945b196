import csv
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fedknow.client.data import make_benchmark
from fedknow.client.learners import list_learners
from fedknow.client.state import StateLost, StateStore
from fedknow.protocols.config import ConfigError, ExperimentConfig, read_config
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.recorder import Subscriber
from fedknow.simulations.compare import compare
from fedknow.simulations.simulate import simulate

SMALL = {
    "name": "small",
    "data": {
        "tasks": 2,
        "clients": 3,
        "classes_min": 2,
        "classes_max": 2,
        "share": "overlapping",
    },
    "model": {"name": "mlp", "hidden": 16},
    "train": {"rounds": 1, "epochs": 1},
    "engine": {"backend": "inline"},
}

BROKEN = """
from fedknow.client.learners import Learner

class Broken(Learner):
    def fit(self, data, round):
        raise ValueError("out of ideas")
"""


PICKY = """
from fedknow.client.learners import Learner

class Picky(Learner):
    def __init__(self, model, train, settings):
        raise ValueError("not with this model")
"""


class Watched:
    """Counts the runs that were really made."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.events: list[str] = []

    @contextmanager
    def __call__(
        self, config: ExperimentConfig, title: str, folder: Path
    ) -> Iterator[Subscriber]:
        self.titles.append(title)
        yield lambda event: self.events.append(event.event)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    watch = Watched()
    result = compare(read_config(SMALL), ["fedavg", "fedrep"], 2, out, watch)
    return out, watch, result


def test_every_learner_runs_with_every_seed(compared):
    out, watch, result = compared
    assert watch.titles == [
        "fedavg seed 0 (1/4)",
        "fedrep seed 0 (2/4)",
        "fedavg seed 1 (3/4)",
        "fedrep seed 1 (4/4)",
    ]
    assert watch.events.count("end") == 4
    assert [(members.label, len(members.runs)) for members in result.groups] == [
        ("fedavg", 2),
        ("fedrep", 2),
    ]
    assert result.failures == {}
    assert result.report == out / "report.html"
    assert result.report.is_file()


def test_one_partition_a_seed(compared):
    out, _, _ = compared
    runs = {
        (learner, seed): RunFolder.open(out / f"{learner}-seed{seed}")
        for learner in ("fedavg", "fedrep")
        for seed in (0, 1)
    }
    digest = {key: run.events()[0]["partition"] for key, run in runs.items()}
    assert digest == {key: run.partition["digest"] for key, run in runs.items()}
    assert {
        make_benchmark(
            read_config(SMALL, [f"learner={learner}"])
        ).partition.digest
        for learner in list_learners()
    } == {digest["fedavg", 0]}
    assert (
        digest["fedavg", 0]
        == digest["fedrep", 0]
        != digest["fedavg", 1]
        == digest["fedrep", 1]
    )


def test_files_hold_the_numbers(compared):
    out, _, result = compared
    tree = json.loads((out / "compare.json").read_text())
    rows = list(csv.DictReader((out / "compare.csv").open()))
    assert [row["run"] for row in rows] == [
        "fedavg-seed0",
        "fedavg-seed1",
        "fedrep-seed0",
        "fedrep-seed1",
    ]
    values = np.array([float(row["accuracy"]) for row in rows[:2]])
    written = tree["learners"]["fedavg"]["accuracy"]
    assert written["mean"] == pytest.approx(values.mean())
    assert written["half_interval_95"] == pytest.approx(
        12.7062047 * values.std(ddof=1) / math.sqrt(2)
    )
    assert written["seeds"] == 2
    end = RunFolder.open(out / "fedavg-seed1").events()[-1]
    assert tree["runs"]["fedavg-seed1"]["accuracy"] == pytest.approx(
        end["accuracy"]
    )
    assert tree["runs"]["fedavg-seed1"]["forgetting_relative"] == pytest.approx(
        end["forgetting_relative"]
    )
    assert result.groups[0].estimate("accuracy").mean == pytest.approx(
        values.mean()
    )


def test_finished_runs_are_read(compared):
    out, _, before = compared
    watch = Watched()
    again = compare(read_config(SMALL), ["fedavg", "fedrep"], 2, out, watch)
    assert watch.titles == []
    assert again.groups[0].estimate("accuracy") == before.groups[0].estimate(
        "accuracy"
    )


def _without_checksums(path):
    """Write a file as earlier versions did."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            np.savez_compressed(path, **arrays)
    else:
        path.write_text(
            re.sub(r', "crc32": "[0-9a-f]{8}"}\n', "}\n", path.read_text())
        )


def test_a_finished_run_that_is_older_than_a_setting_is_read(compared, tmp_path):
    out, _, _ = compared
    shutil.copytree(out / "fedrep-seed0", tmp_path / "fedrep-seed0")
    path = tmp_path / "fedrep-seed0" / "config.toml"
    text = re.sub(
        r"(?s)(\[learner\]\nname = \"fedrep\"\n).*?\n(?=\[)",
        r"\1\n",
        path.read_text(),
    )
    assert len(text) < len(path.read_text())
    path.write_text(text.partition("\n")[2])  # nor had it a checksum then
    for name in ("metrics.jsonl", "accuracy.npz"):
        _without_checksums(path.with_name(name))
    watch = Watched()
    assert (
        compare(read_config(SMALL), ["fedrep"], 1, tmp_path, watch).failures == {}
    )
    assert watch.titles == []


def test_a_half_finished_run_goes_on(compared, tmp_path):
    _, _, undisturbed = compared

    def stop(event):
        if event.event == "task_end":
            raise KeyboardInterrupt

    plan = read_config(SMALL, ["learner=fedrep"])
    with pytest.raises(KeyboardInterrupt):
        simulate(plan, tmp_path / "fedrep-seed0", observers=[stop])
    result = compare(read_config(SMALL), ["fedrep"], 1, tmp_path)
    assert (
        result.groups[0].estimate("accuracy").mean
        == undisturbed.groups[1].runs[0].measures()["accuracy"]
    )
    assert math.isnan(result.groups[0].estimate("accuracy").half)


def test_runs_with_other_settings_are_refused(compared):
    out, _, _ = compared
    with pytest.raises(
        ConfigError,
        match=r"fedavg-seed0 was run with other settings(?s:.*)train.lr: was 0.001, now 0.01",
    ):
        compare(read_config(SMALL, ["train.lr=0.01"]), ["fedavg"], 1, out)


def test_a_failing_learner_costs_the_others_nothing(tmp_path, monkeypatch):
    (tmp_path / "own_learner.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    result = compare(
        read_config(SMALL), ["own_learner:Broken", "fedavg"], 1, tmp_path / "out"
    )
    assert list(result.failures) == ["own_learner-Broken-seed0"]
    assert "out of ideas" in result.failures["own_learner-Broken-seed0"]
    assert [members.label for members in result.groups] == ["fedavg"]
    assert (
        json.loads((tmp_path / "out" / "compare.json").read_text())["failures"]
        == result.failures
    )
    assert (
        "out of ideas"
        in (
            tmp_path / "out" / "own_learner-Broken-seed0" / "error.log"
        ).read_text()
    )


def test_a_lost_state_costs_the_others_nothing(tmp_path, monkeypatch):
    load = StateStore.load

    def lose(store, client, version):
        if "fedrep" in str(store.folder) and version:
            raise StateLost("client 1's state is gone")
        return load(store, client, version)

    monkeypatch.setattr(StateStore, "load", lose)
    result = compare(
        read_config(SMALL), ["fedrep", "fedavg"], 1, tmp_path / "out"
    )
    assert list(result.failures) == ["fedrep-seed0"]
    assert "client 1's state is gone" in result.failures["fedrep-seed0"]
    assert "--set engine.on_lost_state=fresh" in result.failures["fedrep-seed0"]
    assert [members.label for members in result.groups] == ["fedavg"]


@pytest.mark.parametrize(
    ("learner", "change", "message"),
    [
        (
            "own_learner:Picky",
            "train.rounds=1",
            r"learner.name = 'own_learner:Picky': failed: .*not with this model",
        ),
        (
            "fedrep",
            "model.hiden=3",
            r"mlp has no such setting \(did you mean 'hidden'\?\)",
        ),
        ("fedrep", "strategy.fraction=2", r"fraction"),
    ],
)
def test_parts_are_built_before_anything_is_run(
    tmp_path, monkeypatch, learner, change, message
):
    (tmp_path / "own_learner.py").write_text(PICKY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(
        sys.modules, "own_learner", raising=False
    )  # another test's
    with pytest.raises(ConfigError, match=message):
        compare(
            read_config(SMALL, [change]), ["fedavg", learner], 2, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("learners", "seeds", "message"),
    [
        ([], 1, "give one or more names"),
        (["fedavg", "fedavg"], 1, "none of them twice"),
        (["fedavg", "fedknwo"], 1, "did you mean 'fedknow'"),
        (["fedavg"], 0, "--seeds 0: must be a whole number from 1"),
    ],
)
def test_refused_before_anything_is_run(tmp_path, learners, seeds, message):
    with pytest.raises(ConfigError, match=message):
        compare(read_config(SMALL), learners, seeds, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_learner_with_other_settings_is_another_method(tmp_path):
    learners = ["fedknow@rho=0.5+k=2", "fedknow", "fedknow@integrator=off"]
    result = compare(read_config(SMALL), learners, 1, tmp_path)
    labels = [members.label for members in result.groups]
    assert labels == [
        "fedknow (rho=0.5, k=2)",
        "fedknow",  # what two of three have goes without saying
        "fedknow (integrator=off)",
    ]
    assert (tmp_path / "fedknow-rho-0.5-k-2-seed0" / "report.html").is_file()
    with pytest.raises(ConfigError, match=r"learner\.rhoo: unknown setting"):
        compare(read_config(SMALL), ["fedknow@rhoo=0.5"], 1, tmp_path / "other")


def test_settings_stay_with_their_learner(tmp_path):
    config = read_config(SMALL, ["learner.name=fedknow", "learner.k=3"])
    compare(config, ["fedknow", "fedavg"], 1, tmp_path)
    assert (
        RunFolder.open(tmp_path / "fedknow-seed0").config.learner.options["k"]
        == 3
    )
    assert (
        "k"
        not in RunFolder.open(tmp_path / "fedavg-seed0").config.learner.options
    )
