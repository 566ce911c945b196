"""UCI HAR, EMNIST, FEMNIST and Speech Commands, on small files in their layouts."""

import gzip
import io
import os
import struct
import sys
import wave

import numpy as np
import pytest

from fedknow.client.data import load_dataset, make_partition
from fedknow.protocols.config import ConfigError, DataConfig, read_config
from fedknow.server.grids.process_memory import (
    forget_process_peak,
    process_peak_mb,
)


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


def write_sound(path, samples, rate=16_000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def write_speech(folder, speakers=("0a", "0b", "0c"), length=50):
    """Write words of all speakers, of whom the last one is tested."""
    listed = []
    for place, word in enumerate(("no", "yes", "_background_noise_")):
        (folder / word).mkdir(parents=True)
        for number, speaker in enumerate(speakers):
            name = f"{speaker}_nohash_0.wav"
            # The value tells word and speaker.
            sound = np.full(length + number, 100 * place + number)
            write_sound(folder / word / name, sound)
            if speaker == speakers[-1]:
                listed.append(f"{word}/{name}")
    (folder / "testing_list.txt").write_text("\n".join(listed))


def test_speech_commands_lists_what_is_tested(tmp_path):
    write_speech(tmp_path / "speech_commands_v0.02")
    data = load(tmp_path, "speech-commands")
    assert data.class_names == ("no", "yes")
    assert (data.spec.kind, data.spec.rate) == ("waveform", 16_000)
    assert (len(data.train_y), len(data.test_y)) == (4, 2)
    speaker = data.columns["speaker"]
    assert speaker.names == ("0a", "0b", "0c")
    assert set(speaker.test.tolist()) == {2}


def test_decoded_sounds_are_mapped_from_the_cache(tmp_path, monkeypatch):
    write_speech(tmp_path / "speech-commands")
    first = load(tmp_path, "speech-commands")
    # No file is decoded again.
    monkeypatch.setattr("fedknow.client.data.sound_cache.read_wav", None)
    again = load(tmp_path, "speech-commands")
    for data in (first, again):
        assert isinstance(data.train_x.values.base, np.memmap)
        sounds = [data.train_x.row(row).tolist() for row in range(4)]
        assert sounds == [[0] * 50, [1] * 51, [100] * 50, [101] * 51]
        assert data.test_x.row(1).tolist() == [102] * 52
        assert data.shape == (52,)


def test_a_sound_that_changes_is_decoded_again(tmp_path):
    folder = tmp_path / "speech-commands"
    write_speech(folder)
    load(tmp_path, "speech-commands")
    write_sound(folder / "no" / "0a_nohash_0.wav", np.full(50, 7))
    data = load(tmp_path, "speech-commands")
    assert data.train_x.row(0).tolist() == [7] * 50


def test_sounds_are_held_in_memory_where_no_cache_can_be(
    tmp_path, monkeypatch, caplog
):
    write_speech(tmp_path / "speech-commands")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FEDKNOW_CACHE", str(tmp_path / "file"))
    data = load(tmp_path, "speech-commands")
    assert data.train_x.row(1).tolist() == [1] * 51
    assert "Set FEDKNOW_CACHE" in caplog.text


def test_a_damaged_cache_of_sounds_is_refused(tmp_path):
    write_speech(tmp_path / "speech-commands")
    load(tmp_path, "speech-commands")
    (values,) = (tmp_path / "cache").glob("sounds-*/train.int16")
    values.write_bytes(values.read_bytes()[:-2])
    with pytest.raises(ConfigError, match="damaged cache of decoded sounds"):
        load(tmp_path, "speech-commands")


def test_sounds_of_two_rates_leave_no_cache(tmp_path):
    folder = tmp_path / "speech-commands"
    write_speech(folder)
    write_sound(folder / "yes" / "0b_nohash_0.wav", np.ones(9), rate=8_000)
    with pytest.raises(ConfigError, match=r"\[8000, 16000\] samples a second"):
        load(tmp_path, "speech-commands")
    assert not list((tmp_path / "cache").glob("*sounds-*"))


@pytest.mark.skipif(
    not (sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)),
    reason="the system forgets no peak",
)
def test_speech_commands_is_never_whole_in_memory(tmp_path):
    # 80 MB, as few long files, since many short ones take long to write.
    speakers = tuple(f"{number:02x}" for number in range(80))
    write_speech(tmp_path / "speech-commands", speakers, length=250_000)
    load_dataset(DataConfig(name="digits"))
    forget_process_peak()
    before = process_peak_mb()
    data = load(tmp_path, "speech-commands")
    assert data.train_x.values.nbytes + data.test_x.values.nbytes > 80e6
    assert process_peak_mb() < before + 20
    # What a client holds is read, and no more.
    data.train_x[np.arange(4)].padded(data.shape[0])
    assert process_peak_mb() < before + 20


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
