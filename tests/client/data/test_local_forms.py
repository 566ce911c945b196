"""A real client's data in the forms that simulations read."""

import csv
import wave

import numpy as np
import pytest
import torch

from fedknow.client.data.local import LocalStream
from fedknow.protocols.config import ConfigError, read_config

TABLE = {
    "name": "local",
    "tasks": 2,
    "clients": 3,
    "kind": "table",
    "shape": [2],
    "classes": 4,
}
COLUMNS = {"input": ["x", "y"], "label": "activity"}
NAMES = ["lie", "run", "sit", "walk"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEDKNOW_CACHE", str(tmp_path_factory.mktemp("cache")))


def config(**changes):
    return read_config({"data": TABLE | changes}).data


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["x", "y", "activity", "day"])
        table.writerows(rows)


def rows(names, each=10):
    return [
        [k % 3, k % 7, name, day]
        for day, name in enumerate(names)
        for k in range(each)
    ]


def test_a_table_is_cut_by_classes(tmp_path):
    pytest.importorskip("pyarrow")
    # This client never sits: numbers must not depend on what it shows.
    write_csv(tmp_path / "moves.csv", rows(["lie", "run", "walk"]))
    named = config(class_names=NAMES, classes=0, **COLUMNS)
    stream = LocalStream(tmp_path / "moves.csv", named)
    assert stream.classes == 4
    first, second = stream.task(0, 0), stream.task(0, 1)
    assert (first.classes, second.classes) == ((0, 1), (2, 3))
    assert set(first.train.y.tolist()) == {0, 1}
    assert set(second.train.y.tolist()) == {3}
    # Each fifth sample of a class is for testing, as in a simulation.
    assert (len(first.train), len(first.test)) == (16, 4)
    assert first.train.x.dtype == torch.float32
    assert first.train.x[1].tolist() == [1.0, 1.0]


def test_a_column_says_which_task(tmp_path):
    pytest.importorskip("pyarrow")
    write_csv(tmp_path / "train.csv", [[1, 2, k % 2, k // 20] for k in range(40)])
    write_csv(tmp_path / "test.csv", [[1, 2, k % 2, k // 4] for k in range(8)])
    stream = LocalStream(
        tmp_path, config(task_column="day", classes=2, **COLUMNS)
    )
    for task in (0, 1):
        data = stream.task(0, task)
        assert (data.classes, len(data.train), len(data.test)) == ((0, 1), 20, 4)


@pytest.mark.parametrize("form", ["archive", "mapped"])
def test_arrays(tmp_path, form):
    y = np.arange(40) % 4
    arrays = {
        "train_x": np.arange(80, dtype=np.float32).reshape(40, 2),
        "train_y": y,
        "test_x": np.zeros((8, 2), np.float32),
        "test_y": y[:8],
    }
    if form == "archive":
        place = tmp_path / "mine.npz"
        np.savez(place, **arrays)
    else:
        place = tmp_path
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
    data = LocalStream(place, config()).task(0, 1)
    assert data.train.y.tolist() == [2, 3] * 10
    assert data.train.x[0].tolist() == [4.0, 5.0]


def test_labels_of_arrays_may_be_whole_floats(tmp_path):
    y = np.arange(8) % 4
    x = np.arange(16, dtype=np.float32).reshape(8, 2)
    arrays = {"train_x": x, "train_y": y.astype(float), "test_x": -x, "test_y": y}
    place = tmp_path / "mine.npz"
    np.savez(place, **arrays)
    data = LocalStream(place, config()).task(0, 1)
    assert data.train.y.tolist() == [2, 3] * 2
    np.savez(place, **arrays | {"test_y": y + 0.5})
    with pytest.raises(
        ConfigError, match=r"'test_y' holds 0\.5, which is no class"
    ):
        LocalStream(place, config())
    np.savez(place, **arrays | {"train_y": y.astype(str)})
    with pytest.raises(ConfigError, match="as the experiment counts them"):
        LocalStream(place, config())


def test_sounds(tmp_path):
    for name in ("no", "yes"):
        (tmp_path / name).mkdir()
        for k in range(5):
            with wave.open(str(tmp_path / name / f"{k}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(8000)
                sound = np.full(30 + k, 1000 * (k + 1), "<i2")
                file.writeframes(sound.tobytes())
    stream = LocalStream(
        tmp_path,
        config(kind="waveform", shape=[40], class_names=["no", "yes"], classes=2),
    )
    data = stream.task(0, 1)
    assert (len(data.train), len(data.test)) == (4, 1)
    # Shorter sounds are filled up by silence, on the fixed scale of all clients.
    torch.testing.assert_close(
        data.train.x[0, [29, 30, 39]], torch.tensor([1000 / 32768, 0, 0])
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"class 'lie' is not known; name all classes by data\.class_names"),
        (
            {"class_names": ["lie", "sit"], "classes": 0},
            r"class 'run' is not known; data\.class_names has: lie, sit",
        ),
        ({"task_column": "site"}, r"no column 'site'.*it has: day"),
        ({"tasks": 5}, r"data\.tasks = 5 of 1 class each need more than the 4"),
        ({"shape": [3]}, r"train_x is float32 \[\d+, 2\]; it must be"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    pytest.importorskip("pyarrow")
    write_csv(tmp_path / "moves.csv", rows(["lie", "run", "walk"]))
    named = {} if changes == {} else {"class_names": NAMES}
    with pytest.raises(ConfigError, match=message):
        LocalStream(tmp_path / "moves.csv", config(**COLUMNS | named | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ["a", "b"]}, r"data\.class_names has 2; leave"),
        ({"class_names": ["a", "a"], "classes": 0}, "name each class once"),
        ({"class_names": ["a"], "name": "digits"}, "names its classes itself"),
    ],
)
def test_names_that_contradict_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)
