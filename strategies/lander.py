"""The server's half of LANDER: TARGET's, with images made near anchors.

Tran, Le, Le, Harandi and Phung, "Text-Enhanced Data-free Approach for Federated Class-Incremental
Learning", CVPR 2024. To TARGET's three terms the generator's loss adds the bounding loss, Eq. (1)
of :mod:`fedknow.client.learners.lander`, and the student learns the teacher's features as well.

The paper's generator makes images of the label's embedding by a layer that is drawn anew for each
batch. Here a layer that goes on learning adds the anchor to the noise that TARGET has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.learners.lander import Lander as LanderLearner
from fedknow.client.learners.lander import bounding, draw_anchors
from fedknow.protocols.config import ConfigError
from fedknow.strategies.paired import Setup
from fedknow.strategies.synthesis import (
    NOISE,
    Generator,
    Synthesis,
    fresh_student,
    rivals_in,
    run_synthesis,
)
from fedknow.strategies.target import Target

__all__ = ["AnchoredGenerator", "AnchoredSynthesis", "Lander"]


class AnchoredGenerator(Generator):
    """A generator that knows the anchors of what it makes.

    Parameters
    ----------
    shape : tuple of int
        Shape of an image.
    width : int
        Numbers of an anchor.
    """

    def __init__(self, shape: tuple[int, int, int], width: int) -> None:
        super().__init__(shape)
        self.embed = nn.Linear(width, NOISE)


class AnchoredSynthesis(Synthesis):
    """Synthesis near anchors.

    Parameters
    ----------
    teacher, student : nn.Module
        With ``body`` and ``head``.
    generator : AnchoredGenerator
    rivals : Tensor
        As :class:`~fedknow.strategies.synthesis.Synthesis` has it.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        generator: AnchoredGenerator,
        rivals: Tensor,
    ) -> None:
        super().__init__(teacher, student, generator, rivals)
        self._bodies = (
            cast(nn.Module, teacher.body),
            cast(nn.Module, student.body),
        )
        self._embed = generator.embed
        head = cast(nn.Linear, teacher.head)
        self._anchors = draw_anchors(head.out_features, head.in_features)
        self.weight = 0.0
        self.radius = 0.0

    def place(self, noise: Tensor, y: Tensor) -> Tensor:
        """Give noise around the labels' anchors."""
        placed: Tensor = noise + self._embed(self._anchors[y])
        return placed

    def generator_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the bounding loss to TARGET's three terms."""
        teacher, _ = self._bodies
        bound = bounding(teacher(x), self._anchors[y], self.radius)
        return super().generator_loss(x, y) + self.weight * bound

    def student_loss(self, x: Tensor) -> Tensor:
        """Take how far the student's features are from the teacher's."""
        teacher, student = self._bodies
        with torch.no_grad():
            target = teacher(x)
        return self.weight * F.mse_loss(student(x), target)


class Lander(Target):
    """TARGET that makes images near the anchors of their classes.

    Parameters
    ----------
    anchor_weight, radius
        See :class:`fedknow.client.learners.lander.LanderSettings`, which decides.
    samples, temperature, generator_steps, student_steps
        See :class:`~fedknow.strategies.target.Target`.
    fraction_train, min_train_nodes, min_available_nodes
        See :class:`~fedknow.strategies.paired.PairedStrategy`.
    """

    def __init__(  # noqa: PLR0913  # the strategy's settings
        self,
        anchor_weight: float = 5.0,
        radius: float = 0.015,
        samples: int = 256,
        temperature: float = 2.0,
        generator_steps: int = 30,
        student_steps: int = 20,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(
            samples,
            temperature,
            generator_steps,
            student_steps,
            fraction_train,
            min_train_nodes,
            min_available_nodes,
        )
        self.anchor_weight = anchor_weight
        self.radius = radius

    def prepare(self, setup: Setup) -> None:
        """Take a model to work with.

        Raises
        ------
        ConfigError
            If the learner is another one.
        """
        if not isinstance(setup.learner, LanderLearner):
            raise ConfigError(
                "strategy.name = 'lander' is one half of a method; set learner.name = 'lander'"
            )
        super().prepare(setup)

    def _synthesize(self, teacher: nn.Module, slices: Sequence[Tensor]) -> Tensor:
        head = cast(nn.Linear, teacher.head)
        synthesis = AnchoredSynthesis(
            teacher,
            fresh_student(teacher, self._learner.trainable),
            AnchoredGenerator(self._shape, head.in_features),
            rivals_in(slices, head.out_features),
        )
        synthesis.weight = self.anchor_weight
        synthesis.radius = self.radius
        images, _ = run_synthesis(synthesis, self._shape, slices, self._effort)
        return images

    def _describe(self, teacher: nn.Module, images: Tensor) -> dict[str, Tensor]:
        body = cast(nn.Module, teacher.body)
        return {"features": body(images)}
