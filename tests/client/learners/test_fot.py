"""FOT, both halves: subspaces by hand, sketches, and old tasks' features that do not move."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners import resolve
from fedknow.client.learners.base import Round
from fedknow.client.learners.fot import Fot, FotSettings, inputs, layers
from fedknow.client.models import SplitModel
from fedknow.protocols.config import ConfigError, TrainConfig, read_config
from fedknow.server.run_folder import RunFolder
from fedknow.simulations import simulate as simulations
from fedknow.simulations.simulate import simulate
from fedknow.strategies.fot import extend, project

SGD = TrainConfig(epochs=2, batch_size=8, optimizer="sgd", lr=0.1, weight_decay=0.0, channels_last=False)
NOTHING = torch.zeros(3, 0, dtype=torch.float64)


def diagonal(*values: float) -> torch.Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def test_subspace_by_hand():
    """Energies 9, 1 and 0: nine tenths are held by one direction, all by two; a new task's are measured by the rest."""
    one = extend(NOTHING, diagonal(3, 1, 0), 0.9)
    assert one.abs().tolist() == [[1], [0], [0]]
    assert extend(NOTHING, diagonal(3, 1, 0), 0.91).shape == (3, 2)
    assert extend(NOTHING, diagonal(3, 1, 0), 1.0).shape == (3, 2)
    # The basis holds 9 of 9 + 4 + 4: the next direction is needed for a half, both for more than 13/17.
    assert extend(one, diagonal(3, 2, 2), 0.5).shape == (3, 1)
    assert extend(one, diagonal(3, 2, 2), 0.7).shape == (3, 2)
    assert extend(one, diagonal(3, 2, 2), 0.8).shape == (3, 3)
    assert extend(torch.eye(3, dtype=torch.float64), diagonal(1, 1, 1), 1.0).shape == (3, 3)
    update = torch.tensor([[3.0, 4.0, 5.0]], dtype=torch.float64)
    assert project(update, one).tolist() == [[0, 4, 5]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), threshold=st.floats(0.1, 1.0), tasks=st.integers(1, 4))
def test_updates_leave_past_inputs_alone(seed, threshold, tasks):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.zeros(6, 0, dtype=torch.float64)
    for _ in range(tasks):
        inputs = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        before, basis = basis, extend(basis, inputs @ torch.randn(2, 6, generator=generator).double(), threshold)
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-9)
        assert torch.allclose(basis @ (basis.T @ before), before, atol=1e-9)  # nothing learned is lost
    update = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    left = project(update, basis)
    assert torch.allclose(left @ basis, torch.zeros(4, basis.shape[1], dtype=torch.float64), atol=1e-9)
    if threshold == 1.0:
        assert torch.allclose(left @ inputs, torch.zeros(4, 2, dtype=torch.float64), atol=1e-9)


def test_inputs_are_what_layers_multiply():
    """W [x; 1] is what the layer gives, for a padded, strided convolution and for a linear layer."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4, bias=False))
    found = layers(body)
    x = torch.randn(5, 2, 6, 6)
    with inputs(found, 0, torch.Generator()) as seen, torch.no_grad():
        middle = body[0](x)
        out = body(x)
    conv, linear = found["0"], found["3"]
    rows = torch.cat([conv.weight.flatten(1), conv.bias[:, None]], 1)
    assert torch.allclose(rows @ seen["0"], middle.transpose(0, 1).flatten(1), atol=1e-5)
    assert torch.allclose(linear.weight @ seen["3"], out.T, atol=1e-5)
    assert not conv._forward_pre_hooks


def test_sketches_span_the_inputs(tiny_model, tiny_task):
    learner = Fot(tiny_model(), SGD, FotSettings(patches=0))
    data = tiny_task(0)
    shared = learner.share(data, Round(0, 5), ended=True)
    declared = learner.shares(ended=True)
    assert {name: ("float32", tuple(value.shape)) for name, value in shared.items()} == declared
    assert declared == {"0": ("float32", (2, 2)), "2": ("float32", (13, 13))}
    assert learner.share(data, Round(1, 5), ended=False) == learner.shares(ended=False) == {}
    with inputs(learner.layers, 0, torch.Generator()) as seen, torch.no_grad():
        learner.body(data.train.x)
    for name, x in seen.items():
        basis = extend(torch.zeros(len(x), 0, dtype=torch.float64), shared[name].double(), 1.0)
        assert torch.allclose(basis @ (basis.T @ x.double()), x.double(), atol=1e-4)
    again = learner.share(data, Round(0, 5), ended=True)
    assert all(torch.equal(value, again[name]) for name, value in shared.items())


def test_energy_of_a_sketch_is_that_of_the_inputs():
    """E |X Omega|^2 = m |X|^2: what the threshold is compared by."""
    learner = Fot(
        SplitModel(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), nn.Linear(3, 2)), SGD, FotSettings(columns=5)
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1, 2, 2, generator=generator)
    data = TaskData(0, (0, 1), (0, 1), Split(x, torch.zeros(300).long()), Split(x, torch.zeros(300).long()))
    energies = [learner.share(data, Round(0, seed), True)["1"].square().sum() / 5 for seed in range(200)]
    assert torch.stack(energies).mean().item() == pytest.approx(x.square().sum().item() + 300, rel=0.05)


def test_bodies_with_other_parameters_are_refused(tiny_model):
    with pytest.raises(ConfigError, match="its body has BatchNorm1d"):
        Fot(tiny_model(norm=True), SGD, FotSettings())
    with pytest.raises(ConfigError, match="has no layers to project"):
        Fot(SplitModel(nn.Flatten(), nn.Linear(4, 6)), SGD, FotSettings())


BASE = {
    "data": {"clients": 3, "tasks": 2, "classes_per_task": 2, "classes_max": 2, "test_samples": 1.0, "samples": 0.3},
    "model": {"name": "mlp", "hidden": 96, "layers": 1},
    "train": {"rounds": 2, "epochs": 2, "batch_size": 16, "lr": 1e-2},
    "evaluation": {"every": 1},
    "engine": {"backend": "inline"},
}


@pytest.mark.parametrize("threshold", [1.0, 0.9])
def test_a_run_forgets_nothing_where_all_energy_is_held(tmp_path, monkeypatch, threshold):
    """Under epsilon = 1 the features of the first task's samples, and with them its accuracy, cannot change."""
    monkeypatch.setattr(simulations, "write_report", lambda *_: None)  # it takes longer than the run
    changes = [f"learner.threshold={threshold}", "learner.columns=100"]
    config = resolve(read_config({**BASE, "learner": {"name": "fot"}}, changes))
    assert config.strategy.name == "fot"
    assert config.strategy.options["threshold"] == threshold
    folder = simulate(config, tmp_path / "run").folder
    run = RunFolder.open(folder)
    ends = [event for event in run.events() if event["event"] == "task_end"]
    assert [event["knowledge_bytes"] for event in ends] == [0.0, 0.0]
    accuracy = run.accuracy()["personal"]
    if threshold == 1.0:
        # Test samples are others than those the subspace was taken from, but 108 of them span nearly all of it.
        assert accuracy[:, 0, 1] == pytest.approx(accuracy[:, 0, 0], abs=0.02)
    assert np.nanmean(accuracy[:, 1, 1]) > 0.7  # and still there was room to learn the second task
