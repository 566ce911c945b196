"""FOT: subspaces by hand, their energy, and features that do not move."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners import resolve
from fedknow.client.learners.fot import Fot, FotSettings, inputs, layers
from fedknow.client.learners.frames.learner import Round
from fedknow.client.models import SplitModel
from fedknow.protocols.config import ConfigError, TrainConfig, read_config
from fedknow.protocols.messages import EXTRA, Arrays, Message
from fedknow.server.run.folder import RunFolder
from fedknow.simulations import simulate as simulations
from fedknow.simulations.simulate import simulate
from fedknow.strategies.fot import Fot as FotStrategy
from fedknow.strategies.paired import Setup
from fedknow.strategies.subspaces import ROUNDING, extend, project

SGD = TrainConfig(
    epochs=2,
    batch_size=8,
    optimizer="sgd",
    lr=0.1,
    weight_decay=0.0,
    channels_last=False,
)
NOTHING = torch.zeros(3, 0, dtype=torch.float64)


def energies(*values: float) -> torch.Tensor:
    """The second moment of inputs whose principal directions are the axes."""
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def test_subspace_by_hand():
    """Energies 9, 1 and 0: nine tenths are held by one direction, all by two; a new task's are
    measured by the rest."""
    one = extend(NOTHING, energies(9, 1, 0), 0.9)
    assert one.abs().tolist() == [[1], [0], [0]]
    assert extend(NOTHING, energies(9, 1, 0), 0.91).shape == (3, 2)
    assert extend(NOTHING, energies(9, 1, 0), 1.0).shape == (3, 2)
    # The basis holds 9 of 9 + 4 + 4: the next direction is needed for more than that, both for
    # more than 13/17.
    assert extend(one, energies(9, 4, 4), 0.5).shape == (3, 1)
    assert extend(one, energies(9, 4, 4), 0.7).shape == (3, 2)
    assert extend(one, energies(9, 4, 4), 0.8).shape == (3, 3)
    assert extend(
        torch.eye(3, dtype=torch.float64), energies(1, 1, 1), 1.0
    ).shape == (
        3,
        3,
    )
    update = torch.tensor([[3.0, 4.0, 5.0]], dtype=torch.float64)
    assert project(update, one).tolist() == [[0, 4, 5]]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    threshold=st.just(1.0) | st.floats(0.1, 1.0),
    tasks=st.integers(1, 4),
)
def test_updates_leave_past_inputs_alone(seed, threshold, tasks):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.zeros(6, 0, dtype=torch.float64)
    for _ in range(tasks):
        inputs = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        before, basis = basis, extend(basis, inputs @ inputs.T, threshold)
        assert torch.allclose(
            basis.T @ basis,
            torch.eye(basis.shape[1], dtype=torch.float64),
            atol=1e-9,
        )
        assert torch.allclose(
            basis @ (basis.T @ before), before, atol=1e-9
        )  # nothing learned is lost
        energy = inputs.square().sum()
        assert (basis.T @ inputs).square().sum() >= (
            threshold - 6 * ROUNDING
        ) * energy
    update = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    left = project(update, basis)
    assert torch.allclose(
        left @ basis,
        torch.zeros(4, basis.shape[1], dtype=torch.float64),
        atol=1e-9,
    )
    if (
        threshold == 1.0
    ):  # what is left of an input is at most what is taken for rounding
        assert (left @ inputs).norm() <= update.norm() * (
            6 * ROUNDING * energy
        ).sqrt()


SPECTRA = {
    "flat": lambda i: 1 + 0 * i,
    "slow": lambda i: i**-0.5,
    "fast": lambda i: 0.7**i,
}


def linear(d: int, **changes) -> Fot:
    """A learner whose only layer has the images as inputs."""
    return Fot(
        SplitModel(
            nn.Sequential(nn.Flatten(), nn.Linear(d, 3, bias=False)),
            nn.Linear(3, 2),
        ),
        SGD,
        FotSettings(**changes),
    )


def drawn_inputs(
    d: int, count: int, spectrum: str, generator: torch.Generator
) -> torch.Tensor:
    """X, float [d, count]: inputs with this spectrum and random directions."""
    axes, _ = torch.linalg.qr(torch.randn(d, d, generator=generator))
    return axes @ (
        SPECTRA[spectrum](torch.arange(1.0, d + 1))[:, None]
        * torch.randn(d, count, generator=generator)
    )


def bases_after(
    learner: Fot, tasks: list[list[torch.Tensor]]
) -> list[torch.Tensor]:
    """The server's subspace after each task, from the clients' inputs [d, n]."""
    strategy = FotStrategy(**learner.strategy_options(learner.settings))
    strategy.prepare(Setup(None, learner, None))
    found = []
    for task, clients in enumerate(tasks):
        replies = []
        for client, x in enumerate(clients):
            images = Split(
                x.T.reshape(-1, 1, 1, len(x)), torch.zeros(x.shape[1]).long()
            )
            shared = learner.share(
                TaskData(task, (0, 1), (0, 1), images, images),
                Round(0, 100 * task + client),
                True,
            )
            assert {
                name: ("float32", tuple(value.shape))
                for name, value in shared.items()
            } == learner.shares(True)
            extra = Arrays(
                (name, value.numpy()) for name, value in shared.items()
            )
            replies.append(
                Message("train.end_task", client, "", content={EXTRA: extra})
            )
        strategy.aggregate_end_task(task, Arrays(), replies)
        found.append(torch.tensor(strategy.state_dict()["1"]))
    return found


def held(basis: torch.Tensor, clients: list[torch.Tensor]) -> float:
    """|U^T X|^2 / |X|^2."""
    x = torch.cat(clients, 1).double()
    return ((basis.T @ x).square().sum() / x.square().sum()).item()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    d=st.integers(1, 60),
    counts=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    spectrum=st.sampled_from(sorted(SPECTRA)),
    threshold=st.floats(0.3, 0.999),
)
def test_subspaces_hold_the_energy_asked_for_and_no_more(
    seed, d, counts, spectrum, threshold
):
    """Over both halves, as float32 on the way; one direction less would not do."""
    generator = torch.Generator().manual_seed(seed)
    tasks = [
        [drawn_inputs(d, count, spectrum, generator) for count in counts]
        for _ in range(2)
    ]
    first, second = bases_after(linear(d, threshold=threshold), tasks)
    assert held(first, tasks[0]) >= threshold - 1e-4
    assert held(first[:, :-1], tasks[0]) < threshold + 1e-4
    assert held(second, tasks[1]) >= threshold - 1e-4
    assert held(second, tasks[0]) >= threshold - 1e-4
    if second.shape[1] > first.shape[1]:
        assert held(second[:, :-1], tasks[1]) < threshold + 1e-4


def left_out(
    basis: torch.Tensor, clients: list[torch.Tensor]
) -> tuple[float, float]:
    """What share of the energy a basis leaves out, and the standard error of measuring that on 25
    columns."""
    x = torch.cat(clients, 1).double()
    rest = (
        torch.linalg.svdvals(x - basis @ (basis.T @ x)).square()
        / x.square().sum()
    )
    return rest.sum().item(), (2 / 25 * rest.square().sum()).sqrt().item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spectrum", ["slow", "fast"])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_subspaces_of_sketches_hold_it_up_to_the_error_of_measuring(
    seed, spectrum, threshold, caplog
):
    """Four standard errors; of one direction less likewise."""
    generator = torch.Generator().manual_seed(seed)
    learner = linear(400, threshold=threshold, columns=200)
    assert learner.shares(True) == {
        "1": ("float32", (400, 200)),
        "1.energy": ("float32", (1,)),
    }
    tasks = [
        [drawn_inputs(400, count, spectrum, generator) for count in (500, 300)]
        for _ in range(2)
    ]
    for basis, clients in zip(bases_after(learner, tasks), tasks, strict=True):
        left, error = left_out(basis, clients)
        assert left <= 1 - threshold + 4 * error
        more, error = left_out(basis[:, :-1], clients)
        assert more >= 1 - threshold - 4 * error
    assert not told(caplog)


def told(caplog) -> list[str]:
    """The strategy's warnings."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "fedknow.strategies.subspaces"
    ]


def test_sketches_span_the_inputs(caplog):
    """Where these have fewer directions than the sketch, all is held, and nothing besides."""
    x = drawn_inputs(64, 20, "flat", torch.Generator().manual_seed(0))
    (basis,) = bases_after(
        linear(64, threshold=1.0, columns=32), [[x[:, :12], x[:, 12:]]]
    )
    assert basis.shape == (64, 20)
    assert torch.allclose(basis @ (basis.T @ x.double()), x.double(), atol=1e-4)
    assert not told(caplog)


def test_sketches_that_are_too_narrow_are_told_of(caplog):
    generator = torch.Generator().manual_seed(0)
    clients = [drawn_inputs(64, 300, "flat", generator)]
    (basis,) = bases_after(linear(64, threshold=0.9, columns=32), [clients])
    assert basis.shape == (64, 28)
    (message,) = told(caplog)
    assert message.startswith("FOT: the sketch's 28 directions hold about 0.")
    assert "not the 0.9 asked for; raise learner.columns = 32" in message


def test_epsilon_grows_by_what_is_asked_up_to_one():
    """Of energies 6, 3 and 1, one direction holds 0.6, two hold 0.8, three all."""
    x = torch.diag(torch.tensor([6.0, 3.0, 1.0]).sqrt())
    learner = linear(3, threshold=0.55, increase=0.2)
    assert [basis.shape[1] for basis in bases_after(learner, [[x]] * 4)] == [
        1,
        2,
        3,
        3,
    ]


def test_inputs_are_what_layers_multiply():
    """W [x; 1] equals the layer, a padded, strided convolution or a linear one."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(27, 4, bias=False),
    )
    found = layers(body)
    x = torch.randn(5, 2, 6, 6)
    with inputs(found, 0, torch.Generator()) as seen, torch.no_grad():
        middle = body[0](x)
        out = body(x)
    conv, linear = found["0"], found["3"]
    rows = torch.cat([conv.weight.flatten(1), conv.bias[:, None]], 1)
    assert torch.allclose(
        rows @ seen["0"], middle.transpose(0, 1).flatten(1), atol=1e-5
    )
    assert torch.allclose(linear.weight @ seen["3"], out.T, atol=1e-5)
    assert not conv._forward_pre_hooks


def test_what_is_sent_is_the_second_moment(tiny_model, tiny_task):
    learner = Fot(tiny_model(), SGD, FotSettings(patches=0))
    data = tiny_task(0)
    shared = learner.share(data, Round(0, 5), ended=True)
    declared = learner.shares(ended=True)
    assert {
        name: ("float32", tuple(value.shape)) for name, value in shared.items()
    } == declared
    assert declared == {"0": ("float32", (3,)), "2": ("float32", (91,))}
    assert (
        learner.share(data, Round(1, 5), ended=False)
        == learner.shares(ended=False)
        == {}
    )
    with inputs(learner.layers, 0, torch.Generator()) as seen, torch.no_grad():
        learner.body(data.train.x)
    for name, x in seen.items():
        rows, columns = torch.triu_indices(len(x), len(x))
        assert torch.allclose(
            shared[name], (x @ x.T)[rows, columns], rtol=1e-4, atol=1e-4
        )
    again = learner.share(data, Round(0, 5), ended=True)
    assert all(torch.equal(value, again[name]) for name, value in shared.items())


def test_which_layers_are_sketched():
    """Those whose triangle, d (d + 1) / 2, is more than m columns; by default not the 6-layer
    CNN's 2049."""
    declared = {
        d: {name: shape for name, (_, shape) in linear(d).shares(True).items()}
        for d in (2049, 2559, 2560)
    }
    assert declared[2049] == {"1": (2_100_225,)}
    assert declared[2559] == {"1": (2559 * 1280,)}
    assert declared[2560] == {"1": (2560, 1280), "1.energy": (1,)}


def test_energy_of_a_sketch_is_that_of_the_inputs():
    """E |X Omega|^2 = m |X|^2: what the threshold is compared by."""
    learner = linear(40, columns=16)
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    images = Split(x.T.reshape(300, 1, 5, 8), torch.zeros(300).long())
    shared = [
        learner.share(
            TaskData(0, (0, 1), (0, 1), images, images), Round(0, seed), True
        )
        for seed in range(50)
    ]
    assert shared[0]["1.energy"].item() == pytest.approx(x.square().sum().item())
    mean = torch.stack([sent["1"].square().sum() / 16 for sent in shared]).mean()
    assert mean.item() == pytest.approx(x.square().sum().item(), rel=0.05)


def test_bodies_with_other_parameters_are_refused(tiny_model):
    with pytest.raises(ConfigError, match="its body has BatchNorm1d"):
        Fot(tiny_model(norm=True), SGD, FotSettings())
    with pytest.raises(ConfigError, match="has no layers to project"):
        Fot(SplitModel(nn.Flatten(), nn.Linear(4, 6)), SGD, FotSettings())


BASE = {
    "data": {
        "clients": 3,
        "tasks": 2,
        "classes_per_task": 2,
        "classes_max": 2,
        "test_samples": 1.0,
        "samples": 0.3,
    },
    "model": {"name": "mlp", "hidden": 96, "layers": 1},
    "train": {"rounds": 2, "epochs": 2, "batch_size": 16, "lr": 1e-2},
    "evaluation": {"every": 1},
    "engine": {"backend": "inline"},
}


@pytest.mark.parametrize("threshold", [1.0, 0.9])
def test_a_run_forgets_nothing_where_all_energy_is_held(
    tmp_path, monkeypatch, threshold
):
    """Under epsilon = 1 the features of the first task's samples, and with them its accuracy,
    cannot change."""
    monkeypatch.setattr(
        simulations, "write_report", lambda *_: None
    )  # it takes longer than the run
    changes = [f"learner.threshold={threshold}"]
    config = resolve(read_config({**BASE, "learner": {"name": "fot"}}, changes))
    assert config.strategy.name == "fot"
    assert config.strategy.options["threshold"] == threshold
    folder = simulate(config, tmp_path / "run").folder
    run = RunFolder.open(folder)
    ends = [event for event in run.events() if event["event"] == "task_end"]
    assert [event["knowledge_bytes"] for event in ends] == [0.0, 0.0]
    accuracy = run.accuracy()["personal"]
    if threshold == 1.0:
        # Test samples are others than those the subspace was taken from, but 108 of them span
        # nearly all of it.
        assert accuracy[:, 0, 1] == pytest.approx(accuracy[:, 0, 0], abs=0.02)
    assert (
        np.nanmean(accuracy[:, 1, 1]) > 0.7
    )  # and still there was room to learn the second task
