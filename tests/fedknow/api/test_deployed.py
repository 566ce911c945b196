import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

import fedknow
from fedknow.api.inputs import as_images
from fedknow.cli import app

SMALL = {
    "data": {"clients": 3, "tasks": 5},
    "train": {"rounds": 2, "epochs": 1},
    "engine": {"backend": "inline"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    return fedknow.simulate("digits", learner="fedrep", out=out, **SMALL)


@pytest.fixture(scope="module")
def model(run):
    return run.deployed(client=1)


@pytest.fixture
def images(run):
    return run._benchmark.dataset.test_x[:40]


def test_it_normalises_as_the_run_does(run, model):
    data = run._benchmark.task(1, 4)
    places = run._benchmark.partition.tasks[1][4].test
    raw = run._benchmark.dataset.test_x[places]
    labels = run._benchmark.dataset.test_y[places]
    with torch.no_grad():
        expected = run.model(client=1)(data.test.x)
    np.testing.assert_allclose(model.logits(raw), expected, rtol=1e-4, atol=1e-5)
    scores = model.evaluate(raw, labels, list(data.head))
    assert scores.accuracy == run.accuracy[1, 4, 4]
    assert scores.confusion.sum() == scores.samples == len(labels)


def test_floats_and_bytes_mean_the_same(model, images):
    np.testing.assert_array_equal(
        model.logits(images),
        model.logits(images.astype(np.float32) / np.float32(255)),
    )


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), "[n, 1, 8, 8]"),
        (np.zeros((0, 1, 8, 8), np.uint8), "at least 1"),
        (np.zeros((2, 1, 8, 8), np.int64), "uint8"),
        (np.full((2, 1, 8, 8), 200.0), "from 0 to 1"),
        (np.full((2, 1, 8, 8), np.nan), "from 0 to 1"),
    ],
)
def test_other_images_are_refused(x, text):
    with pytest.raises(fedknow.ConfigError) as error:
        as_images(x, (1, 8, 8))
    assert text in str(error.value)


def test_other_labels_are_refused(model, images):
    with pytest.raises(fedknow.ConfigError, match="y is float64"):
        model.evaluate(images, np.zeros(40))
    with pytest.raises(fedknow.ConfigError, match="the model knows 0 to 9"):
        model.evaluate(images, np.full(40, 10))
    with pytest.raises(fedknow.ConfigError, match="classes"):
        model.predict(images, [3, 11])


def test_safetensors_hold_the_weights_by_name(model, tmp_path):
    path = model.export(tmp_path / "model", "safetensors")
    assert path.name == "model.safetensors"
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["fedknow"])
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value)
    assert about["input"]["shape"] == ["n", 1, 8, 8]
    assert len(about["classes"]) == 10


def test_torchscript_gives_the_same_logits(model, images, tmp_path):
    path = model.export(tmp_path / "model", "torchscript")
    extra = {"fedknow.json": ""}
    loaded = torch.jit.load(str(path), _extra_files=extra)
    with torch.no_grad():
        logits = loaded(torch.from_numpy(images).float() / 255)
    np.testing.assert_allclose(logits, model.logits(images), rtol=1e-4, atol=1e-5)
    assert json.loads(extra["fedknow.json"])["classes"][0] == "0"


def test_onnx_gives_the_same_logits_in_another_runtime(model, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = model.export(tmp_path / "model", "onnx")
    session = onnxruntime.InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    for count in (1, 7, 40):
        batch = images[:count].astype(np.float32) / np.float32(255)
        (logits,) = session.run(None, {"images": batch})
        np.testing.assert_allclose(
            logits, model.logits(images[:count]), rtol=1e-4, atol=1e-4
        )
    about = json.loads(session.get_modelmeta().custom_metadata_map["fedknow"])
    assert about["output"]["name"] == "logits"


def test_an_unknown_format_is_refused(model, tmp_path):
    with pytest.raises(
        fedknow.ConfigError, match="safetensors, onnx, torchscript"
    ):
        model.export(tmp_path / "model", "pickle")


def test_the_commands(run, model, images, tmp_path):
    labels = run._benchmark.dataset.test_y[:40]
    np.savez(tmp_path / "mine.npz", x=images, y=labels)
    command = CliRunner()
    done = command.invoke(app, ["export", str(run.path), "--client", "1"])
    assert done.exit_code == 0, done.output
    assert (run.path / "model-client1.safetensors").is_file()
    done = command.invoke(
        app,
        [
            "evaluate",
            str(run.path),
            "--client",
            "1",
            "--data",
            str(tmp_path / "mine.npz"),
        ],
    )
    assert done.exit_code == 0, done.output
    expected = model.evaluate(images, labels).accuracy
    assert f"accuracy {100 * expected:.2f} % of 40 samples" in done.output
    done = command.invoke(
        app,
        [
            "predict",
            str(run.path),
            "--client",
            "1",
            "--data",
            str(tmp_path / "mine.npz"),
        ],
    )
    rows = list(csv.DictReader(io.StringIO(done.output)))
    assert [int(row["label"]) for row in rows] == model.predict(images).tolist()


def test_pictures_in_folders_have_labels(run, images, tmp_path):
    labels = run._benchmark.dataset.test_y[:40]
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "pictures" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(folder / f"{place}.png")
    done = CliRunner().invoke(
        app, ["evaluate", str(run.path), "--data", str(tmp_path / "pictures")]
    )
    assert done.exit_code == 0, done.output
    expected = run.deployed().evaluate(images, labels).accuracy
    assert f"accuracy {100 * expected:.2f} % of 40 samples" in done.output


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("none.npz", b"nothing", "not a file that numpy.savez wrote"),
        ("picture.png", b"nothing", "cannot be read as a picture"),
    ],
)
def test_files_of_another_kind_are_refused(run, tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    done = CliRunner().invoke(
        app, ["predict", str(run.path), "--data", str(tmp_path / name)]
    )
    assert done.exit_code == 2
    assert text in " ".join(done.output.split())
