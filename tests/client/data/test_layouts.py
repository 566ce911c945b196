"""Data sets in their publishers' layouts, on small ones made here."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from PIL import Image

from fedknow.client.data import Dataset, load_dataset, make_partition, source
from fedknow.protocols.config import ConfigError, DataConfig, read_config


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKNOW_CACHE", str(tmp_path / "cache"))


def save(path: Path, level: int, size: tuple[int, int] = (4, 4)) -> None:
    """A picture of one colour, lossless whatever its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path, "png")


def write_parquet(
    path: Path, levels: list[int], size: int = 4, **columns: list[int]
) -> None:
    cells = []
    for level in levels:
        out = io.BytesIO()
        Image.new("RGB", (size, size), (level,) * 3).save(out, "png")
        cells.append({"bytes": out.getvalue(), "path": None})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = "img" if "fine_label" in columns else "image"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({image: pa.array(cells, kind)} | columns), path, row_group_size=3
    )


def load(name: str, root: Path, **settings: object) -> Dataset:
    return load_dataset(
        DataConfig.model_validate({"name": name, "dir": str(root), **settings})
    )


def levels(x: np.ndarray) -> list[int]:
    return x[:, 0, 0, 0].tolist()


def write_cifar(root: Path, per_class: int = 2) -> None:
    """Class c of superclass (7 c) mod 20; images of class c have level c, and 100 + c in the test
    file."""
    fine = np.tile(np.arange(100), per_class)
    coarse = (7 * fine) % 20
    for part, start in (("train", 0), ("test", 100)):
        write_parquet(
            root / f"cifar100/{part}-0.parquet",
            (start + fine).tolist(),
            fine_label=fine.tolist(),
            coarse_label=coarse.tolist(),
        )


def test_fc100_is_cifar100_by_superclasses(tmp_path: Path) -> None:
    write_cifar(tmp_path, per_class=3)
    data = load("fc100", tmp_path)
    assert (data.classes, len(data.groups), data.groups[1]) == (
        100,
        20,
        (5, 6, 7, 8, 9),
    )
    order = [1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19, 8, 11, 13, 16, 0, 7, 12, 14]
    expected = [
        c for superclass in order for c in range(100) if 7 * c % 20 == superclass
    ]
    assert data.class_names == tuple(f"{7 * c % 20}/{c}" for c in expected)
    # Three images of a class in each file: the sixth of the six, from the test file, is for
    # testing.
    assert np.bincount(data.train_y).tolist() == [5] * 100
    assert np.bincount(data.test_y).tolist() == [1] * 100
    assert [level - 100 for level in levels(data.test_x)] == [
        expected[y] for y in data.test_y
    ]
    assert [level % 100 for level in levels(data.train_x)] == [
        expected[y] for y in data.train_y
    ]
    for part in ("train", "test"):
        write_parquet(
            tmp_path / f"x/cifar100/{part}-0.parquet", [1], fine_label=[0]
        )
    with pytest.raises(ConfigError, match="'coarse_label' is missing"):
        load("fc100", tmp_path / "x")


@pytest.fixture(scope="module")
def core50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("core50")
    for session in range(1, 12):
        for number in range(1, 51):
            for frame in range(2):
                name = (
                    f""
                    f"core50_128x128/s{session}/o{number}/C_{session:02}_{number:02}_{frame:03}.png"
                )
                save(root / name, 10 * session + frame)
    return root


def test_core50_is_split_by_session(core50: Path) -> None:
    data = load("core50", core50)
    assert data.shape == (3, 32, 32)
    assert sorted(set(levels(data.test_x))) == [30, 31, 70, 71, 100, 101]
    assert sorted({level // 10 for level in levels(data.train_x)}) == [
        1,
        2,
        4,
        5,
        6,
        8,
        9,
        11,
    ]
    assert np.bincount(data.train_y).tolist() == [16] * 50
    assert np.bincount(data.test_y).tolist() == [6] * 50
    assert data.groups[3] == (15, 16, 17, 18, 19)
    assert data.class_names[15] == "light bulb 1"
    tasks = make_partition(
        data, DataConfig(tasks=10, partition="iid", clients=2), seed=0
    ).tasks[0]
    assert [share.classes for share in tasks] == list(data.groups)


def test_core50_with_a_folder_missing(tmp_path: Path) -> None:
    save(tmp_path / "core50/s1/o1/C_01_01_000.png", 1)
    with pytest.raises(
        ConfigError, match=r"s1/o2: no such folder; CORe50 has s1 to s11"
    ):
        load("core50", tmp_path)


def test_miniimagenet_as_folders_and_as_lists(tmp_path: Path) -> None:
    """Classes of all three parts, in that order; each sixth image of a class is for testing."""
    rows: dict[str, list[str]] = {}
    for part, names in (
        ("train", ("n02", "n01")),
        ("val", ("n05",)),
        ("test", ("n03",)),
    ):
        rows[part] = []
        for name in sorted(names):
            for k in range(12):
                level = 20 * int(name[1:]) + k
                save(
                    tmp_path / f"a/miniimagenet/{part}/{name}/{name}_{k:02}.jpg",
                    level,
                    (9, 6),
                )
                save(
                    tmp_path / f"b/mini-imagenet/images/{name}{k:02}.jpg",
                    level,
                    (9, 6),
                )
                rows[part].append(f"{name}{k:02}.jpg,{name}")
        (tmp_path / f"b/mini-imagenet/{part}.csv").write_text(
            "\n".join(["filename,label", *rows[part]])
        )
    for root in (tmp_path / "a", tmp_path / "b"):
        data = load("miniimagenet", root, image_size=5)
        assert data.shape == (3, 5, 5)
        assert data.class_names == ("n01", "n02", "n05", "n03")
        assert levels(data.test_x) == [25, 31, 45, 51, 105, 111, 65, 71]
        assert data.test_y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert len(data.train_y) == 40
    (tmp_path / "b/mini-imagenet/val.csv").write_text("file,class\n")
    with pytest.raises(
        ConfigError, match=r"val.csv: its first line is \['file', 'class'\]"
    ):
        load("miniimagenet", tmp_path / "b", image_size=6)


def test_tinyimagenet(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for label, name in enumerate(("n10", "n20")):
        for k in range(2):
            save(
                root / f"train/{name}/images/{name}_{k}.JPEG",
                100 * label + k,
                (64, 64),
            )
    for k, level in enumerate((7, 8, 9)):
        save(root / f"val/images/val_{k}.JPEG", level, (64, 64))
    answers = root / "val/val_annotations.txt"
    answers.write_text(
        "val_0.JPEG\tn20\t0\t0\t62\t62\nval_1.JPEG\tn10\t1\t1\t9\t9\nval_2.JPEG\tn20\t0\t0\t1\t1\n"
    )
    data = load("tinyimagenet", tmp_path)
    assert (data.shape, data.class_names) == ((3, 64, 64), ("n10", "n20"))
    assert (levels(data.train_x), data.train_y.tolist()) == (
        [0, 1, 100, 101],
        [0, 0, 1, 1],
    )
    assert (levels(data.test_x), data.test_y.tolist()) == ([7, 8, 9], [1, 0, 1])
    answers.write_text("val_0.JPEG\tn30\t0\t0\t62\t62\n")
    with pytest.raises(ConfigError, match=r"line 1: class 'n30' has no folder"):
        load("tinyimagenet", tmp_path)
    answers.write_text("val_9.JPEG\tn20\t0\t0\t62\t62\n")
    with pytest.raises(
        ConfigError, match=r"val_9.JPEG holds no image that can be decoded"
    ):
        load("tinyimagenet", tmp_path)


def test_hub_names_the_parts_in_its_own_way(tmp_path: Path) -> None:
    for name, part in (
        ("tinyimagenet", "valid"),
        ("miniimagenet", "validation"),
        ("svhn", "test"),
    ):
        inside = "cropped_digits" if name == "svhn" else "data"
        write_parquet(
            tmp_path / f"{name}/{inside}/train-0-of-1.parquet",
            [1, 2, 3, 4],
            label=[0, 1, 1, 0],
        )
        write_parquet(
            tmp_path / f"{name}/{inside}/{part}-0-of-1.parquet",
            [5, 6],
            label=[1, 0],
        )
        data = load(name, tmp_path)
        assert (levels(data.train_x), data.train_y.tolist()) == (
            [1, 2, 3, 4],
            [0, 1, 1, 0],
        )
        assert (levels(data.test_x), data.test_y.tolist()) == ([5, 6], [1, 0])


def test_svhn_mat(tmp_path: Path) -> None:
    x = np.zeros((32, 32, 3, 3), np.uint8)
    x[3, 5, 1] = 10, 20, 30
    for part in ("train", "test"):
        path = tmp_path / f"svhn/{part}_32x32.mat"
        path.parent.mkdir(exist_ok=True)
        scipy.io.savemat(
            path, {"X": x, "y": np.array([[10], [1], [9]], np.uint8)}
        )
    data = load("svhn", tmp_path)
    assert data.train_y.tolist() == [0, 1, 9]  # 10 stands for the digit 0
    assert data.train_x[:, 1, 3, 5].tolist() == [10, 20, 30]
    assert int(data.train_x.sum()) == 60
    assert data.classes == 10
    scipy.io.savemat(path, {"X": x[..., 0], "y": np.array([[1]])})
    with pytest.raises(
        ConfigError,
        match=r"test_32x32.mat: X is uint8 \[32, 32, 3\]; it must be uint8 \[H, W, 3, 1\]",
    ):
        load("svhn", tmp_path)
    path.write_bytes(b"MATLAB")
    with pytest.raises(ConfigError, match=r"test_32x32.mat: cannot be read"):
        load("svhn", tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"test_32x32.mat: no such file"):
        load("svhn", tmp_path)


def test_mix_of_three(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    for name, part, classes in (
        ("miniimagenet", "validation", 100),
        ("tinyimagenet", "valid", 200),
    ):
        labels = list(range(classes))
        write_parquet(tmp_path / f"{name}/train-0.parquet", labels, label=labels)
        write_parquet(tmp_path / f"{name}/{part}-0.parquet", labels, label=labels)
    data = load("mix80", tmp_path)
    assert (data.classes, data.shape, len(data.groups)) == (400, (3, 32, 32), 80)
    assert data.groups[79] == (395, 396, 397, 398, 399)
    assert [data.class_names[k] for k in (0, 100, 399)] == [
        "miniimagenet/0",
        "tinyimagenet/0",
        "cifar100/99",
    ]
    assert levels(data.test_x) == [
        *range(100),
        *range(200),
        *[100 + c for c in range(100)] * 2,
    ]
    assert data.test_y.tolist() == [*range(400), *range(300, 400)]
    config = DataConfig(name="mix80", tasks=80, clients=1, partition="iid")
    assert len(make_partition(data, config, seed=0).tasks[0]) == 80
    (tmp_path / "tinyimagenet/valid-0.parquet").unlink()
    with pytest.raises(
        ConfigError,
        match=r"tinyimagenet: train-\*.parquet is there but valid-\*.parquet is missing",
    ):
        load("mix80", tmp_path)


def test_size_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled so that the shorter side fits, and cut to a square in the middle; each size has a
    cache of its own."""
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, 2:6] = 200
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "png")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "img": pa.array([{"bytes": out.getvalue(), "path": None}] * 2, kind),
            "fine_label": [0, 1],
        }
    )
    (tmp_path / "cifar100").mkdir()
    for part in ("train", "test"):
        pq.write_table(table, tmp_path / f"cifar100/{part}-0.parquet")
    assert load("cifar100", tmp_path).shape == (3, 4, 8)
    square = load("cifar100", tmp_path, image_size=2)
    assert square.shape == (3, 2, 2)
    assert square.train_x.min() > 150  # the dark sides are cut off
    with (
        monkeypatch.context() as patch
    ):  # in batches of one image: the same arrays and statistics
        patch.setattr(source, "_BATCH_BYTES", 1)
        again = load("cifar100", tmp_path, image_size=3)
    assert again.train_x.shape == (2, 3, 3, 3)
    assert again.mean[0] == pytest.approx(
        float(again.train_x[:, 0].mean()) / 255, abs=1e-12
    )
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_size_where_there_is_none_to_choose() -> None:
    with pytest.raises(
        ConfigError,
        match=r"data.image_size = 16: data.name = 'digits' has images of a size of its own",
    ):
        read_config({"data": {"image_size": 16}})


def test_nothing_there_says_what_would_be(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    for name, text in (
        ("core50", r"no core50/s1/o1/\*.png there \(it holds: odd\)"),
        ("svhn", r"no svhn/train-\*.parquet or svhn/train_32x32.mat there"),
        ("tinyimagenet", r"tinyimagenet/train/CLASS/images/\*.JPEG"),
        (
            "mix80",
            r"no miniimagenet/train-\*.parquet or miniimagenet/\{train,val,test\}.csv",
        ),
    ):
        with pytest.raises(ConfigError, match=text):
            load(name, tmp_path)
