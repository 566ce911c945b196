"""States at a storage URL: as in a folder, and a place that fails is no lost state."""

import sys
from pathlib import Path

import pytest
import torch

from fedknow.client.state import StateError, StateLost
from fedknow.client.state.remote import UrlFiles, check_url, open_states
from fedknow.protocols.config import ConfigError, ExperimentConfig


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    place = tmp_path if request.param == "file" else f"/{tmp_path.name}"
    yield f"{request.param}://{place}/states"
    UrlFiles(f"{request.param}://{place}/states").remove()


def stored(url):
    files = UrlFiles(url)
    return sorted(path.name for path in files.list(files.root))


def test_states_come_back_in_another_process_of_the_run(url):
    store = open_states(url, 2**20)
    past = torch.arange(30_000)
    for client in (3, 1500):
        store.save(client, 1, {"past": past, "n": 1})
        store.save(client, 2, {**store.load(client, 1), "n": 2})
        store.save(client, 3, {**store.load(client, 2), "n": 3})
    again = open_states(url, 0)
    for client in (3, 1500):
        assert torch.equal(again.load(client, 3)["past"], past)
        assert again.load(client, 3)["n"] == 3
        assert again.load(client, 0) == {}
    with pytest.raises(StateLost, match="no such client state"):
        again.load(3, 9)
    again.prune({3: 3, 1500: 3})
    again.settle()
    assert stored(url) == [
        "000003-2.part.safetensors",
        "000003-3.safetensors",
        "001500-2.part.safetensors",
        "001500-3.safetensors",
    ]
    assert torch.equal(open_states(url, 0).load(1500, 3)["past"], past)
    UrlFiles(url).remove()
    assert stored(url) == []


def test_a_damaged_state_is_lost_and_a_place_that_fails_is_not(url, monkeypatch):
    store = open_states(url, 0)
    store.save(0, 1, {"n": 1})
    files = UrlFiles(url)
    files.write(store.path(0, 2), files.read(store.path(0, 1)))
    with pytest.raises(StateLost, match="holds another client or another ver"):
        store.load(0, 2)

    def fail(path):
        raise TimeoutError("the network is down")

    monkeypatch.setattr(store._files._fs, "cat_file", fail)
    with pytest.raises(StateError, match="the network is down") as told:
        store.load(0, 1)
    assert not isinstance(told.value, StateLost)
    assert "engine.states" in str(told.value)


def test_a_place_is_tried_before_the_run(url, tmp_path):
    check_url(url)
    assert stored(url) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="may read and write"):
        check_url(f"file://{tmp_path}/file/states")


def test_a_scheme_without_a_package_is_refused_by_name(monkeypatch):
    with pytest.raises(ConfigError, match=r"engine\.states = 'nonsense://x'.*"):
        check_url("nonsense://x")
    # None in this table is how Python says that there is no such module.
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"engine\.states = 's3://b/x'.*s3fs"):
        check_url("s3://b/x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match="the package fsspec is missing"):
        check_url("memory://x")


def test_memory_goes_with_one_process_and_other_words_are_no_urls():
    with pytest.raises(ValueError, match=r"engine\.backend = 'inline'"):
        ExperimentConfig(engine={"states": "memory://x"})
    ExperimentConfig(engine={"states": "memory://x", "backend": "inline"})
    with pytest.raises(ValueError, match="states"):
        ExperimentConfig(engine={"states": str(Path("runs"))})
