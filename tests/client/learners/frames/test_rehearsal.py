"""Replay memory: its samples, their slice of the head, and the frame."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F

from fedknow.client.learners.frames.learner import Round
from fedknow.client.learners.frames.rehearsal import (
    Memory,
    MemorySettings,
    Rehearsal,
    Replay,
    choose,
    columns,
)
from fedknow.client.state import load_state, save_state
from fedknow.protocols.config import TrainConfig

TRAIN = TrainConfig(epochs=1, batch_size=8, lr=0.01)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_a_balanced_choice_takes_from_every_class_alike(labels, share, seed):
    y = torch.tensor(labels)
    count = max(1, round(share * len(y)))
    index = choose(y, count, torch.Generator().manual_seed(seed))
    assert index.tolist() == sorted(set(index.tolist()))
    assert len(index) == count
    taken, there = (torch.bincount(part, minlength=5) for part in (y[index], y))
    for a in range(5):
        for b in range(
            5
        ):  # a class may lag another by more than one only if all it has is taken
            assert taken[a] >= taken[b] - 1 or taken[a] == there[a]


def test_an_unbalanced_choice_follows_the_classes_frequencies():
    y = torch.tensor([0] * 90 + [1] * 10)
    shares = [
        (
            y[choose(y, 20, torch.Generator().manual_seed(seed), balanced=False)]
            == 1
        )
        .sum()
        .item()
        for seed in range(200)
    ]
    assert sum(shares) / 200 == pytest.approx(2.0, abs=0.25)
    assert (y[choose(y, 20, torch.Generator().manual_seed(0))] == 1).sum() == 10


def test_what_is_kept_and_what_it_weighs(tiny_task):
    memory = Memory()
    memory.store(tiny_task(0, samples=40), 4, seed=3)
    memory.store(tiny_task(1, samples=10), 1, seed=3)
    assert len(memory) == 4 + 1
    assert memory.tasks[0].y.bincount().tolist() == [2, 2]
    assert memory.nbytes == 5 * (
        4 * 4 + 8
    )  # four float32 pixels and an int64 label each
    again = Memory()
    again.store(tiny_task(0, samples=40), 4, seed=3)
    assert torch.equal(memory.tasks[0].x, again.tasks[0].x)
    again.store(tiny_task(0, samples=40), 4, seed=4)
    assert not torch.equal(memory.tasks[0].x, again.tasks[0].x)


def test_each_sample_is_scored_in_the_slice_of_its_task(tiny_task):
    memory = Memory()
    for task in (0, 1):
        memory.store(tiny_task(task), 2, seed=0)
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    past = memory.all(tiny_task(2), 6)
    expected = F.cross_entropy(logits[:2, :2], past.y[:2]) + F.cross_entropy(
        logits[2:, 2:4], past.y[2:] - 2
    )
    assert past.loss(logits).item() == pytest.approx(
        expected.item() / 2, rel=1e-6
    )
    one = memory.replay_of(1, tiny_task(2), 6)
    assert one.loss(logits[2:]).item() == pytest.approx(
        F.cross_entropy(logits[2:, 2:4], one.y - 2).item(), rel=1e-6
    )
    seen = memory.all(
        tiny_task(2, incremental=True), 6
    )  # class-incremental: in the slice of all classes seen
    assert seen.loss(logits).item() == pytest.approx(
        F.cross_entropy(logits, seen.y).item(), rel=1e-6
    )


def test_columns_outside_a_slice_get_no_gradient():
    z = torch.zeros(1, 3, requires_grad=True)
    Replay(
        torch.zeros(1, 1, 2, 2), torch.tensor([1]), columns((0, 1), 3)[None]
    ).loss(z).backward()
    assert z.grad.tolist() == [[0.5, -0.5, 0.0]]


def test_an_empty_memory_has_nothing_to_replay(tiny_task):
    with pytest.raises(ValueError, match="the memory is empty"):
        Memory().all(tiny_task(0), 6)


def test_state_round_trip_on_disk(tiny_task, tmp_path):
    memory = Memory()
    for task in (0, 1):
        memory.store(tiny_task(task), 4, seed=0)
    save_state(tmp_path / "state", memory.state_dict())
    again = Memory.from_state(load_state(tmp_path / "state"))
    assert again.tasks.keys() == memory.tasks.keys()
    for task, stored in memory.tasks.items():
        assert again.tasks[task].classes == stored.classes
        assert torch.equal(again.tasks[task].x, stored.x)
        assert torch.equal(again.tasks[task].y, stored.y)


@pytest.mark.parametrize("exchange", ["all", "body", "none"])
def test_the_frame_keeps_samples_whatever_is_exchanged(
    tiny_model, tiny_task, exchange
):
    learner = Rehearsal(
        tiny_model(), TRAIN, MemorySettings(memory=0.2, exchange=exchange)
    )
    assert learner.ends_task
    learner.fit(tiny_task(0), Round(1, 1))
    assert learner.past is None
    assert learner.end_task(tiny_task(0), Round(0, 2)) == {
        "knowledge-bytes": 4 * 24.0
    }
    state = learner.state_dict()
    learner.load_state_dict({})
    assert len(learner.memory) == 0
    learner.load_state_dict(state)
    learner.begin(tiny_task(1), Round(1, 3))
    assert len(learner.past) == 4
    assert len(learner.draw(learner.past, 3)) == 3
    assert len(learner.draw(learner.past, 9)) == 4
    assert len(state["memory"]) == 1  # a state that was handed out stays as it is
    learner.end_task(tiny_task(1), Round(0, 4))
    assert len(state["memory"]) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 3),  # a tenth is two, and there are three classes
        ({"memory_floor": 2}, 6),
        ({"memory_floor": 0}, 2),
        ({"memory_floor": 100}, 20),
        ({"memory": 0.5}, 10),
        ({"memory_bytes": 24 * 7 + 23}, 7),
        ({"memory_bytes": 1}, 1),
        ({"memory_bytes": 10**6}, 20),
        ({"memory_bytes": 24, "memory_floor": 5}, 1),
    ],
)
def test_how_many_samples_are_kept(settings, expected):
    x, y = torch.zeros(20, 1, 2, 2), torch.arange(20) % 3
    assert MemorySettings(**settings).count(x, y) == expected


def test_no_class_is_left_without_a_sample(tiny_model, tiny_task):
    """A tenth of eight samples is one, which would leave a class out."""
    learner = Rehearsal(tiny_model(), TRAIN, MemorySettings())
    task = tiny_task(0, samples=8)
    learner.fit(task, Round(1, 1))
    learner.end_task(task, Round(0, 2))
    assert learner.memory.tasks[0].y.bincount().tolist() == [1, 1]


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValidationError):
        MemorySettings(memory=share)
