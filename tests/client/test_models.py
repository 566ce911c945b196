"""Networks: exact sizes, two parts, weights by seed, and errors."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fedknow.client.models import build_model, list_models
from fedknow.protocols.config import ConfigError, ModelConfig

RGB, GREY8, GREY28 = (3, 32, 32), (1, 8, 8), (1, 28, 28)


def build(
    name: str, shape: tuple[int, int, int] = RGB, classes: int = 100, seed: int = 0, **settings: object
) -> nn.Module:
    return build_model(ModelConfig.model_validate({"name": name, **settings}), shape, classes, seed)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "body", "head"),
    [
        ("cnn6", RGB, 2_385_184, 102_500),  # spec: 2,487,684 in all at 100 classes
        ("resnet18", RGB, 11_168_832, 51_300),
        ("cnn", GREY8, 13_056, 6_500),
        ("cnn", GREY28, 37_632, 6_500),
        ("mlp", GREY8, 8_320, 6_500),
        ("linear", GREY28, 0, 78_500),
    ],
)
def test_parameter_counts(name: str, shape: tuple[int, int, int], body: int, head: int) -> None:
    model = build(name, shape)
    assert (count(model.body), count(model.head)) == (body, head)


def test_settings_change_the_size() -> None:
    convolutions = 448 + 2320 + 4640 + 9248 + 18496 + 36928
    assert count(build("cnn6", width=0.5).body) == convolutions + (1024 + 1) * 512
    assert count(build("mlp", GREY8, hidden=10, layers=1).body) == 65 * 10
    assert build("cnn", GREY28, hidden=8).head.in_features == 8
    assert build("resnet18", width=0.25).head.in_features == 128
    assert sum(isinstance(m, nn.Dropout) for m in build("cnn6").modules()) == 4
    assert [m.p for m in build("cnn6").modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25, 0.25, 0.5]
    assert sum(isinstance(m, nn.Dropout) for m in build("cnn6", dropout=False).modules()) == 0


def test_kaiming_weights_keep_the_signal_through_six_layers() -> None:
    """With variance 2 / fan-in a ReLU network's features are as large as its input; PyTorch's own shrink them."""
    x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    size = {init: float(build("cnn6", init=init).eval().body(x).detach().square().mean().sqrt()) for init in INITS}
    assert 0.5 < size["kaiming"] < 4
    assert size["default"] < 0.1


INITS = ("default", "kaiming")


@pytest.mark.parametrize("name", ["cnn6", "cnn", "mlp", "linear", "resnet18"])
@pytest.mark.parametrize("shape", [RGB, GREY8, GREY28, (2, 9, 13)])
def test_head_of_body(name: str, shape: tuple[int, int, int]) -> None:
    model = build(name, shape, classes=7).eval()
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
    build("mlp", GREY8, seed=2**63 - 1)  # the largest that protocols.seeds.integer gives


def test_list_models() -> None:
    assert list(list_models()) == ["cnn6", "cnn", "mlp", "linear", "resnet18"]
    assert all("settings: " in text for text in list_models().values())


@pytest.mark.parametrize(
    ("name", "shape", "settings", "text"),
    [
        ("resnet", RGB, {}, r"model.name = 'resnet': no such model \(did you mean 'resnet18'\?\)"),
        ("cnn6", RGB, {"widht": 2}, r"model.widht = 2: .*did you mean 'width'.*it has: width, dropout, init"),
        ("cnn6", RGB, {"width": -1.0}, r"model.width = -1.0: .*greater than 0"),
        ("mlp", RGB, {"hidden": "many"}, r"model.hidden = 'many': .*integer"),
        ("mlp", RGB, {"layers": 0}, r"model.layers = 0: .*greater than or equal to 1"),
        ("cnn6", (3, 7, 32), {}, r"7x32 are too small; it needs 8x8"),
        ("resnet18", (3, 8, 4), {}, r"8x4 are too small; it needs 8x8"),
        ("cnn", (1, 3, 3), {}, r"3x3 are too small; it needs 4x4"),
        ("no_such_module_here:f", RGB, {}, r"model.name = 'no_such_module_here:f': importing"),
    ],
)
def test_errors(name: str, shape: tuple[int, int, int], settings: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build(name, shape, **settings)


def test_shape_is_not_a_setting() -> None:
    with pytest.raises(ConfigError, match=r"model.shape = 3: cnn6 has no such setting"):
        build_model(ModelConfig.model_validate({"name": "cnn6", "shape": 3}), RGB, 10, 0)


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
        ("Linear", {"depth": 2}, r"settings given \(depth\).*depth"),
    ):
        with pytest.raises(ConfigError, match=text):
            build(f"own_model_for_test:{name}", GREY8, 5, **settings)


@pytest.mark.parametrize("name", ["cnn6", "cnn", "mlp", "linear", "resnet18"])
def test_every_parameter_learns(name: str) -> None:
    model = build(name, (1, 8, 8), classes=3)
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
