"""The server's half of TARGET (Zhang et al., ICCV 2023): images made of nothing but the global model."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.host import one_thread
from fedknow.client.learners.target import Target as TargetLearner
from fedknow.client.learners.target import distillation
from fedknow.protocols.config import ConfigError
from fedknow.protocols.messages import EXTRA, Arrays, Message, client_of
from fedknow.protocols.seeds import integer
from fedknow.strategies.paired import PairedStrategy, Setup

__all__ = ["Generator", "Target", "statistics_gap", "synthesize"]

_BATCH = 64
"""Images that are made together."""
_NOISE = 64
_AWAY = -1e9
"""A logit that a softmax leaves out without becoming infinite."""


class Generator(nn.Module):
    """Images from noise, float [n, 64] -> [n, C, H, W], normalised over the batch as the data are
    over the data set."""

    def __init__(self, shape: tuple[int, int, int], width: int = 32) -> None:
        super().__init__()
        channels, self._height, self._width = shape
        self._start = (
            2 * width,
            math.ceil(self._height / 4),
            math.ceil(self._width / 4),
        )
        self.spread = nn.Linear(_NOISE, math.prod(self._start))
        self.paint = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, noise: Tensor) -> Tensor:
        """Cut to the images' size, where that is no multiple of four."""
        image: Tensor = self.paint(self.spread(noise).view(-1, *self._start))
        return image[:, :, : self._height, : self._width]


@contextmanager
def statistics_gap(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect, for what goes through a model in evaluation mode, how far it is from each
    BatchNorm's statistics.

    The distances of means and of variances, ``|mean(x) - running_mean| + |var(x) -
    running_var|``, one a layer.
    """
    gaps: list[Tensor] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        mean, var = args[0].mean((0, 2, 3)), args[0].var((0, 2, 3), unbiased=False)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        gaps.append(
            (mean - layer.running_mean).norm() + (var - layer.running_var).norm()
        )

    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d) and m.track_running_stats
    ]
    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        yield gaps
    finally:
        for handle in handles:
            handle.remove()


def synthesize(
    teacher: nn.Module,
    shape: tuple[int, int, int],
    slices: Sequence[Tensor],
    samples: int,
    generator_steps: int,
    student_steps: int,
    temperature: float,
    trainable: Collection[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Make images that a model takes for given classes, and that a student of it does not know yet.

    For each batch, labels y are drawn and a generator and its noise are trained on the sum of
    the paper's three terms, Eq. (9): cross-entropy of the teacher's answer with y among y's
    slice, Eq. (5); minus the divergence of a student from the teacher where the two disagree,
    Eqs. (6) and (7), which moves images to where the student still errs; and the distance of
    the images' statistics from those in the teacher's BatchNorm layers, if it has any, Eq. (8).
    Then the student is distilled from the teacher on all images there are, Eq. (10). Draws come
    from torch's global generator.

    Other than in the authors' program
    (github.com/zj-jayzhang/Federated-Class-Continual-Learning, for CIFAR-100),

    - the second term is where the two disagree, as the paper has it; there where they agree;
    - the generator goes on learning from batch to batch; there each batch's starts from one
      meta-learned over batches;
    - the three terms weigh the same; there by data set, and batches' statistics are averaged
      over those before;
    - the last images of a batch's steps are taken; there those of the step with the smallest loss;
    - images go to teacher and student as they are; there augmented, shifted and flipped;
    - the student, and with it the second term, begins with the first batch; there after 20 for
      warm-up, which as published, with 10 batches, never end;
    - the student is distilled at the clients' temperature, without its square as a factor, by
      20 steps of Adam a batch; there at a temperature of its own, 20, with T^2, by 400 steps of
      SGD from a rate of 0.2.

    Parameters
    ----------
    teacher : nn.Module
        Whose answers count; in evaluation mode, frozen, and left as it was.
    shape : tuple of int
        Of an image.
    slices : sequence of Tensor
        Classes that are told from one another, int64 [k] each.
    samples, generator_steps, student_steps, temperature
        See :class:`fedknow.client.learners.target.TargetSettings`.
    trainable : collection of str, optional
        Names of the parameters that a student learns, by default all; the others it has from
        the teacher.

    Returns
    -------
    tuple of Tensor
        Images, float [samples, C, H, W], and the class that each was made for, int64 [samples].
    """
    classes = torch.cat(list(slices))
    width = int(teacher(torch.zeros(1, *shape)).shape[1])
    among = torch.zeros(
        width, width, dtype=torch.bool
    )  # row y: the classes that y is told from
    for part in slices:
        among[part[:, None], part] = True
    student = _student(teacher, trainable)
    generator = Generator(shape)
    generator_optimizer = torch.optim.Adam(
        generator.parameters(), lr=2e-3, betas=(0.5, 0.999)
    )
    student_optimizer = torch.optim.Adam(
        [p for p in student.parameters() if p.requires_grad], lr=1e-3
    )
    pool, labels = torch.zeros(0, *shape), torch.zeros(0, dtype=torch.int64)
    while len(pool) < samples:
        # Whole batches, for statistics; the last one's surplus is dropped.
        y = classes[torch.randint(len(classes), (_BATCH,))]
        noise = torch.randn(_BATCH, _NOISE, requires_grad=True)
        noise_optimizer = torch.optim.Adam([noise], lr=1e-2, betas=(0.5, 0.999))
        student.eval()
        for _ in range(generator_steps):
            x = generator(noise)
            with statistics_gap(teacher) as gaps:
                told = teacher(x).masked_fill(~among[y], _AWAY)
            guessed = student(x).masked_fill(~among[y], _AWAY)
            disagree = told.argmax(1) != guessed.argmax(1)
            log_p, log_q = told.log_softmax(1), guessed.log_softmax(1)
            apart = (log_p.exp() * (log_p - log_q)).sum(1)
            loss = (
                F.cross_entropy(told, y)
                - (apart * disagree).mean()
                + sum(gaps, torch.zeros(()))
            )
            generator_optimizer.zero_grad()
            noise_optimizer.zero_grad()
            loss.backward()
            generator_optimizer.step()
            noise_optimizer.step()
        with torch.no_grad():
            pool, labels = torch.cat([pool, generator(noise)]), torch.cat([labels, y])
        student.train()
        for _ in range(student_steps):
            x = pool[torch.randint(len(pool), (_BATCH,))]
            with torch.no_grad():
                answer = teacher(x)
            student_optimizer.zero_grad()
            distillation(student(x), answer, slices, temperature).backward()  # type: ignore[no-untyped-call]
            student_optimizer.step()
    return pool[:samples], labels[:samples]


def _student(teacher: nn.Module, trainable: Collection[str] | None) -> nn.Module:
    """A model like the teacher that has learned nothing yet, but for what is frozen."""
    student = copy.deepcopy(teacher)
    for module in student.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    known = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if trainable is None or name in trainable:
            parameter.requires_grad_(True)
        else:
            with torch.no_grad():
                parameter.copy_(known[name])
    return student


class Target(PairedStrategy):
    """FedAvg that makes images of the global model when a task is over, and sends them with its
    answers.

    Keeps the images of the last task, the classes of all, and which clients have had the images.

    Parameters
    ----------
    samples, temperature, generator_steps, student_steps
        See :class:`fedknow.client.learners.target.TargetSettings`, which decides.
    fraction_train, min_train_nodes, min_available_nodes
        See :class:`~fedknow.strategies.paired.PairedStrategy`.
    """

    def __init__(
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
        self._effort: dict[str, Any] = {
            "samples": samples,
            "generator_steps": generator_steps,
            "student_steps": student_steps,
            "temperature": temperature,
        }
        self._tasks: list[list[int]] = []
        self._pool: Arrays | None = None
        self._told: set[int] = set()

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
        self._learner = setup.learner
        channels, height, width = (
            setup.stream.shape if setup.stream is not None else setup.config.data.shape
        )
        self._shape = channels, height, width
        self._seed = setup.config.seed
        self._last_task = setup.config.data.tasks - 1
        self._incremental = setup.config.data.scenario == "class-incremental"

    def extra(self, task: int, client: int) -> Arrays | None:
        """The images, for a client that has not had them."""
        return None if client in self._told else self._pool

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """FedAvg's; whoever answered has the images."""
        replies = list(replies)
        self._told |= {
            client_of(reply.metadata.src_node_id)
            for reply in replies
            if reply.has_content()
        }
        return super().aggregate_train(server_round, replies)

    def aggregate_end_task(
        self, task: int, arrays: Arrays, replies: Sequence[Message]
    ) -> None:
        """Note the task's classes, and make images of all classes so far unless it was the last task."""
        for extra in (reply.content.get(EXTRA) for reply in replies):
            classes = (
                sorted(int(label) for label in extra["classes"])
                if isinstance(extra, Arrays)
                else []
            )
            if classes and classes not in self._tasks:
                self._tasks.append(classes)
        self._pool, self._told = None, set()
        if task == self._last_task or not self._tasks:
            return
        groups = (
            [sorted({label for part in self._tasks for label in part})]
            if self._incremental
            else self._tasks
        )
        slices = [torch.tensor(group) for group in groups]
        self._learner.receive(
            {name: torch.tensor(array) for name, array in arrays.items()}
        )
        teacher = self._learner.model.eval().requires_grad_(False)
        with torch.random.fork_rng(devices=[]), one_thread():
            torch.manual_seed(integer(self._seed, "target", task))
            x, _ = synthesize(
                teacher,
                self._shape,
                slices,
                **self._effort,
                trainable=self._learner.trainable,
            )
            with torch.no_grad():
                logits = teacher(x)
        columns = torch.cat(slices)
        group = torch.cat(
            [torch.full_like(part, number) for number, part in enumerate(slices)]
        )
        pool = {
            "x": x,
            "logits": logits[:, columns],
            "classes": columns,
            "slice": group,
        }
        self._pool = Arrays(
            (name, value.contiguous().numpy()) for name, value in pool.items()
        )

    def state_dict(self) -> dict[str, Any]:
        """The images, the classes, and who has had the images."""
        return {
            "tasks": self._tasks,
            "pool": dict(self._pool or {}),
            "told": sorted(self._told),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._tasks = [list(classes) for classes in state["tasks"]]
        self._pool = Arrays(state["pool"]) if state["pool"] else None
        self._told = set(state["told"])
