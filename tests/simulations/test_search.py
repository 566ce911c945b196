import json
import math
import tomllib

import pytest

from fedknow.client.learners import learner_class, list_learners
from fedknow.client.learners.baselines import FedPer, FedRep
from fedknow.client.learners.fedknow.learner import FedKnow
from fedknow.protocols.config import ConfigError, read_config
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.contenders import plan
from fedknow.simulations.records import read_left_out
from fedknow.simulations.search import SearchRequest, candidates, search

SMALL = {
    "name": "small",
    "data": {"tasks": 2, "clients": 3, "classes_min": 2, "classes_max": 2},
    "model": {"name": "mlp", "hidden": 16},
    "train": {"rounds": 1, "epochs": 3},
    "engine": {"backend": "inline"},
}


@pytest.fixture
def spaces(monkeypatch):
    monkeypatch.setattr(FedRep, "search", {"head_epochs": [0, 1, 2]})
    monkeypatch.setattr(
        FedKnow,
        "search",
        {"rho": [0.05, 0.1], "labels": ["soft", "hard"], "k": [1, 10]},
    )


@pytest.mark.usefixtures("spaces")
def test_candidates_are_the_defaults_and_the_grid_or_a_part_of_it():
    assert candidates("fedper", 5, 0) == [{}]
    assert candidates("fedrep", 5, 0) == [
        {"head_epochs": 0},
        {"head_epochs": 1},
        {"head_epochs": 2},
    ]
    whole = candidates("fedknow", 8, 0)
    assert whole[0] == {"rho": 0.1, "labels": "soft", "k": 10}
    assert len({json.dumps(settings) for settings in whole}) == 8
    some = candidates("fedknow", 4, 0)
    assert len(some) == 4
    assert some[0] == whole[0]
    assert all(settings in whole for settings in some)
    assert some == candidates("fedknow", 4, 0) != candidates("fedknow", 4, 2)
    assert candidates("fedknow", 1, 0) == whole[:1]


def test_defaults_off_the_grid_are_tried_too(monkeypatch):
    monkeypatch.setattr(FedRep, "search", {"head_epochs": [1, 2]})
    assert candidates("fedrep", 9, 0) == [
        {"head_epochs": 0},
        {"head_epochs": 1},
        {"head_epochs": 2},
    ]


@pytest.mark.usefixtures("spaces")
def test_the_best_on_held_out_samples_is_found_and_recorded(tmp_path):
    config = read_config(SMALL)
    request = SearchRequest(
        ["fedrep", "fedper"], 3, command="fedknow search small"
    )
    found, failures = search(config, request, tmp_path)
    assert failures == {}
    lines = [
        json.loads(line)
        for line in (tmp_path / "search.jsonl").read_text().splitlines()
    ]
    assert [(line["learner"], line["settings"]) for line in lines] == [
        *(("fedrep", {"head_epochs": epochs}) for epochs in (0, 1, 2)), ("fedper", {}),
    ]  # fmt: skip
    best = max(
        lines[:3], key=lambda line: (line["accuracy"], -line["forgetting"])
    )
    assert (found["fedrep"].settings, found["fedrep"].accuracy) == (
        best["settings"],
        best["accuracy"],
    )
    assert found["fedrep"].default == lines[0]["accuracy"]
    assert found["fedrep"].runs == 3
    run = RunFolder.open(tmp_path / "fedrep-head_epochs-1-seed0")
    assert run.config.data.holdout == 0.2
    assert run.complete
    written = tomllib.loads((tmp_path / "best.toml").read_text())
    assert written["fedrep"]["settings"] == best["settings"]
    assert written["fedrep"]["space"] == {"head_epochs": [0, 1, 2]}
    assert written["fedper"]["settings"] == {}
    assert written["fedper"]["command"] == "fedknow search small"

    seen = []
    request = SearchRequest(["fedrep"], 3, command="another")
    again, _ = search(
        config, request, tmp_path, lambda *watched: seen.append(watched)
    )
    assert seen == []  # what is finished is read
    assert again["fedrep"] == found["fedrep"]
    assert len((tmp_path / "search.jsonl").read_text().splitlines()) == 4
    assert (
        tomllib.loads((tmp_path / "best.toml").read_text())["fedper"]
        == written["fedper"]
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("search.jsonl", b'{"learner": "ewc"'),
        ("search.jsonl", b"\xff\n"),
        ("search.jsonl", b"[1]\n"),
        ("best.toml", b"[ewc\n"),
        ("best.toml", b"\xff"),
    ],
)
def test_a_damaged_record_is_refused_before_anything_runs(
    tmp_path, name, content
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name} is damaged .*; delete it"):
        search(read_config(SMALL), SearchRequest(["fedper"], 3), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'{"left_out": [1]}'])
def test_a_damaged_comparison_is_refused(tmp_path, content):
    (tmp_path / "compare.json").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"compare\.json is damaged .*; delete it"
    ):
        read_left_out(tmp_path)


def test_what_fails_is_not_the_best(tmp_path, monkeypatch):
    fit = FedPer.fit

    def sometimes(learner, task, round):
        if learner.settings.amount == 2:
            raise ValueError("out of ideas")
        return fit(learner, task, round)

    class Settings(FedPer.Settings):
        amount: int = 2

    monkeypatch.setattr(FedPer, "Settings", Settings)
    monkeypatch.setattr(FedPer, "fit", sometimes)
    monkeypatch.setattr(FedPer, "search", {"amount": [1, 2]})
    found, failures = search(
        read_config(SMALL), SearchRequest(["fedper"], 3), tmp_path
    )
    assert list(failures) == ["fedper-amount-2-seed0"]
    assert found["fedper"].settings == {"amount": 1}
    assert math.isnan(found["fedper"].default)


@pytest.mark.parametrize(
    ("learners", "limit", "message"),
    [
        (["fedper"], 0, "--runs 0: must be"),
        (["fedper@best"], 1, "settings are what is searched"),
        ([], 1, "one or more"),
    ],
)
def test_refused(tmp_path, learners, limit, message):
    with pytest.raises(ConfigError, match=message):
        search(
            read_config(SMALL), SearchRequest(learners, limit), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("learner", list_learners())
def test_what_is_to_be_searched_are_settings_there_are(learner):
    config = read_config(
        {"data": {"scenario": learner_class(learner).scenarios[0]}}
    )
    for name, values in learner_class(learner).search.items():
        assert len(set(values)) == len(values) > 1
        for value in values:
            plan(config, f"{learner}@{name}={value}", 0)
