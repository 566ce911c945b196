"""Weights from files: read without running code, refused where they do not fit."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from fedknow.client.models import build_model
from fedknow.client.permissions import Permissions
from fedknow.protocols.config import ConfigError, ModelConfig, read_config

SHAPE = (1, 4, 4)


def build(weights="", seed=0, name="mlp", **options):
    config = ModelConfig(name=name, weights=weights, **options)
    return build_model(config, SHAPE, 3, seed)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_body_comes_back(tmp_path, suffix):
    path = tmp_path / f"body{suffix}"
    saved = build(seed=1).body.state_dict()
    save_file(saved, path) if suffix == ".safetensors" else torch.save(
        saved, path
    )
    model = build(f"file:{path}", seed=2)
    for name, value in model.body.state_dict().items():
        assert torch.equal(value, saved[name])
    # The head stays fresh.
    assert torch.equal(model.head.weight, build(seed=2).head.weight)


class Malicious:
    def __reduce__(self):
        return print, ("ran",)


def test_no_code_is_run(tmp_path, capsys):
    path = tmp_path / "body.pt"
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ConfigError, match="cannot be read"):
        build(f"file:{path}")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(1)}, "weights of another network"),
        ([1, 2], "holds no state dict"),
        (
            build(hidden=8).body.state_dict(),
            r"is \[8, 16\], and .* needs \[64, 16\]",
        ),
    ],
)
def test_other_weights(tmp_path, content, message):
    path = tmp_path / "body.pt"
    torch.save(content, path)
    with pytest.raises(ConfigError, match=message):
        build(f"file:{path}")


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.pt cannot be read"):
        build(f"file:{tmp_path}/missing.pt")


def test_no_package():
    with pytest.raises(ConfigError, match="no Python package is known"):
        build("package")
    with pytest.raises(ConfigError, match="takes 'file:PATH'"):
        build("internet")


def test_a_server_names_no_file_unless_the_owner_allows_it():
    weights = "file:/etc/passwd"
    config = read_config({"model": {"name": "mlp", "weights": weights}})
    with pytest.raises(ConfigError, match="--allow file:/etc/passwd"):
        Permissions().check(config)
    Permissions(parts=frozenset({weights})).check(config)
