"""The raw loop that ``overhead.py`` compares with: no framework."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from fedknow.protocols.config import ExperimentConfig


class Loop:
    """The raw loop of one process: a model and all clients' samples."""

    def __init__(self, config: ExperimentConfig) -> None:
        import torch

        from fedknow.client.compute.heap import retain_freed_memory
        from fedknow.client.data import make_benchmark
        from fedknow.client.models import build_model
        from fedknow.protocols.seeds import integer

        torch.set_num_threads(1)
        retain_freed_memory()  # as our run does; what that saves is in heap.py
        self.config = config
        benchmark = make_benchmark(config)
        self.model = build_model(
            config.model,
            benchmark.shape,
            benchmark.classes,
            integer(config.seed, "model"),
        )
        self.format = (
            torch.channels_last
            if config.train.channels_last
            else torch.contiguous_format
        )
        self.model.to(memory_format=self.format)
        tasks = [
            benchmark.task(client, 0) for client in range(config.data.clients)
        ]
        self.data = [
            (task.train.x.contiguous(memory_format=self.format), task.train.y)
            for task in tasks
        ]
        self.test = [
            (task.test.x.contiguous(memory_format=self.format), task.test.y)
            for task in tasks
        ]

    def initial(self) -> dict[str, Tensor]:
        """Return the first global weights."""
        return {
            name: value.clone() for name, value in self.model.state_dict().items()
        }

    def train(
        self, weights: dict[str, Tensor], clients: range, round: int
    ) -> tuple[dict[str, Tensor], int]:
        """Train these clients a round; return the weighted sum and the samples."""
        import torch
        from torch.nn import functional as F

        from fedknow.protocols.seeds import integer

        train, model = self.config.train, self.model
        optimizers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        samples = 0
        for client in clients:
            x, y = self.data[client]
            model.load_state_dict(weights)
            model.train()
            optimizer = optimizers[train.optimizer](
                model.parameters(), lr=train.lr, fused=True
            )
            seed = integer(self.config.seed, "train", client, 0, round)
            generator = torch.Generator().manual_seed(seed)
            torch.manual_seed(seed)
            for _ in range(train.epochs):
                for index in torch.randperm(len(y), generator=generator).split(
                    train.batch_size
                ):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[index]), y[index]).backward()
                    optimizer.step()
            for name, value in model.state_dict().items():
                total[name].add_(value, alpha=len(y))
            samples += len(y)
        return total, samples

    def score(
        self, weights: dict[str, Tensor], clients: range
    ) -> tuple[int, int]:
        """Test samples that the model classifies rightly, and all of them."""
        import torch

        self.model.load_state_dict(weights)
        self.model.eval()
        right = 0
        with torch.inference_mode():
            for client in clients:
                x, y = self.test[client]
                parts = x.split(self.config.evaluation.batch_size)
                right += int(
                    (
                        torch.cat([self.model(part) for part in parts]).argmax(1)
                        == y
                    ).sum()
                )
        return right, sum(len(self.test[client][1]) for client in clients)


def start(config: ExperimentConfig) -> None:
    """Make this process of the pool ready."""
    global _loop
    _loop = Loop(config)


def work(
    task_name: str, weights: dict[str, Tensor], clients: range, round: int
) -> Any:
    """Train a share of a round, in a process of the pool."""
    return (
        _loop.train(weights, clients, round)
        if task_name == "train"
        else _loop.score(weights, clients)
    )


def mean(parts: list[tuple[dict[str, Tensor], int]]) -> dict[str, Tensor]:
    """Return the weighted mean of all clients, from sums over some of them."""
    samples = sum(part[1] for part in parts)
    averages = {}
    for name in parts[0][0]:
        averages[name] = sum(part[0][name] for part in parts) / samples
    return averages
