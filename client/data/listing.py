"""Data sets known by name: what each holds, and how its files may lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedknow.client.data.femnist import Femnist
from fedknow.client.data.folders import (
    Core50,
    Fc100,
    MiniImageNetCsv,
    MiniImageNetFolders,
    SvhnMat,
    TinyImageNet,
)
from fedknow.client.data.parquet import Parquet
from fedknow.client.data.published import (
    Emnist,
    ReadySource,
    SpeechCommands,
    UciHar,
)
from fedknow.client.data.recorded import RecordedLayout, RecordedSource
from fedknow.client.data.sentences import CLINC_COLUMNS, read_clinc150
from fedknow.client.data.signals import WHARF_COLUMNS, read_wharf
from fedknow.client.data.source import Form, Source
from fedknow.client.data.speech import SPEECH_COLUMNS, read_speech_digits

__all__ = ["LISTED", "Layout", "Listing"]


class Layout(Protocol):
    """How a data set may lie in its folder."""

    @property
    def wants(self) -> str:
        """The file it is known by."""

    def find(self, place: Path) -> Source | RecordedSource | ReadySource | None:
        """Look for the data set in a folder.

        Returns
        -------
        Source, RecordedSource, ReadySource or None
            None if the folder has another layout.
        """


@dataclass(frozen=True)
class Listing:
    """A data set known by name.

    Attributes
    ----------
    summary : str
        A line for the list of data sets.
    form : Form or str
        Its images; ``data.image_size`` has precedence over the size. Or what other samples are,
        in words.
    layouts : tuple of Layout
        How it may lie in its folder.
    folders : tuple of str
        Names that the folder may have, besides the data set's name.
    hub : str
        Repository on the hub; empty where no copy there has the columns needed.
    mix : tuple of str
        The data sets it is made of, each with its own layouts.
    """

    summary: str
    form: Form | str
    layouts: tuple[Layout, ...] = ()
    folders: tuple[str, ...] = ()
    hub: str = ""
    mix: tuple[str, ...] = ()

    def files(self, name: str) -> str:
        """Name the files that the data set is known by, for messages."""
        return " or ".join(f"{name}/{layout.wants}" for layout in self.layouts)


_NESTED = ("", "data", "mnist", "fashion_mnist", "plain_text")
"""Folders in which copies of the hub keep their files."""
_LABELLED = Parquet("image", ("label",), folders=_NESTED)
_CIFAR10 = Parquet("img", ("label",), folders=_NESTED)
# The files have coarse labels, too, and those are no classes of CIFAR-100.
_CIFAR100 = Parquet("img", ("fine_label",))

# Names are written in configurations and results, so they never change.
LISTED: Mapping[str, Listing] = {
    "cifar100": Listing(
        "60,000 photographs, 32x32 RGB, 100 classes (Krizhevsky 2009); "
        "parquet folder or Hugging Face hub",
        Form("RGB"),
        (_CIFAR100,),
        hub="uoft-cs/cifar100",
    ),
    "fashion-mnist": Listing(
        "70,000 pictures of clothes, 28x28 grey, 10 classes (Xiao 2017); "
        "parquet folder or Hugging Face hub",
        Form("L"),
        (_LABELLED,),
        folders=("fashion_mnist",),
        hub="zalando-datasets/fashion_mnist",
    ),
    "cifar10": Listing(
        "60,000 photographs, 32x32 RGB, 10 classes (Krizhevsky 2009); "
        "parquet folder or Hugging Face hub",
        Form("RGB"),
        (_CIFAR10,),
        hub="uoft-cs/cifar10",
    ),
    "omniglot": Listing(
        "32,460 handwritten characters, 28x28 grey, 1,623 classes in 50 alphabets "
        "(Lake 2015); parquet folder",
        Form("L"),
        (Parquet("image", ("alphabet", "character"), columns=("drawer",)),),
    ),
    "fc100": Listing(
        "CIFAR-100 ordered by FC100's superclasses and split anew, 500 / 100 a class; "
        "CIFAR-100's parquet folder",
        Form("RGB"),
        (Fc100(),),
        # The same photographs as CIFAR-100, in another order and split.
        folders=("cifar100",),
        hub="uoft-cs/cifar100",
    ),
    "core50": Listing(
        "165,000 video frames of 50 objects in 10 categories, to 32x32 RGB, "
        "split by session (Lomonaco 2017); folders",
        Form("RGB", 32),
        (Core50(),),
        folders=("core50_128x128",),
    ),
    "miniimagenet": Listing(
        "60,000 photographs, to 84x84 RGB, 100 classes (Vinyals 2016); "
        "folders, CSV lists, or parquet folder",
        Form("RGB", 84),
        (
            Parquet("image", ("label",), test="validation"),
            MiniImageNetCsv(),
            MiniImageNetFolders(),
        ),
        folders=("mini-imagenet", "miniImageNet"),
    ),
    "tinyimagenet": Listing(
        "110,000 photographs, 64x64 RGB, 200 classes (Stanford CS231N); "
        "its folders, or parquet folder",
        Form("RGB", 64),
        (Parquet("image", ("label",), test="valid"), TinyImageNet()),
        folders=("tiny-imagenet-200", "tiny-imagenet"),
    ),
    "svhn": Listing(
        "99,289 house numbers, 32x32 RGB, 10 classes (Netzer 2011); "
        "*_32x32.mat, or parquet folder",
        Form("RGB"),
        (
            # SVHN has whole photographs, too, in another folder.
            Parquet("image", ("label",), folders=("", "data", "cropped_digits")),
            SvhnMat(),
        ),
    ),
    "mnist": Listing(
        "70,000 handwritten digits, 28x28 grey, 10 classes (LeCun 1998); "
        "parquet folder or Hugging Face hub",
        Form("L"),
        (Parquet("image", ("label",), folders=("", "data", "mnist")),),
        hub="ylecun/mnist",
    ),
    "wharf": Listing(
        "892 recordings of a wrist's acceleration, 14 activities of 17 people "
        "(Bruno 2013); parquet folder",
        "windows of 2 seconds, 64x3",
        (RecordedLayout(read_wharf, WHARF_COLUMNS, ("train",)),),
    ),
    "speech_digits": Listing(
        "3,000 spoken digits of 6 speakers, 8 kHz, 10 classes (Jackson 2018); "
        "parquet folder",
        "waveforms of up to 0.8 seconds",
        (RecordedLayout(read_speech_digits, SPEECH_COLUMNS),),
    ),
    "clinc150": Listing(
        "19,500 sentences, 150 intents in 10 domains (Larson 2019); parquet folder",
        "up to 24 words, as token ids",
        (RecordedLayout(read_clinc150, CLINC_COLUMNS, has_texts=True),),
    ),
    "emnist": Listing(
        "131,600 handwritten letters and digits, 28x28 grey, 47 classes "
        "(Cohen 2017); its files in MNIST's format",
        Form("L"),
        (Emnist(),),
        folders=("EMNIST",),
    ),
    "femnist": Listing(
        "814,255 handwritten characters, 28x28 grey, 62 classes of 3,597 writers "
        "(Caldas 2018); parquet folder or Hugging Face hub",
        Form("L", 28),
        (Femnist(),),
        hub="flwrlabs/femnist",
    ),
    "uci-har": Listing(
        "10,299 windows of a phone's sensors, 6 activities of 30 people "
        "(Anguita 2013); its folders",
        "windows of 2.56 seconds, 128x9",
        (UciHar(),),
        folders=("UCI HAR Dataset",),
    ),
    "speech-commands": Listing(
        "105,829 spoken words, 16 kHz, 35 classes of 2,618 speakers (Warden 2018); "
        "its folders",
        "waveforms of a second",
        (SpeechCommands(),),
        folders=("speech_commands_v0.02",),
    ),
    "mix80": Listing(
        "80 tasks of 5 classes: miniimagenet, tinyimagenet and cifar100 "
        "one after another, to 32x32 RGB",
        Form("RGB", 32),
        # In this order, as it is the order of the tasks.
        mix=("miniimagenet", "tinyimagenet", "cifar100"),
    ),
}
