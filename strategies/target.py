"""The server's half of TARGET: images made of the global model alone.

Zhang, Chen, Zhuang and Lyu, "TARGET: Federated Class-Continual Learning via Exemplar-Free
Distillation", ICCV 2023, algorithm 1. When a task is over, the server makes images that the
global model takes for the classes so far (:mod:`fedknow.strategies.synthesis`). It sends them,
with the model's answers, to the clients of the next task, which distil from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from torch import Tensor, nn

from fedknow.client.host import one_thread
from fedknow.client.learners.target import Target as TargetLearner
from fedknow.client.models.draws import own_draws
from fedknow.protocols.config import ConfigError
from fedknow.protocols.messages import EXTRA, Arrays, Message, client_of
from fedknow.protocols.seeds import integer
from fedknow.strategies.paired import PairedStrategy, Setup, to_tensors
from fedknow.strategies.synthesis import SynthesisEffort, synthesize

__all__ = ["Target"]


class Target(PairedStrategy):
    """FedAvg that makes images of the global model and sends them.

    The server stores the images of the last task, the classes of all tasks, and which clients
    have the images.

    Parameters
    ----------
    samples, temperature, generator_steps, student_steps
        See :class:`fedknow.client.learners.target.TargetSettings`, which decides.
    fraction_train, min_train_nodes, min_available_nodes
        See :class:`~fedknow.strategies.paired.PairedStrategy`.
    """

    def __init__(  # noqa: PLR0913  # the strategy's settings
        self,
        samples: int = 256,
        temperature: float = 2.0,
        generator_steps: int = 30,
        student_steps: int = 20,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(fraction_train, min_train_nodes, min_available_nodes)
        self._effort = SynthesisEffort(
            samples, generator_steps, student_steps, temperature
        )
        self._tasks: list[list[int]] = []
        self._images: Arrays | None = None
        self._informed: set[int] = set()

    def prepare(self, setup: Setup) -> None:
        """Take a model to work with.

        Raises
        ------
        ConfigError
            If the learner is another one.
        """
        if not isinstance(setup.learner, TargetLearner):
            raise ConfigError(
                "strategy.name = 'target' is one half of a method; set learner.name = 'target'"
            )
        data = setup.config.data
        self._learner = setup.learner
        # The stream knows the true shape; without it the clients have data of their own.
        shape = data.shape if setup.stream is None else setup.stream.spec.shape
        channels, height, width = shape
        self._shape = channels, height, width
        self._seed = setup.config.seed
        # Images of the last task would reach nobody.
        self._last_task = data.tasks - 1
        self._is_incremental = data.scenario == "class-incremental"

    def extra(self, task: int, client: int) -> Arrays | None:
        """Return the images for a client that does not have them yet."""
        return None if client in self._informed else self._images

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average as FedAvg does; clients that answered have the images."""
        replies = list(replies)
        answered = [reply for reply in replies if reply.has_content()]
        self._informed |= {
            client_of(reply.metadata.src_node_id) for reply in answered
        }
        return super().aggregate_train(server_round, replies)

    def aggregate_end_task(
        self,
        task: int,
        arrays: Arrays,
        replies: Sequence[Message],
    ) -> None:
        """Note the task's classes, and make images of all classes so far.

        After the last task no images are made.
        """
        self._note_classes(replies)
        self._images = None
        self._informed = set()
        if task == self._last_task or not self._tasks:
            return
        self._learner.receive(to_tensors(arrays))
        self._images = self._make_images(task, self._slices())

    def state_dict(self) -> dict[str, Any]:
        """Return the images, the classes, and which clients have the images."""
        return {
            "tasks": self._tasks,
            "pool": dict(self._images or {}),
            "told": sorted(self._informed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._tasks = [list(classes) for classes in state["tasks"]]
        self._images = Arrays(state["pool"]) if state["pool"] else None
        self._informed = set(state["told"])

    def _note_classes(self, replies: Sequence[Message]) -> None:
        """Note the sets of classes that clients learned, each set once."""
        for reply in replies:
            extra = reply.content.get(EXTRA)
            if not isinstance(extra, Arrays):
                continue
            classes = sorted(int(label) for label in extra["classes"])
            # Clients may learn different classes of one task.
            if classes and classes not in self._tasks:
                self._tasks.append(classes)

    def _slices(self) -> list[Tensor]:
        """Return the classes that are told from one another, int64 [k] each."""
        if not self._is_incremental:
            return [torch.tensor(classes) for classes in self._tasks]
        # One head answers for all tasks, so every class is told from every other.
        everything = set().union(*self._tasks)
        return [torch.tensor(sorted(everything))]

    def _make_images(self, task: int, slices: Sequence[Tensor]) -> Arrays:
        """Make images, and the global model's answers to them."""
        # Nothing may change the model: it is judged, not trained.
        teacher = self._learner.model.eval().requires_grad_(False)
        # A seed of the task's own, and a fork: other draws of the server stay as they are.
        with own_draws(integer(self._seed, "target", task)), one_thread():
            images = self._synthesize(teacher, slices)
            with torch.no_grad():
                logits = teacher(images)
                added = self._describe(teacher, images)
        classes = torch.cat(list(slices))
        numbers = [
            torch.full_like(part, number) for number, part in enumerate(slices)
        ]
        extra = {
            "x": images,
            # Columns of classes alone: others were never trained.
            "logits": logits[:, classes],
            "classes": classes,
            "slice": torch.cat(numbers),
            **added,
        }
        return Arrays(
            (name, value.contiguous().numpy()) for name, value in extra.items()
        )

    def _synthesize(self, teacher: nn.Module, slices: Sequence[Tensor]) -> Tensor:
        """Make images of the teacher, float [samples, C, H, W]."""
        images, _ = synthesize(
            teacher, self._shape, slices, self._effort, self._learner.trainable
        )
        return images

    def _describe(self, teacher: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Give what else of the images goes to clients."""
        return {}
