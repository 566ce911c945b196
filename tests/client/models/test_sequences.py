"""Networks for sensors, sound and text: what they compute, and what they ignore."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedknow.client.data import SampleSpec
from fedknow.client.models import build_model
from fedknow.client.models.mel import LogMel, mel_matrix
from fedknow.client.models.sequences import Gru
from fedknow.protocols.config import ConfigError, ModelConfig

SAMPLES = {
    "series": SampleSpec("series", (16, 3), "float32"),
    "waveform": SampleSpec("waveform", (1024,), "int16", rate=8000),
    "tokens": SampleSpec("tokens", (6,), "int32", vocabulary=11),
    "table": SampleSpec("table", (7,), "float32"),
    "image": SampleSpec("image", (1, 8, 8), "uint8"),
}
FITTING = [
    ("cnn1d", "series"),
    ("cnn1d", "waveform"),
    ("gru", "series"),
    ("gru", "waveform"),
    ("gru", "tokens"),
    ("transformer", "series"),
    ("transformer", "waveform"),
    ("transformer", "tokens"),
    ("mlp", "table"),
    ("mlp", "series"),
    ("linear", "waveform"),
]


def build(name, kind, **options):
    return build_model(ModelConfig(name=name, **options), SAMPLES[kind], 4, 0)


@pytest.mark.parametrize(("name", "kind"), FITTING)
def test_samples_become_logits_alone_and_stacked(name, kind):
    model = build(name, kind).eval()
    x = SAMPLES[kind].random(3)
    logits = model(x)
    assert logits.shape == (3, 4)
    assert logits.isfinite().all()
    # A sample's answer does not depend on the others of its batch.
    assert torch.allclose(model(x[1:2]), logits[1:2], atol=1e-5)
    # Clients are trained at once by vmap.
    weights = {n: p.expand(2, *p.shape) for n, p in model.named_parameters()}
    stacked = torch.vmap(lambda p, s: functional_call(model, p, (s,)))(
        weights, torch.stack([x, x.flip(0)])
    )
    assert torch.allclose(stacked[0], logits, atol=1e-5)
    assert torch.allclose(stacked[1], logits.flip(0), atol=1e-5)


def test_the_same_seed_gives_the_same_weights():
    one = build("transformer", "tokens").state_dict()
    other = build("transformer", "tokens").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", ["gru", "transformer"])
def test_what_fills_a_sentence_up_does_not_matter(name):
    long = SampleSpec("tokens", (9,), "int32", vocabulary=11)
    model = build(name, "tokens")
    longer = build_model(ModelConfig(name=name), long, 4, 0)
    weights = model.state_dict()
    if name == "transformer":
        positions = weights["body.positions"]
        weights["body.positions"] = torch.cat([positions, torch.randn(3, 64)])
    longer.load_state_dict(weights)
    x = torch.tensor([[3, 4, 5, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
    filled = torch.cat([x, torch.zeros(2, 3, dtype=torch.int64)], 1)
    assert torch.allclose(model(x), longer(filled), atol=1e-5)
    # The words do, and so does a sentence without any stay finite.
    assert not torch.allclose(model(x)[0], model(x)[1], atol=1e-3)
    assert model(torch.zeros_like(x)).isfinite().all()


def test_recurrence_is_that_of_torch():
    torch.manual_seed(0)
    ours, reference = Gru(3, 5), nn.GRU(3, 5, batch_first=True)
    reference.weight_ih_l0.data = ours.inputs.weight.data
    reference.bias_ih_l0.data = ours.inputs.bias.data
    reference.weight_hh_l0.data = ours.recurrent.weight.data
    reference.bias_hh_l0.data = ours.recurrent.bias.data
    x = torch.randn(4, 7, 3)
    assert torch.allclose(ours(x), reference(x)[1][0], atol=1e-6)


def test_frames_are_those_of_torch_stft():
    front = LogMel(2000, 8000, 20)
    x = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0)) / 10
    spectrum = torch.stft(
        x, front.size, front.hop, window=front.window, center=False,
        return_complex=True,
    )  # fmt: skip
    logs = (spectrum.abs().square().mT @ front.matrix + 1e-6).log()
    assert front.size == 256
    assert logs.shape == (2, front.frames, 20)
    centred = logs - logs.mean((1, 2), keepdim=True)
    expected = centred / centred.square().mean((1, 2), keepdim=True).sqrt()
    assert torch.allclose(front(x), expected, atol=1e-3)


def test_a_tone_lights_up_its_band():
    front = LogMel(2048, 8000, 24)
    time = torch.arange(2048) / 8000
    low, high = (torch.sin(6.2831853 * f * time) for f in (300, 2500))
    bands = front(torch.stack([low, high])).mean(1).argmax(1)
    # Middles of the bands: mel 2595 log10(1 + f / 700), 24 of them up to 4000 Hz.
    assert bands.tolist() == [4, 19]
    # A quieter tone looks the same.
    assert torch.allclose(front(low[None]), front(low[None] / 4), atol=0.3)


def test_every_band_has_a_frequency():
    matrix = mel_matrix(128, 8000, 64)
    assert matrix.shape == (65, 64)
    assert (matrix.sum(0) > 0).all()
    assert matrix.min() >= 0


@pytest.mark.parametrize(
    ("name", "kind", "options", "reason"),
    [
        ("cnn1d", "tokens", {}, "set model.name = gru or transformer"),
        ("cnn6", "series", {}, "takes samples of kind image"),
        ("gru", "image", {}, "those of this data set are images of 1x8x8"),
        ("transformer", "tokens", {"heads": 3}, "must divide model.dim = 64"),
        ("cnn1d", "series", {"kernel": 4}, "make it odd"),
    ],
)
def test_what_does_not_fit_is_refused(name, kind, options, reason):
    with pytest.raises(ConfigError, match=reason):
        build(name, kind, **options)


def test_sound_shorter_than_a_frame_is_refused():
    short = SampleSpec("waveform", (100,), "int16", rate=8000)
    with pytest.raises(ConfigError, match="shorter than a frame of 256"):
        build_model(ModelConfig(name="gru"), short, 4, 0)


def test_a_users_model_is_told_what_a_sample_is(monkeypatch):
    import sys
    import types

    seen = []

    class Bag(nn.Module):
        def __init__(self, sample, classes):
            super().__init__()
            self.body = nn.EmbeddingBag(sample.vocabulary, 5)
            self.head = nn.Linear(5, classes)

        def forward(self, x):
            return self.head(self.body(x))

    def bag(shape, classes, sample):
        seen.append((shape, sample))
        return Bag(sample, classes)

    module = types.ModuleType("users_bag")
    module.bag = bag
    monkeypatch.setitem(sys.modules, "users_bag", module)
    build("users_bag:bag", "tokens")
    assert seen == [((6,), SAMPLES["tokens"])]
