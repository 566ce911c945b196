"""A last batch of one sample joins the one before it, for BatchNorm's sake."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedknow.client.capacity import clients_at_once
from fedknow.client.learners import (
    build_learner,
    check_samples,
    learner_class,
    list_learners,
)
from fedknow.client.learners.baselines import Finetune
from fedknow.client.learners.frames.batching import (
    TooFewSamples,
    batches,
    smallest_batch,
)
from fedknow.client.learners.frames.learner import LearnerSettings, Round
from fedknow.client.learners.frames.rehearsal import Replay, columns
from fedknow.client.learners.joint import JointCentral
from fedknow.client.models import SplitModel, build_model
from fedknow.client.models.frozen import freeze
from fedknow.client.models.lora import adapt
from fedknow.protocols.config import (
    ConfigError,
    ModelConfig,
    TrainConfig,
    read_config,
)
from fedknow.simulations.simulate import simulate

TRAIN = TrainConfig(epochs=1, batch_size=6)
WITHOUT = {"agscl", "fot", "fedprotip"}
"""Methods that refuse BatchNorm."""


@given(st.integers(1, 40), st.integers(1, 12))
def test_a_single_last_sample_joins_the_batch_before(count, size):
    order = torch.randperm(count, generator=torch.Generator().manual_seed(5))
    plain = list(batches(count, size, torch.Generator().manual_seed(5)))
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain, torch.split(order, size), strict=True)
    )
    joined = list(
        batches(count, size, torch.Generator().manual_seed(5), smallest=2)
    )
    assert torch.equal(torch.cat(joined), order)
    if size > 1 and count > 1:
        assert min(map(len, joined)) >= 2
        sizes = [len(batch) for batch in joined]
        expected = [len(batch) for batch in plain]
        if expected[-1] == 1:
            expected = [*expected[:-2], size + 1]
        assert sizes == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 8)), 1),
        (
            nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten()),
            1,
        ),  # four places an image
        (nn.Sequential(nn.Conv2d(1, 8, 2), nn.BatchNorm2d(8), nn.Flatten()), 2),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8)), 2),
        (
            nn.Sequential(
                nn.Flatten(),
                nn.Linear(4, 8),
                nn.BatchNorm1d(8, track_running_stats=False),
            ),
            2,
        ),
        (
            nn.Sequential(
                nn.Flatten(), nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.LayerNorm(8)
            ),
            1,
        ),
    ],
)
def test_which_models_need_two(body, expected):
    model = nn.Sequential(body, nn.Linear(8, 3)).train()
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert smallest_batch(model, torch.zeros(1, 1, 2, 2)) == expected
    assert [module.training for module in model.modules()] == modes
    assert all(
        torch.equal(value, before[name])
        for name, value in model.state_dict().items()
    )


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2", "cnn6"])
def test_two_is_what_pytorch_needs(name):
    """What is found without training is what training on one sample comes to, on small images and
    on large ones."""
    for side in (8, 32):
        model = build_model(ModelConfig(name=name), (3, side, side), 4, 0)
        needs_two = smallest_batch(model, torch.zeros(1, 3, side, side)) == 2
        model.train()
        if needs_two:
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                model(torch.randn(1, 3, side, side))
        else:
            model(torch.randn(1, 3, side, side))


def make(name, tiny_model, **options):
    kind, model = learner_class(name), tiny_model(norm=True)
    if kind.needs_frozen_body:
        freeze(model.body)
    if kind.model_train == "lora":
        freeze(model.body)
        adapt(model.body, 2, 4.0, "tiny")
    return kind(model, TRAIN, kind.Settings(**options))


def fit(learner, task, round):
    if not isinstance(learner, JointCentral):
        return learner.fit(task, round)
    head = columns(task.head, 6).expand(len(task.train), -1)
    return learner.fit_on(
        Replay(task.train.x, task.train.y, head), len(task.train), task, round
    )


@pytest.mark.parametrize(
    "name", [name for name in list_learners() if name not in WITHOUT]
)
def test_every_learner_trains_on_a_single_last_sample(
    tiny_model, tiny_task, name
):
    """Batches of 6 of 13 samples. GEM and A-GEM keep two, as they pass a memory through the model
    alone."""
    options = (
        {"memory": 0.01, "memory_floor": 0}
        if "memory" in learner_class(name).Settings.model_fields
        and not name.startswith("joint")
        else {}
    )
    learner = make(name, tiny_model, **options)
    for task in range(2):
        report = fit(learner, tiny_task(task, 13), Round(1, task))
        assert report["loss"] < 100
        learner.end_task(tiny_task(task, 13), Round(0, task))
    if options and name != "refed":  # which chooses among all tasks' samples
        kept = 2 if name in ("gem", "agem") else 1
        assert [len(stored.y) for stored in learner.memory.tasks.values()] == [
            kept,
            kept,
        ]


def test_a_joint_round_draws_at_least_two(tiny_model, tiny_task):
    learner = make("joint", tiny_model, budget=0.01)
    samples = learner.training_data(tiny_task(0, 13), Round(1, 0))
    assert len(samples) == 2
    assert len(samples) == learner.drawn(learner.union(tiny_task(0, 13)), 0)


def test_one_sample_alone_is_refused_in_a_sentence(tiny_model, tiny_task):
    learner = make("finetune", tiny_model)
    with pytest.raises(
        TooFewSamples,
        match=r"one training sample.*BatchNorm layers need two values a channel",
    ):
        learner.fit(tiny_task(0, 1), Round(1, 0))
    one = Finetune(
        tiny_model(norm=True),
        TRAIN.model_copy(update={"batch_size": 1}),
        LearnerSettings(),
    )
    with pytest.raises(TooFewSamples, match="batch_size is 1"):
        one.fit(tiny_task(0, 4), Round(1, 0))
    Finetune(tiny_model(), TRAIN, LearnerSettings()).fit(
        tiny_task(0, 1), Round(1, 0)
    )  # without BatchNorm one will do


# --- before there is a run
# --------------------------------------------------------------------------------------------


def normed(shape, classes):
    channels, height, width = shape
    body = nn.Sequential(
        nn.Flatten(), nn.Linear(channels * height * width, 8), nn.BatchNorm1d(8)
    )
    return SplitModel(body, nn.Linear(8, classes))


def unsteady(shape, classes):
    model = normed(shape, classes)
    model.body[2] = nn.BatchNorm1d(8, track_running_stats=False)
    return model


def experiment(*changes):
    data = {
        "clients": 2,
        "tasks": 2,
        "classes_per_task": 2,
        "classes_max": 2,
        "test_samples": 0.2,
    }
    changes = [
        f"model={__name__}:normed",
        "learner=fedavg",
        "train.rounds=1",
        *changes,
    ]
    return read_config({"data": data, "engine": {"backend": "inline"}}, changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["train.batch_size=1"],
            r"train.batch_size = 1: .* need 2 samples a batch; set it to 2 or more",
        ),
        (
            [
                "data.samples=0.0001",
                "data.classes_per_task=1",
                "data.classes_min=1",
                "data.classes_max=1",
            ],
            r"client 0 has 1 training sample in task 1.*raise data.samples",
        ),
    ],
)
def test_too_few_samples_are_refused_before_there_is_a_folder(
    tmp_path, changes, said
):
    with pytest.raises(ConfigError, match=said):
        simulate(experiment(*changes), tmp_path / "run", report=False)
    assert not (tmp_path / "run").exists()


def test_where_all_are_trained_on_together_one_client_may_have_one_sample():
    config = experiment("learner=joint-central")
    sizes = SimpleNamespace(clients=2, tasks=1, train_size=lambda client, task: 1)
    check_samples(config, build_learner(config, (1, 8, 8), 4), (1, 8, 8), sizes)
    config = experiment()
    with pytest.raises(
        ConfigError, match="client 0 has 1 training sample in task 1"
    ):
        check_samples(
            config, build_learner(config, (1, 8, 8), 4), (1, 8, 8), sizes
        )
    check_samples(
        config, build_learner(config, (1, 8, 8), 4), (1, 8, 8), None
    )  # real clients find out themselves


def test_a_run_with_a_single_last_sample_ends(tmp_path):
    config = experiment("train.batch_size=4", "data.samples=0.1")
    sizes = []
    result = simulate(
        config,
        tmp_path / "run",
        report=False,
        observers=[lambda event: sizes.append(event.line())],
    )
    assert [event for event in sizes if event["event"] == "end"]
    assert not [
        event for event in sizes if event["event"] in ("failure", "warning")
    ]
    assert result.accuracy["personal"].shape[0] == 2


def test_batchnorm_without_statistics_is_not_trained_many_at_once():
    """Short batches are filled up there, and the filling would move the mean."""
    config = experiment(f"model={__name__}:unsteady")
    learner = build_learner(config, (1, 8, 8), 4)
    with pytest.raises(ConfigError, match="the model has BatchNorm"):
        clients_at_once(learner, "on", (1, 8, 8))
