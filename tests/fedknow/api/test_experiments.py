from pathlib import Path

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from torch import nn

import fedknow
from fedknow.api.fingerprints import fingerprint
from fedknow.client.learners.gem import Gem
from fedknow.protocols.parts import find


def test_sections_and_keys_change_a_preset():
    config = fedknow.experiment(
        "digits", seed=np.int64(4), train={"rounds": 7, "lr": 0.5}
    )
    assert (config.seed, config.train.rounds, config.train.lr) == (4, 7, 0.5)
    assert config.train.epochs == fedknow.experiment("digits").train.epochs


def test_a_table_a_file_and_a_configuration_say_the_same(tmp_path):
    table = {
        "name": "mine",
        "seed": 2,
        "learner": {"name": "gem", "margin": 0.25},
    }
    config = fedknow.experiment(table)
    file = tmp_path / "mine.toml"
    file.write_text(config.to_toml())
    assert fedknow.experiment(file) == fedknow.experiment(str(file)) == config
    assert fedknow.experiment(config) == config
    assert config.learner.options["margin"] == 0.25


def test_a_builtin_class_goes_by_its_short_name():
    config = fedknow.experiment(learner={"name": Gem, "margin": 0.1})
    assert (config.learner.name, config.learner.options) == (
        "gem",
        {"margin": 0.1},
    )


def test_other_parts_lose_the_settings_of_the_part_before():
    config = fedknow.experiment(learner={"name": "gem", "margin": 0.1})
    assert fedknow.experiment(config, learner="ewc").learner.options == {}


def test_objects_get_names():
    class Mine(fedknow.Learner):
        """Mine."""

    config = fedknow.experiment(
        learner=Mine,
        strategy=FedAvg(),
        model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    )
    assert config.learner.name.startswith("__main__:")
    assert config.strategy.name.startswith("__main__:FedAvg-")
    assert config.model.name.startswith("__main__:Sequential-")


@pytest.mark.parametrize(
    "base", [{"name": "mine"}, {"name": "mine", "data": "digits"}]
)
@pytest.mark.parametrize("is_object", [True, False])
def test_data_with_settings_go_over_a_base_without_a_table_of_them(
    base, is_object
):
    images = np.arange(320, dtype=np.uint8).reshape(20, 1, 4, 4)
    labels = np.arange(20) % 4
    mine = fedknow.Dataset.from_arrays(
        "mine", images[:12], labels[:12], images[12:], labels[12:]
    )
    config = fedknow.experiment(
        base, data={"name": mine if is_object else "mnist", "tasks": 2}
    )
    assert config.data.tasks == 2
    start = "__main__:Dataset-" if is_object else "mnist"
    assert config.data.name.startswith(start)


@pytest.mark.parametrize(
    ("section", "first", "rest"),
    [
        ("data", "name", {"name": "mnist", "clients": 3}),
        ("model", "name", {"name": "mlp", "hidden": 8}),
        ("learner", "name", {"name": "er", "memory": 0.5}),
        ("strategy", "name", {"name": "fedavg", "fraction": 0.5}),
        ("attack", "name", {"name": "signflip", "clients": 0.25}),
        ("start", "weights", {"weights": "a.npz", "without": ["head"]}),
        ("fleet", "devices", {"devices": ["jetson-nano"], "down": 2e6}),
        ("tracking", "to", {"to": ["mlflow"], "project": "mine"}),
    ],
)
def test_each_named_section_goes_over_a_base_without_it(section, first, rest):
    config = fedknow.experiment({"name": "mine"}, **{section: rest})
    made = getattr(config, section).model_dump()
    assert made[first] == rest[first]
    assert rest.items() <= (made | made.get("options", {})).items()


def test_two_objects_of_a_class_have_names_of_their_own():
    def net(width):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width))

    def data(shade):
        images = np.full((4, 1, 8, 8), shade, np.uint8)
        labels = np.array([0, 0, 1, 1])
        return fedknow.Dataset.from_arrays("mine", images, labels, images, labels)

    for section, one, other in [
        ("data", data(1), data(2)),
        ("model", net(2), net(3)),
        ("strategy", FedAvg(), FedAvg(fraction_train=0.5)),
    ]:
        first = getattr(fedknow.experiment(**{section: one}), section).name
        second = getattr(fedknow.experiment(**{section: other}), section).name
        assert first != second
        assert fingerprint(find(first).part) != fingerprint(find(second).part)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"learner": 3}, ["learner = 3", "fedknow.Learner"]),
        ({"model": 3.5}, ["model = 3.5", "nn.Module"]),
        (
            {"train": {"rounds": object()}},
            ["train.rounds", "cannot stand in a configuration"],
        ),
        ({"train": {"runds": 3}}, ["train.runds", "rounds"]),
        ({"sead": 3}, ["sead", "seed"]),
        ({"seed": float("nan")}, ["seed"]),
    ],
)
def test_what_cannot_be_is_refused(changes, parts):
    with pytest.raises(fedknow.ConfigError) as error:
        fedknow.experiment("digits", **changes)
    assert all(part in str(error.value) for part in parts), error.value


def test_a_path_is_text_in_the_configuration(tmp_path):
    assert fedknow.experiment(data={"dir": Path(tmp_path)}).data.dir == str(
        tmp_path
    )
