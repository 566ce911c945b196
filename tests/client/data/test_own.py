"""A user's own data: every form, on small files that the test writes."""

import io
import tracemalloc
import wave
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from fedknow.client.data import Column, Dataset, load_dataset, make_benchmark
from fedknow.client.data.objects import from_huggingface, from_torch
from fedknow.client.data.tables import Roles
from fedknow.protocols.config import ConfigError, DataConfig, read_config

ROWS = 40


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKNOW_CACHE", str(tmp_path_factory.mktemp("cache")))


TABLE = {
    "x": [float(row) for row in range(ROWS)],
    "y": [-float(row) for row in range(ROWS)],
    "activity": [("sit", "run", "walk", "lie")[row % 4] for row in range(ROWS)],
    "person": [f"p{row % 8 // 4}" for row in range(ROWS)],
    "kind": [
        ("still", "moving", "moving", "still")[row % 4] for row in range(ROWS)
    ],
    "part": ["test" if row < 8 else "train" for row in range(ROWS)],
}
ROLES = {"input": ["x", "y"], "label": "activity"}


def load(name: str, folder: Path, **changes: Any) -> Dataset:
    return load_dataset(DataConfig(name=name, dir=str(folder), **changes))


def write_wav(path: Path, values: np.ndarray, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(values.astype("<i2").tobytes())


# --- tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_one_table_is_split_by_each_fifth(tmp_path: Path, ending: str) -> None:
    table = pa.table(TABLE)
    path = tmp_path / f"moves.{ending}"
    if ending == "csv":
        pa_csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    data = load(f"file:moves.{ending}", tmp_path, **ROLES)
    assert data.class_names == ("lie", "run", "sit", "walk")
    assert str(data.spec) == "rows of 2"
    # The fifth and the tenth of ten samples of each class.
    assert data.test_x[:, 0].tolist() == [16, 17, 18, 19, 36, 37, 38, 39]
    assert data.test_y.tolist() == [2, 1, 3, 0] * 2
    assert len(data.train_x) == 32
    person = data.columns["person"]
    assert person.names == ("p0", "p1")
    assert person.test.tolist() == [0] * 4 + [1] * 4
    assert set(data.columns) == {"person", "kind", "part"}


def test_columns_say_split_and_tasks(tmp_path: Path) -> None:
    pq.write_table(pa.table(TABLE), tmp_path / "moves.parquet")
    data = load(
        "file:moves.parquet",
        tmp_path,
        **ROLES,
        split_column="part",
        task_column="kind",
    )
    assert data.test_x[:, 0].tolist() == list(range(8))
    # In the order of the names: moving (run, walk), still (lie, sit).
    assert data.groups == ((1, 3), (0, 2))


def test_a_person_is_a_client(tmp_path: Path) -> None:
    pq.write_table(pa.table(TABLE), tmp_path / "moves.parquet")
    settings = {
        "name": "file:moves.parquet",
        "dir": str(tmp_path),
        **ROLES,
        "partition": "natural",
        "client_column": "person",
        "clients": 2,
        "tasks": 2,
    }
    stream = make_benchmark(read_config({"data": settings}))
    person = stream.dataset.columns["person"].train
    for shares in stream.partition.tasks:
        rows = np.concatenate([share.train for share in shares])
        assert len(set(person[rows].tolist())) == 1
    assert stream.task(0, 0).train.x.shape[1:] == (2,)


def test_lists_are_rows_or_series(tmp_path: Path) -> None:
    labels = [0, 1] * 10
    row_table = pa.table({"v": [[1.0, 2.0, 3.0]] * 20, "label": labels})
    pq.write_table(row_table, tmp_path / "rows.parquet")
    rows = load("file:rows.parquet", tmp_path, input=["v"], label="label")
    assert str(rows.spec) == "rows of 3"
    steps = [[[1, 2]] * (2 + row % 3) for row in range(20)]
    pq.write_table(
        pa.table({"v": steps, "label": labels}), tmp_path / "s.parquet"
    )
    series = load("file:s.parquet", tmp_path, input=["v"], label="label")
    assert series.spec.is_ragged
    assert str(series.spec) == "series of 4x2"
    assert series.train_x.row(0).tolist() == [[1, 2], [1, 2]]


def test_texts_are_ids_of_training_words(tmp_path: Path) -> None:
    table = {
        "text": ["Play a song", "stop a song now"] * 10,
        "label": [0, 1] * 10,
    }
    pq.write_table(pa.table(table), tmp_path / "says.parquet")
    data = load("file:says.parquet", tmp_path, input=["text"], label="label")
    assert data.spec.kind == "tokens"
    assert data.spec.shape == (4,)
    # By how often they come, then by the alphabet: a, song, now, play, stop.
    assert data.spec.vocabulary == 7
    assert data.train_x.row(0).tolist() == [5, 2, 3]
    assert data.train_x.row(1).tolist() == [6, 2, 3, 4]


def test_pictures_of_the_hub(tmp_path: Path) -> None:
    def picture(level: int) -> dict[str, Any]:
        file = io.BytesIO()
        Image.fromarray(np.full((3, 5), level, np.uint8)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    table = datasets.Dataset.from_dict(
        {
            "image": [picture(10 * row) for row in range(10)],
            "label": [row % 2 for row in range(10)],
            "writer_id": [f"f{row % 3}" for row in range(10)],
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=["zero", "one"]),
                "writer_id": datasets.Value("string"),
            }
        ),
    )
    folder = tmp_path / "flwrlabs" / "femnist" / "data"
    folder.mkdir(parents=True)
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    roles = {"input": ["image"], "label": "label"}
    data = load("hf:flwrlabs/femnist", tmp_path, **roles)
    assert data.class_names == ("zero", "one")
    assert data.train_x.shape == (8, 1, 3, 5)
    assert data.test_x[:, 0, 0, 0].tolist() == [80, 90]
    assert data.columns["writer_id"].names == ("f0", "f1", "f2")
    same = from_huggingface("mine", table, None, Roles(["image"], "label"))
    assert (same.train_x == data.train_x).all()
    shuffled = from_huggingface(
        "mine", table.select([9, 8, 1, 0]), table, Roles(["image"], "label")
    )
    assert shuffled.train_x[:, 0, 0, 0].tolist() == [90, 80, 10, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "mood"}, "column 'mood' is missing; found: x, y, activity"),
        ({"input": []}, r"data\.input: with data\.name"),
        ({"input": ["x", "person"]}, "column 'person' is string"),
        ({"split_column": "kind"}, "must say 'train' and 'test'"),
        ({"task_column": "person"}, r"belongs to several tasks"),
    ],
)
def test_wrong_roles_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(TABLE), tmp_path / "moves.parquet")
    with pytest.raises(ConfigError, match=message):
        load("file:moves.parquet", tmp_path, **ROLES | changes)


def test_columns_as_pandas_writes_them(tmp_path: Path) -> None:
    table = pa.table(
        {
            "x": [float(row) for row in range(10)],
            "label": [0.0, 1.0] * 5,
            "user": pa.array(
                [f"u{row % 3}" for row in range(10)], "large_string"
            ),
            "site": pa.array(["a", "b"] * 5).dictionary_encode(),
            "is_old": [row < 5 for row in range(10)],
            "weight": [0.5] * 10,
        }
    )
    pq.write_table(table, tmp_path / "moves.parquet")
    data = load("file:moves.parquet", tmp_path, input=["x"], label="label")
    assert data.class_names == ("0", "1")
    assert data.columns["user"].names == ("u0", "u1", "u2")
    assert data.columns["site"].test.tolist() == [0, 1]
    assert set(data.columns) == {"user", "site", "is_old"}
    with pytest.raises(
        ConfigError, match=r"'weight' holds 0\.5, which is no class"
    ):
        load("file:moves.parquet", tmp_path, input=["x"], label="weight")


def test_empty_cells_and_missing_files_are_refused(tmp_path: Path) -> None:
    table = pa.table({"x": [1.0, None], "label": [0, 1]})
    pq.write_table(table, tmp_path / "holes.parquet")
    roles = {"input": ["x"], "label": "label"}
    with pytest.raises(ConfigError, match="column 'x' has 1 empty cell"):
        load("file:holes.parquet", tmp_path, **roles)
    with pytest.raises(ConfigError, match=r"there is no .*none\.csv"):
        load("file:none.csv", tmp_path, **roles)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="it holds: nothing"):
        load("file:empty", tmp_path, **roles)
    with pytest.raises(ConfigError, match="no folder owner/name there"):
        load("hf:owner/name", tmp_path, **roles)


# --- NumPy ----------------------------------------------------------------------------------


def test_arrays_of_an_archive(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "train_x": rng.normal(size=(12, 16, 3)).astype(np.float32),
        "train_y": np.arange(12) % 3,
        "test_x": rng.normal(size=(6, 16, 3)).astype(np.float32),
        "test_y": np.arange(6) % 3,
        "train_person": np.arange(12) % 2,
        "test_person": np.arange(6) % 2,
    }
    np.savez(tmp_path / "windows.npz", **arrays)
    data = load("file:windows.npz", tmp_path)
    assert str(data.spec) == "series of 16x3"
    assert data.columns["person"].names == ("0", "1")
    assert (data.train_x == arrays["train_x"]).all()


def test_arrays_that_are_no_classes_or_doubles(tmp_path: Path) -> None:
    x = np.zeros((4, 3), np.float32)
    whole = np.array([0.0, 1.0, 1.0, 0.0])
    arrays = {"train_x": x, "train_y": whole, "test_x": x + 1, "test_y": whole}
    np.savez(tmp_path / "rows.npz", **arrays)
    assert load("file:rows.npz", tmp_path).train_y.tolist() == [0, 1, 1, 0]
    np.savez(tmp_path / "rows.npz", **arrays | {"train_y": whole + 0.25})
    with pytest.raises(
        ConfigError, match=r"'train_y' holds 0.25, which is no cl"
    ):
        load("file:rows.npz", tmp_path)
    np.savez(tmp_path / "rows.npz", **arrays | {"test_y": np.array(["a"] * 4)})
    with pytest.raises(ConfigError, match=r"'test_y' is <U1; classes are whole"):
        load("file:rows.npz", tmp_path)
    np.savez(tmp_path / "rows.npz", **arrays | {"train_x": x.astype(float)})
    with pytest.raises(ConfigError, match=r"x\.astype\('float32'\) converts"):
        load("file:rows.npz", tmp_path)


def test_ten_million_samples_are_not_read(tmp_path: Path) -> None:
    """Peak memory grows with the labels alone: 80 MB, of 640 MB of samples."""
    count = 10_000_000
    for part, size in (("train", count), ("test", 1000)):
        x = np.lib.format.open_memmap(
            tmp_path / f"{part}_x.npy", "w+", np.uint8, (size, 64)
        )
        x[-1] = 7
        x.flush()
        # Labels are few, so that a file of them is small: a hole is a zero.
        y = np.lib.format.open_memmap(
            tmp_path / f"{part}_y.npy", "w+", np.int64, (size,)
        )
        y[size // 2 :] = 1
        y.flush()
    np.save(tmp_path / "mean.npy", np.zeros(64))
    np.save(tmp_path / "std.npy", np.ones(64))
    tracemalloc.start()
    data = load(f"file:{tmp_path}", tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data.train_x) == count
    assert data.train_x[-1].tolist() == [7] * 64
    assert peak < 250e6


# --- sound ----------------------------------------------------------------------------------


def test_speech_commands_layout(tmp_path: Path) -> None:
    names = []
    for word in ("yes", "no"):
        for take in range(6):
            name = f"{word}/{'ab'[take % 2]}{take // 2}f_nohash_0.wav"
            write_wav(tmp_path / name, np.full(10 + take, take))
            names.append(name)
    write_wav(tmp_path / "_background_noise_" / "hum.wav", np.ones(5))
    (tmp_path / "testing_list.txt").write_text(f"{names[0]}\n{names[6]}\n")
    data = load(f"file:{tmp_path}", tmp_path)
    assert data.class_names == ("no", "yes")
    assert data.test_y.tolist() == [0, 1]
    assert str(data.spec) == "waveforms of 15"
    assert data.spec.rate == 8000
    assert data.columns["speaker"].names == tuple(
        sorted(f"{c}{n}f" for c in "ab" for n in range(3))
    )
    write_wav(tmp_path / "yes" / "a9f_nohash_0.wav", np.ones(8), channels=2)
    with pytest.raises(ConfigError, match="2 channels of 16 bits"):
        load(f"file:{tmp_path}", tmp_path)


# --- torch ----------------------------------------------------------------------------------


def test_torch_data_sets(tmp_path: Path) -> None:
    x = torch.arange(48, dtype=torch.float32).view(4, 3, 2, 2)
    part = TensorDataset(x, torch.tensor([0, 1, 0, 1]))
    owner = Column(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), ("a", "b"))
    data = from_torch("mine", part, part, columns={"owner": owner})
    assert str(data.spec) == "images of 3x2x2"
    assert data.spec.dtype == "float32"
    assert data.train_x.tolist() == x.tolist()
    assert data.columns["owner"] is owner
    pictures = [
        (Image.fromarray(np.full((2, 3), level, np.uint8)), level % 2)
        for level in range(4)
    ]
    grey = from_torch("grey", pictures, pictures)
    assert grey.train_x.shape == (4, 1, 2, 3)
    assert grey.spec.dtype == "uint8"


def test_torch_series_of_unequal_lengths() -> None:
    def part(steps: int) -> list[tuple[torch.Tensor, int]]:
        return [
            (torch.full((steps + row % 2, 3), row + 1.0), row % 2)
            for row in range(4)
        ]

    data = from_torch("mine", part(4), part(5))
    # The longest of both parts.
    assert str(data.spec) == "series of 6x3"
    assert data.train_x.lengths.tolist() == [4, 5, 4, 5]
    assert data.test_x.row(1).tolist() == [[2.0] * 3] * 6


ROW = torch.zeros(3)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ([(ROW, 0.5)], r"item 0: its label holds 0\.5, which is no class"),
        ([(ROW, torch.tensor([0, 1]))], r"item 0 has labels of shape \[2\]"),
        ([{"x": ROW, "y": 0}], "item 0 is dict; it must be a pair"),
        ([(ROW, 0), (torch.zeros(4), 1)], r"shapes \[\(3,\), \(4,\)\]; all must"),
        (iter([(ROW, 0)]), "list_iterator has no length"),
        ([], "holds no samples"),
    ],
)
def test_torch_items_that_are_no_pairs(part: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_torch("mine", part, part)


def test_parts_of_the_hub_that_are_no_tables() -> None:
    table = datasets.Dataset.from_dict({"x": [0.0, 1.0], "y": [0, 1]})
    both = datasets.DatasetDict(train=table, test=table)
    roles = Roles(["x"], "y")
    with pytest.raises(ConfigError, match=r"data\['train'\], data\['test'\]"):
        from_huggingface("mine", both, None, roles)
    stream = table.to_iterable_dataset()
    with pytest.raises(ConfigError, match="loaded without streaming"):
        from_huggingface("mine", stream, None, roles)
