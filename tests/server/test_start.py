"""Weights that a run starts from: what fits, what is refused, and what a run remembers."""

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fedknow
from fedknow.client.learners import (
    build_learner,
    learner_class,
    list_learners,
    resolve,
)
from fedknow.client.models import build_model
from fedknow.protocols.config import ConfigError, ModelConfig, read_config
from fedknow.server.assemble import Clients, assemble
from fedknow.server.run.checkpoint import load_checkpoint
from fedknow.server.start import pin_start, start_learner

SHAPE = (1, 8, 8)
CLASSES = 10
BASE = {
    "data": {"clients": 2, "tasks": 2, "classes_max": 2},
    "train": {"rounds": 1, "epochs": 1},
    "model": "mlp",
    "learner": "fedavg",
    "engine": {"backend": "inline"},
}


def state_dict(model="mlp", seed=7):
    """Of a model with other weights than a run's."""
    return build_model(ModelConfig(name=model), SHAPE, CLASSES, seed).state_dict()


@pytest.fixture
def written(tmp_path):
    """Write tensors into a file, by its ending."""

    def write(tensors, name="own.safetensors"):
        path = tmp_path / name
        if name.endswith(".safetensors"):
            save_file(dict(tensors), path)
        else:
            torch.save(tensors, path)
        return path

    return write


def experiment(path, *changes):
    return resolve(read_config(BASE, [f"start={path}", *changes]))


def started(config):
    """A learner that starts so."""
    learner = build_learner(config, SHAPE, CLASSES)
    return learner, start_learner(config, learner)


@pytest.mark.parametrize("name", ["own.safetensors", "own.pt", "checkpoint.pth"])
def test_the_global_model_is_the_files(written, name):
    own = state_dict()
    content = {"state_dict": own, "epoch": 3} if name.endswith("pth") else own
    path = written(content, name)
    learner, config = started(experiment(path))
    assert learner.send().keys() == own.keys()
    for key, value in learner.send().items():
        torch.testing.assert_close(value, own[key], rtol=0, atol=0)
    assert config.start.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert pin_start(config) == config


def test_half_precision_is_widened(written):
    own = {name: value.half() for name, value in state_dict().items()}
    learner, _ = started(experiment(written(own)))
    for key, value in learner.send().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, own[key].float(), rtol=0, atol=0)


def test_counters_of_batch_normalisation_start_anew(written):
    own = state_dict("resnet18")
    assert any(name.endswith("num_batches_tracked") for name in own)
    learner, _ = started(experiment(written(own), "model=resnet18"))
    assert torch.equal(learner.send()["head.weight"], own["head.weight"]), (
        "all else is taken"
    )


def test_what_is_left_out_is_drawn_from_the_seed(written):
    own = state_dict()
    own["head.weight"] = torch.zeros(3, 64)
    config = experiment(written(own), "start.without=head")
    learner, _ = started(config)
    drawn = build_learner(config, SHAPE, CLASSES).send()
    for name, value in learner.send().items():
        source = drawn if name.startswith("head.") else own
        assert torch.equal(value, source[name])


def without(own, name):
    return {key: value for key, value in own.items() if key != name}


CASES = {
    "a name too many": (
        lambda own: own | {"odd.weight": torch.zeros(1)},
        [],
        "the model has no odd.weight; .*add start.without=odd",
    ),
    "a name too few": (
        lambda own: without(own, "head.bias"),
        [],
        "it has no head.bias; .*by start.without=head",
    ),
    "another shape": (
        lambda own: own | {"head.bias": torch.zeros(3)},
        [],
        r"head.bias has shape \[3\], the model's is \[10\].*start.without=head",
    ),
    "not a number": (
        lambda own: own | {"head.bias": torch.full((10,), np.nan)},
        [],
        "head.bias is not made of finite floats",
    ),
    "integers": (
        lambda own: own | {"head.bias": torch.zeros(10, dtype=torch.int64)},
        [],
        "head.bias is not made of finite floats",
    ),
    "a head that clients keep": (
        lambda own: own,
        ["learner=fedrep"],
        "head.bias, head.weight would not reach .*add start.without=head",
    ),
    "a part that there is not": (
        lambda own: own,
        ["start.without=haed"],
        "start.without = 'haed': neither the model nor .* has such",
    ),
    "other bytes": (
        lambda own: own,
        [f"start.sha256={'0' * 64}"],
        "start.sha256 = '0{64}': .* has '[0-9a-f]{64}'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused(written, case):
    change, settings, words = CASES[case]
    path = written(change(state_dict()))
    with pytest.raises(ConfigError, match=words):
        started(experiment(path, *settings))


class Evil:
    """Unpickling it runs code."""

    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pt", Evil(), "not a state dict .*weights_only=True"),
        ("b.pt", [1, 2], "holds a list that is no state dict"),
        ("c.pt", {}, "holds a dict that is no state dict"),
        ("d.pt", {"w": 3}, "holds a dict that is no state dict"),
    ],
)
def test_a_torch_file_runs_no_code(written, name, content, words):
    path = written(content, name)
    with pytest.raises(ConfigError, match=words):
        started(experiment(path))


@pytest.mark.parametrize("name", ["odd.safetensors", "odd.pt"])
def test_a_file_of_another_kind_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"no weights at all")
    with pytest.raises(ConfigError, match=r"no safetensors file|no state|not a"):
        started(experiment(tmp_path / name))


def test_without_a_file_or_a_round_it_is_refused_before_the_run(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        fedknow.simulate(BASE, start=tmp_path / "none.pt", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="does nothing without weights"):
        read_config(BASE, ["start.without=head"])


def test_frozen_parameters_must_be_the_models_own(written, monkeypatch):
    def frozen(shape, classes):
        model = build_model(ModelConfig(name="mlp"), shape, classes, 0)
        next(model.parameters()).requires_grad_(False)
        return model

    own = frozen(SHAPE, CLASSES).state_dict()
    config = fedknow.experiment(BASE, model=frozen)
    key = next(iter(own))
    path = written({name: value + 1.0 for name, value in own.items()})
    changed = fedknow.experiment(config, start=path)
    with pytest.raises(ConfigError, match=f"{key} is frozen in the model"):
        started(resolve(changed))
    same = written(
        {name: value + (name != key) for name, value in own.items()},
        "b.safetensors",
    )
    learner, _ = started(resolve(fedknow.experiment(config, start=same)))
    assert key not in learner.send()


@pytest.mark.parametrize("name", sorted(list_learners()))
def test_every_learner_starts_so_or_says_why_not(written, name):
    trained = learner_class(name).model_train
    scenario = learner_class(name).scenarios[0]
    keys = [f"learner={name}", "model=cnn", f"model.train={trained}"]
    keys.append(f"data.scenario={scenario}")
    config = resolve(read_config(BASE, keys))
    drawn = build_learner(config, SHAPE, CLASSES).send()
    own = {key: value + 0.5 for key, value in drawn.items()}
    if not own:
        own = {"head.bias": torch.zeros(CLASSES)}
    config = resolve(read_config(BASE, [*keys, f"start={written(own)}"]))
    if not drawn:
        with pytest.raises(ConfigError, match="would not reach the clients"):
            started(config)
        return
    learner, _ = started(config)
    assert all(
        torch.equal(value, own[key]) for key, value in learner.send().items()
    )


# --- runs


@pytest.fixture(scope="module")
def former(tmp_path_factory):
    out = tmp_path_factory.mktemp("former") / "run"
    return fedknow.simulate(BASE, out=out)


def test_a_run_starts_from_a_former_run(former, tmp_path):
    run = fedknow.simulate(BASE, start=former, seed=1, out=tmp_path / "run")
    assert run.status == "complete"
    start = run.config.start
    assert start.weights == str(former.path)
    arrays = load_checkpoint(former.path / "checkpoint").arrays
    parts = assemble(run.config, Clients.VIRTUAL)
    for name, value in parts.learner.send().items():
        np.testing.assert_array_equal(value.numpy(), arrays[name])
    with pytest.raises(ConfigError, match=r"start\.without=head"):
        fedknow.simulate(
            BASE, start=former, learner="fedrep", out=tmp_path / "other"
        )


def test_an_exported_model_is_weights_too(former, tmp_path):
    path = former.deployed().export(tmp_path / "model", "safetensors")
    learner, _ = started(experiment(path))
    arrays = load_checkpoint(former.path / "checkpoint").arrays
    for name, value in learner.send().items():
        np.testing.assert_array_equal(value.numpy(), arrays[name])


def test_weights_that_changed_stop_a_resumption(written, tmp_path):
    path = written(state_dict())

    class Stop(fedknow.Callback):
        def on_round_end(self, event):
            raise fedknow.StopRun

    options = {"start": path, "out": tmp_path / "run"}
    run = fedknow.simulate(BASE, callbacks=[Stop()], **options)
    assert run.status != "complete"
    assert len(run.config.start.sha256) == 64
    written(state_dict(seed=8))
    with pytest.raises(
        ConfigError, match=r"start\.sha256: was '[0-9a-f]{64}', now"
    ):
        fedknow.simulate(BASE, resume=True, **options)
    # The same bytes may lie elsewhere.
    moved = written(state_dict(), "moved.safetensors")
    options["start"] = moved
    assert fedknow.simulate(BASE, resume=True, **options).status == "complete"


def test_a_comparison_starts_every_method_so(written, tmp_path):
    options = {"start": written(state_dict()), "out": tmp_path / "compared"}
    learners = ["fedavg", "finetune"]
    compared = fedknow.compare(BASE, learners, seeds=1, **options)
    assert not compared.failures
    sums = {run.config.start.sha256 for run in compared.runs.values()}
    assert len(sums) == 1
    # It is read again, and the checksum says that it is the same.
    again = fedknow.compare(BASE, learners, seeds=1, **options)
    assert again.runs.keys() == compared.runs.keys()
    written(state_dict(seed=9))
    with pytest.raises(ConfigError, match=r"start\.sha256: was"):
        fedknow.compare(BASE, learners, seeds=1, **options)


def test_clients_are_not_told_of_the_servers_files(written):
    path = written(state_dict())
    _, config = started(experiment(path))
    assert str(path) in config.to_toml()
    assert "start" not in config.for_clients().to_toml()
