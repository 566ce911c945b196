"""Data sets by name, the parquet loader and its cache."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedknow.client.data import (
    Column,
    Dataset,
    list_datasets,
    load_dataset,
    make_benchmark,
)
from fedknow.client.data.benchmark import hold_out
from fedknow.protocols.config import ConfigError, DataConfig, read_config


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKNOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDKNOW_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def write(
    path: Path,
    images: list[bytes | None],
    names: dict[str, list[str]] | None = None,
    **labels: list,
) -> None:
    """A parquet file in the layout of the Hugging Face hub; the first keyword is the image
    column's name."""
    column = labels.pop("column", "img")
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = pa.array(
        [{"bytes": b, "path": None} for b in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({column: cells} | labels)
    if names:
        features = {
            key: {"_type": "ClassLabel", "names": value}
            for key, value in names.items()
        }
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    pq.write_table(table, path)


def colours(n: int, start: int = 0) -> list[np.ndarray]:
    """Images whose pixels tell their number and channel."""
    return [
        np.full((4, 6, 3), (start + i, start + i + 1, start + i + 2), np.uint8)
        for i in range(n)
    ]


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    names = {"fine_label": ["ant", "bee", "cat"]}
    # Two training files, out of order on purpose: they are read by name.
    write(
        root / "cifar100/train-00001-of-00002.parquet",
        [png(x) for x in colours(2, 40)],
        names,
        fine_label=[2, 0],
    )
    write(
        root / "cifar100/train-00000-of-00002.parquet",
        [png(x) for x in colours(4)],
        names,
        fine_label=[0, 1, 2, 1],
    )
    write(
        root / "cifar100/test-00000-of-00001.parquet",
        [png(x) for x in colours(3, 90)],
        names,
        fine_label=[2, 1, 0],
    )
    return root


def cifar_config(root: Path) -> DataConfig:
    return DataConfig(name="cifar100", dir=str(root))


def test_digits() -> None:
    data = load_dataset(DataConfig())
    assert data.train_x.shape == (1442, 1, 8, 8)
    assert data.test_x.shape == (355, 1, 8, 8)
    assert (data.classes, data.shape, data.groups) == (10, (1, 8, 8), ())
    assert (data.train_x.min(), data.train_x.max()) == (0, 255)
    every = np.bincount(np.concatenate([data.train_y, data.test_y]))
    assert every.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (
        np.bincount(data.test_y).tolist() == (every // 5).tolist()
    )  # stratified
    assert data.mean[0] == pytest.approx((data.train_x / 255).mean(), abs=1e-12)
    assert data.std[0] == pytest.approx((data.train_x / 255).std(), abs=1e-12)


def test_list_datasets() -> None:
    known = list_datasets()
    sets = [
        "cifar100",
        "fashion-mnist",
        "cifar10",
        "omniglot",
        "fc100",
        "core50",
        "miniimagenet",
        "tinyimagenet",
        "svhn",
        "mnist",
        "wharf",
        "speech_digits",
        "clinc150",
        "emnist",
        "femnist",
        "uci-har",
        "speech-commands",
        "mix80",
    ]
    assert list(known) == ["digits", *sets]
    assert all(text and "\n" not in text for text in known.values())


@pytest.mark.parametrize("inside", ["", "cifar100"])
def test_parquet_folder_and_its_parent(cifar: Path, inside: str) -> None:
    data = load_dataset(cifar_config(cifar / inside))
    assert data.train_x.shape == (6, 3, 4, 6)
    assert data.train_x[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 40, 41]
    assert data.train_x[1, :, 3, 5].tolist() == [1, 2, 3]  # channels first
    assert data.train_y.tolist() == [0, 1, 2, 1, 2, 0]
    assert data.test_x[:, 0, 0, 0].tolist() == [90, 91, 92]
    assert data.test_y.tolist() == [2, 1, 0]
    assert data.class_names == ("ant", "bee", "cat")
    assert data.train_y.dtype == np.int64


def test_environment_names_the_folder(
    cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDKNOW_DATA", str(cifar))
    assert load_dataset(DataConfig(name="cifar100")).classes == 3


def test_omniglot_classes_are_sorted_by_alphabet_and_make_groups(
    tmp_path: Path,
) -> None:
    grey = [png(np.full((5, 5), 10 * i, np.uint8)) for i in range(5)]
    labels = {"character": [7, 3, 7, 1, 3], "alphabet": [1, 2, 0, 2, 2]}
    for part in ("train", "test"):
        write(
            tmp_path / f"omniglot/{part}-0.parquet",
            grey,
            column="image",
            **labels,
        )
    data = load_dataset(DataConfig(name="omniglot", dir=str(tmp_path)))
    # (alphabet, character): (0, 7) (1, 7) (2, 1) (2, 3)
    assert data.train_y.tolist() == [1, 3, 0, 2, 3]
    assert data.groups == ((0,), (1,), (2, 3))
    assert data.class_names == (
        "0/7",
        "1/7",
        "2/1",
        "2/3",
    )  # the file has no names for them
    assert data.shape == (1, 5, 5)


def test_drawers_of_omniglot_are_natural_clients(tmp_path: Path) -> None:
    drawers = {"train": [0, 0, 4, 4, 0, 0, 4, 4], "test": [15, 16, 15, 16]}
    for part, drawer in drawers.items():
        count = len(drawer)
        write(
            tmp_path / f"omniglot/{part}-0.parquet",
            [png(np.full((5, 5), 10 * i, np.uint8)) for i in range(count)],
            column="image",
            character=[i % 2 for i in range(count)],
            alphabet=[0] * count,
            drawer=drawer,
        )
    folder = DataConfig(name="omniglot", dir=str(tmp_path))
    # Decoded by the first call, read from the cache by the second one.
    for _ in range(2):
        drawer = load_dataset(folder).columns["drawer"]
        assert drawer.names == ("0", "4", "15", "16")
        assert drawer.train.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
        assert drawer.test.tolist() == [2, 3, 2, 3]
    changes = {
        "tasks": 1,
        "classes_per_task": 2,
        "clients": 2,
        "partition": "natural",
        "client_column": "drawer",
        "holdout": 0.5,
    }
    config = read_config({"data": folder.model_dump() | changes})
    made = make_benchmark(config)
    owner = made.dataset.columns["drawer"].train
    people = [
        set(owner[shares[0].train].tolist()) for shares in made.partition.tasks
    ]
    # Each client is one of the two drawers of training samples.
    assert sorted(map(tuple, people)) == [(0,), (1,)]


def test_cache_is_read_back_and_follows_the_files(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_dataset(cifar_config(cifar))
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.open", lambda *_: pytest.fail("decoded again"))
        second = load_dataset(cifar_config(cifar))
    np.testing.assert_array_equal(first.train_x, second.train_x)
    assert (first.mean, first.std, first.class_names) == (
        second.mean,
        second.std,
        second.class_names,
    )
    assert not second.train_x.flags.writeable
    assert type(second.train_x) is np.ndarray
    write(
        cifar / "cifar100/test-00000-of-00001.parquet",
        [png(x) for x in colours(1, 7)],
        fine_label=[1],
    )
    assert load_dataset(cifar_config(cifar)).test_x[:, 0, 0, 0].tolist() == [7]
    assert sorted(path.name[:9] for path in (tmp_path / "cache").iterdir()) == [
        "cifar100-",
        "cifar100-",
    ]


def test_damaged_cache_says_what_to_delete(cifar: Path, tmp_path: Path) -> None:
    load_dataset(cifar_config(cifar))
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "train_x.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ConfigError, match=r"damaged cache.*delete this folder"):
        load_dataset(cifar_config(cifar))


def test_cache_that_cannot_be_written_is_done_without(
    cifar: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDKNOW_CACHE", str(tmp_path / "file"))
    assert load_dataset(cifar_config(cifar)).classes == 3
    assert "FEDKNOW_CACHE" in caplog.text


def test_full_disk_leaves_no_half_cache(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert load_dataset(cifar_config(cifar)).classes == 3
    assert list((tmp_path / "cache").iterdir()) == []


def fails(config: DataConfig, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_dataset(config)
    for part in parts:
        assert part in str(caught.value)


def test_missing_folder_and_files(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(
        cifar_config(tmp_path / "nowhere"),
        "data.dir",
        "nowhere",
        "no such folder",
    )
    monkeypatch.setenv("FEDKNOW_DATA", str(tmp_path / "gone"))
    fails(DataConfig(name="cifar100"), "FEDKNOW_DATA", "gone", "no such folder")
    fails(
        DataConfig(name="omniglot", dir=str(cifar)),
        "no omniglot/train-*.parquet",
        "it holds: cifar100",
    )
    (cifar / "cifar100/test-00000-of-00001.parquet").unlink()
    fails(cifar_config(cifar), "test-*.parquet is missing")


def test_wrong_column(cifar: Path) -> None:
    write(
        cifar / "cifar100/test-00000-of-00001.parquet",
        [png(x) for x in colours(1)],
        label=[0],
    )
    fails(
        cifar_config(cifar),
        "test-00000",
        "'fine_label' is missing",
        "needed: img, fine_label",
        "found: img, label",
    )
    write(
        cifar / "cifar100/test-00000-of-00001.parquet",
        [png(x) for x in colours(1)],
        fine_label=["ant"],
    )
    fails(cifar_config(cifar), "'fine_label' is string", "whole numbers")
    table = pa.table({"img": ["a.png"], "fine_label": [0]})
    pq.write_table(table, cifar / "cifar100/test-00000-of-00001.parquet")
    fails(cifar_config(cifar), "'img' is string", "struct<bytes")


def test_unreadable_images_and_files(cifar: Path) -> None:
    test = cifar / "cifar100/test-00000-of-00001.parquet"
    good = png(colours(1)[0])
    for bad in (b"not an image", good[:40], None):
        write(test, [good, bad], fine_label=[0, 1])
        fails(cifar_config(cifar), "test row 1", "'img'", "decoded")
    write(test, [good, png(np.zeros((4, 5, 3), np.uint8))], fine_label=[0, 1])
    fails(cifar_config(cifar), "test row 1", "(3, 4, 5)", "(3, 4, 6)")
    write(test, [], fine_label=pa.array([], pa.int64()))
    fails(cifar_config(cifar), "holds no rows")
    test.write_bytes(b"PAR1 and no more")
    fails(cifar_config(cifar), "test-00000", "cannot be read as parquet")


def test_class_without_training_samples(cifar: Path) -> None:
    write(
        cifar / "cifar100/test-00000-of-00001.parquet",
        [png(x) for x in colours(1)],
        fine_label=[9],
    )
    fails(cifar_config(cifar), "(9,)", "not among the training samples")


def test_no_folder_and_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    fails(
        DataConfig(name="cifar100"),
        "uoft-cs/cifar100",
        "no route to host",
        "--data-dir",
        "FEDKNOW_DATA",
    )
    fails(
        DataConfig(name="omniglot"),
        "not on the hub",
        "--data-dir",
        "FEDKNOW_DATA",
    )


def test_hub_copy_is_read_like_a_folder(
    cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: str(cifar)
    )
    assert load_dataset(DataConfig(name="cifar100")).train_x.shape == (6, 3, 4, 6)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    fails(DataConfig(), "'sklearn'", "pip install '.[data]'")


def test_unknown_name() -> None:
    fails(
        DataConfig(name="cifar1000"),
        "data.name = 'cifar1000'",
        "did you mean 'cifar100'?",
        "module:callable",
    )


def test_own_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_data_for_test.py").write_text(
        "import numpy as np\n"
        "from fedknow.client.data import Dataset\n"
        "def load(config):\n"
        "    x = np.zeros((config.clients, 2, 3, 3), np.uint8)\n"
        "    return Dataset.from_arrays('own', x, np.arange(config.clients), x, "
        "np.arange(config.clients))\n"
        "def wrong(config):\n"
        "    return [1, 2]\n"
        "def gaps(config):\n"
        "    x, y = np.zeros((4, 2, 3, 3), np.uint8), np.array([0, 1, 3, 7])\n"
        "    return Dataset.from_arrays('own', x, y, x, y)\n"
        "def untested(config):\n"
        "    x, y = np.zeros((3, 2, 3, 3), np.uint8), np.array([0, 1, 2])\n"
        "    return Dataset.from_arrays('own', x, y, x[:2], y[:2])\n"
        "def leaves(config):\n"
        "    raise SystemExit\n"
    )
    data = load_dataset(DataConfig(name="own_data_for_test:load", clients=4))
    assert (data.name, data.classes, data.shape) == ("own", 4, (2, 3, 3))
    assert data.std == (1.0, 1.0)  # constant channels are not divided by 0
    fails(DataConfig(name="own_data_for_test:wrong"), "returned list", "Dataset")
    fails(
        DataConfig(name="own_data_for_test:gaps"),
        "train_y has no sample of 4 of 8 classes (2, 4, 5, 6)", "np.unique(y, return_inverse=True)",
    )  # fmt: skip
    fails(
        DataConfig(name="own_data_for_test:untested"),
        "test_y has no sample of 1 of 3 classes (2)",
    )
    fails(
        DataConfig(name="own_data_for_test:leaves"),
        "failed: SystemExit",
        "own_data_for_test.py, line",
    )
    fails(
        DataConfig(name="builtins:dict"),
        "data.name = 'builtins:dict'",
        "fedknow.client.data.Dataset",
    )
    fails(
        DataConfig(name="os:getcwd"),
        "data.name = 'os:getcwd'",
        "function of yours",
    )
    fails(
        DataConfig(name="own_data_for_test:lod"),
        "has no 'lod'",
        "did you mean 'load'?",
    )


def test_data_set_that_does_not_fit_itself() -> None:
    x, y = np.zeros((3, 1, 2, 2), np.uint8), np.array([0, 1, 2])
    for change, text in (
        ({"train_x": x.astype(np.float32)}, "train_x is float32"),
        ({"test_x": x[:, 0]}, r"test_x is uint8 \[3, 2, 2\]"),
        ({"test_y": y[:2]}, "test_y is int64"),
        ({"train_y": y.astype(np.int32)}, "train_y is int32"),
        ({"test_y": y + 1}, r"test_y runs from 1 to 3.*0\.\.2"),
        ({"test_x": np.zeros((3, 1, 2, 3), np.uint8)}, "train images are"),
        ({"train_x": [1, 2]}, "train_x is list"),
        ({"test_y": None}, "test_y is NoneType"),
        ({"groups": [[0, 1], [1, 2]]}, "groups"),
        ({"test_x": x[:0], "test_y": y[:0]}, "no samples"),
    ):
        arrays = {"train_x": x, "train_y": y, "test_x": x, "test_y": y} | change
        with pytest.raises(ConfigError, match=text):
            Dataset.from_arrays("bad", class_names="abc", **arrays)


needs_data = pytest.mark.skipif(
    not os.environ.get("FEDKNOW_DATA"), reason="FEDKNOW_DATA is not set"
)
REAL = os.environ.get("FEDKNOW_DATA", "")


@pytest.mark.data
@needs_data
def test_real_cifar100() -> None:
    data = load_dataset(DataConfig(name="cifar100", dir=REAL))
    assert data.train_x.shape == (50_000, 3, 32, 32)
    assert data.test_x.shape == (10_000, 3, 32, 32)
    assert np.bincount(data.train_y).tolist() == [500] * 100
    assert np.bincount(data.test_y).tolist() == [100] * 100
    assert data.mean == pytest.approx((0.5071, 0.4865, 0.4409), abs=1e-4)
    assert data.class_names[0] == "apple"
    assert data.groups == ()


@pytest.mark.data
@needs_data
def test_real_omniglot() -> None:
    data = load_dataset(DataConfig(name="omniglot", dir=REAL))
    assert data.train_x.shape == (24_345, 1, 28, 28)
    assert data.test_x.shape == (8_115, 1, 28, 28)
    assert np.bincount(data.train_y).tolist() == [15] * 1623
    assert np.bincount(data.test_y).tolist() == [5] * 1623
    assert len(data.groups) == 50
    sizes = [len(group) for group in data.groups]
    assert (min(sizes), max(sizes), sum(sizes)) == (14, 55, 1623)
    alphabets = [
        {data.class_names[label].split("/")[0] for label in group}
        for group in data.groups
    ]
    assert all(len(alphabet) == 1 for alphabet in alphabets)


@pytest.mark.parametrize(
    ("name", "folder", "column", "channels"),
    [
        ("mnist", "mnist/mnist", "image", 1),
        ("fashion-mnist", "fashion_mnist/fashion_mnist", "image", 1),
        ("cifar10", "cifar10/plain_text", "img", 3),
    ],
)
def test_sets_of_ten_classes(
    tmp_path: Path, name: str, folder: str, column: str, channels: int
) -> None:
    for part, count in (("train", 20), ("test", 10)):
        write(
            tmp_path / f"{folder}/{part}-00000-of-00001.parquet",
            [png(pixels) for pixels in colours(count)],
            column=column,
            label=[row % 10 for row in range(count)],
        )
    data = load_dataset(DataConfig(name=name, dir=str(tmp_path)))
    assert data.classes == 10
    assert data.train_x.shape[:2] == (20, channels)
    assert data.test_y.tolist() == list(range(10))


def test_columns_belong_to_the_samples() -> None:
    x = np.zeros((4, 1, 2, 2), np.uint8)
    y = np.array([0, 1, 0, 1])
    people = Column.from_values(
        np.array(["ann", "bob", "bob", "cid"]), np.array(["bob", "dan"] * 2)
    )
    assert people.names == ("ann", "bob", "cid", "dan")
    assert people.train.tolist() == [0, 1, 1, 2]
    assert people.test.tolist() == [1, 3, 1, 3]
    data = Dataset.from_arrays("own", x, y, x, y, columns={"person": people})
    assert data.columns["person"] is people

    short = Column(people.train[:3], people.test, people.names)
    with pytest.raises(ConfigError, match=r"'person' must be int64 \[4\]"):
        Dataset.from_arrays("own", x, y, x, y, columns={"person": short})
    unnamed = Column(people.train, people.test, people.names[:3])
    with pytest.raises(ConfigError, match="test values run from 1 to 3"):
        Dataset.from_arrays("own", x, y, x, y, columns={"person": unnamed})


def test_columns_follow_samples_that_are_held_out() -> None:
    x = np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1)
    y = np.arange(8) % 2
    site = Column(np.arange(8), np.arange(8), tuple("abcdefgh"))
    data = Dataset.from_arrays("own", x, y, x, y, columns={"site": site})
    held = hold_out(data, 0.25, seed=1)
    # A sample's value is its pixel here, so both must have moved together.
    assert held.columns["site"].train.tolist() == held.train_x.ravel().tolist()
    assert held.columns["site"].test.tolist() == held.test_x.ravel().tolist()
