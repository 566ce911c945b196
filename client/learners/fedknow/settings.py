"""Settings of FedKNOW, and of what was found better.

docs/explanation/the-method.md has a table of each open point: the paper, the authors' code,
and what is done here and why.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fedknow.client.learners.frames.learner import Exchange, LearnerSettings

__all__ = [
    "SEARCH",
    "SEARCH_PLUS",
    "FedKnowPlusSettings",
    "FedKnowSettings",
]

SEARCH: dict[str, list[float | str]] = {
    "rho": [0.05, 0.1, 0.2],
    "labels": ["soft", "hard"],
    "temperature": [0.5, 1.0, 2.0, 4.0],
    "finetune_epochs": [0, 3, 10],
    "extract_from": ["local", "global"],
    "wasserstein": ["values", "positions"],
    "k": [3, 10],
    "exchange": ["body", "all"],
    "post_aggregation": ["first-epoch", "extra-epoch"],
}
"""Values worth trying of each setting that the paper leaves open."""
SEARCH_PLUS: dict[str, list[float | str]] = SEARCH | {
    "margin": [0.0, 0.1, 0.5, 1.0, 2.0],
    "post_aggregation": ["off", "first-epoch", "extra-epoch"],
}
"""Values worth trying, those that the paper does not have included."""


class FedKnowSettings(LearnerSettings):
    """Settings of :class:`FedKnow`."""

    learner: ClassVar[str] = "fedknow"
    """The learner's name, for messages."""
    rho: float = Field(0.1, gt=0, le=1)
    """Fraction of the body's weights a task's knowledge keeps."""
    k: int = Field(10, ge=1, le=10_000)
    """Most signature tasks a gradient is integrated with."""
    temperature: float = Field(2.0, gt=0)
    """T of the restorer's soft labels. 2, as in the authors' code where it restores gradients;
    1 takes the knowledge's answers as they are."""
    labels: Literal["soft", "hard"] = "soft"
    """What the knowledge says of a sample: its distribution at T, or its most likely class."""
    extractor: Literal["magnitude", "int8", "filters", "low-rank"] = "magnitude"
    """How a task's knowledge is made small. ``magnitude``: the share rho of largest weights, as in
    the paper. Lighter ones: ``int8``, the same in a byte each; ``filters``, the share rho of each
    layer's filters that are least alike; ``low-rank``, two thin matrices a layer."""
    energy: float = Field(0.9, gt=0, le=1)
    """``low-rank``: share of a layer's sum of squared weights that the thin matrices hold."""
    finetune_epochs: int = Field(3, ge=0, le=10_000)
    """Epochs of fine-tuning the pruned weights."""
    finetune_lr: float = Field(1e-3, gt=0, le=1)
    """Adam's learning rate in fine-tuning, whatever optimizer and rate the training has."""
    extract_from: Literal["local", "global"] = "local"
    """The model to extract from: this client's own as it last trained it in the task, or the final
    shared one."""
    wasserstein: Literal["values", "positions"] = "values"
    """Reading of the distance that chooses signature tasks
    (:func:`~fedknow.client.learners.fedknow.selection.wasserstein`).
    """
    select: Literal["round", "batch"] = "round"
    """How often signature tasks are chosen; matters only with more than k past tasks."""
    candidates: int = Field(0, ge=0, le=1_000_000)
    """Which past tasks signature tasks are chosen from. 0, as in the paper: all, at the price of a
    backward pass and a teacher's answers for each. Otherwise k and so many more, drawn anew
    each round: those chosen last, and others at random. With that a round costs the same
    however many tasks there are; the choice is exact as long as they are no more than that, and
    an approximation afterwards, of which no loss was seen (docs/evidence/benchmarks.md, Growth)."""
    integrator: Literal["qp", "bounded", "surrogate", "online", "sum", "off"] = (
        "qp"
    )
    """``qp`` is the paper's, with ``margin``. ``bounded`` is for long streams: it hurts no past
    task beyond a bound (``tolerance``), in memory that does not grow with the tasks. Two
    approximations without a bound cost the same however many tasks there are: ``surrogate``
    takes all violated constraints as one, their weighted sum; ``online`` keeps the multipliers
    of Eq. (4) from batch to batch and moves them one step a batch. ``sum`` adds the restored
    gradients instead (distillation), ``off`` ignores them: for ablation."""
    tolerance: float = Field(0.25, ge=1e-3, lt=1)
    """``bounded``: how fast g' may raise the loss of a past task at most, as a share of how fast g
    raises the one that it raises fastest."""
    path: Literal["adaptive", "full"] = "adaptive"
    """How ``qp`` comes to its result, which is the same up to rounding: from the restored
    gradients it needs, or from all of them."""
    margin: float = Field(0.0, ge=0)
    """The least that each multiplier of Eq. (4) may be: v >= margin. The paper has v >= 0. With
    more, restored gradients are followed a little in every step that is integrated; the
    authors' code has 0.5, where its trigger lets it integrate at all. It costs nothing as a
    rule: g' is then what is nearest to ``g + margin sum_i g_i``, which one backward pass gives
    as well as g (where g alone is needed first, to choose signature tasks, it costs one). Not
    with ``sum``."""
    restore_from: float = Field(1.0, gt=0, le=1)
    """Share of a batch that restored gradients are taken from, in a forward pass of its own with
    other dropout masks. Less than 1 is an approximation; not with ``online``, nor for bodies
    with BatchNorm."""
    every: int = Field(1, ge=1, le=1_000_000)
    """Integrate one batch in so many; the others take the plain gradient. More than 1 is an
    approximation."""
    exchange: Exchange = "body"
    """What is averaged over clients. ``body``: each client keeps a head of its own; ``all``: heads
    are averaged too."""
    post_aggregation: Literal["off", "first-epoch", "extra-epoch"] = "first-epoch"
    """Integration of the gradient at the received model, g_a, with that at the model last trained
    here, g_b, for one epoch (Sec. III-E): in the first local epoch, so that a round has as many
    epochs as with any other method; in an epoch of its own before it; or not at all. g_b is
    taken without dropout."""
    infer_task: Literal["off", "probability", "energy"] = "off"
    """Where test samples come without their task, as in class-incremental streams: whether to
    answer each one among the classes of the task whose knowledge is surest of it. Sure is the
    one with the largest ``probability`` of a class, or with the largest ``energy``, the logarithm
    of the sum of its logits' exponentials. Not in the paper; a forward pass of each knowledge
    for each test sample."""


class FedKnowPlusSettings(FedKnowSettings):
    """Settings of :class:`~fedknow.client.learners.fedknow.plus.FedKnowPlus`."""

    learner: ClassVar[str] = "fedknow-plus"
    temperature: float = Field(1.0, gt=0)
    """T of the restorer's soft labels; 1 takes the knowledge's answers as they are."""
    margin: float = Field(0.5, ge=0)
    """The least that each multiplier of Eq. (4) may be: restored gradients are followed in every
    step. 0 is the paper's. Not with ``sum``."""
    post_aggregation: Literal["off", "first-epoch", "extra-epoch"] = "off"
    """Integration of the gradients at the received model and at the one last trained here: not at
    all, in the first local epoch, or in an epoch of its own before it."""
