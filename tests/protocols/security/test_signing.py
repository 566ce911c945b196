import stat

import pytest
from typer.testing import CliRunner

from fedknow.cli.app import app
from fedknow.client.learners import resolve
from fedknow.client.permissions import Permissions
from fedknow.protocols.config import ConfigError, TrainConfig, read_config
from fedknow.protocols.security.signing import (
    PublicKey,
    canonical,
    make_key,
    read_signature,
    sign,
)


@pytest.fixture
def key(tmp_path):
    make_key(tmp_path / "owner.key")
    return tmp_path / "owner.key"


@pytest.fixture
def owner(key):
    return PublicKey(key.with_name("owner.key.pub"))


def experiment(*changes):
    return resolve(read_config({"name": "field"}, changes))


def signature(config, key, tmp_path):
    path = tmp_path / "signature"
    path.write_bytes(sign(config, key))
    return read_signature(path, config)


def test_what_was_signed_may_run_and_nothing_else(key, owner, tmp_path):
    config = experiment()
    good = signature(config, key, tmp_path)
    permissions = Permissions(signed_by=owner)
    permissions.check_signature(config, good)
    for other in ("train.epochs=7", "model=resnet18", "seed=5"):
        with pytest.raises(ConfigError, match="not of this experiment"):
            permissions.check_signature(experiment(other), good)
    for bad in (bytes(64), good[:-1], good[::-1]):
        with pytest.raises(ConfigError, match="not of this experiment"):
            permissions.check_signature(config, bad)
    with pytest.raises(ConfigError, match="this one is not signed"):
        permissions.check_signature(config, b"")
    Permissions().check_signature(config, b"")


def test_another_key_does_not_do(key, tmp_path):
    config = experiment()
    good = signature(config, key, tmp_path)
    make_key(tmp_path / "other.key")
    other = PublicKey(tmp_path / "other.key.pub")
    with pytest.raises(ConfigError, match=r"by the key other\.key\.pub"):
        other.check(config, good)


def test_a_round_cannot_change_what_was_signed(owner):
    permissions = Permissions(signed_by=owner)
    train = TrainConfig(epochs=2)
    permissions.check_work({"epochs": 2, "proximal-mu": 0.1}, train)
    with pytest.raises(ConfigError, match=r"signed train\.epochs = 2"):
        permissions.check_work({"epochs": 3}, train)
    Permissions().check_work({"epochs": 3}, train)


def test_what_means_nothing_to_a_client_is_not_signed():
    plain = canonical(experiment())
    for change in ("engine.workers=3", "data.dir=/srv", "engine.round_timeout=9"):
        assert canonical(experiment(change)) == plain
    # A client reads it from the server's text.
    config = experiment()
    import tomllib

    assert canonical(read_config(tomllib.loads(config.to_toml()))) == plain


def test_keys_are_private_and_never_overwritten(key):
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="cannot be made"):
        make_key(key)


def test_other_files_are_named(key, tmp_path):
    config = experiment()
    other = tmp_path / "other"
    other.write_text("{}")
    with pytest.raises(ConfigError, match="not a signature"):
        read_signature(other, config)
    with pytest.raises(ConfigError, match="not a public key"):
        PublicKey(other)
    with pytest.raises(ConfigError, match="not a private key"):
        sign(config, other)
    other.write_bytes(sign(config, key))
    with pytest.raises(ConfigError, match="of another experiment"):
        read_signature(other, experiment("seed=5"))


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "sign digits --key owner.key --make-key --set data.clients=2"
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output
    config = resolve(read_config({}, []))
    with pytest.raises(ConfigError, match="of another experiment"):
        read_signature(tmp_path / "digits.signature", config)
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 2
