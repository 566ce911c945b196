"""Products with the body's Jacobian, against the explicit one."""

import copy

import pytest
import torch
from torch import nn

from fedknow.client.data import SampleSpec
from fedknow.client.learners.fedknow.flat import flatten, views
from fedknow.client.learners.fedknow.linearization import (
    Linearization,
    factorable,
)
from fedknow.client.models import build_model
from fedknow.protocols.config import ModelConfig


class Residual(nn.Module):
    """Convolutions of every kind, and a way around some of them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(
            4, 4, (3, 1), padding=(1, 0), groups=2, bias=False
        )
        self.dilated = nn.Conv2d(4, 4, 3, padding="same", dilation=2)
        self.norm, self.plain, self.pool = (
            nn.BatchNorm2d(4),
            nn.BatchNorm2d(4, affine=False),
            nn.MaxPool2d(2),
        )
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(16, 5)

    def forward(self, x):
        x = self.plain(self.stem(x)).relu()
        x = self.pool(self.norm(self.grouped(x)) + self.dilated(x).tanh())
        return self.last(self.drop(x.flatten(1)))


def at_batch(body, x, **kwargs):
    torch.manual_seed(7)
    return Linearization(body, x, **kwargs)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_products_are_those_of_the_explicit_jacobian(
    channels_last, factor, training
):
    torch.manual_seed(0)
    body = Residual().double()
    x = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    if channels_last:
        body, x = (
            body.to(memory_format=torch.channels_last),
            x.to(memory_format=torch.channels_last),
        )
    parameters = list(body.parameters())
    factored = factorable(body, x[:2], threshold=1) if factor else frozenset()
    assert (body.last.weight in factored) is factor
    body.train(training)
    x = x[:4]
    statistics = copy.deepcopy(body.state_dict())

    torch.manual_seed(7)
    features = body(x)
    moved = copy.deepcopy(body.state_dict())
    rows = [
        torch.autograd.grad(f, parameters, retain_graph=True)
        for f in features.flatten()
    ]
    jacobian = torch.stack([flatten(row, parameters) for row in rows])

    body.load_state_dict(statistics)
    at = at_batch(body, x, factored=factored)
    assert torch.equal(at.features, features)
    c, d = torch.randn(2, 4, 5, dtype=torch.float64)
    g, h = (
        at.pullback(part, torch.empty(at.size, dtype=x.dtype), forward=part is c)
        for part in (c, d)
    )
    expected_g, expected_h = c.flatten() @ jacobian, d.flatten() @ jacobian
    assert torch.allclose(
        flatten(at.expand(g), parameters), expected_g, atol=1e-12
    )
    assert torch.allclose(
        g @ h, expected_g @ expected_h, rtol=1e-10
    )  # coordinates keep inner products
    assert torch.allclose(
        at.pushforward(h).flatten(), jacobian @ expected_h, atol=1e-11
    )
    assert torch.allclose(
        (at.pushforward(h) * c).sum(), g @ h, rtol=1e-10
    )  # the two are adjoint
    assert all(
        torch.equal(value, moved[name])
        for name, value in body.state_dict().items()
    )  # statistics moved once
    assert (at.size < jacobian.shape[1]) is factor


def test_views_and_flatten_are_inverse_and_laid_out_as_the_parameters():
    parameters = [
        nn.Parameter(
            torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
        ),
        nn.Parameter(torch.zeros(5)),
    ]
    flat = torch.arange(53.0)
    parts = views(flat, parameters)
    assert [part.stride() for part in parts] == [
        parameter.stride() for parameter in parameters
    ]
    assert torch.equal(flatten(parts, parameters), flat)
    assert torch.equal(
        flatten([part.contiguous() for part in parts], parameters), flat
    )


class Shared(nn.Module):
    """One weight used twice, one also used for something else, one for sequences, one plainly."""

    def __init__(self):
        super().__init__()
        self.twice, self.tied, self.tokens, self.plain = (
            nn.Linear(4, 4) for _ in range(4)
        )

    def forward(self, x):
        x = self.twice(self.twice(x.flatten(1)).tanh())
        x = self.tied(x) @ self.tied.weight
        return self.plain(self.tokens(x.view(len(x), 1, 4)).flatten(1))


def test_weights_used_twice_are_not_factored():
    body = Shared()
    x = torch.randn(2, 1, 2, 2)
    assert factorable(body, x, threshold=1) == {body.plain.weight}
    assert factorable(body, x) == frozenset()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_single_and_half_precision_agree_with_double(precision):
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 6),
    )
    x, c = torch.randn(8, 2, 8, 8), torch.randn(8, 6)
    results = []
    for dtype in (torch.float64, torch.float32):
        body.to(dtype)
        context = (
            torch.autocast("cpu", torch.bfloat16)
            if (precision, dtype) == ("bf16", torch.float32)
            else None
        )
        factored = factorable(body, x[:2].to(dtype), threshold=1)
        at = Linearization(body.train(), x.to(dtype), context, factored)
        g = at.pullback(
            c.to(dtype), torch.empty(at.size, dtype=dtype), forward=True
        )
        results.append(
            (
                flatten(at.expand(g), list(body.parameters())).double(),
                at.pushforward(g).double(),
            )
        )
    tolerance = {"fp32": 1e-5, "bf16": 3e-2}[precision]
    for exact, ours in zip(*results, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < tolerance


def test_pushforward_needs_a_pullback():
    body = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="pullback"):
        Linearization(body, torch.ones(1, 2)).pushforward(torch.ones(6))


class Sentences(nn.Module):
    """Embedded tokens, PyTorch's own attention and recurrence."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 8, dropout=0, batch_first=True
        )
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.cell = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        mask = x == 0
        steps = self.layer(self.words(x), src_key_padding_mask=mask)
        steps = steps + self.attention(steps, steps, steps, mask)[0]
        fused = nn.functional.scaled_dot_product_attention(steps, steps, steps)
        return self.cell(steps + fused)[0].mean(1)


@pytest.mark.parametrize("name", ["own", "gru", "transformer"])
def test_products_through_embedding_and_attention(name):
    """Against a reference that never takes a gradient: central differences."""
    torch.manual_seed(0)
    sample = SampleSpec("tokens", (5,), "int32", vocabulary=9)
    config = ModelConfig(name="transformer", dim=4, heads=2, layers=1)
    if name == "gru":
        config = ModelConfig(name="gru", hidden=4, embedding=3)
    network = build_model(config, sample, 3, 0)
    body = (Sentences() if name == "own" else network.body).double()
    x = torch.randint(1, 9, (3, 5))
    x[0, 3:] = 0
    linear = Linearization(body, x)
    parameters = list(body.parameters())
    cotangent = torch.randn_like(linear.features)
    pulled = linear.pullback(
        cotangent, torch.empty(linear.size, dtype=torch.float64), forward=True
    )
    direction = torch.randn_like(pulled)
    start = nn.utils.parameters_to_vector(parameters).detach()

    def features(step):
        with torch.no_grad():
            # The reference: weights moved along the direction, and nothing of ours.
            moved = start + step * direction
            nn.utils.vector_to_parameters(moved, parameters)
            return body(x)

    step = 3e-7
    expected = (features(step) - features(-step)) / (2 * step)
    pushed = linear.pushforward(direction)
    torch.testing.assert_close(pushed, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        (pulled * direction).sum(),
        (cotangent * expected).sum(),
        rtol=1e-6,
        atol=1e-8,
    )
