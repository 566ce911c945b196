"""GEM and A-GEM: projections by hand, by another solver, and what defines them: the memory is not
hurt."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.frames.learner import Batch, HeadSlice, Round
from fedknow.client.learners.gem import AGem, AGemSettings, Gem, GemSettings
from fedknow.client.models import SplitModel
from fedknow.protocols.config import TrainConfig

SGD = TrainConfig(
    epochs=1,
    batch_size=64,
    optimizer="sgd",
    lr=1e-4,
    weight_decay=0.0,
    channels_last=False,
)
FEW = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def one_weight() -> SplitModel:
    """One input, a body of one weight, which is 1, and a head of zeros for two classes."""
    model = SplitModel(
        nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False)), nn.Linear(1, 2)
    )
    with torch.no_grad():
        model.body[1].weight.fill_(1)
        model.head.weight.zero_()
        model.head.bias.zero_()
    return model


def sample(task: int, x: float, y: int) -> TaskData:
    """A task of one sample; all have the same two classes."""
    split = Split(torch.full((1, 1, 1, 1), x), torch.tensor([y]))
    return TaskData(task, (0, 1), (0, 1), split, split)


def first_gradient(learner, task, round=Round(1, 1)):
    """What a learner leaves in the parameters at the first batch of a round, of the whole task;
    and the batch's own."""
    learner.model.train()
    learner.begin(task, round)
    head = HeadSlice(task.head, learner.head.out_features)
    batch = Batch(
        task.train.x,
        head.labels(task.train.y),
        torch.arange(len(task.train)),
        head,
    )
    loss = torch.nn.functional.cross_entropy(
        head.logits(learner.model(batch.x)), batch.y
    )
    plain = torch.autograd.grad(
        loss,
        list(learner.model.parameters()),
        materialize_grads=True,
        allow_unused=True,
    )
    learner.gradient(batch)
    return flat(p.grad for p in learner.model.parameters()), flat(plain)


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


def gradient_on(model, stored):
    """Gradient of the mean loss on a task's memory in its own slice, by plain autograd."""
    index = torch.tensor(stored.classes)
    loss = torch.nn.functional.cross_entropy(
        model(stored.x)[:, index], stored.y - index[0]
    )
    return flat(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize(
    ("learner", "expected"),
    [
        # Order: the body's weight, the head's two weights, its two biases. At logits of zero
        # the batch (x = 2, y = 0) has g = (0, -1, 1, -.5, .5), and the memory (x = 1, y = 1)
        # has g_1 = (0, .5, -.5, .5, -.5). So <g, g_1> = -1.5 and |g_1|^2 = 1, which gives
        # v = 1.5 and g' = g + 1.5 g_1.
        (
            lambda: Gem(one_weight(), SGD, GemSettings(margin=0.0)),
            [0, -0.25, 0.25, 0.25, -0.25],
        ),
        (
            lambda: AGem(one_weight(), SGD, AGemSettings()),
            [0, -0.25, 0.25, 0.25, -0.25],
        ),
        # With a margin of .5, g' = g + (1.5 + .5) g_1.
        (
            lambda: Gem(one_weight(), SGD, GemSettings(margin=0.5)),
            [0, 0, 0, 0.5, -0.5],
        ),
    ],
)
def test_projection_by_hand(learner, expected):
    learner = learner()
    learner.memory.store(sample(0, 1.0, 1), 1, seed=0)
    projected, _ = first_gradient(learner, sample(1, 2.0, 0))
    assert projected.tolist() == pytest.approx(expected, abs=1e-6)
    assert learner.counts() == {"violated": 1.0}


@pytest.mark.parametrize(
    "learner",
    [
        Gem(one_weight(), SGD, GemSettings()),
        AGem(one_weight(), SGD, AGemSettings()),
    ],
)
def test_a_gradient_that_hurts_nothing_stays_as_it_is(learner):
    learner.memory.store(sample(0, 1.0, 0), 1, seed=0)
    projected, plain = first_gradient(learner, sample(1, 2.0, 0))
    assert torch.equal(projected, plain)
    assert learner.counts() == {"violated": 0.0}


def experienced(
    tiny_model, tiny_task, kind, options, seed, tasks=3, incremental=False
):
    """A learner that has met some tasks, in double precision; and the next task."""

    def double(task):
        split = Split(task.train.x.double(), task.train.y)
        return TaskData(
            task.task, task.classes, task.seen, split, split, task.is_incremental
        )

    learner = kind(
        tiny_model(seed=seed).double(),
        SGD.model_copy(update={"lr": 0.1}),
        options,
    )
    met = [
        double(tiny_task(t, seed=seed, incremental=incremental))
        for t in range(tasks)
    ]
    for task in met[:-1]:
        learner.fit(task, Round(1, seed))
        learner.end_task(task, Round(0, seed))
    return learner, met[-1]


@given(seed=st.integers(0, 10_000))
@FEW
def test_gem_is_the_nearest_gradient_that_hurts_no_task(
    tiny_model, tiny_task, seed
):
    learner, task = experienced(
        tiny_model, tiny_task, Gem, GemSettings(margin=0.0, memory=0.3), seed
    )
    memories = torch.stack(
        [
            gradient_on(learner.model, s)
            for _, s in sorted(learner.memory.tasks.items())
        ]
    )
    projected, g = first_gradient(learner, task)
    scale = projected.norm() * memories.norm(dim=1)
    assert (memories @ projected >= -1e-6 * scale).all()
    v, _ = nnls(
        memories.T.numpy(), -g.numpy()
    )  # min_{v >= 0} |g + G^T v|, SciPy's solver
    assert torch.allclose(
        projected, g + torch.from_numpy(v) @ memories, atol=1e-6 * float(g.norm())
    )


@given(seed=st.integers(0, 10_000))
@FEW
def test_a_step_raises_no_stored_tasks_loss_to_first_order(
    tiny_model, tiny_task, seed
):
    learner, task = experienced(
        tiny_model, tiny_task, Gem, GemSettings(margin=0.0, memory=0.3), seed
    )
    replays = [learner.memory.replay_of(past, task, 6) for past in (0, 1)]
    before = [replay.loss(learner.model(replay.x)).item() for replay in replays]
    projected, _ = first_gradient(learner, task)
    learner.optimizer = torch.optim.SGD(
        learner.model.parameters(), lr=(step := 1e-5)
    )
    learner.step()
    for replay, loss in zip(replays, before, strict=True):
        rise = replay.loss(learner.model(replay.x)).item() - loss
        assert (
            rise <= 1e3 * step**2 * projected.norm().item() ** 2
        )  # what is left is of second order


@given(seed=st.integers(0, 10_000))
@FEW
def test_agem_hurts_its_reference_no_more(tiny_model, tiny_task, seed):
    options = AGemSettings(
        memory=0.3, memory_batch=10_000
    )  # the reference is all of the memory
    learner, task = experienced(tiny_model, tiny_task, AGem, options, seed)
    everything = learner.memory.all(task, 6)
    loss = everything.loss(learner.model(everything.x))
    reference = flat(torch.autograd.grad(loss, list(learner.model.parameters())))
    projected, g = first_gradient(learner, task)
    product = torch.dot(g, reference)
    assert (
        torch.dot(projected, reference)
        >= -1e-9 * projected.norm() * reference.norm()
    )
    expected = (
        g if product >= 0 else g - product / reference.square().sum() * reference
    )
    assert torch.allclose(projected, expected, atol=1e-9)


def test_agem_draws_as_many_as_it_is_told(tiny_model, tiny_task, monkeypatch):
    learner, task = experienced(
        tiny_model, tiny_task, AGem, AGemSettings(memory=0.5, memory_batch=3), 0
    )
    sizes = []
    plain = learner._gradient_of
    monkeypatch.setattr(
        learner,
        "_gradient_of",
        lambda replay: sizes.append(len(replay)) or plain(replay),
    )
    first_gradient(learner, task)
    assert sizes == [3]


def test_when_class_incremental_stored_samples_are_scored_among_all_classes_seen(
    tiny_model, tiny_task
):
    learner, task = experienced(
        tiny_model,
        tiny_task,
        Gem,
        GemSettings(margin=0.0),
        1,
        tasks=2,
        incremental=True,
    )
    stored = learner.memory.tasks[0]
    loss = torch.nn.functional.cross_entropy(
        learner.model(stored.x)[:, :4], stored.y
    )
    memory = flat(torch.autograd.grad(loss, list(learner.model.parameters())))
    projected, g = first_gradient(learner, task)
    v = max(0.0, -(torch.dot(g, memory) / memory.square().sum()).item())
    assert torch.allclose(projected, g + v * memory, atol=1e-9)
