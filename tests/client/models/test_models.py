"""Networks: exact sizes, two parts, weights by seed, and errors."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fedknow.client.learners.fedknow.linearization import Linearization
from fedknow.client.models import Dropout, build_model, list_models
from fedknow.protocols.config import ConfigError, ModelConfig

RGB, GREY8, GREY28 = (3, 32, 32), (1, 8, 8), (1, 28, 28)


def build(
    name: str,
    shape: tuple[int, int, int] = RGB,
    classes: int = 100,
    seed: int = 0,
    **settings: object,
) -> nn.Module:
    return build_model(
        ModelConfig.model_validate({"name": name, **settings}),
        shape,
        classes,
        seed,
    )


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "body", "head"),
    [
        (
            "cnn6",
            RGB,
            2_385_184,
            102_500,
        ),  # spec: 2,487,684 in all at 100 classes
        ("resnet18", RGB, 11_168_832, 51_300),
        ("cnn", GREY8, 13_056, 6_500),
        ("cnn", GREY28, 37_632, 6_500),
        ("mlp", GREY8, 8_320, 6_500),
        ("linear", GREY28, 0, 78_500),
    ],
)
def test_parameter_counts(
    name: str, shape: tuple[int, int, int], body: int, head: int
) -> None:
    model = build(name, shape)
    assert (count(model.body), count(model.head)) == (body, head)


PUBLISHED = {
    # torchvision's documented numbers of parameters at 1000 classes; SE-ResNet-18 by hand: 2
    # c^2 / 16 + c / 16 + c for each of two blocks with c = 64, 128, 256 and 512 channels,
    # beside ResNet-18's.
    ("resnet18", 1.0): 11_689_512,
    ("resnet152", 1.0): 60_192_808,
    ("wide_resnet50", 1.0): 68_883_240,
    ("resnext50", 1.0): 25_028_904,
    ("senet18", 1.0): 11_689_512 + 89_080,
    ("mobilenet_v2", 1.0): 3_504_872,
    ("shufflenet_v2", 0.5): 1_366_792,
    ("shufflenet_v2", 1.0): 2_278_604,
    ("shufflenet_v2", 1.5): 3_503_624,
    ("shufflenet_v2", 2.0): 7_393_996,
    ("inception_v3", 1.0): 27_161_264
    - 3_326_696,  # less the auxiliary classifier
    ("densenet121", 1.0): 7_978_856,
}
BIG = sorted({name for name, _ in PUBLISHED})


@pytest.mark.parametrize(("name", "width"), PUBLISHED)
def test_published_parameter_counts(name: str, width: float) -> None:
    with torch.device("meta"):  # shapes without numbers
        model = build(name, (3, 224, 224), classes=1000, width=width)
    assert count(model) == PUBLISHED[name, width]


@pytest.mark.parametrize("name", BIG)
@pytest.mark.parametrize(
    ("side", "last"),
    # Sides of the last features, before they are averaged: 5 halvings, 3 with the small stem
    # (below 64). Inception has 5 and 2 (below 75), without padding.
    [(224, 7), (84, 3), (64, 2), (32, 4)],
)
def test_sizes_of_images(name: str, side: int, last: int) -> None:
    if name == "inception_v3":
        last = {224: 5, 84: 1, 64: 15, 32: 7}[side]
    with torch.device("meta"):
        model = build(name, (3, side, side), classes=10)
        seen: list[tuple[int, ...]] = []
        pool = next(
            m
            for m in reversed(list(model.body))
            if isinstance(m, nn.AdaptiveAvgPool2d)
        )  # type: ignore[arg-type]
        pool.register_forward_pre_hook(
            lambda _, inputs: seen.append(tuple(inputs[0].shape))
        )
        assert model(torch.empty(2, 3, side, side)).shape == (2, 10)
    if name == "densenet121" and side == 84:
        last = 2  # its halvings cut off odd sides
    assert seen == [(2, model.head.in_features, last, last)]


@pytest.mark.parametrize("name", BIG)
def test_pushforward_is_the_pullbacks_transpose(name: str) -> None:
    """What FedKNOW's short path needs of a network: <c, J J^T c> = |J^T c|^2, in training mode."""
    body = build(
        name,
        (3, 16, 16),
        width=0.125,
        **({"dropout": 0.0} if "dropout" in list_models()[name] else {}),
    ).body
    draw = torch.Generator().manual_seed(0)
    linear = Linearization(
        body.double(),
        torch.randn(3, 3, 16, 16, generator=draw, dtype=torch.float64),
    )
    c = torch.randn(linear.features.shape, generator=draw, dtype=torch.float64)
    g = linear.pullback(
        c, torch.empty(linear.size, dtype=torch.float64), forward=True
    )
    assert float((c * linear.pushforward(g)).sum()) == pytest.approx(
        float(g @ g), rel=1e-9
    )
    assert float(g @ g) > 0


def test_stem_is_a_setting() -> None:
    strides = {
        (side, stem): build("resnet18", (3, side, side), width=0.125, stem=stem)
        .body[0]
        .stride
        for side in (32, 64)
        for stem in ("auto", "small", "large")
    }
    assert [pair for pair, stride in strides.items() if stride == (2, 2)] == [
        (32, "large"),
        (64, "auto"),
        (64, "large"),
    ]


def test_settings_change_the_size() -> None:
    convolutions = 448 + 2320 + 4640 + 9248 + 18496 + 36928
    assert count(build("cnn6", width=0.5).body) == convolutions + (1024 + 1) * 512
    assert count(build("mlp", GREY8, hidden=10, layers=1).body) == 65 * 10
    assert build("cnn", GREY28, hidden=8).head.in_features == 8
    assert build("resnet18", width=0.25).head.in_features == 128
    assert sum(isinstance(m, nn.Dropout) for m in build("cnn6").modules()) == 4
    assert [
        m.p for m in build("cnn6").modules() if isinstance(m, nn.Dropout)
    ] == [
        0.25,
        0.25,
        0.25,
        0.5,
    ]
    assert (
        sum(
            isinstance(m, nn.Dropout)
            for m in build("cnn6", dropout=False).modules()
        )
        == 0
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_drops_a_share_and_scales_the_rest(
    p: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 1000, dtype=dtype, requires_grad=True)
    y = Dropout(p)(x)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert y.dtype == dtype
    assert float((y == 0).double().mean()) == pytest.approx(
        p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5
    )
    assert set(y.unique().tolist()) == {
        0.0,
        torch.tensor(1 / (1 - p)).to(dtype).item(),
    }
    assert torch.equal(
        x.grad, y
    )  # what was dropped gets no gradient, what was not the scale
    assert float((y[:, 0] == 0).double().mean()) == pytest.approx(
        p, abs=0.1
    )  # no row or column is dropped as one
    assert float((y[0] == 0).double().mean()) == pytest.approx(p, abs=0.1)


def test_dropout_is_seeded_and_does_nothing_while_evaluating() -> None:
    x = torch.rand(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    layer = Dropout(0.5)
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(layer(x) == 0)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert layer.eval()(x) is x
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros_like(x))


def test_kaiming_weights_keep_the_signal_through_six_layers() -> None:
    """With variance 2 / fan-in a ReLU network's features are as large as its input; PyTorch's own
    shrink them."""
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    size = {
        init: float(
            build("cnn6", init=init)
            .eval()
            .body(x)
            .detach()
            .square()
            .mean()
            .sqrt()
        )
        for init in INITS
    }
    assert 0.5 < size["kaiming"] < 4
    assert size["default"] < 0.1


INITS = ("default", "kaiming")


@pytest.mark.parametrize(
    "name",
    ["cnn6", "cnn", "mlp", "linear", "resnet18", "resnext50", "shufflenet_v2"],
)
@pytest.mark.parametrize("shape", [RGB, GREY8, GREY28, (2, 9, 13)])
def test_head_of_body(name: str, shape: tuple[int, int, int]) -> None:
    model = build(
        name, shape, classes=7, **({"width": 0.125} if name[-1].isdigit() else {})
    ).eval()
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    features = model.body(x)
    assert features.shape == (3, model.head.in_features)
    logits = model(x)
    assert logits.shape == (3, 7)
    assert torch.equal(logits, model.head(features))
    assert all(name.startswith(("body.", "head.")) for name in model.state_dict())


def test_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build("cnn", GREY8, seed=11).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = build("cnn", GREY8, seed=11).state_dict()
    other = build("cnn", GREY8, seed=12).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    build(
        "mlp", GREY8, seed=2**63 - 1
    )  # the largest that protocols.seeds.integer gives


def test_list_models() -> None:
    small = ["cnn6", "cnn", "mlp", "linear", "cnn1d", "gru", "transformer"]
    names = list(list_models())
    assert names[: len(small)] == small
    assert names[len(small)] == "resnet18"
    pretrained = ["efficientnet_lite0", "minilm"]
    assert sorted(names[len(small) :]) == sorted([*BIG, *pretrained])
    assert all("settings: " in text for text in list_models().values())


@pytest.mark.parametrize(
    ("name", "shape", "settings", "text"),
    [
        (
            "resnet",
            RGB,
            {},
            r"model.name = 'resnet': no such model \(did you mean 'resnet18'\?\)",
        ),
        (
            "cnn6",
            RGB,
            {"widht": 2},
            r"model.widht = 2: .*did you mean 'width'.*it has: width, dropout, init",
        ),
        ("cnn6", RGB, {"width": -1.0}, r"model.width = -1.0: .*greater than 0"),
        ("mlp", RGB, {"hidden": "many"}, r"model.hidden = 'many': .*integer"),
        (
            "mlp",
            RGB,
            {"layers": 0},
            r"model.layers = 0: .*greater than or equal to 1",
        ),
        ("cnn6", (3, 7, 32), {}, r"7x32 are too small; it needs 8x8"),
        ("resnet18", (3, 8, 4), {}, r"8x4 are too small; it needs 8x8"),
        ("mobilenet_v2", (3, 12, 16), {}, r"12x16 are too small; it needs 16x16"),
        (
            "inception_v3",
            (3, 64, 64),
            {"stem": "large"},
            r"64x64 are too small; it needs 75x75.*stem = 'small'",
        ),
        (
            "resnext50",
            RGB,
            {"stem": "tiny"},
            r"model.stem = 'tiny': .*'auto', 'small' or 'large'",
        ),
        ("cnn", (1, 3, 3), {}, r"3x3 are too small; it needs 4x4"),
        ("cnn6", RGB, {"width": float("nan")}, r"model.width = nan: .*finite"),
        (
            "mlp",
            RGB,
            {"hidden": 65536, "layers": 64},
            r"mlp' with model.hidden = 65536.*2.71e\+11 parameters.*1e\+09",
        ),
        ("mlp", (3, 2**31, 2**31), {}, r"parameters; at most 1e\+09"),
        (
            "builtins:dict",
            RGB,
            {},
            r"model.name = 'builtins:dict': .*torch.nn.Module",
        ),
        (
            "types:SimpleNamespace",
            RGB,
            {},
            r"types:SimpleNamespace': .*torch.nn.Module",
        ),
        (
            "builtins:Exception",
            RGB,
            {},
            r"builtins:Exception': .*torch.nn.Module",
        ),
        ("torch.nn:Linear", RGB, {}, r"torch.nn:Linear': cannot be called"),
        ("torch:zeros", RGB, {}, r"torch:zeros': .*not written in Python"),
        ("sys:exit", RGB, {}, r"sys:exit': .*function of yours"),
        (
            "no_such_module_here:f",
            RGB,
            {},
            r"model.name = 'no_such_module_here:f': importing",
        ),
    ],
)
def test_errors(
    name: str, shape: tuple[int, int, int], settings: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        build(name, shape, **settings)


def test_shape_is_not_a_setting() -> None:
    with pytest.raises(
        ConfigError, match=r"model.shape = 3: cnn6 has no such setting"
    ):
        build_model(
            ModelConfig.model_validate({"name": "cnn6", "shape": 3}), RGB, 10, 0
        )


def test_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_model_for_test.py").write_text(
        "from torch import nn\n"
        "class Linear(nn.Module):\n"
        "    def __init__(self, shape, classes, bias=True):\n"
        "        super().__init__()\n"
        "        self.body = nn.Flatten()\n"
        "        self.head = nn.Linear(shape[0] * shape[1] * shape[2], classes, bias=bias)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.body(x))\n"
        "def headless(shape, classes):\n"
        "    return nn.Flatten()\n"
        "def narrow(shape, classes):\n"
        "    return Linear(shape, classes - 1)\n"
        "def leaves(shape, classes):\n"
        "    raise SystemExit\n"
        "class Shy(Linear):\n"
        "    @property\n"
        "    def body(self):\n"
        "        raise LookupError('no body')\n"
        "    body = body.setter(lambda self, value: None)\n"
        "def endless(shape, classes, most=1.0):\n"
        "    return Linear(shape, classes)\n"
        "class Doubled(Linear):\n"
        "    def forward(self, x):\n"
        "        return 2 * super().forward(x)\n"
    )
    model = build("own_model_for_test:Linear", GREY8, 5, bias=False)
    assert model(torch.zeros(2, *GREY8)).shape == (2, 5)
    assert model.head.bias is None
    again = build("own_model_for_test:Linear", GREY8, 5, bias=False)
    assert torch.equal(model.head.weight, again.head.weight)
    for name, settings, text in (
        ("headless", {}, r"returned Flatten with head None.*nn.Linear\(..., 5\)"),
        ("narrow", {}, r"out_features=4.*nn.Linear\(..., 5\)"),
        ("Doubled", {}, r"model\(x\) must be model.head\(model.body\(x\)\)"),
        (
            "leaves",
            {},
            r"leaves': failed: SystemExit: .*own_model_for_test.py, line",
        ),
        ("Shy", {}, r"Shy': failed: LookupError: no body"),
        (
            "endless",
            {"most": float("inf")},
            r"model.most = inf: must be a finite number",
        ),
        ("Linear", {"depth": 2}, r"settings given \(depth\).*depth"),
    ):
        with pytest.raises(ConfigError, match=text):
            build(f"own_model_for_test:{name}", GREY8, 5, **settings)


@pytest.mark.parametrize("name", ["cnn6", "cnn", "mlp", "linear", *BIG])
def test_every_parameter_learns(name: str) -> None:
    side = 16 if name in BIG else 8
    model = build(
        name,
        (1, side, side),
        classes=3,
        **({"width": 0.125} if name in BIG else {}),
    )
    x = torch.randn(8, 1, side, side, generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
    assert all(
        p.grad is not None and bool(p.grad.abs().sum() > 0)
        for p in model.parameters()
    )
