import tomllib
from importlib.resources import files

import pytest

from fedknow.client import learners
from fedknow.client.learners import best, learner_class, list_learners, resolve
from fedknow.client.learners.baselines import FedPer, FedRep
from fedknow.protocols.config import ConfigError, read_config
from fedknow.simulations.compare import RunSeries, compare
from fedknow.simulations.contenders import contenders, plan
from fedknow.simulations.presets import list_presets, load_preset
from fedknow.simulations.records import read_left_out

SMALL = {
    "name": "small",
    "data": {
        "tasks": 2,
        "clients": 3,
        "classes_min": 2,
        "classes_max": 2,
        "share": "overlapping",
    },
    "model": {"name": "cnn"},
    "train": {"rounds": 1, "epochs": 1},
    "engine": {"backend": "inline"},
}
FOUND = {
    "fedrep": {"settings": {"head_epochs": 1}},
    "fedknow": {"settings": {"rho": 0.25, "k": 3}},
}


@pytest.fixture
def shipped(monkeypatch):
    """Best settings for the preset ``small``."""
    monkeypatch.setattr(
        best,
        "searched_settings",
        lambda preset: FOUND if preset == "small" else {},
    )
    monkeypatch.setattr(
        "fedknow.simulations.contenders.searched_settings", best.searched_settings
    )


def test_all_is_every_method_once():
    methods, left_out = contenders(read_config(SMALL), ["all"])
    assert set(methods) | set(left_out) == set(list_learners())
    assert len({learner_class(name) for name in methods}) == len(methods)
    assert left_out["finetune"] == "the same method as fedavg"
    assert {"fedknow", "fedavg", "fedrep", "local"} <= set(methods)


def test_all_but_some_and_with_others():
    methods, left_out = contenders(
        read_config(SMALL), ["all", "-fedrep", "fedknow@rho=0.2", "fedper"]
    )
    assert "fedrep" not in methods
    assert left_out["fedrep"] == "as was asked"
    assert methods[-1] == "fedknow@rho=0.2"
    assert methods.count("fedper") == 1


def test_those_that_do_not_fit_are_told_and_left_out(monkeypatch):
    def refuse(learner, model, train, settings):
        raise ConfigError("needs a better model")

    monkeypatch.setattr(FedRep, "scenarios", ("class-incremental",))
    monkeypatch.setattr(FedPer, "__init__", refuse)
    methods, left_out = contenders(read_config(SMALL), ["all"])
    assert not {"fedrep", "fedper"} & set(methods)
    assert "not made for data.scenario = 'task-incremental'" in left_out["fedrep"]
    assert left_out["fedper"] == "needs a better model"


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["all", "all"], "none of them twice"),
        (["-fedavg"], "give one or more names"),
        (
            ["all", "-fedrp"],
            r"-fedrp: no such learner \(did you mean 'fedrep'\?\)",
        ),
    ],
)
def test_refused(methods, message):
    with pytest.raises(ConfigError, match=message):
        contenders(read_config(SMALL), methods)


def test_left_out_is_in_what_a_comparison_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(
        learners,
        "LEARNERS",
        {
            name: kind
            for name, kind in learners.LEARNERS.items()
            if "fed" in name or "fine" in name
        },
    )
    without = [
        f"-{name}"
        for name in list_learners()
        if name not in ("finetune", "fedavg", "fedper")
    ]
    result = compare(
        read_config(SMALL, ["model=mlp"]), ["all", *without], 1, tmp_path / "out"
    )
    assert {members.label for members in result.groups} == {"fedavg", "fedper"}
    assert "the same method as fedavg" in (
        tmp_path / "out" / "report.html"
    ).read_text("utf-8")
    assert read_left_out(tmp_path / "out") == result.left_out
    assert result.left_out["finetune"] == "the same method as fedavg"
    config = read_config(SMALL, ["model=mlp"])
    series = RunSeries.plan(config, ["fedper"], 1, tmp_path / "bare")
    assert series.run(None, is_lean=True) == {}
    left = {path.name for path in (tmp_path / "bare" / "fedper-seed0").iterdir()}
    assert {"config.toml", "metrics.jsonl", "accuracy.npz"} <= left
    assert not {"clients", "checkpoint", "report.html", "plots"} & left


# --- best settings
# --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shipped")
def test_best_settings_take_the_place_of_the_presets():
    config = read_config(
        SMALL, ["learner.name=fedknow", "learner.k=7", "learner.temperature=4.0"]
    )
    settings = plan(config, "fedknow@best", 0).learner.options
    assert (settings["rho"], settings["k"], settings["temperature"]) == (
        0.25,
        3,
        2.0,
    )
    assert plan(config, "fedknow@best+rho=0.5", 0).learner.options["rho"] == 0.5
    assert resolve(
        read_config(SMALL, ["learner=fedrep@best"])
    ).learner.options == {"head_epochs": 1}
    assert (
        resolve(read_config(SMALL, ["learner=fedrep@best"])).learner.name
        == "fedrep"
    )


@pytest.mark.usefixtures("shipped")
def test_all_at_their_best_where_that_is_known():
    methods, _ = contenders(read_config(SMALL), ["all@best"])
    assert {"fedrep@best", "fedknow@best", "fedper"} <= set(methods)
    with pytest.raises(
        ConfigError,
        match=r"'all@best': .* for name = 'other'; compare 'all'.*fedknow search other",
    ):
        contenders(read_config(SMALL, ["name=other"]), ["all@best"])


@pytest.mark.usefixtures("shipped")
def test_there_are_no_best_settings():
    with pytest.raises(
        ConfigError,
        match=r"'fedper@best': .* for 'small' there are those of fedrep, fedknow; search",
    ):
        resolve(read_config(SMALL, ["learner=fedper@best"]))
    with pytest.raises(
        ConfigError,
        match=r"there are none for 'other'(?s:.*)fedknow search other --learners fedrep",
    ):
        resolve(read_config(SMALL, ["learner=fedrep@best", "name=other"]))


def shipped_settings():
    return [
        (file.name.removesuffix(".toml"), learner)
        for file in files(best).iterdir()
        if file.name.endswith(".toml")
        for learner in tomllib.loads(file.read_text("utf-8"))
    ]


@pytest.mark.parametrize(("preset", "learner"), shipped_settings())
def test_shipped_settings_are_those_of_a_learner_and_tell_where_they_are_from(
    preset, learner
):
    assert preset in list_presets()
    entry = best.searched_settings(preset)[learner]
    config = resolve(load_preset(preset, [f"learner={learner}@best"]))
    assert entry["settings"].items() <= config.learner.options.items()
    assert entry["command"].startswith(
        (
            f"fedknow search {preset} ",
            f"fedknow compare {preset} --set data.holdout=",
        )
    )
    assert 0 < entry["accuracy"] <= 1
    assert entry["runs"] >= 1
    assert set(entry["settings"]) <= set(entry["space"])


@pytest.mark.parametrize(("large", "small"), best.SEARCHED_AS.items())
def test_what_takes_hours_has_the_settings_of_a_small_preset(large, small):
    assert {large, small} <= set(list_presets())
    assert load_preset(large).model.name == load_preset(small).model.name
    assert load_preset(large).data.name == load_preset(small).data.name
    assert best.searched_settings(large) == best.searched_settings(small) != {}
