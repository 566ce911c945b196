"""A client's own data from files."""

import numpy as np
import pytest
import torch

from fedknow.client.data import make_benchmark
from fedknow.client.data.local import LocalStream, local_spec
from fedknow.client.data.samples import SampleSpec
from fedknow.protocols.config import ConfigError, read_config

DATA = {
    "name": "local",
    "tasks": 2,
    "clients": 3,
    "shape": [1, 2, 2],
    "classes": 4,
    "classes_per_task": 2,
}


def config(**changes):
    return read_config({"data": DATA | changes}).data


def write(folder, task, labels=(0, 1), dtype=np.uint8, **changes):
    y = np.array(labels)
    x = np.arange(len(y) * 4).reshape(len(y), 1, 2, 2).astype(dtype)
    arrays = {
        "train_x": x,
        "train_y": y,
        "test_x": x[:1],
        "test_y": y[:1],
    } | changes
    np.savez(
        folder / f"task-{task:03d}.npz",
        **{name: array for name, array in arrays.items() if array is not None},
    )


def test_tasks_are_read_as_they_come(tmp_path):
    write(tmp_path, 0)
    stream = LocalStream(tmp_path, config())
    assert (stream.tasks, stream.clients, stream.classes, stream.spec.shape) == (
        2,
        3,
        4,
        (1, 2, 2),
    )
    data = stream.task(1, 0)
    assert (data.classes, data.seen, data.is_incremental) == (
        (0, 1),
        (0, 1),
        False,
    )
    torch.testing.assert_close(
        data.train.x[1].flatten(), torch.tensor([4.0, 5, 6, 7]) / 127.5 - 1
    )
    assert data.train.x.dtype == torch.float32
    assert data.train.y.tolist() == [0, 1]
    assert data.train.y.dtype == torch.int64
    assert len(data.test) == 1
    with pytest.raises(
        ConfigError,
        match=r"task-001\.npz: no such file; the folder holds 1 file ",
    ):
        stream.task(1, 1)
    write(tmp_path, 1, (3, 2, 3), np.float32)  # it arrives while the run goes on
    later = stream.task(1, 1)
    assert (later.classes, later.seen) == ((2, 3), (0, 1, 2, 3))
    assert later.train.x[0].flatten().tolist() == [
        0,
        1,
        2,
        3,
    ]  # floats are taken as they are
    with pytest.raises(IndexError, match="the number of tasks is 2, from 0"):
        stream.task(1, 2)


def test_classes_come_from_the_file_or_the_labels(tmp_path):
    write(tmp_path, 0, (1, 3), classes=np.array([3, 1, 0]))
    assert LocalStream(tmp_path, config()).task(0, 0).classes == (3, 1, 0)
    write(tmp_path, 0, (3, 1))
    stream = LocalStream(
        tmp_path, config(classes_per_task=0, scenario="class-incremental")
    )
    assert stream.task(0, 0).classes == (1, 3)
    assert stream.task(0, 0).head == (1, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"train_x": None},
            r"train_x is missing; it must be uint8 or float32 \[n, 1, 2, 2\]",
        ),
        (
            {"train_x": np.zeros((2, 1, 3, 2), np.uint8)},
            r"train_x is uint8 \[2, 1, 3, 2\]; it must be",
        ),
        ({"test_x": np.zeros((1, 1, 2, 2))}, r"test_x is float64 \[1, 1, 2, 2\]"),
        (
            {"test_x": np.zeros((0, 1, 2, 2), np.uint8)},
            r"test_x is uint8 \[0, 1, 2, 2\]",
        ),
        (
            {"train_x": np.full((2, 1, 2, 2), np.nan, np.float32)},
            "train_x holds NaN or infinity",
        ),
        (
            {"train_y": np.zeros(3, int)},
            r"train_y is int64 \[3\]; it must be integers \[2\]",
        ),
        ({"train_y": np.zeros(2)}, r"train_y is float64 \[2\]"),
        (
            {"train_y": np.array([0, 2])},
            r"labels \[2\] are none of the task's; its classes are \[0, 1\]",
        ),
        (
            {"classes": np.array([0, 1, 4])},
            r"labels \[0, 1, 4\] are none .* out of 0\.\.3",
        ),
        (
            {"classes": np.array([0.5])},
            r"classes is float64 \[1\]; it must be a list of integers",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, said):
    write(tmp_path, 0, **changes)
    with pytest.raises(ConfigError, match=said):
        LocalStream(tmp_path, config())


def test_files_that_are_none(tmp_path):
    (tmp_path / "task-000.npz").write_bytes(b"PK nonsense")
    with pytest.raises(
        ConfigError, match=r"task-000\.npz: not a file that numpy\.savez wrote"
    ):
        LocalStream(tmp_path, config())


def test_the_server_needs_shape_and_classes(tmp_path):
    assert local_spec(config()) == (SampleSpec("image", (1, 2, 2), "uint8"), 4)
    with pytest.raises(ConfigError, match=r"data\.shape = \[1, 2\]"):
        local_spec(config(shape=[1, 2]))
    with pytest.raises(ConfigError, match=r"data\.classes = 0"):
        local_spec(config(classes=0))
    with pytest.raises(ConfigError, match="the data are with real clients"):
        make_benchmark(read_config({"data": DATA}))


def test_channels_that_stand_last_are_refused(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"data\.shape = \[32, 32, 3\]: .*data\.shape = \[3, 32, 32\]",
    ):
        local_spec(config(shape=[32, 32, 3]))
    assert local_spec(config(shape=[3, 3, 3]))[0].shape == (3, 3, 3)
    last = np.zeros((2, 4, 5, 3), np.uint8)
    write(tmp_path, 0, train_x=last)
    with pytest.raises(
        ConfigError,
        match=r"n, 3, 4, 5\] \(channels first: x\.transpose\(0, 3, 1, 2\)\)",
    ):
        LocalStream(tmp_path, config(shape=[3, 4, 5]))


@pytest.mark.parametrize(
    "dtype", [np.uint16, np.int32, np.int64, np.float16, np.float64, bool]
)
def test_images_of_another_depth_are_refused(tmp_path, dtype):
    write(tmp_path, 0, dtype=dtype)
    with pytest.raises(
        ConfigError, match=r"train_x is \w+ .*; it must be uint8 or float32"
    ):
        LocalStream(tmp_path, config())


def outcome(folder):
    """The first task, or what is said instead."""
    try:
        return LocalStream(folder, config()).task(0, 0)
    except ConfigError as error:
        return str(error)


def test_a_damaged_file_is_named_or_harmless(tmp_path):
    """Cut at any length or with any byte changed: the arrays as they were, or a sentence."""
    write(tmp_path, 0, classes=np.array([0, 1]))
    path = tmp_path / "task-000.npz"
    whole = path.read_bytes()
    right = outcome(tmp_path)
    cut = [whole[:length] for length in range(0, len(whole), 13)]
    for place in range(0, len(whole), 5):
        cut.append(
            whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :]
        )
    for content in cut:
        path.write_bytes(content)
        found = outcome(tmp_path)
        if isinstance(found, str):
            assert "task-000.npz" in found
            continue
        for one, other in ((found.train, right.train), (found.test, right.test)):
            torch.testing.assert_close(one.x, other.x, rtol=0, atol=0)
            assert one.y.tolist() == other.y.tolist()


def test_other_files_under_the_name_are_refused(tmp_path):
    with (tmp_path / "task-000.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(
        ConfigError, match=r"task-000\.npz: not a file that numpy\.savez wrote"
    ):
        LocalStream(tmp_path, config())
    write(tmp_path, 0, classes=np.array([0, 1, 1]))
    with pytest.raises(
        ConfigError, match=r"classes is \[0, 1, 1\]; it must name each class once"
    ):
        LocalStream(tmp_path, config())


def test_a_file_exchanged_for_one_of_other_labels_is_refused(tmp_path):
    """Its classes are known from the first reading; another task is read in between."""
    write(tmp_path, 0)
    write(tmp_path, 1, (2, 3))
    stream = LocalStream(tmp_path, config())
    stream.task(0, 0)
    stream.task(0, 1)
    write(tmp_path, 0, (0, 3))
    with pytest.raises(
        ConfigError, match=r"task-000\.npz: labels \[3\] are none of the task's"
    ):
        stream.task(0, 0)


def test_other_samples_than_images(tmp_path):
    series = np.full((2, 4, 3), 7, np.float32)
    write(tmp_path, 0, train_x=series, test_x=series[:1])
    stream = LocalStream(tmp_path, config(kind="series", shape=[4, 3]))
    assert torch.equal(stream.task(0, 0).train.x, torch.full((2, 4, 3), 7.0))

    sound = np.full((2, 5), 16384, np.int16)
    write(tmp_path, 0, train_x=sound, test_x=sound[:1])
    stream = LocalStream(tmp_path, config(kind="waveform", shape=[5]))
    assert torch.equal(stream.task(0, 0).train.x, torch.full((2, 5), 0.5))

    ids = np.array([[3, 8, 0], [1, 0, 0]], np.int32)
    write(tmp_path, 0, train_x=ids, test_x=ids[:1])
    tokens = {"kind": "tokens", "shape": [3]}
    stream = LocalStream(tmp_path, config(**tokens, vocabulary=9))
    assert stream.spec.vocabulary == 9
    assert stream.task(0, 0).train.x.dtype == torch.int64
    with pytest.raises(ConfigError, match=r"token ids from 0 to 8; .* 0 to 7"):
        LocalStream(tmp_path, config(**tokens, vocabulary=8))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "tokens", "shape": [3]}, "data.vocabulary = 0 with data.kind"),
        ({"kind": "series", "shape": [3]}, r"for example data.shape = \[64, 3\]"),
        ({"vocabulary": 5}, "with data.kind = 'image'"),
        ({"shape": [3, 5000, 5000]}, "sides of images end at 4096"),
        ({"name": "digits", "kind": "table"}, "leave data.kind out"),
    ],
)
def test_kinds_that_do_not_fit_are_refused(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        local_spec(config(**changes))
