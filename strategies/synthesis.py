"""Images made of nothing but a model: the first part of TARGET.

Zhang, Chen, Zhuang and Lyu, "TARGET: Federated Class-Continual Learning via Exemplar-Free
Distillation", ICCV 2023, section 3.3. A generator is trained on

    (9)  CE(teacher(x), y) - divergence of student from teacher + distance of statistics

with the three terms of Eqs. (5), (6)-(7) and (8), and a student is distilled, Eq. (10).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.learners.target import distillation

__all__ = [
    "NOISE",
    "Generator",
    "Synthesis",
    "SynthesisEffort",
    "fresh_student",
    "rivals_in",
    "run_synthesis",
    "statistics_gap",
    "synthesize",
]

_BATCH = 64
"""Images that are made together."""
NOISE = 64
"""Numbers of noise for an image."""
_EXCLUDED = -1e9
"""A logit that a softmax leaves out without becoming infinite."""


@dataclass(frozen=True)
class SynthesisEffort:
    """How many images are made, and how much work goes into them.

    Attributes
    ----------
    samples, generator_steps, student_steps, temperature
        See :class:`fedknow.client.learners.target.TargetSettings`.
    """

    samples: int
    generator_steps: int
    student_steps: int
    temperature: float


class Generator(nn.Module):
    """A network that makes images of noise, float [n, 64] -> [n, C, H, W].

    Images are normalised over the batch as the data are over the data set.
    """

    def __init__(self, shape: tuple[int, int, int], width: int = 32) -> None:
        super().__init__()
        channels, self._height, self._width = shape
        # Two upsamplings follow, each by two.
        height = math.ceil(self._height / 4)
        self._start = 2 * width, height, math.ceil(self._width / 4)
        self.spread = nn.Linear(NOISE, math.prod(self._start))
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
        """Make images, cut to size where that is no multiple of four."""
        image: Tensor = self.paint(self.spread(noise).view(-1, *self._start))
        return image[:, :, : self._height, : self._width]


@contextmanager
def statistics_gap(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect how far inputs are from the statistics of BatchNorm layers.

    The distances of means and of variances, ``|mean(x) - running_mean| + |var(x) -
    running_var|``, one a layer, for inputs that go through the model in evaluation mode.
    """
    gaps: list[Tensor] = []

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean = args[0].mean((0, 2, 3))
        # BatchNorm normalises with the biased variance too.
        variance = args[0].var((0, 2, 3), unbiased=False)
        mean_gap = (mean - layer.running_mean).norm()
        gaps.append(mean_gap + (variance - layer.running_var).norm())

    handles = [
        module.register_forward_pre_hook(note)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats
    ]
    try:
        yield gaps
    finally:
        for handle in handles:
            handle.remove()


def synthesize(
    teacher: nn.Module,
    shape: tuple[int, int, int],
    slices: Sequence[Tensor],
    effort: SynthesisEffort,
    trainable: Collection[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Make images that a model takes for given classes.

    For each batch, labels y are drawn, and a generator and its noise are trained on the sum of
    the paper's three terms, Eq. (9). These are: cross-entropy of the teacher's answer with y
    among y's slice, Eq. (5); minus the divergence of a student from the teacher where the two
    disagree, Eqs. (6) and (7), which moves images to where the student still errs; the distance
    of the images' statistics from those in the teacher's BatchNorm layers, if it has any, Eq.
    (8). Then the student is distilled from the teacher on all images there are, Eq. (10). Draws
    come from torch's global generator.

    The authors' program (github.com/zj-jayzhang/Federated-Class-Continual-Learning, for
    CIFAR-100) differs:

    - its second term is where the two agree; here where they disagree, as the paper has it;
    - its generator starts each batch from one meta-learned over batches; here it goes on
      learning from batch to batch;
    - its three terms are weighted by data set, and batches' statistics are averaged over those
      before; here the terms weigh the same;
    - it takes the images of the step with the smallest loss; here those of the last step;
    - it augments images, shifted and flipped; here they go to teacher and student as they are;
    - its student, and with it the second term, begins after 20 batches of warm-up, which as
      published, with 10 batches, never end; here with the first batch;
    - it distils at a temperature of its own, 20, with T^2 as a factor, by 400 steps of SGD from
      a rate of 0.2; here at the clients' temperature, without that factor, by 20 steps of Adam
      a batch.

    Parameters
    ----------
    teacher : nn.Module
        The model; in evaluation mode, frozen, and left as it was.
    shape : tuple of int
        Shape of an image.
    slices : sequence of Tensor
        Classes that are told from one another, int64 [k] each.
    effort : SynthesisEffort
    trainable : collection of str, optional
        Names of the parameters that a student learns, by default all; it copies the others from
        the teacher.

    Returns
    -------
    tuple of Tensor
        Images, float [samples, C, H, W], and the class that each was made for, int64 [samples].
    """
    width = int(teacher(torch.zeros(1, *shape)).shape[1])
    # Student before generator: the order of random draws is part of a run.
    synthesis = Synthesis(
        teacher,
        fresh_student(teacher, trainable),
        Generator(shape),
        rivals_in(slices, width),
    )
    return run_synthesis(synthesis, shape, slices, effort)


def run_synthesis(
    synthesis: Synthesis,
    shape: tuple[int, int, int],
    slices: Sequence[Tensor],
    effort: SynthesisEffort,
) -> tuple[Tensor, Tensor]:
    """Make images batch by batch, and distil the student after each.

    Parameters and results are those of :func:`synthesize`.
    """
    classes = torch.cat(list(slices))
    images = torch.zeros(0, *shape)
    labels = torch.zeros(0, dtype=torch.int64)
    while len(images) < effort.samples:
        # Whole batches, for the statistics; the surplus of the last one is dropped.
        y = classes[torch.randint(len(classes), (_BATCH,))]
        batch = synthesis.make_batch(y, effort.generator_steps)
        images = torch.cat([images, batch])
        labels = torch.cat([labels, y])
        synthesis.distil(images, slices, effort)
    return images[: effort.samples], labels[: effort.samples]


class Synthesis:
    """A generator and a student that learn from one teacher, in turns.

    Parameters
    ----------
    teacher, student : nn.Module
    generator : Generator
    rivals : Tensor
        Row y: the classes that y is told from, bool [classes, classes].
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: Generator,
        rivals: Tensor,
    ) -> None:
        self._teacher = teacher
        self._student = student
        self._generator = generator
        self._rivals = rivals
        self._generator_optimizer = torch.optim.Adam(
            generator.parameters(), lr=2e-3, betas=(0.5, 0.999)
        )
        learned = [
            weight for weight in student.parameters() if weight.requires_grad
        ]
        self._student_optimizer = torch.optim.Adam(learned, lr=1e-3)

    def make_batch(self, y: Tensor, steps: int) -> Tensor:
        """Train the generator and its noise for some labels; return the images."""
        noise = torch.randn(_BATCH, NOISE, requires_grad=True)
        # Each batch begins with noise of its own, so its optimizer is new too.
        noise_optimizer = torch.optim.Adam([noise], lr=1e-2, betas=(0.5, 0.999))
        # The student's BatchNorm must not move while it judges.
        self._student.eval()
        for _ in range(steps):
            images = self._generator(self.place(noise, y))
            loss = self.generator_loss(images, y)
            self._generator_optimizer.zero_grad()
            noise_optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._generator_optimizer.step()
            noise_optimizer.step()
        with torch.no_grad():
            result: Tensor = self._generator(self.place(noise, y))
        return result

    def place(self, noise: Tensor, y: Tensor) -> Tensor:
        """Give what the generator makes images of; here the noise alone."""
        return noise

    def distil(
        self,
        images: Tensor,
        slices: Sequence[Tensor],
        effort: SynthesisEffort,
    ) -> None:
        """Train the student to answer like the teacher on all images, Eq. (10)."""
        # In training mode, so that its BatchNorm learns the images' statistics.
        self._student.train()
        for _ in range(effort.student_steps):
            x = images[torch.randint(len(images), (_BATCH,))]
            with torch.no_grad():
                answer = self._teacher(x)
            self._student_optimizer.zero_grad()
            loss = distillation(
                self._student(x), answer, slices, effort.temperature
            )
            loss = loss + self.student_loss(x)
            loss.backward()  # type: ignore[no-untyped-call]
            self._student_optimizer.step()

    def student_loss(self, x: Tensor) -> Tensor | float:
        """Give what a method adds to the student's loss on images."""
        return 0.0

    def generator_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of the paper's three terms, Eq. (9)."""
        is_excluded = ~self._rivals[y]
        with statistics_gap(self._teacher) as gaps:
            teacher = self._teacher(x).masked_fill(is_excluded, _EXCLUDED)
        student = self._student(x).masked_fill(is_excluded, _EXCLUDED)
        is_disputed = teacher.argmax(1) != student.argmax(1)
        # In logarithms: a probability of 0 would give 0 times infinity.
        log_p = teacher.log_softmax(1)
        log_q = student.log_softmax(1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(1)
        label_term = F.cross_entropy(teacher, y)
        student_term = (divergence * is_disputed).mean()
        # A sum of an empty list: models without BatchNorm have no such term.
        statistics_term = sum(gaps, torch.zeros(()))
        loss: Tensor = label_term - student_term + statistics_term
        return loss


def rivals_in(slices: Sequence[Tensor], width: int) -> Tensor:
    """Mark for each class the classes of its slice, bool [width, width]."""
    rivals = torch.zeros(width, width, dtype=torch.bool)
    for classes in slices:
        rivals[classes[:, None], classes] = True
    return rivals


def fresh_student(
    teacher: nn.Module, trainable: Collection[str] | None
) -> nn.Module:
    """Copy the teacher without its knowledge; frozen parameters stay."""
    student = copy.deepcopy(teacher)
    for module in student.modules():
        # Layers with parameters know how to draw them anew.
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    originals = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if trainable is None or name in trainable:
            parameter.requires_grad_(True)
        else:
            # A frozen part travels to nobody, so every model has the teacher's.
            with torch.no_grad():
                parameter.copy_(originals[name])
    return student
