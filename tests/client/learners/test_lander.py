"""LANDER: its losses by hand, and images near their anchors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.frames.learner import Batch, HeadSlice, Round
from fedknow.client.learners.lander import (
    Lander,
    LanderSettings,
    bounding,
    draw_anchors,
    weights,
)
from fedknow.client.models import SplitModel
from fedknow.protocols.config import TrainConfig
from fedknow.strategies.lander import AnchoredGenerator, AnchoredSynthesis
from fedknow.strategies.synthesis import (
    SynthesisEffort,
    fresh_student,
    rivals_in,
    run_synthesis,
)

SGD = TrainConfig(
    epochs=1,
    batch_size=64,
    optimizer="sgd",
    lr=0.1,
    weight_decay=0.0,
    channels_last=False,
)


def test_bounding_by_hand():
    """Squares 1, 0, 4 and 9 over two samples of two numbers: 3.5."""
    features = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    anchors = torch.zeros(2, 2)
    assert bounding(features, anchors, 0.5).item() == pytest.approx(3.0)
    assert bounding(features, anchors, 4.0).item() == 0


def test_weights_by_hand():
    """6 classes, s = log2(4) = 2; of them 4 are old; b = sqrt(2/3)."""
    current, previous = weights(4, 6)
    assert current == pytest.approx(1.5 / (2 / 3) ** 0.5)
    assert previous == pytest.approx(2 * (2 / 3) ** 0.5)


def test_anchors_are_the_same_everywhere():
    anchors = draw_anchors(5, 7)
    torch.manual_seed(3)
    assert torch.equal(anchors, draw_anchors(5, 7))
    assert anchors.min() == 0
    assert len(torch.unique(anchors, dim=0)) == 5


def linear():
    body = nn.Sequential(nn.Flatten(), nn.Linear(2, 3))
    torch.manual_seed(0)
    for layer in (body[1], head := nn.Linear(3, 4)):
        layer.reset_parameters()
    return SplitModel(body, head)


def pool():
    return {
        "x": torch.tensor([[1.0, 0.5], [-0.5, 2.0]]).view(-1, 1, 1, 2),
        "logits": torch.tensor([[0.3, -0.2], [1.0, 0.0]]),
        "classes": torch.tensor([0, 1]),
        "slice": torch.tensor([0, 0]),
        "features": torch.tensor([[0.1, 0.2, 0.3], [0.0, 1.0, -1.0]]),
    }


@pytest.mark.parametrize("is_first", [True, False])
def test_gradient_against_autograd_of_the_losses(is_first):
    options = LanderSettings(
        distill=0.7, current=0.3, anchor_weight=2.0, radius=0.01
    )
    learner = Lander(linear(), SGD, options)
    images = pool()
    if not is_first:
        learner.receive_extra(dict(images))
    x = torch.tensor([[0.2, -1.0], [1.5, 1.0]]).view(-1, 1, 1, 2)
    split = Split(x, torch.tensor([2, 3]))
    data = TaskData(1, (2, 3), (0, 1, 2, 3), split, split, True)
    learner.begin(data, Round(1, 0))
    head = HeadSlice(data.head, 4)
    batch = Batch(x, head.labels(split.y), torch.arange(2), head)
    learner.gradient(batch)

    model = linear()
    features = model.body(x)
    bound = bounding(features, draw_anchors(4, 3)[[2, 3]], 0.01)
    new = F.cross_entropy(model.head(features)[:, 2:], split.y - 2) + 2 * bound
    loss = new
    if not is_first:
        made = model.body(images["x"])
        z = model.head(made)[:, :2] / 2
        soft = (images["logits"] / 2).softmax(1)
        kept = -(soft * z.log_softmax(1)).sum(1).mean()
        kept = kept + F.mse_loss(made, images["features"])
        current, previous = weights(2, 4)
        loss = 0.3 * current * new + 0.7 * previous * kept
    loss.backward()
    for ours, parameter in zip(
        learner.model.parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, parameter.grad)


def test_images_without_their_features_are_refused():
    learner = Lander(linear(), SGD, LanderSettings())
    images = pool()
    with pytest.raises(ValueError, match="features of synthetic images"):
        learner.receive_extra(images | {"features": torch.zeros(2, 2)})


def test_images_lie_nearer_their_anchors():
    """With the bounding loss features are nearer to the anchors of their classes."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU())
    teacher = SplitModel(body, nn.Linear(8, 3)).eval().requires_grad_(False)
    slices = [torch.arange(3)]
    effort = SynthesisEffort(64, 60, 2, 2.0)
    anchors = draw_anchors(3, 8)
    gaps = []
    for weight in (0.0, 20.0):
        torch.manual_seed(1)
        synthesis = AnchoredSynthesis(
            teacher,
            fresh_student(teacher, None),
            AnchoredGenerator((1, 4, 4), 8),
            rivals_in(slices, 3),
        )
        synthesis.weight = weight
        shape = (1, 4, 4)
        x, y = run_synthesis(synthesis, shape, slices, effort)
        gaps.append(F.mse_loss(teacher.body(x), anchors[y]).item())
    assert gaps[1] < 0.8 * gaps[0]
