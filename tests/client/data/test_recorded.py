"""Sensors, speech and sentences: tiny files of each public layout, written here."""

import io
import os
import wave

import numpy as np
import pytest

from fedknow.client.data import list_datasets, load_dataset
from fedknow.protocols.config import ConfigError, DataConfig

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def load(folder, name, **settings):
    return load_dataset(DataConfig(name=name, dir=str(folder), **settings))


def write(folder, name, part, columns):
    place = folder / name
    place.mkdir(exist_ok=True)
    path = place / f"{part}-00000-of-00001.parquet"
    pq.write_table(pa.table(columns), path)


def steps(length, value):
    triple = pa.list_(pa.int16(), 3)
    rows = np.full((length, 3), value, np.int16)
    return pa.array([rows.tolist()], pa.list_(triple))


def wharf(folder, recordings):
    columns = {
        "signal": pa.chunked_array([steps(n, v) for n, v, *_ in recordings]),
        "activity": [row[2] for row in recordings],
        "volunteer": [row[3] for row in recordings],
        "day": ["20110411"] * len(recordings),
    }
    write(folder, "wharf", "train", columns)


def test_recordings_of_a_wrist_become_windows(tmp_path):
    wharf(
        tmp_path,
        [
            (130, 10, "walk", "f1"),  # windows at 0, 32 and 64
            (64, 20, "walk", "f1"),  # the second of her walks: for testing
            (96, 30, "drink", "m1"),
            (100, 40, "drink", "m1"),
            (63, 50, "drink", "m1"),  # too short for a window
        ],
    )
    data = load(tmp_path, "wharf")
    assert str(data.spec) == "series of 64x3"
    assert data.class_names == ("drink", "walk")
    assert data.train_y.tolist() == [1, 1, 1, 0, 0]
    assert data.train_x[:, 0, 0].tolist() == [10, 10, 10, 30, 30]
    assert data.test_x[:, 0, 0].tolist() == [20, 40, 40]
    people = data.columns["volunteer"]
    assert people.names == ("f1", "m1")
    assert people.train.tolist() == [0, 0, 0, 1, 1]
    assert people.test.tolist() == [0, 1, 1]
    # Mean 18 and variance 96 of each axis, over training windows alone.
    assert data.mean == pytest.approx((18,) * 3)
    assert data.std == pytest.approx((96**0.5,) * 3)


def sound(samples, rate=8000, channels=1):
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(np.array(samples, "<i2").tobytes())
    return {"bytes": file.getvalue(), "path": "0.wav"}


def speech(folder, **wrong):
    for part, loudness in (("train", 100), ("test", 200)):
        columns = {
            "audio": [sound([loudness] * 3), sound([-loudness], **wrong)],
            "label": [0, 1],
            "speaker": ["ann", "bob"],
            "index": [5, 5],
        }
        write(folder, "speech_digits", part, columns)


def test_spoken_digits_stay_as_long_as_they_are(tmp_path):
    speech(tmp_path)
    data = load(tmp_path, "speech_digits")
    assert str(data.spec) == "waveforms of 6400"
    assert data.spec.rate == 8000
    assert data.train_x.row(0).tolist() == [100, 100, 100]
    assert data.test_x.row(1).tolist() == [-200]
    assert data.columns["speaker"].names == ("ann", "bob")
    assert (data.mean, data.std) == ((0.0,), (1.0,))


def test_sound_of_another_form_is_refused(tmp_path):
    speech(tmp_path, rate=16000)
    with pytest.raises(ConfigError, match=r"train row 1: .*16000 Hz.*at 8000 Hz"):
        load(tmp_path, "speech_digits")


def clinc(folder):
    rows = [
        ("play a song", "music", "home"),
        ("Play it louder", "volume", "home"),
        ("book a flight", "flight", "travel"),
    ]
    for part in ("train", "validation", "test"):
        columns = dict(
            zip(
                ("text", "intent", "domain"), zip(*rows, strict=True), strict=True
            )
        )
        write(folder, "clinc150", part, columns)


def test_sentences_become_ids_and_domains_are_groups(tmp_path):
    clinc(tmp_path)
    data = load(tmp_path, "clinc150")
    assert data.class_names == ("music", "volume", "flight")
    assert data.groups == ((0, 1), (2,))
    # "a" and "play" occur twice; all others are unknown words.
    assert data.spec.vocabulary == 4
    rows = [data.train_x.row(place).tolist() for place in range(3)]
    assert rows == [[3, 2, 1], [3, 1, 1], [1, 2, 1]]
    assert data.columns["domain"].names == ("home", "travel")


def test_what_is_missing_is_named(tmp_path):
    write(tmp_path, "wharf", "train", {"signal": steps(64, 1)})
    with pytest.raises(ConfigError, match="'activity', 'volunteer', 'day' is"):
        load(tmp_path, "wharf")
    with pytest.raises(ConfigError, match="speech_digits/train-"):
        load(tmp_path, "speech_digits")
    clinc(tmp_path)
    with pytest.raises(ConfigError, match="has no images"):
        load(tmp_path, "clinc150", image_size=32)


def test_mnist_lies_as_on_the_hub(tmp_path):
    image = pytest.importorskip("PIL.Image")

    def picture(value):
        file = io.BytesIO()
        pixels = np.full((28, 28), value, np.uint8)
        image.fromarray(pixels).save(file, "png")
        return {"bytes": file.getvalue(), "path": "0.png"}

    for part in ("train", "test"):
        columns = {"image": [picture(0), picture(9)], "label": [0, 1]}
        write(tmp_path, "mnist", part, columns)
    data = load(tmp_path, "mnist")
    assert data.shape == (1, 28, 28)
    assert data.train_x[:, 0, 0, 0].tolist() == [0, 9]


def test_each_is_listed():
    assert {"mnist", "wharf", "speech_digits", "clinc150"} <= set(list_datasets())


@pytest.mark.data
@pytest.mark.skipif(
    "FEDKNOW_DATA" not in os.environ, reason="FEDKNOW_DATA is not set"
)
@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [
        ("wharf", 8589, 4218, 14),
        ("speech_digits", 2700, 300, 10),
        ("clinc150", 15_000, 4500, 150),
    ],
)
def test_published_files(name, train, test, classes):
    data = load_dataset(DataConfig(name=name))
    sizes = (len(data.train_y), len(data.test_y), data.classes)
    assert sizes == (train, test, classes)
    data.check_labels()
