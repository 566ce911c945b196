"""Features on disk: same numbers with and without, keys, costs, refusals."""

import json

import numpy as np
import pytest
import torch

from fedknow.client.data.benchmark import make_benchmark
from fedknow.client.feature_store import FeatureStore
from fedknow.client.features import FeatureStream, with_features
from fedknow.client.learners import LEARNERS, build_learner
from fedknow.protocols.config import ConfigError, read_config
from fedknow.simulations import simulate as simulations
from fedknow.simulations.simulate import simulate


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Reports take longer than these runs."""
    monkeypatch.setattr(simulations, "write_report", lambda *_: None)


FROZEN = {"name": "mlp", "layers": 2, "hidden": 12, "train": "head", "neck": 6}
DATA = {"name": "digits", "tasks": 2, "clients": 2, "samples": 0.15}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKNOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def experiment(learner="fedavg", **model):
    return read_config(
        {
            "data": DATA,
            "model": FROZEN | model,
            "learner": learner,
            "train": {"rounds": 1, "epochs": 2},
            "engine": {"backend": "inline"},
        }
    )


def stream_of(config):
    stream = make_benchmark(config)
    learner = build_learner(config, stream.spec, stream.classes)
    return stream, learner, with_features(stream, learner, config.model)


def arrays(folder):
    """Give all scores of a run."""
    with np.load(folder / "accuracy.npz") as scores:
        return {name: scores[name] for name in scores.files}


@pytest.mark.parametrize("name", ["er", "fedknow"])
def test_same_numbers_with_and_without(name, tmp_path, cache):
    scores = []
    for is_cached in (False, True):
        folder = tmp_path / str(is_cached)
        simulate(experiment(name, cache_features=is_cached), folder)
        scores.append(arrays(folder))
    plain, cached = scores
    assert list(cache.iterdir())
    assert plain.keys() == cached.keys()
    for key in plain:
        np.testing.assert_array_equal(plain[key], cached[key])


def test_files_are_found_again(cache):
    config = experiment(cache_features=True)
    _, _, stream = stream_of(config)
    features = stream.task(0, 0).train.x
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(files) == 1
    _, _, again = stream_of(config)
    assert torch.equal(again.task(0, 0).train.x, features)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files


@pytest.mark.parametrize("change", [{"hidden": 13}, {"layers": 1}])
def test_another_network_has_other_files(cache, change):
    stream_of(experiment(cache_features=True))[2].task(0, 0)
    stream_of(experiment(cache_features=True, **change))[2].task(0, 0)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "change", [{"neck": 7}, {"neck": 0, "random_features": 5}]
)
def test_parts_behind_the_network_share_its_file(cache, change, monkeypatch):
    config = experiment(cache_features=True)
    stream_of(config)[2].task(0, 0)
    plain, learner, stream = stream_of(experiment(cache_features=True, **change))
    x = plain.task(0, 0).train.x
    expected = learner.body.features(learner.images(x))
    with monkeypatch.context() as patch:
        # Nothing is computed but what stands behind the stored part.
        patch.setattr(stream._stored, "forward", None)
        assert torch.equal(stream.task(0, 0).train.x, expected)
    assert len(list(cache.iterdir())) == 1


def test_another_partition_finds_the_same_samples(cache, monkeypatch):
    config = experiment(cache_features=True)
    stream = stream_of(config)[2]
    for client in range(2):
        for task in range(2):
            stream.task(client, task)
    other = config.model_copy(
        update={"data": config.data.model_copy(update={"partition": "iid"})}
    )
    asked = []
    put = FeatureStore.put
    monkeypatch.setattr(
        FeatureStore,
        "put",
        lambda store, rows: (asked.append(len(rows)), put(store, rows)),
    )
    plain, learner, stream = stream_of(other)
    data = plain.task(0, 0).train
    expected = learner.body.features(learner.images(data.x))
    assert torch.equal(stream.task(0, 0).train.x, expected)
    # Some of them were in the first partition.
    assert sum(asked) < len(data) + len(plain.task(0, 0).test)


def test_a_damaged_file_is_computed_again(cache, caplog):
    config = experiment(cache_features=True)
    features = stream_of(config)[2].task(0, 0).train.x
    for path in cache.iterdir():
        path.write_bytes(b"broken")
    assert torch.equal(stream_of(config)[2].task(0, 0).train.x, features)
    assert "damaged features" in caplog.text


def test_a_full_disk_is_no_end(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FEDKNOW_CACHE", str(blocked))
    plain, learner, stream = stream_of(experiment(cache_features=True))
    x = learner.images(plain.task(0, 0).train.x)
    assert torch.equal(stream.task(0, 0).train.x, learner.body.features(x))
    assert "cannot be cached" in caplog.text


def test_operations_of_a_sample_by_hand():
    _, _, stream = stream_of(experiment(cache_features=True))
    assert isinstance(stream, FeatureStream)
    # Two products, of 64 x 12 and 12 x 12; a multiply-add is two.
    assert stream.sample_flops == 2 * (64 * 12 + 12 * 12)


def test_costs_do_not_depend_on_the_cache(tmp_path):
    flops = []
    for number in range(2):
        folder = tmp_path / str(number)
        simulate(experiment("fedrep", cache_features=True), folder)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        events = map(json.loads, lines)
        flops.append([event["flops"] for event in events if "flops" in event])
    assert any(flops[0])
    assert flops[0] == flops[1]


@pytest.mark.parametrize(
    ("learner", "model", "message"),
    [
        ("fedavg", {"train": "all"}, "no frozen part that comes first"),
        ("fedavg", {"train": "lora"}, "no frozen part that comes first"),
        ("co2l", {}, "makes images or changes them"),
    ],
)
def test_refusals(learner, model, message):
    assert learner in LEARNERS
    config = experiment(learner, cache_features=True, **model)
    with pytest.raises(ConfigError, match=message):
        build_learner(config, (1, 8, 8), 10)
