"""A model of a few weights and tasks of a few samples, for tests a person can follow."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.frames.learner import Learner, Round


class TinyModel(nn.Module):
    """One hidden layer on 1 x 2 x 2 images; six classes."""

    def __init__(
        self,
        hidden: int = 8,
        classes: int = 6,
        dropout: float = 0.0,
        norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(1, 3, 1),
            nn.Flatten(),
            nn.Linear(12, hidden),
        ]
        if norm:
            layers.append(nn.BatchNorm1d(hidden))
        layers += [nn.ReLU(), nn.Dropout(dropout)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@pytest.fixture
def tiny_model() -> Callable[..., TinyModel]:
    def build(seed: int = 0, **settings: object) -> TinyModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return TinyModel(**settings)  # type: ignore[arg-type]

    return build


@pytest.fixture
def tiny_task() -> Callable[..., TaskData]:
    """Task t has classes 2t and 2t + 1, told apart by the sign of the first pixel."""

    def build(
        task: int, samples: int = 20, seed: int = 0, incremental: bool = False
    ) -> TaskData:
        generator = torch.Generator().manual_seed(1000 * seed + task)

        def split(count: int) -> Split:
            x = torch.randn(count, 1, 2, 2, generator=generator) + task
            positive = torch.arange(count) % 2
            x[:, 0, 0, 0] = (2.0 * positive - 1) * (1 + x[:, 0, 0, 0].abs())
            return Split(x, 2 * task + positive)

        classes = (2 * task, 2 * task + 1)
        return TaskData(
            task,
            classes,
            tuple(range(2 * task + 2)),
            split(samples),
            split(samples),
            incremental,
        )

    return build


@pytest.fixture
def assert_interruptions_do_not_matter() -> Callable[..., None]:
    """Three tasks come to the same, bit for bit, if another client trains in the same object after
    each."""

    def run(
        build: Callable[[], Learner],
        task: Callable[..., TaskData],
        interrupt: bool,
    ) -> dict[str, torch.Tensor]:
        learner = build()
        for number in range(3):
            learner.fit(task(number), Round(1, number))
            learner.end_task(task(number), Round(0, 7))
            if interrupt:
                state, arrays = learner.state_dict(), learner.send()
                learner.load_state_dict({})
                learner.fit(task(1, seed=5), Round(1, 9))
                learner.end_task(task(1, seed=5), Round(0, 9))
                learner.load_state_dict(state)
                learner.receive(arrays)
        return learner.send() | learner.local_parameters()

    def check(
        build: Callable[[], Learner], task: Callable[..., TaskData]
    ) -> None:
        plain, interrupted = run(build, task, False), run(build, task, True)
        assert plain.keys() == interrupted.keys()
        assert all(
            torch.equal(value, interrupted[name]) for name, value in plain.items()
        )

    return check
