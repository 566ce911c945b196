"""Clients trained at once against the same clients trained one by one."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedknow.client.capacity import clients_at_once
from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners import build_learner
from fedknow.client.learners.baselines import FedPer, FedRep, Finetune, Local
from fedknow.client.learners.frames.learner import (
    Diverged,
    Learner,
    LearnerSettings,
    Round,
)
from fedknow.client.together import Start, fit_together
from fedknow.protocols.config import ConfigError, TrainConfig, read_config

SHAPE = (1, 2, 2)


def share(tiny_task, samples, seed, task=0):
    """A client's task with any number of training samples; classes of the second one in an order
    of their own."""
    full = tiny_task(task, max(samples, 2), seed)
    train = Split(full.train.x[:samples], full.train.y[:samples])
    return TaskData(
        full.task,
        full.classes[::-1] if seed % 2 else full.classes,
        full.seen,
        train,
        full.test,
    )


def one_by_one(learner, starts):
    results = []
    for start in starts:
        learner.adopt(start.parameters, start.task.task)
        report = learner.fit(start.task, start.round)
        results.append((learner.send() | learner.local_parameters(), report))
    return results


def starts_of(learner, tiny_task, sizes, mu=0.0):
    """Clients that differ in parameters, data, task and seed."""
    starts = []
    for i, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(i)
        parameters = {
            name: value + 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in (
                learner.send() | learner.local_parameters()
            ).items()
        }
        starts.append(
            Start(
                parameters,
                share(tiny_task, size, i, task=i % 3),
                Round(1, 100 + i, mu),
            )
        )
    return starts


def assert_same(learner, starts):
    expected = one_by_one(learner, starts)
    for (parameters, report), trained in zip(
        expected, fit_together(learner, starts), strict=True
    ):
        assert trained.parameters.keys() == parameters.keys()
        for name, value in trained.parameters.items():
            assert torch.allclose(
                value, parameters[name], rtol=1e-4, atol=1e-5
            ), name
        assert trained.report == pytest.approx(report, rel=1e-4)
    moved = [
        (start.parameters, parameters)
        for start, (parameters, _) in zip(starts, expected, strict=True)
    ]
    assert all(
        not torch.equal(before["body.0.weight"], after["body.0.weight"])
        for before, after in moved
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "lr": 0.1},
        {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        {"optimizer": "adam", "lr": 0.01},
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "clip_norm": 0.3},
        {"optimizer": "sgd", "lr": 0.1, "clip_norm": 0.3, "channels_last": False},
    ],
)
@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize("kind", [Finetune, FedPer, Local])
def test_clients_at_once_are_the_clients_one_by_one(
    tiny_model, tiny_task, kind, changes, mu
):
    learner = kind(
        tiny_model(),
        TrainConfig(epochs=3, batch_size=8, **changes),
        LearnerSettings(),
    )
    # without a full batch, with one sample, with batches that come out even, with a short last one
    assert_same(
        learner, starts_of(learner, tiny_task, [5, 1, 16, 19, 30, 24], mu)
    )


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=6),
    batch_size=st.integers(1, 30),
    epochs=st.integers(1, 3),
    optimizer=st.sampled_from(["sgd", "adam"]),
)
def test_whatever_the_sizes(
    tiny_model, tiny_task, sizes, batch_size, epochs, optimizer
):
    train = TrainConfig(
        epochs=epochs, batch_size=batch_size, optimizer=optimizer, lr=0.01
    )
    learner = FedPer(tiny_model(), train, LearnerSettings())
    assert_same(learner, starts_of(learner, tiny_task, sizes))


@pytest.mark.parametrize("model", ["cnn", "mlp", "linear"])
def test_models_by_name(model):
    config = read_config(
        {},
        [
            f"model={model}",
            "learner=fedper",
            "train.epochs=1",
            "train.batch_size=8",
        ],
    )
    learner = build_learner(config, (1, 8, 8), 10)
    generator = torch.Generator().manual_seed(0)
    starts = []
    for i in range(3):
        x, y = (
            torch.randn(9 + i, 1, 8, 8, generator=generator),
            torch.randint(4, 6, (9 + i,), generator=generator),
        )
        task = TaskData(0, (4, 5), (4, 5), Split(x, y), Split(x, y))
        starts.append(
            Start(learner.send() | learner.local_parameters(), task, Round(1, i))
        )
    expected = one_by_one(learner, starts)
    for (parameters, report), trained in zip(
        expected, fit_together(learner, starts), strict=True
    ):
        assert all(
            torch.allclose(v, parameters[n], rtol=1e-4, atol=1e-5)
            for n, v in trained.parameters.items()
        )
        assert trained.report == pytest.approx(report, rel=1e-4)


def test_a_client_that_diverges_is_told_and_leaves_the_others_alone(
    tiny_model, tiny_task
):
    train = TrainConfig(optimizer="sgd", lr=0.1, epochs=3, batch_size=8)
    learner = Finetune(tiny_model(), train, LearnerSettings())
    starts = starts_of(learner, tiny_task, [16, 24, 16])
    alone = fit_together(learner, [starts[0], starts[2]])
    starts[1].task.train.x.mul_(1e30)
    first, second, third = fit_together(learner, starts)
    assert isinstance(second.report, Diverged)
    with pytest.raises(Diverged) as same:
        one_by_one(learner, [starts[1]])
    assert str(second.report) == str(same.value)
    for trained, expected in zip((first, third), alone, strict=True):
        assert trained.report == pytest.approx(expected.report)
        assert all(
            torch.allclose(v, expected.parameters[n])
            for n, v in trained.parameters.items()
        )


def test_bf16(tiny_model, tiny_task):
    train = TrainConfig(
        epochs=2, batch_size=8, optimizer="sgd", lr=0.1, precision="bf16"
    )
    learner = FedPer(tiny_model(), train, LearnerSettings())
    starts = starts_of(learner, tiny_task, [9, 16])
    for (parameters, _), trained in zip(
        one_by_one(learner, starts), fit_together(learner, starts), strict=True
    ):
        assert all(
            torch.allclose(v, parameters[n], atol=0.02)
            for n, v in trained.parameters.items()
        )


class Eager(Learner):
    """Changes a step."""

    def step(self):
        super().step()


@pytest.mark.parametrize(
    ("kind", "model", "reason"),
    [
        (FedRep, {}, "FedRep trains in a way of its own"),
        (Eager, {}, r"Eager trains in a way of its own \(step\)"),
        (FedPer, {"dropout": 0.5}, "the model has dropout"),
        (
            FedPer,
            {"norm": True},
            r"buffers or shared parameters \(body\.3\.num_batches_tracked",
        ),
    ],
)
def test_what_cannot_train_at_once(tiny_model, kind, model, reason):
    learner = kind(tiny_model(**model), TrainConfig(), kind.Settings())
    with pytest.raises(
        ConfigError,
        match=f"engine.vectorize = 'on': .*{reason}.* 'auto' or 'off'",
    ):
        clients_at_once(learner, "on", SHAPE)
    assert clients_at_once(learner, "auto", SHAPE) == 1
    assert clients_at_once(learner, "off", SHAPE) == 1


def test_a_model_that_vmap_cannot_take(tiny_model):
    class Odd(torch.nn.ReLU):
        def forward(self, x):
            return super().forward(x) * float(x.sum().item() < torch.inf)

    model = tiny_model()
    model.body[3] = Odd()
    with pytest.raises(
        ConfigError, match=r"torch\.vmap cannot take the model: .*item"
    ):
        clients_at_once(
            Finetune(model, TrainConfig(), LearnerSettings()), "on", SHAPE
        )


def test_auto_is_for_small_models():
    def at_once(model, vectorize):
        return clients_at_once(
            build_learner(
                read_config({}, ["learner=fedper", *model]), (1, 8, 8), 10
            ),
            vectorize,
            (1, 8, 8),
        )

    small, convolutions, large = (
        ["model=mlp"],
        ["model=cnn"],
        ["model=mlp", "model.hidden=2048"],
    )
    assert [at_once(model, "off") for model in (small, convolutions, large)] == [
        1,
        1,
        1,
    ]
    assert [at_once(model, "auto") for model in (small, convolutions, large)] == [
        128,
        128,
        1,
    ]
    assert [at_once(model, "on") for model in (small, convolutions, large)] == [
        128,
        128,
        4,
    ]
    assert at_once(["model=cnn", "model.channels=64"], "auto") == 1
