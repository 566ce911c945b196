"""UCI HAR, EMNIST, FEMNIST and Speech Commands, on small files in their layouts."""

import gzip
import io
import struct
import wave

import numpy as np
import pytest

from fedknow.client.data import load_dataset, make_partition
from fedknow.protocols.config import ConfigError, DataConfig, read_config


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKNOW_CACHE", str(tmp_path / "cache"))


def load(folder, name):
    return load_dataset(DataConfig(name=name, dir=str(folder)))


# --- UCI HAR --------------------------------------------------------------------------------


def write_har(folder, steps=128):
    (folder / "train" / "Inertial Signals").mkdir(parents=True)
    (folder / "test" / "Inertial Signals").mkdir(parents=True)
    (folder / "activity_labels.txt").write_text("1 WALKING\n2 SITTING\n")
    for part, people in (("train", [1, 1, 3, 3]), ("test", [2, 2])):
        count = len(people)
        place = folder / part
        for number, signal in enumerate(("body_acc", "body_gyro", "total_acc")):
            for axis, letter in enumerate("xyz"):
                # The value tells signal, axis and row.
                table = np.tile(
                    100 * number + 10 * axis + np.arange(count)[:, None], steps
                )
                np.savetxt(
                    place / "Inertial Signals" / f"{signal}_{letter}_{part}.txt",
                    table,
                    fmt=" %.7e",
                )
        labels = np.arange(count) % 2 + 1
        np.savetxt(place / f"y_{part}.txt", labels, fmt="%d")
        np.savetxt(place / f"subject_{part}.txt", people, fmt="%d")


def test_uci_har_has_nine_channels_and_people(tmp_path):
    write_har(tmp_path / "UCI HAR Dataset")
    data = load(tmp_path, "uci-har")
    assert (data.spec.kind, data.shape, data.spec.rate) == (
        "series",
        (128, 9),
        50,
    )
    assert data.class_names == ("SITTING", "WALKING")
    assert data.train_y.tolist() == [1, 0, 1, 0]
    assert data.train_x[3, 0].tolist() == [
        100 * signal + 10 * axis + 3 for signal in range(3) for axis in range(3)
    ]
    subject = data.columns["subject"]
    assert subject.names == ("1", "2", "3")
    assert subject.train.tolist() == [0, 0, 2, 2]
    assert subject.test.tolist() == [1, 1]


def test_signals_of_another_length_are_refused(tmp_path):
    write_har(tmp_path / "uci-har", steps=64)
    with pytest.raises(ConfigError, match=r"\[4, 64, 9\] signals.*\[n, 128, 9\]"):
        load(tmp_path, "uci-har")


# --- EMNIST ---------------------------------------------------------------------------------


def write_emnist(folder, is_packed=True, magic=8):
    folder.mkdir(parents=True)
    for part, count in (("train", 6), ("test", 3)):
        x = np.zeros((count, 28, 28), np.uint8)
        # One point in the second column of the first row, once it is turned.
        x[:, 1, 0] = 10 + np.arange(count)
        y = (np.arange(count) % 3).astype(np.uint8)
        for kind, array in (("images-idx3", x), ("labels-idx1", y)):
            axes = array.ndim
            head = struct.pack(f">HBB{axes}I", 0, magic, axes, *array.shape)
            content = head + array.tobytes()
            name = f"emnist-balanced-{part}-{kind}-ubyte"
            if is_packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    (folder / "emnist-balanced-mapping.txt").write_text("0 48\n1 65\n2 98\n")


@pytest.mark.parametrize("is_packed", [True, False])
def test_emnist_is_turned(tmp_path, is_packed):
    write_emnist(tmp_path / "emnist" / "gzip", is_packed)
    data = load(tmp_path, "emnist")
    assert data.class_names == ("0", "A", "b")
    assert data.shape == (1, 28, 28)
    assert data.train_x[:, 0, 0, 1].tolist() == [10, 11, 12, 13, 14, 15]
    assert data.train_x[:, 0, 1, 0].tolist() == [0] * 6
    assert data.test_y.tolist() == [0, 1, 2]


def test_a_file_of_another_format_is_refused(tmp_path):
    write_emnist(tmp_path / "emnist", magic=13)
    with pytest.raises(ConfigError, match=r"not a file of MNIST's format"):
        load(tmp_path, "emnist")


# --- FEMNIST --------------------------------------------------------------------------------


def write_femnist(folder, writers=("f1_00", "f1_01", "f2_00"), each=20):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True)
    rows = [
        (writer, 7 * place + k)
        for place, writer in enumerate(writers)
        for k in range(each)
    ]
    # Writers alternate in the files, and a file ends in the middle of one.
    rows = rows[::2] + rows[1::2]
    for number, part in enumerate((rows[:25], rows[25:])):
        cells = []
        for _, level in part:
            file = io.BytesIO()
            pixels = np.full((28, 28), level, np.uint8)
            image.fromarray(pixels).save(file, "png")
            cells.append({"bytes": file.getvalue(), "path": None})
        columns = {
            "image": cells,
            "writer_id": [writer for writer, _ in part],
            "hsf_id": [0] * len(part),
            "character": [level % 2 for _, level in part],
        }
        parquet.write_table(
            arrow.table(columns),
            folder / f"train-{number:05d}-of-00002.parquet",
        )


def test_femnist_has_writers_and_a_tenth_of_each_is_tested(tmp_path):
    write_femnist(tmp_path / "femnist" / "data")
    data = load(tmp_path, "femnist")
    assert (len(data.train_y), len(data.test_y)) == (54, 6)
    writer = data.columns["writer"]
    assert writer.names == ("f1_00", "f1_01", "f2_00")
    assert np.bincount(writer.test).tolist() == [2, 2, 2]
    # A picture's level says whose it is: 7 more for each writer.
    level = data.test_x[:, 0, 0, 0].astype(int)
    assert ((level >= 7 * writer.test) & (level < 7 * writer.test + 20)).all()
    # From the cache of decoded images too.
    again = load(tmp_path, "femnist").columns["writer"]
    assert again.train.tolist() == writer.train.tolist()
    assert again.names == writer.names


def test_writers_of_femnist_are_natural_clients(tmp_path):
    write_femnist(tmp_path / "femnist")
    data = load(tmp_path, "femnist")
    config = read_config(
        {
            "data": {
                "name": "femnist",
                "tasks": 1,
                "clients": 2,
                "partition": "natural",
                "client_column": "writer",
                "held_out": ["f2_00"],
            }
        }
    ).data
    partition = make_partition(data, config, 0)
    assert [len(shares[0].train) for shares in partition.tasks] == [18, 18]
    (held_out,) = partition.held_out.values()
    assert (len(held_out[0].train), len(held_out[0].test)) == (18, 2)


# --- Speech Commands ------------------------------------------------------------------------


def test_speech_commands_lists_what_is_tested(tmp_path):
    folder = tmp_path / "speech_commands_v0.02"
    listed = []
    for word in ("no", "yes", "_background_noise_"):
        (folder / word).mkdir(parents=True)
        for number, speaker in enumerate(("0a", "0b", "0c")):
            name = f"{speaker}_nohash_0.wav"
            with wave.open(str(folder / word / name), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(16_000)
                file.writeframes(np.full(50 + number, 5, "<i2").tobytes())
            if speaker == "0c":
                listed.append(f"{word}/{name}")
    (folder / "testing_list.txt").write_text("\n".join(listed))
    data = load(tmp_path, "speech-commands")
    assert data.class_names == ("no", "yes")
    assert (data.spec.kind, data.spec.rate) == ("waveform", 16_000)
    assert (len(data.train_y), len(data.test_y)) == (4, 2)
    speaker = data.columns["speaker"]
    assert speaker.names == ("0a", "0b", "0c")
    assert set(speaker.test.tolist()) == {2}


@pytest.mark.parametrize(
    ("name", "wants"),
    [
        ("uci-har", "Inertial Signals"),
        ("emnist", "images-idx3-ubyte"),
        ("femnist", "train-"),
        ("speech-commands", "testing_list.txt"),
    ],
)
def test_what_is_missing_is_named(tmp_path, name, wants):
    with pytest.raises(ConfigError, match=wants):
        load(tmp_path, name)
