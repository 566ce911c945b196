import pytest

from fedknow.protocols.config import ConfigError
from fedknow.strategies import describe_strategy
from fedknow.strategies.build import option_names
from fedknow.strategies.registry import BUILTIN


@pytest.mark.parametrize("name", BUILTIN)
def test_every_option_of_a_strategy_has_values_and_a_meaning(name):
    description = describe_strategy(name)
    assert description.summary == BUILTIN[name].summary
    assert [setting.name for setting in description.settings] == option_names(
        name
    )
    for setting in description.settings:
        assert setting.meaning, f"{name}.{setting.name}: say what it does"
        assert setting.allowed


def test_defaults_are_those_that_a_run_has():
    settings = {
        setting.name: setting for setting in describe_strategy("fedadam").settings
    }
    assert settings["eta"].default == "0.1"
    assert settings["min_available_nodes"].default == "1"  # ours; Flower's is 2
    private = {
        setting.name: setting
        for setting in describe_strategy("dp-fixed-clipping").settings
    }
    assert private["clipping_norm"].default is None  # must be set
    assert describe_strategy("target").facts["Learner"] == "target"


def test_a_strategy_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="fedadam"):
        describe_strategy("fedadm")
