"""Learners on the device that :mod:`pretend` makes of the CPU; in a process of its own, run by
``test_device.py``.

PyTorch counts devices when it first takes a gradient, so this one must be there before.
"""

import numpy as np
import pretend
import pytest
import torch
from safetensors.numpy import load_file

from fedknow.client import workbench
from fedknow.client.capacity import clients_at_once
from fedknow.client.compute.device import DeviceTransfer
from fedknow.client.learners import (
    build_learner,
    learner_class,
    list_learners,
    resolve,
)
from fedknow.protocols.config import read_config
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.simulate import simulate

DEVICE = pretend.set_up()
BASE = {
    "data": {
        "clients": 2,
        "tasks": 3,
        "classes_per_task": 2,
        "classes_max": 2,
        "samples": 0.04,
        "test_samples": 0.1,
    },
    "model": {"name": "cnn"},
    "train": {"rounds": 1, "epochs": 1, "batch_size": 8, "lr": 1e-3},
    "engine": {"backend": "inline"},
}
SHORT = {
    "target": ["learner.generator_steps=3", "learner.student_steps=1"],
    "lander": ["learner.generator_steps=3", "learner.student_steps=1"],
    "co2l": ["learner.head_epochs=2"],
}
OTHER_WAYS = [
    [
        "learner=finetune",
        "train.optimizer=sgd",
        "train.momentum=0.9",
        "train.clip_norm=1",
        "train.channels_last=false",
    ],
    ["learner=finetune", "model=resnet18", "data.tasks=1"],
    [
        "learner=local",
        "data.tasks=2",
        "evaluation.every=1",
        "evaluation.forward=true",
    ],
    ["learner=fedper", "engine.vectorize=on", "data.clients=5"],
    [
        "learner=fedprox",
        "engine.vectorize=on",
        "data.clients=5",
        "train.clip_norm=1",
    ],
    [
        "learner=fedknow",
        "learner.path=full",
        "learner.labels=hard",
        "learner.extract_from=global",
    ],
    [
        "learner=fedknow",
        "learner.k=1",
        "learner.candidates=1",
        "learner.post_aggregation=first-epoch",
        "train.rounds=2",
    ],
    [
        "learner=fedknow",
        "learner.k=1",
        "learner.wasserstein=positions",
        "learner.integrator=surrogate",
    ],
    ["learner=fedknow", "learner.integrator=online", "learner.margin=0.1"],
    ["learner=fedknow", "learner.integrator=bounded", "learner.tolerance=0.01"],
    [
        "learner=fedknow",
        "model=mlp",
        "learner.restore_from=0.5",
        "learner.integrator=sum",
    ],
    ["learner=ewc", "learner.labels=expected", "learner.anchor=local"],
    ["learner=er", "learner.keep=reservoir"],
    ["learner=fedweit", "learner.mask_sparsity=0.001", "train.clip_norm=1"],
    ["learner=fot", "learner.columns=16"],
]


@pytest.fixture
def on_device(monkeypatch):
    """Nodes work on the device from now on."""

    def use():
        monkeypatch.setattr(workbench, "find_device", lambda name: DEVICE)

    return use


def numbers(folder):
    """All that a run came to: raw accuracies, the final parameters, and what clients said of each
    round."""
    run = RunFolder.open(folder)
    [arrays] = folder.glob("checkpoint/checkpoint-*/arrays.safetensors")
    told = {
        f"{event['task']} {event['round']} {name}": value
        for event in run.events()
        if event["event"] == "round"
        for name, value in event["metrics"].items()
        if name != "seconds"
        and not name.startswith("memory-")  # whose storages are another kind's
    }
    return run.accuracy() | load_file(arrays) | told


def assert_same_on_both(tmp_path, on_device, *changes):
    config = resolve(read_config(BASE, changes))
    simulate(config, tmp_path / "cpu", report=False)
    on_device()
    simulate(config, tmp_path / "device", report=False)
    expected, found = numbers(tmp_path / "cpu"), numbers(tmp_path / "device")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("name", list_learners())
def test_learners_come_to_the_same(tmp_path, on_device, name):
    """Bit for bit, with states that pass through a store, which is on the CPU."""
    scenarios = learner_class(name).scenarios
    scenario = scenarios[min(1, len(scenarios) - 1)]
    assert_same_on_both(
        tmp_path,
        on_device,
        f"learner={name}",
        f"data.scenario={scenario}",
        # A frozen layer takes samples one by one on the CPU alone, so bits may differ.
        *["model=linear"] * learner_class(name).needs_frozen_body,
        *["model.train=lora"] * (learner_class(name).model_train == "lora"),
        *SHORT.get(name, []),
    )


@pytest.mark.slow
@pytest.mark.parametrize("changes", OTHER_WAYS, ids=" ".join)
def test_their_settings_do_too(tmp_path, on_device, changes):
    assert_same_on_both(tmp_path, on_device, *changes)


def test_mixing_devices_is_found_out():
    """What these tests are worth."""
    here, there = torch.ones(2), torch.ones(2).to(DEVICE)
    for wrong in (
        lambda: here + there,
        lambda: torch.cat([there, here]),
        lambda: there.add_(here),
        there.numpy,
    ):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    index, index_there = torch.tensor([1]), torch.tensor([1]).to(DEVICE)
    for wrong in (
        lambda: here[index_there],
        lambda: here.index_put_((index,), there[index]),
        lambda: there.index_put_((index,), torch.ones(1)),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    with pytest.raises(RuntimeError):
        torch.randperm(3, generator=torch.Generator(), device=DEVICE)
    assert torch.equal(
        (there[torch.tensor([1])] + torch.tensor(1.0)).cpu(), torch.tensor([2.0])
    )


def test_what_was_not_written_to_comes_back_as_it_was():
    border = DeviceTransfer(DEVICE)
    state = {
        "kept": [torch.zeros(2), torch.zeros(2)],
        "count": 3,
        "nested": {"x": torch.ones(1)},
    }
    inside = border.enter(state)
    assert {
        tensor.device for tensor in (*inside["kept"], inside["nested"]["x"])
    } == {DEVICE}
    inside["kept"][0].add_(1)
    inside["new"] = inside["nested"]["x"] + 1
    outside = border.leave(inside)
    assert outside["kept"][0].tolist() == [1, 1]
    assert state["kept"][0].tolist() == [0, 0]
    assert outside["kept"][1] is state["kept"][1]
    assert outside["nested"]["x"] is state["nested"]["x"]
    assert (
        outside["new"].device.type,
        outside["new"].item(),
        outside["count"],
    ) == (
        "cpu",
        2,
        3,
    )


@pytest.mark.parametrize(("free", "clients"), [(2**40, 128), (0, 1)])
def test_memory_bounds_clients_at_once(monkeypatch, free, clients):
    monkeypatch.setattr(torch.pretend, "free", free)
    learner = build_learner(
        read_config({}, ["learner=finetune", "model=cnn"]),
        (3, 32, 32),
        100,
        DEVICE,
    )
    assert clients_at_once(learner, "auto", (3, 32, 32)) == clients
    assert clients_at_once(learner, "off", (3, 32, 32)) == 1
