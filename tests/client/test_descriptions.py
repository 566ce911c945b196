from typing import ClassVar, Literal

import pytest
from pydantic import Field

from fedknow.client.data import list_datasets
from fedknow.client.descriptions import (
    describe_dataset,
    describe_learner,
    describe_model,
)
from fedknow.client.learners import Learner, LearnerSettings, list_learners
from fedknow.client.models import list_models
from fedknow.protocols.config import ConfigError
from fedknow.protocols.descriptions import (
    Setting,
    documented_parameters,
    plain_text,
)


class OwnSettings(LearnerSettings):
    pull: float = Field(0.5, gt=0, le=2)
    """How strongly ``w`` is pulled."""
    mode: Literal["near", "far"] = "near"
    """Where to."""
    is_wild: bool = False


class Own(Learner):
    """A learner of a user.

    Keeps: what :class:`~fedknow.client.learners.ewc.Ewc` keeps. Sends: ``all``.
    """

    Settings = OwnSettings
    search: ClassVar[dict[str, list[float]]] = {"pull": [0.5, 1.0]}


@pytest.mark.parametrize("name", list_learners())
def test_every_learner_says_what_it_keeps_sends_and_needs(name):
    description = describe_learner(name)
    assert {"Keeps", "Sends", "Needs", "Valid"} <= description.facts.keys()
    for text in (description.summary, *description.facts.values()):
        assert text
        assert "``" not in text
        assert ":class:" not in text


@pytest.mark.parametrize("name", list_learners())
def test_every_setting_of_a_learner_has_values_and_a_meaning(name):
    for setting in describe_learner(name).settings:
        assert len(setting.meaning.split()) > 1, (
            f"{name}.{setting.name}: say what it does"
        )
        assert setting.allowed
        assert setting.default is not None


def test_a_users_learner_is_described_as_ours_are():
    description = describe_learner(f"{__name__}:Own")
    assert description.summary == "A learner of a user."
    assert description.facts["Keeps"] == "what ewc keeps."
    assert description.facts["Sends"] == "all."
    assert description.settings == [
        Setting(
            "pull",
            "0.5",
            "a number, above 0, at most 2",
            "How strongly w is pulled.",
            "0.5, 1.0",
        ),
        Setting("mode", '"near"', '"near" or "far"', "Where to."),
        Setting("is_wild", "false", "true or false"),
    ]


def test_bounds_and_values_are_those_that_are_checked():
    settings = {
        setting.name: setting for setting in describe_learner("fedknow").settings
    }
    assert settings["rho"].default == "0.1"
    assert settings["rho"].allowed == "a number, above 0, at most 1"
    assert settings["rho"].searched == "0.05, 0.1, 0.2"
    assert settings["labels"].allowed == '"soft" or "hard"'
    assert describe_learner("target").facts["Strategy"] == "target"


@pytest.mark.parametrize("name", list_models())
def test_every_setting_of_a_model_has_values_and_a_meaning(name):
    description = describe_model(name)
    assert description.summary
    for setting in description.settings:
        assert setting.meaning, f"{name}.{setting.name}"
        assert setting.allowed
        assert setting.default is not None


def test_the_settings_of_a_model_are_those_it_takes():
    assert [setting.name for setting in describe_model("cnn6").settings] == [
        "width",
        "dropout",
        "init",
    ]
    assert describe_model("cnn6").settings[0].default == "1.0"


@pytest.mark.parametrize("name", list_datasets())
def test_every_data_set_says_where_its_files_are(name):
    description = describe_dataset(name)
    assert description.summary == list_datasets()[name]
    assert {"Files", "Files in it", "Made of"} & description.facts.keys()


@pytest.mark.parametrize(
    "describe", [describe_learner, describe_model, describe_dataset]
)
def test_a_name_that_is_none_is_refused_with_the_closest(describe):
    with pytest.raises(ConfigError, match=r"cnn6|digits|ewc"):
        describe(
            "cn6"
            if describe is describe_model
            else "digit"
            if describe is describe_dataset
            else "ewcc"
        )


def test_docstrings_become_plain_text():
    assert (
        plain_text("As :func:`~.a.b.c` says,\n  ``x`` and `y`.")
        == "As c says, x and y."
    )


def two(first: int, second: int, third: int) -> None:
    """Do nothing.

    Parameters
    ----------
    first, second : int
        Two of
        three.
    third : int
        The last.

    Returns
    -------
    int
        None.
    """


def test_numpy_docstrings_are_read():
    assert documented_parameters(two) == {
        "first": "Two of three.",
        "second": "Two of three.",
        "third": "The last.",
    }


def test_what_a_sample_is_is_no_setting_of_a_model():
    names = [setting.name for setting in describe_model("transformer").settings]
    assert names == ["dim", "heads", "layers", "dropout", "mels"]
