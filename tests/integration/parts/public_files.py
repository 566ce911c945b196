"""Tiny files in the public layouts of data sets of sensors, speech and sentences."""

import io
import wave

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ACTIVITIES = 14
PEOPLE = 5
SPEAKERS = 6
DOMAINS = 10


def write_all(folder):
    """Write all three data sets into a folder."""
    _wharf(folder)
    _speech_digits(folder)
    _clinc150(folder)


def _write(folder, name, part, rows, schema=None):
    (folder / name).mkdir(exist_ok=True)
    path = folder / name / f"{part}-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def _wharf(folder):
    """Two recordings of each person and activity, of a frequency of its own."""
    draws = np.random.default_rng(0)
    time = np.arange(100)[:, None]
    rows = []
    for person in range(PEOPLE):
        for activity in range(ACTIVITIES):
            for _ in range(2):
                wave_ = np.sin(time * (activity + 1) / 10 + draws.random(3) * 6)
                signal = np.rint(32 + 20 * wave_ + draws.normal(0, 2, (100, 3)))
                rows.append(
                    {
                        "signal": signal.astype(int).tolist(),
                        "activity": f"activity{activity:02d}",
                        "volunteer": f"f{person}",
                        "day": f"2011041{draws.integers(9)}",
                    }
                )
    schema = pa.schema(
        {
            "signal": pa.list_(pa.list_(pa.int16(), 3)),
            "activity": pa.string(),
            "volunteer": pa.string(),
            "day": pa.string(),
        }
    )
    _write(folder, "wharf", "train", rows, schema)


def _speech_digits(folder):
    """Tones: of a height for each digit, higher with some speakers."""
    draws = np.random.default_rng(1)
    for part, repeats in (("train", 3), ("test", 1)):
        rows = []
        for speaker in range(SPEAKERS):
            for digit in range(10):
                for index in range(repeats):
                    time = np.arange(draws.integers(1500, 4000)) / 8000
                    height = 300 + 250 * digit + 20 * speaker
                    tone = 8000 * np.sin(2 * np.pi * height * time)
                    noise = draws.normal(0, 200, len(time))
                    sound = (tone + noise).astype("<i2").tobytes()
                    rows.append(
                        {
                            "audio": {"bytes": _wav(sound), "path": "0.wav"},
                            "label": digit,
                            "speaker": f"speaker{speaker}",
                            "index": index,
                        }
                    )
        _write(folder, "speech_digits", part, rows)


def _wav(frames):
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(8000)
        writer.writeframes(frames)
    return file.getvalue()


def _clinc150(folder):
    """Sentences with a word of their intent among words of all."""
    draws = np.random.default_rng(2)
    for part, repeats in (("train", 24), ("validation", 2), ("test", 6)):
        rows = []
        for domain in range(DOMAINS):
            for intent in range(2):
                for _ in range(repeats):
                    letters = draws.choice(list("abcdefgh"), draws.integers(2, 9))
                    own = f"word{'xyz'[domain % 3] * (domain + 1)}{'pq'[intent]}"
                    rows.append(
                        {
                            "text": " ".join([*letters, own]),
                            "intent": f"intent{domain}-{intent}",
                            "domain": f"domain{domain}",
                        }
                    )
        _write(folder, "clinc150", part, rows)
