"""Modules of a user on the machines of a cluster."""

import pytest
from ray.exceptions import RayActorError

from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.config.sections import EngineConfig
from fedknow.simulations.engine.cluster import start_ray
from fedknow.simulations.engine.pool import raise_missing_module


def test_code_needs_a_cluster():
    with pytest.raises(ValueError, match=r"engine\.code = '\.'.*engine\.address"):
        EngineConfig(code=".")
    assert ExperimentConfig().engine.code == ""


def test_a_folder_that_is_missing_is_refused_before_ray_is_asked(tmp_path):
    with pytest.raises(ConfigError, match=r"engine\.code = .*no such folder"):
        start_ray("127.0.0.1:1", str(tmp_path / "nowhere"))


def test_a_module_that_a_machine_lacks_is_named_with_machine_and_remedy():
    error = RayActorError(
        error_msg="The actor died because of an error raised in its creation task, "
        "\x1b[36mray::Worker.__init__()\x1b[39m (pid=7, ip=10.0.0.9, actor_id=1)\n"
        "ModuleNotFoundError: No module named 'my_parts'"
    )
    with pytest.raises(ConfigError) as told:
        raise_missing_module(error)
    text = str(told.value)
    assert "machine 10.0.0.9" in text
    assert "No module named 'my_parts'" in text
    assert "engine.code" in text


def test_another_death_is_none_of_its_business():
    assert raise_missing_module(RayActorError(error_msg="killed")) is None
