"""Exact pixels of each kind of picture through each loader: right, or refused by name."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedknow.client.data import Dataset, load_dataset
from fedknow.client.data.files import fingerprint, pictures
from fedknow.client.data.pixels import UnusablePictureError, to_eight_bit
from fedknow.protocols.config import ConfigError, DataConfig

SIDE = 6
RANDOM = np.random.default_rng(14)
GREY = RANDOM.integers(0, 256, (SIDE, SIDE), np.uint8)
COLOUR = RANDOM.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
ALPHA = RANDOM.integers(0, 256, (SIDE, SIDE), np.uint8)
DEEP = RANDOM.integers(0, 65536, (SIDE, SIDE), np.uint16)
DEEP_COLOUR = RANDOM.integers(0, 65536, (SIDE, SIDE, 3), np.uint16)
BLACK = np.zeros_like(GREY)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKNOW_CACHE", str(tmp_path / "cache"))


# --- references, computed without Pillow ----------------------------------------------------------


def rgb(pixels: np.ndarray) -> np.ndarray:
    """Grey [H, W] or colour [H, W, 3] as colour [3, H, W]."""
    colour = np.stack([pixels] * 3, axis=-1) if pixels.ndim == 2 else pixels
    return np.rint(colour).astype(np.int64).transpose(2, 0, 1)


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = (alpha if pixels.ndim == 2 else alpha[..., None]) / 255
    return pixels * share + 255 * (1 - share)


def luma(colour: np.ndarray) -> np.ndarray:
    return np.tensordot([0.299, 0.587, 0.114], colour, axes=1)


# --- pictures -------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    check = zlib.crc32(name + content)
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", check)
    )


def png(
    rows: list[bytes], width: int, depth: int, colour_type: int, key: bytes = b""
) -> bytes:
    """A PNG file of a depth that Pillow does not write; ``key`` is its transparent colour."""
    header = struct.pack(
        ">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0
    )
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"tRNS", key) if key else b"",
            chunk(b"IDAT", body),
            chunk(b"IEND", b""),
        ]
    )


def deep_png(samples: np.ndarray, colour_type: int, key: bytes = b"") -> bytes:
    rows = [row.astype(">u2").tobytes() for row in samples.reshape(SIDE, -1)]
    return png(rows, SIDE, 16, colour_type, key)


def palette(
    transparency: bytes | int | None,
) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A picture of 8 colours, these colours at each pixel, and their transparency."""
    colours = RANDOM.integers(0, 256, (8, 3), np.uint8)
    places = RANDOM.integers(0, 8, (SIDE, SIDE), np.uint8)
    image = Image.fromarray(places).convert("L")
    image.putpalette(colours.tobytes())
    alphas = np.full(8, 255)
    if isinstance(transparency, bytes):
        alphas[: len(transparency)] = list(transparency)
    elif transparency is not None:
        alphas[transparency] = 0
    options = {} if transparency is None else {"transparency": transparency}
    return encoded(image, **options), colours[places], alphas[places]


def oriented(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(COLOUR), kind, exif=exif)


def turned(orientation: int) -> np.ndarray:
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: x.swapaxes(0, 1)[:, ::-1],
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: x.swapaxes(0, 1)[::-1],
    }
    return turns.get(orientation, lambda x: x)(COLOUR)


def frames(kind: str) -> bytes:
    images = [Image.fromarray(each) for each in (COLOUR, 255 - COLOUR)]
    return encoded(images[0], kind, save_all=True, append_images=images[1:])


class Kind(NamedTuple):
    """A picture, and the colours [3, H, W] it stands for or the words it is refused with."""

    content: bytes
    expected: np.ndarray | str
    tolerance: int = 0


BILEVEL = np.where(GREY > 100, 255, 0).astype(np.uint8)
TWO_BITS = GREY >> 6
TWO_BIT_ROWS = [
    np.packbits(np.unpackbits(row[:, None], axis=1)[:, -2:].reshape(-1)).tobytes()
    for row in TWO_BITS
]
PLAIN_PALETTE = palette(None)
ALPHA_PALETTE = palette(bytes([0, 128, 255, 3]))
KEY_PALETTE = palette(5)
CMYK = RANDOM.integers(0, 256, (SIDE, SIDE, 4), np.uint8)
CMYK_COLOUR = (255.0 - CMYK[..., :3]) * (255 - CMYK[..., 3:]) / 255
RGBA = np.dstack([COLOUR, ALPHA])
GREY_KEY = int(GREY[2, 3])
COLOUR_KEY = tuple(map(int, COLOUR[2, 3]))
DEEP_KEY = int(DEEP[2, 3])
HUGE = b"".join(
    [
        b"\x89PNG\r\n\x1a\n",
        chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)),
        chunk(b"IDAT", b""),
        chunk(b"IEND", b""),
    ]
)

KINDS = {
    "1": Kind(encoded(Image.fromarray(BILEVEL).convert("1")), rgb(BILEVEL)),
    "1, white is transparent": Kind(
        encoded(Image.fromarray(BILEVEL).convert("1"), transparency=255),
        rgb(BILEVEL),
    ),
    "1, black is transparent": Kind(
        encoded(Image.fromarray(BILEVEL).convert("1"), transparency=0),
        "is one colour when its transparency",
    ),
    "L": Kind(encoded(Image.fromarray(GREY)), rgb(GREY)),
    "L, key": Kind(
        encoded(Image.fromarray(GREY), transparency=GREY_KEY),
        rgb(np.where(GREY == GREY_KEY, 255, GREY)),
    ),
    "L, 2 bits": Kind(png(TWO_BIT_ROWS, SIDE, 2, 0), rgb(TWO_BITS * 85)),
    "L, 2 bits, key": Kind(
        png(TWO_BIT_ROWS, SIDE, 2, 0, b"\0\2"),
        r"a transparent colour and samples of another depth than 8 bits \(L;2\)",
    ),
    "LA": Kind(
        encoded(Image.fromarray(np.dstack([GREY, ALPHA]))),
        rgb(on_white(GREY, ALPHA)),
    ),
    "LA, opaque": Kind(
        encoded(Image.fromarray(np.dstack([GREY, BLACK + 255]))), rgb(GREY)
    ),
    "LA, 16 bits": Kind(
        deep_png(np.dstack([DEEP, DEEP_COLOUR[..., 0]]), 4),
        rgb(on_white(DEEP / 257, DEEP_COLOUR[..., 0] / 257)),
        2,
    ),
    "I;16": Kind(encoded(Image.fromarray(DEEP)), rgb(DEEP / 257)),
    "I;16, key": Kind(
        deep_png(DEEP, 0, struct.pack(">H", DEEP_KEY)),
        rgb(np.where(DEEP == DEEP_KEY, 255, DEEP / 257)),
    ),
    "I;16, TIFF": Kind(encoded(Image.fromarray(DEEP), "tiff"), rgb(DEEP / 257)),
    "I;16, TIFF, 0 is white": Kind(
        encoded(Image.fromarray(DEEP), "tiff", tiffinfo={262: 0}),
        "16-bit samples whose 0 is white",
    ),
    "I, PGM": Kind(
        b"P5 6 6 65535\n" + DEEP.astype(">u2").tobytes(), rgb(DEEP / 257)
    ),
    "I, PGM of 12 bits": Kind(
        b"P5 6 6 4095\n" + (DEEP >> 4).astype(">u2").tobytes(),
        rgb((DEEP >> 4) * (255 / 4095)),
        1,
    ),
    "I, TIFF": Kind(
        encoded(Image.fromarray(DEEP.astype(np.int32)), "tiff"),
        "signed or fractional samples",
    ),
    "F, TIFF": Kind(
        encoded(Image.fromarray(DEEP.astype(np.float32)), "tiff"),
        "signed or fractional samples",
    ),
    "RGB": Kind(encoded(Image.fromarray(COLOUR)), rgb(COLOUR)),
    "RGB, BMP": Kind(encoded(Image.fromarray(COLOUR), "bmp"), rgb(COLOUR)),
    "RGB, WebP": Kind(
        encoded(Image.fromarray(COLOUR), "webp", lossless=True), rgb(COLOUR)
    ),
    "RGB, key": Kind(
        encoded(Image.fromarray(COLOUR), transparency=COLOUR_KEY),
        rgb(np.where((COLOUR == COLOUR_KEY).all(-1, keepdims=True), 255, COLOUR)),
    ),
    "RGB, 16 bits": Kind(deep_png(DEEP_COLOUR, 2), rgb(DEEP_COLOUR / 257), 1),
    "RGB, 16 bits, key": Kind(
        deep_png(DEEP_COLOUR, 2, DEEP_COLOUR[2, 3].astype(">u2").tobytes()),
        "a transparent colour and samples of another depth",
    ),
    "RGBA": Kind(encoded(Image.fromarray(RGBA)), rgb(on_white(COLOUR, ALPHA))),
    "RGBA, opaque": Kind(
        encoded(Image.fromarray(np.dstack([COLOUR, BLACK + 255]))), rgb(COLOUR)
    ),
    "RGBA, black": Kind(
        encoded(Image.fromarray(np.dstack([COLOUR * 0, ALPHA]))), rgb(255 - ALPHA)
    ),
    "RGBA, white": Kind(
        encoded(Image.fromarray(np.dstack([COLOUR * 0 + 255, ALPHA]))),
        "is one colour when its transparency is laid on white, though it holds more",
    ),
    "RGBA, all transparent": Kind(
        encoded(Image.fromarray(np.dstack([COLOUR, BLACK]))),
        "is one colour when its transparency",
    ),
    "RGBA, one colour": Kind(
        encoded(Image.new("RGBA", (SIDE, SIDE), (10, 20, 30, 255))),
        rgb(np.tile(np.uint8([10, 20, 30]), (SIDE, SIDE, 1))),
    ),
    "RGBA, 16 bits": Kind(
        deep_png(np.dstack([DEEP_COLOUR, DEEP]), 6),
        rgb(on_white(DEEP_COLOUR / 257, DEEP / 257)),
        2,
    ),
    "P": Kind(PLAIN_PALETTE[0], rgb(PLAIN_PALETTE[1])),
    "P, alpha": Kind(ALPHA_PALETTE[0], rgb(on_white(*ALPHA_PALETTE[1:]))),
    "P, key": Kind(KEY_PALETTE[0], rgb(on_white(*KEY_PALETTE[1:]))),
    "CMYK": Kind(
        encoded(Image.fromarray(CMYK, "CMYK"), "tiff"), rgb(CMYK_COLOUR), 1
    ),
    "CMYK, JPEG": Kind(
        encoded(
            Image.new("CMYK", (SIDE, SIDE), (10, 60, 110, 20)),
            "jpeg",
            quality=100,
        ),
        rgb(
            np.tile(
                (255.0 - np.array([10, 60, 110])) * 235 / 255, (SIDE, SIDE, 1)
            )
        ),
        3,
    ),
    "LAB": Kind(
        encoded(Image.new("LAB", (SIDE, SIDE)), "tiff"), "Pillow's mode 'LAB'"
    ),
    "camera's MPO": Kind(
        frames("mpo"),
        rgb(np.asarray(Image.open(io.BytesIO(frames("mpo"))).convert("RGB"))),
    ),
    **{
        f"two frames, {kind}": Kind(frames(kind), "has several frames")
        for kind in ("gif", "png", "webp")
    },
    **{
        f"EXIF {k}, PNG": Kind(oriented(k, "png"), rgb(turned(k)))
        for k in range(10)
    },
    **{
        f"EXIF {k}, TIFF": Kind(oriented(k, "tiff"), rgb(turned(k)))
        for k in (1, 6)
    },
    "20000 x 20000": Kind(HUGE, "the image has more than 178,956,970 pixels"),
    "no image": Kind(b"<html>", "holds no image that can be decoded"),
    "nothing": Kind(b"", "holds no image that can be decoded"),
}


# --- loaders --------------------------------------------------------------------------------------


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(
    folder: Path, column: str, content: bytes, *labels: str
) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": content, "path": None}] * 2, kind)
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        table = pa.table({column: cells} | {label: [0, 1] for label in labels})
        pq.write_table(table, folder / f"{part}-0.parquet")


def folders(root: Path, content: bytes) -> Dataset:
    for part in ("train", "val", "test"):
        for number in range(6):
            put(root / f"miniimagenet/{part}/{part}s/{number}.png", content)
    return load_dataset(
        DataConfig(name="miniimagenet", dir=str(root), image_size=SIDE)
    )


def lists(root: Path, content: bytes) -> Dataset:
    for part in ("train", "val", "test"):
        rows = [f"{part}/{number}.png,{part}s" for number in range(6)]
        put(
            root / f"miniimagenet/{part}.csv",
            "\n".join(["\ufefffilename,label", *rows]),
        )
        for number in range(6):
            put(root / f"miniimagenet/images/{part}/{number}.png", content)
    return load_dataset(
        DataConfig(name="miniimagenet", dir=str(root), image_size=SIDE)
    )


def tiny(root: Path, content: bytes) -> Dataset:
    place = root / "tinyimagenet"
    for name in ("n1", "n2"):
        put(place / f"train/{name}/images/0.JPEG", content)
        put(place / f"val/images/{name}.JPEG", content)
    put(place / "val/val_annotations.txt", "n1.JPEG\tn1\nn2.JPEG\tn2\n")
    return load_dataset(
        DataConfig(name="tinyimagenet", dir=str(root), image_size=SIDE)
    )


def parquet(root: Path, content: bytes) -> Dataset:
    write_parquet(root / "cifar100", "img", content, "fine_label")
    return load_dataset(DataConfig(name="cifar100", dir=str(root)))


def grey_parquet(root: Path, content: bytes) -> Dataset:
    write_parquet(root / "omniglot", "image", content, "alphabet", "character")
    return load_dataset(DataConfig(name="omniglot", dir=str(root)))


LOADERS = {
    "folders": folders,
    "lists": lists,
    "tiny": tiny,
    "parquet": parquet,
    "grey": grey_parquet,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_right_or_refused(
    kind: str, loader: str, tmp_path: Path
) -> None:
    content, expected, tolerance = KINDS[kind]
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected) as caught:
            LOADERS[loader](tmp_path / "data", content)
        assert str(tmp_path) in str(caught.value)
        return
    data = LOADERS[loader](tmp_path / "data", content)
    if loader == "grey":
        expected, tolerance = luma(expected)[None], tolerance + 1
    for images in (data.train_x, data.test_x):
        assert np.abs(images - expected).max() <= tolerance


def test_sixteen_bit_case_keeps_the_classes_apart(tmp_path: Path) -> None:
    """Grey levels 20, 80, 140 and 200, saved at 16 bits, are these levels again."""
    for part, level in (
        ("train", 20),
        ("train", 80),
        ("val", 140),
        ("test", 200),
    ):
        picture = Image.fromarray(np.full((SIDE, SIDE), level * 257, np.uint16))
        for number in range(6):
            put(
                tmp_path / f"miniimagenet/{part}/c{level:03}/{number}.png",
                encoded(picture),
            )
    data = load_dataset(
        DataConfig(name="miniimagenet", dir=str(tmp_path), image_size=SIDE)
    )
    means = [data.train_x[data.train_y == label].mean() for label in range(4)]
    assert means == [20, 80, 140, 200]


@pytest.mark.parametrize(
    "mode", ["PA", "La", "RGBa", "RGBX", "YCbCr", "HSV", "LAB", "I", "F", "I;16B"]
)
def test_modes_that_no_png_has(mode: str) -> None:
    """Modes that a reader of Pillow may give: within a level of their colours, or refused."""
    if mode in ("HSV", "LAB", "I", "F", "I;16B"):
        with pytest.raises(UnusablePictureError, match=f"mode '{mode}'"):
            to_eight_bit(Image.new(mode, (2, 2)), "RGB")
        return
    source = Image.new("RGBA", (2, 1), (40, 90, 200, 255))
    source.putpixel((1, 0), (0, 0, 0, 102))
    by_way_of = {"PA": "P", "La": "LA", "RGBX": "RGB", "YCbCr": "RGB"}.get(
        mode, "RGBA"
    )
    image = source.convert(by_way_of).convert(mode)
    if mode == "PA":
        image.putalpha(source.getchannel("A"))
    found = np.asarray(to_eight_bit(image, "RGB")).astype(int)
    second = [0, 0, 0] if mode in ("RGBX", "YCbCr") else [153, 153, 153]
    first = [87, 87, 87] if mode == "La" else [40, 90, 200]  # 0.299, 0.587, 0.114
    assert np.abs(found - [[first, second]]).max() <= (
        2 if mode == "YCbCr" else 1
    )


@pytest.mark.parametrize(
    "kind", ["png", "jpeg", "gif", "bmp", "webp", "tiff", "ppm"]
)
def test_truncated_files_are_refused_at_every_length(kind: str) -> None:
    whole = encoded(Image.fromarray(COLOUR), kind)
    pixels = np.asarray(to_eight_bit(Image.open(io.BytesIO(whole)), "RGB"))
    refused = 0
    for length in range(len(whole)):
        try:
            found = to_eight_bit(Image.open(io.BytesIO(whole[:length])), "RGB")
        except (
            Exception
        ):  # any type: the loader makes a sentence of each (test above)
            refused += 1
        else:
            np.testing.assert_array_equal(np.asarray(found), pixels)
    assert refused > 0.8 * len(whole)


def test_matlab_file_is_right_or_refused(tmp_path: Path) -> None:
    x = np.random.default_rng(3).integers(0, 256, (32, 32, 3, 2), np.uint8)
    right = {"X": x, "y": np.array([[10], [1]], np.uint8)}
    path = tmp_path / "svhn/test_32x32.mat"
    path.parent.mkdir()
    for part in ("train", "test"):
        scipy.io.savemat(tmp_path / f"svhn/{part}_32x32.mat", right)
    data = load_dataset(DataConfig(name="svhn", dir=str(tmp_path)))
    np.testing.assert_array_equal(data.test_x, x.transpose(3, 2, 0, 1))
    for change, text in (
        ({"X": x.astype(np.uint16)}, "X is uint16"),
        ({"X": x / 255}, "X is float64"),
        ({"y": np.array([[11], [1]])}, "y must hold whole numbers from 0 to 10"),
        ({"y": np.array([[1.5], [1]])}, "y must hold whole numbers from 0 to 10"),
        (
            {"y": np.array([[np.nan], [1]])},
            "y must hold whole numbers from 0 to 10",
        ),
    ):
        scipy.io.savemat(path, right | change)
        with pytest.raises(ConfigError, match=rf"test_32x32\.mat: {text}"):
            load_dataset(DataConfig(name="svhn", dir=str(tmp_path)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_png_is_its_eight_bit_conversion(data: st.DataObject) -> None:
    """Against NumPy, within a level; a picture that lies in its transparency alone is refused."""
    mode, bands, highest = data.draw(
        st.sampled_from(
            [
                ("L", 1, 255),
                ("LA", 2, 255),
                ("RGB", 3, 255),
                ("RGBA", 4, 255),
                ("I;16", 1, 65535),
            ]
        )
    )
    side = data.draw(st.integers(1, 4))
    size = side * side * bands
    values = data.draw(
        st.lists(st.integers(0, highest), min_size=size, max_size=size)
    )
    samples = np.array(values, np.uint8 if highest == 255 else np.uint16).reshape(
        side, side, bands
    )
    image = Image.fromarray(samples.squeeze(-1) if bands == 1 else samples)
    assert image.mode == mode
    eight_bit = samples / (highest / 255)
    is_layered = bands in (2, 4)
    colours = eight_bit[..., :-1] if is_layered else eight_bit
    if is_layered:
        share = eight_bit[..., -1:] / 255
        colours = colours * share + 255 * (1 - share)
    expected = np.broadcast_to(colours, (side, side, 3))
    opened = Image.open(io.BytesIO(encoded(image)))
    try:
        found = np.asarray(to_eight_bit(opened, "RGB")).astype(float)
    except UnusablePictureError:
        assert is_layered
        assert np.ptp(expected.reshape(-1, 3), axis=0).max() < 1
        return
    assert np.abs(found - expected).max() <= 1


# --- state of the files ---------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
def test_pictures_overwritten_in_place_are_seen(
    loader: str, tmp_path: Path
) -> None:
    """Also where size and time of the content are the old ones."""
    root = tmp_path / "data"
    load = LOADERS[loader]
    dark, bright = (
        encoded(Image.new("RGB", (SIDE, SIDE), (level,) * 3), "bmp")
        for level in (40, 215)
    )
    assert len(dark) == len(bright)
    assert set(load(root, dark).train_x.flat) == {40}
    old = {path: path.stat() for path in root.rglob("*") if path.is_file()}
    if loader in ("parquet", "grey"):
        for path in old:
            path.unlink()
        next(iter(old)).parent.rmdir()
        load(root, bright)
    else:
        load(root, bright)
    for path, stat in old.items():
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for path in old:
        assert path.stat().st_mtime_ns == old[path].st_mtime_ns
    config = {
        "folders": "miniimagenet",
        "lists": "miniimagenet",
        "tiny": "tinyimagenet",
    }
    name = config.get(loader, "cifar100" if loader == "parquet" else "omniglot")
    size = SIDE if loader in config else 0
    data = load_dataset(DataConfig(name=name, dir=str(root), image_size=size))
    assert set(data.train_x.flat) == {215}
    assert set(data.test_x.flat) == {215}


def test_a_folder_s_state_takes_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        put(tmp_path / f"{number}.png", b"x")
    scan = os.scandir
    passes: list[object] = []
    monkeypatch.setattr(
        os, "scandir", lambda path: passes.append(path) or scan(path)
    )
    before = fingerprint(tmp_path)
    assert passes == [tmp_path]
    put(tmp_path / "._1.png", b"hidden")
    put(tmp_path / "Thumbs.db", b"hidden")
    assert fingerprint(tmp_path) == before
    put(tmp_path / "3.png", b"y")
    assert fingerprint(tmp_path) != before
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert fingerprint(tmp_path)[1][-1] == ("gone.png", -1, -1, -1)


def test_a_pipe_with_a_picture_s_name_is_refused_and_not_waited_for(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(ConfigError, match=r"0\.png: no file"):
        pictures(tmp_path)


@pytest.mark.parametrize("loader", ["folders", "tiny"])
def test_clutter_is_no_class_no_picture_and_no_change(
    loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    content = encoded(Image.fromarray(COLOUR))
    clean = LOADERS[loader](root, content)
    for folder in [path for path in root.rglob("*") if path.is_dir()]:
        put(folder / "._0.png", b"\0\5\x16\7AppleDouble")
        put(folder / ".DS_Store", b"Bud1")
        put(folder / "Thumbs.db", b"thumbs")
        for hidden in (
            ".ipynb_checkpoints",
            "__MACOSX",
            ".git",
            "@eaDir",
            "$RECYCLE.BIN",
        ):
            put(folder / hidden / "images/0.png", content)
            put(folder / hidden / "0.png", content)
    monkeypatch.setattr("PIL.Image.open", lambda *_: pytest.fail("decoded again"))
    name = "miniimagenet" if loader == "folders" else "tinyimagenet"
    data = load_dataset(DataConfig(name=name, dir=str(root), image_size=SIDE))
    assert data.class_names == clean.class_names
    monkeypatch.undo()
    monkeypatch.setenv("FEDKNOW_CACHE", str(tmp_path / "another"))
    fresh = load_dataset(DataConfig(name=name, dir=str(root), image_size=SIDE))
    assert fresh.class_names == clean.class_names
    np.testing.assert_array_equal(fresh.train_x, clean.train_x)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda place: (place / "val.csv").write_text(
                "filename,label\na.png\n"
            ),
            r"val\.csv: line 2: ",
        ),
        (
            lambda place: (place / "val.csv").write_bytes(
                b"filename,label\n\xff.png,a\n"
            ),
            r"val\.csv: not text",
        ),
        (
            lambda place: [
                put(place / f"{p}.csv", "filename,label")
                for p in ("train", "val", "test")
            ],
            "no samples",
        ),
        (
            lambda place: put(
                place / "val.csv", "filename,label\nnowhere/a.png,a"
            ),
            r"nowhere: No such file",
        ),
        (
            lambda place: put(place / "val.csv", "filename,label\ntrain/a.png,a"),
            r"a\.png holds no image",
        ),
    ],
)
def test_lists_that_do_not_fit(
    change: Callable[[Path], object], text: str, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    lists(root, encoded(Image.fromarray(COLOUR)))
    change(root / "miniimagenet")
    with pytest.raises(ConfigError, match=text):
        load_dataset(
            DataConfig(name="miniimagenet", dir=str(root), image_size=SIDE)
        )


def test_damaged_parquet_is_a_sentence_or_the_same(tmp_path: Path) -> None:
    """Also where a column's name or Hugging Face's metadata are no text any more."""
    parquet(tmp_path, encoded(Image.fromarray(COLOUR)))
    path = tmp_path / "cifar100/train-0.parquet"
    described = {
        "huggingface": '{"info": {"features": {"fine_label": {"names": ["a", "b"]}}}}'
    }
    pq.write_table(pq.read_table(path).replace_schema_metadata(described), path)
    config = DataConfig(name="cifar100", dir=str(tmp_path))
    assert load_dataset(config).class_names == ("a", "b")
    whole = path.read_bytes()
    refused = 0
    for place in np.random.default_rng(7).integers(0, len(whole), 120):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :]
        )
        try:
            found = load_dataset(config)
        except ConfigError:
            refused += 1
        else:
            np.testing.assert_array_equal(
                found.train_x, np.stack([rgb(COLOUR)] * 2)
            )
    assert refused > 20
    for broken in (
        "{",
        "[]",
        '{"info": 3}',
        '{"info": {"features": {"fine_label": {"names": 3}}}}',
    ):
        path.write_bytes(whole)
        table = pq.read_table(path).replace_schema_metadata(
            {"huggingface": broken}
        )
        pq.write_table(table, path)
        with pytest.raises(
            ConfigError, match=r"train-0\.parquet: its metadata of Hugging Face"
        ):
            load_dataset(config)


def test_labels_below_zero_are_refused(tmp_path: Path) -> None:
    parquet(tmp_path, encoded(Image.fromarray(COLOUR)))
    path = tmp_path / "cifar100/test-0.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "fine_label", pa.array([-1, 1])), path)
    with pytest.raises(
        ConfigError,
        match=r"test-0\.parquet: column 'fine_label' runs from -1 to 1",
    ):
        load_dataset(DataConfig(name="cifar100", dir=str(tmp_path)))


def test_arrays_with_channels_last(caplog: pytest.LogCaptureFixture) -> None:
    y = np.array([0, 1])

    def make(*shape: int) -> Dataset:
        x = np.zeros((2, *shape), np.uint8)
        return Dataset.from_arrays("mine", x, y, x, y)

    for shape in ((32, 32, 3), (8, 8, 1), (64, 64, 4)):
        with pytest.raises(
            ConfigError,
            match=r"train_x is \[N, .*; .*give x\.transpose\(0, 3, 1, 2\)",
        ):
            make(*shape)
    for shape in (
        (3, 32, 32),
        (1, 8, 8),
        (3, 3, 3),
        (1, 1, 1),
        (64, 8, 8),
        (2, 3, 3),
        (16, 5, 3),
        (3, 32, 3),
    ):
        assert make(*shape).shape == shape
    assert not caplog.records
    assert make(48, 64, 3).shape == (48, 64, 3)
    assert "is taken for 48 channels of 64 x 3" in caplog.text
