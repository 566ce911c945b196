"""What all learners share: what travels, what is kept, and updates a person can check by hand."""

import math
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners import (
    build_learner,
    learner_class,
    list_learners,
    resolve,
)
from fedknow.client.learners.baselines import (
    FedPer,
    FedProx,
    FedRep,
    FedRepSettings,
    Finetune,
    Local,
)
from fedknow.client.learners.frames import optimizers as base
from fedknow.client.learners.frames.learner import (
    Diverged,
    HeadSlice,
    Learner,
    LearnerSettings,
    Round,
    batches,
    make_optimizer,
)
from fedknow.client.learners.frames.scoring import logits
from fedknow.client.learners.joint import JointCentral
from fedknow.client.models import SplitModel, build_model
from fedknow.protocols.config import (
    ConfigError,
    ModelConfig,
    TrainConfig,
    read_config,
)

SGD = TrainConfig(
    epochs=1,
    batch_size=64,
    optimizer="sgd",
    lr=0.5,
    weight_decay=0.0,
    channels_last=False,
)


def weights(learner):
    return {
        name: value.detach().clone()
        for name, value in learner.model.state_dict().items()
    }


@pytest.mark.parametrize("kind", [Finetune, Local, FedPer])
def test_one_sgd_step_by_hand(tiny_model, tiny_task, kind):
    """A full batch: w <- w - lr * dL/dw of the cross-entropy over two classes."""
    model, task = tiny_model(), tiny_task(1)
    before = weights(learner := kind(model, SGD, LearnerSettings()))
    z = model(task.train.x)[:, [2, 3]]
    probability = z.softmax(1)
    truth = torch.nn.functional.one_hot(task.train.y - 2, 2)
    features = model.body(task.train.x)
    expected = (probability - truth).T @ features / len(truth)
    report = learner.fit(task, Round(1, 0))
    moved = (before["head.weight"] - learner.head.weight.detach()) / 0.5
    assert torch.allclose(moved[[2, 3]], expected.detach(), atol=1e-6)
    assert torch.equal(moved[[0, 1, 4, 5]], torch.zeros(4, 8))
    assert report["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(z, task.train.y - 2).item(), rel=1e-5
    )


def test_a_gradient_is_clipped_to_its_norm(tiny_model, tiny_task):
    """A single step of lr 0.5 moves all weights together by half of the norm."""
    moved = {}
    for norm in (0.0, 1e-3):
        train = SGD.model_copy(update={"clip_norm": norm})
        learner = Finetune(tiny_model(), train, LearnerSettings())
        before = weights(learner)
        learner.fit(tiny_task(1), Round(1, 0))
        after = weights(learner)
        parts = [(after[name] - before[name]).flatten() for name in after]
        moved[norm] = float(torch.cat(parts).norm())
    assert moved[1e-3] == pytest.approx(0.5e-3, rel=1e-3)
    assert moved[0.0] > 10 * moved[1e-3]


def test_the_order_of_batches_is_the_rounds(tiny_model, tiny_task):
    train = SGD.model_copy(update={"batch_size": 4})
    heads = []
    for seed in (1, 1, 2):
        learner = Finetune(tiny_model(), train, LearnerSettings())
        learner.fit(tiny_task(1), Round(1, seed))
        heads.append(weights(learner)["head.weight"])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize(
    ("kind", "travelling"),
    [
        (Finetune, {"body", "head"}),
        (FedProx, {"body", "head"}),
        (FedPer, {"body"}),
        (FedRep, {"body"}),
        (Local, set()),
    ],
)
def test_what_travels(tiny_model, kind, travelling):
    learner = kind(tiny_model(norm=True), SGD, kind.Settings())
    assert {name.split(".")[0] for name in learner.send()} == travelling
    everything = {
        n for n, v in learner.model.state_dict().items() if v.is_floating_point()
    }
    assert learner.send().keys() | learner.local_parameters().keys() == everything
    assert not learner.send().keys() & learner.local_parameters().keys()
    assert learner.ends_task is (travelling != {"body", "head"})


def test_integer_buffers_neither_travel_nor_stay(tiny_model):
    learner = FedPer(tiny_model(norm=True), SGD, LearnerSettings())
    names = learner.send().keys() | learner.local_parameters().keys()
    assert not any("num_batches_tracked" in name for name in names)
    assert any("running_mean" in name for name in names)


@pytest.mark.parametrize("kind", [Finetune, Local, FedPer, FedRep, FedProx])
def test_a_returning_client_has_the_broadcast_and_what_is_its_own(
    tiny_model, tiny_task, kind
):
    learner = kind(tiny_model(), SGD, kind.Settings())
    learner.fit(tiny_task(0), Round(1, 1))
    state = learner.state_dict()
    broadcast = {
        name: torch.full_like(value, 0.25)
        for name, value in learner.send().items()
    }
    learner.load_state_dict({})  # somebody else
    learner.load_state_dict(state)
    learner.receive(broadcast)
    assert all(
        torch.equal(value, broadcast[name])
        for name, value in learner.send().items()
    )
    assert all(
        torch.equal(value, state["kept"][name])
        for name, value in learner.local_parameters().items()
    )


def test_a_fresh_client_has_the_initial_head(tiny_model, tiny_task):
    learner = FedPer(tiny_model(), SGD, LearnerSettings())
    initial = learner.local_parameters()
    learner.fit(tiny_task(0), Round(1, 1))
    assert not torch.equal(
        learner.local_parameters()["head.weight"], initial["head.weight"]
    )
    learner.load_state_dict({})
    assert torch.equal(
        learner.local_parameters()["head.weight"], initial["head.weight"]
    )


def ways_to_exchange():
    """All learners that train on clients, with each value of their setting ``exchange``, where
    they have one."""
    for name in list_learners():
        kind = learner_class(name)
        field = kind.Settings.model_fields.get("exchange")
        if not issubclass(kind, JointCentral):
            yield from (
                ((kind, {"exchange": way}) for way in get_args(field.annotation))
                if field
                else [(kind, {})]
            )


def test_scoring_drops_nothing_out(tiny_task):
    """All features are dropped in training, so that mode would give the bias alone."""
    head = nn.Linear(4, 2)
    model = SplitModel(nn.Sequential(nn.Flatten(), nn.Dropout(1.0)), head)
    learner = FedPer(model, TrainConfig(), FedPer.Settings())
    test = tiny_task(0).test
    learner.model.train()
    [(right, total, loss)] = learner.score([test], [(0, 1)], 7)
    z = head(test.x.flatten(1))
    assert total == len(test.y)
    assert right == (z.argmax(1) == test.y).sum()
    assert loss == pytest.approx(F.cross_entropy(z, test.y).item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "settings"), list(ways_to_exchange()))
def test_a_returning_client_knows_that_it_has_trained(tiny_task, kind, settings):
    """Or it would train once more when the task is over, as who was never chosen does."""
    train = TrainConfig(epochs=1, batch_size=8, lr=0.01)
    model = ModelConfig(name="mlp", train=kind.model_train)
    learner, again = (
        kind(
            build_model(model, (1, 2, 2), 6, 0),
            train,
            kind.Settings(**settings),
        )
        for _ in range(2)
    )
    learner.fit(tiny_task(0), Round(1, 5))
    assert ("trained_task" in learner.state_dict()) is learner.ends_task
    again.load_state_dict(learner.state_dict())
    assert again.has_trained(0) is learner.ends_task
    assert not again.has_trained(1)


def test_what_is_sent_does_not_change_with_later_training(tiny_model, tiny_task):
    learner = Finetune(tiny_model(), SGD, LearnerSettings())
    sent = learner.send()
    before = {name: value.clone() for name, value in sent.items()}
    learner.fit(tiny_task(0), Round(1, 1))
    assert all(torch.equal(value, before[name]) for name, value in sent.items())
    assert all(value.is_contiguous() for value in sent.values())


def test_parameters_that_do_not_fit_are_refused(tiny_model):
    learner = Finetune(tiny_model(), SGD, LearnerSettings())
    arrays = learner.send()
    with pytest.raises(ValueError, match=r"head\.bias"):
        learner.receive(
            {name: value for name, value in arrays.items() if name != "head.bias"}
        )
    with pytest.raises(ValueError, match=r"head\.bias has shape \(5,\)"):
        learner.receive(arrays | {"head.bias": torch.zeros(5)})


def test_same_seed_same_numbers_whoever_was_here_before(tiny_model, tiny_task):
    train = TrainConfig(epochs=3, batch_size=4)
    results = []
    for others in (0, 2):
        learner = FedPer(
            tiny_model(dropout=0.5, norm=True), train, LearnerSettings()
        )
        arrays = learner.send()
        for other in range(others):
            learner.load_state_dict({})
            learner.receive(arrays)
            learner.fit(tiny_task(1, seed=other), Round(1, other))
        learner.load_state_dict({})
        learner.receive(arrays)
        learner.fit(tiny_task(0), Round(1, 7))
        results.append(learner.send() | learner.local_parameters())
    assert all(
        torch.equal(value, results[1][name]) for name, value in results[0].items()
    )


def test_fedrep_trains_the_head_on_a_frozen_body_first(tiny_model, tiny_task):
    learner = FedRep(
        tiny_model(norm=True),
        TrainConfig(epochs=3, batch_size=64),
        FedRepSettings(head_epochs=2),
    )
    seen = []
    plain = learner.gradient

    def watched(batch):
        seen.append(
            {
                name.split(".")[0]
                for name, p in learner.model.named_parameters()
                if p.requires_grad
            }
        )
        return plain(batch)

    learner.gradient = watched
    counted = learner.model.state_dict()["body.3.num_batches_tracked"]
    learner.fit(tiny_task(0), Round(1, 1))
    assert seen == [{"head"}, {"head"}, {"body"}]
    assert counted == 1  # running statistics moved in the body's epoch alone
    assert all(p.requires_grad for p in learner.model.parameters())
    assert (
        FedRep(tiny_model(), TrainConfig(epochs=8), FedRepSettings()).head_epochs
        == 4
    )
    assert (
        FedRep(tiny_model(), TrainConfig(epochs=1), FedRepSettings()).epochs == 2
    )
    with pytest.raises(
        ConfigError,
        match=r"learner\.head_epochs = 3 leaves none of train\.epochs = 3",
    ):
        FedRep(tiny_model(), TrainConfig(epochs=3), FedRepSettings(head_epochs=3))


def test_a_fedrep_round_by_hand():
    """The head moves first, then the body under the new head.

    x = 2, w = 1, a head of zeros, label 0. Head: dL/dz = (-1/2, 1/2), so a = (1/2, -1/2) and
    b = (1/4, -1/4). Body: z = (5/4, -5/4), dL/dz = (-q, q) with q = 1 / (1 + e^(5/2)),
    dL/dw = (a . dL/dz) x = -2q, so w = 1 + q.
    """
    body, head = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 2)
    for parameter, value in (
        (body.weight, 1.0),
        (head.weight, 0.0),
        (head.bias, 0.0),
    ):
        torch.nn.init.constant_(parameter, value)
    samples = Split(torch.tensor([[2.0]]), torch.tensor([0]))
    learner = FedRep(
        SplitModel(body, head),
        SGD.model_copy(update={"epochs": 2}),
        FedRepSettings(),
    )
    learner.fit(TaskData(0, (0, 1), (0, 1), samples, samples), Round(1, 0))
    q = 1 / (1 + math.exp(2.5))
    assert head.weight.flatten().tolist() == pytest.approx([0.5, -0.5])
    assert head.bias.tolist() == pytest.approx([0.25, -0.25])
    assert body.weight.item() == pytest.approx(1 + q, rel=1e-6)


def test_l2_term_leaves_the_head_alone(tiny_model, tiny_task):
    train = TrainConfig(epochs=5, batch_size=8, weight_decay=0.1)
    learner = Finetune(tiny_model(), train, LearnerSettings())
    before = learner.head.weight.detach().clone()
    learner.fit(tiny_task(0), Round(1, 1))
    assert torch.equal(learner.head.weight.detach()[2:], before[2:])


def test_divergence_is_said_not_averaged(tiny_model, tiny_task):
    learner = Finetune(
        tiny_model(),
        TrainConfig(optimizer="sgd", lr=10, epochs=60, batch_size=4),
        LearnerSettings(),
    )
    task = tiny_task(0)
    task.train.x.mul_(1e18)
    with pytest.raises(Diverged, match=r"lower train\.lr = 10"):
        learner.fit(task, Round(1, 1))


def test_scoring_by_hand(tiny_model):

    model = tiny_model()
    learner = Finetune(model, SGD, LearnerSettings())
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, 1.0, 5.0, 0.0, 0.0, 0.0]))
    x = torch.zeros(4, 1, 2, 2)
    split = Split(x, torch.tensor([0, 1, 1, 1]))
    (right, total, loss), (right_all, _, _) = learner.score(
        [split, split], [(0, 1), (0, 1, 2)], 3
    )
    assert (right, total) == (
        3,
        4,
    )  # the slice knows classes 0 and 1 only, and 1 wins
    assert right_all == 0  # with class 2 allowed, 2 wins
    assert loss == pytest.approx(
        torch.log1p(torch.e * torch.ones(())).item() - 0.75
    )


def test_batches_cover_every_sample_once():
    generator = torch.Generator().manual_seed(0)
    parts = list(batches(10, 4, generator))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert sorted(torch.cat(parts).tolist()) == list(range(10))


def test_head_slice_maps_labels_to_positions():
    head = HeadSlice((7, 2, 5), 9)
    assert head.labels(torch.tensor([5, 7, 2])).tolist() == [2, 0, 1]
    assert head.logits(torch.arange(9.0)[None]).tolist() == [[7.0, 2.0, 5.0]]


class Mine(Learner):
    """A user's own learner."""


def test_learners_by_name_and_by_path():
    assert learner_class("fedavg") is Finetune
    assert learner_class("fedknow.client.learners.baselines:Local") is Local
    assert {
        "fedknow",
        "fedavg",
        "fedper",
        "fedrep",
        "local",
        "finetune",
    } <= list_learners().keys()
    with pytest.raises(
        ConfigError, match=r"learner\.name = 'fedknwo'.*did you mean 'fedknow'"
    ):
        learner_class("fedknwo")
    with pytest.raises(ConfigError, match="not a subclass"):
        learner_class("collections:OrderedDict")
    with pytest.raises(ConfigError, match=r"No module named .no_such_module"):
        learner_class("no_such_module:X")


def test_settings_are_checked_and_spelled_out():
    config = resolve(read_config({}, ["learner=fedknow", "learner.rho=0.2"]))
    assert config.learner.options["rho"] == 0.2
    assert config.learner.options["k"] == 10
    with pytest.raises(
        ConfigError,
        match=r"learner\.rhoo: unknown setting \(did you mean 'rho'\?\)",
    ):
        resolve(read_config({}, ["learner.rhoo=0.2"]))
    with pytest.raises(ConfigError, match=r"learner\.rho = 0: .*greater than 0"):
        resolve(read_config({}, ["learner.rho=0"]))
    with pytest.raises(ConfigError, match="learner local has none"):
        resolve(read_config({}, ["learner=local", "learner.rho=0.2"]))


def test_same_seed_builds_the_same_weights_for_every_learner():
    def build(*overrides):
        config = read_config({}, overrides)
        return build_learner(config, (1, 8, 8), 10).model.state_dict()

    one, other, third = (
        build("learner=fedknow"),
        build("learner=local"),
        build("seed=1"),
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not all(torch.equal(value, third[name]) for name, value in one.items())


def test_settings_never_change():
    with pytest.raises(ValidationError):
        FedRepSettings().head_epochs = 3


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_gradient_in_another_memory_format_is_the_same_gradient(optimizer):
    """Fused steps walk through memory; a method may set gradients of any format."""
    train = TrainConfig(optimizer=optimizer, lr=0.1)
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    moved = []
    for given in (gradient, gradient.to(memory_format=torch.channels_last)):
        parameter = torch.nn.Parameter(
            weight.to(memory_format=torch.channels_last, copy=True)
        )
        parameter.grad = given.clone()
        make_optimizer(
            train, iter([parameter]), iter([torch.nn.Parameter(torch.zeros(1))])
        ).step()
        moved.append(parameter.detach())
    assert not torch.equal(moved[0], weight)
    assert torch.equal(*moved)


def test_gradients_of_flat_features_come_back_channels_last(
    tiny_model, monkeypatch
):
    monkeypatch.setattr(base, "_LARGE", 1)

    def gradient_by_features(channels_last):
        learner = Finetune(
            tiny_model(),
            SGD.model_copy(update={"channels_last": channels_last}),
            LearnerSettings(),
        )
        given = []
        learner.body[0].register_full_backward_pre_hook(
            lambda module, gradients: given.extend(gradients)
        )
        learner.model(
            learner.images(
                torch.arange(16.0).reshape(4, 1, 2, 2)
            ).requires_grad_()
        ).square().sum().backward()
        return given[0]

    plain, last = gradient_by_features(False), gradient_by_features(True)
    assert torch.equal(plain, last)
    assert plain.is_contiguous()
    assert not last.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_models_with_flat_features_work_under_transforms_too(
    tiny_model, monkeypatch
):
    monkeypatch.setattr(base, "_LARGE", 1)
    learner = Finetune(
        tiny_model(),
        SGD.model_copy(update={"channels_last": True}),
        LearnerSettings(),
    )
    parameters = {
        name: value.detach() for name, value in learner.model.named_parameters()
    }
    x = torch.arange(16.0).reshape(4, 1, 1, 2, 2)

    def loss(parameters, x):
        return (
            torch.func.functional_call(learner.model, parameters, (x,))
            .square()
            .sum()
        )

    each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    learner.model(x[:, 0]).square().sum().backward()
    for name, parameter in learner.model.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


def test_bf16_trains_float32_weights_to_nearly_the_same(tiny_model, tiny_task):
    plain, half = (
        FedPer(
            tiny_model(),
            SGD.model_copy(
                update={"epochs": 5, "lr": 0.1, "precision": precision}
            ),
            LearnerSettings(),
        )
        for precision in ("fp32", "bf16")
    )
    reports = [
        learner.fit(tiny_task(0), Round(1, 0)) for learner in (plain, half)
    ]
    for name, value in half.send().items():
        assert value.dtype is torch.float32
        assert not torch.equal(value, plain.send()[name])
        assert torch.allclose(value, plain.send()[name], atol=0.02)
    assert reports[1]["loss"] == pytest.approx(reports[0]["loss"], rel=0.02)
    again = FedPer(tiny_model(), half.train, LearnerSettings())
    assert again.fit(tiny_task(0), Round(1, 0)) == reports[1]
    x = tiny_task(0).test.x
    assert logits(half, x, 8).dtype is torch.float32
    assert not torch.equal(logits(half, x, 8), half.model(x))
