"""A real client's own data: one file a task in a folder of its own."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from fedknow.client.data.arrays import has_channels_last
from fedknow.client.data.local_forms import find_forms
from fedknow.client.data.samples import Kind, SampleSpec, local_input
from fedknow.client.data.stream import Split, TaskData
from fedknow.protocols.config import ConfigError, DataConfig
from fedknow.protocols.texts import counted

__all__ = ["LOCAL", "LocalStream", "local_spec"]

log = logging.getLogger(__name__)

LOCAL = "local"
"""``data.name`` of an experiment whose clients bring their own data."""


def local_spec(config: DataConfig) -> tuple[SampleSpec, int]:
    """Read what a sample is and the number of classes from settings.

    A server without data cannot learn them otherwise.

    Returns
    -------
    (SampleSpec, int)
        A sample; classes.

    Raises
    ------
    ConfigError
        If ``data.shape`` or ``data.classes`` is missing, does not fit ``data.kind``, or has the
        channels last.
    """
    axes, example = _EXAMPLES[config.kind]
    if len(config.shape) != len(example):
        raise ConfigError(
            f"data.shape = {config.shape}: with data.name = {LOCAL!r} and data.kind = "
            f"{config.kind!r} give {axes}, for example data.shape = {example}"
        )
    if config.kind == "image" and has_channels_last(config.shape):
        height, width, channels = config.shape
        raise ConfigError(
            f"data.shape = {config.shape}: looks like height, width, channels; "
            f"give channels first: data.shape = [{channels}, {height}, {width}], "
            "and arrays x.transpose(0, 3, 1, 2)"
        )
    # Names say how many there are.
    classes = config.classes or len(config.class_names)
    if classes < 1:
        raise ConfigError(
            f"data.classes = {config.classes}: with data.name = {LOCAL!r} give the number "
            "of classes of all tasks together, for example data.classes = 10, or their names by "
            "data.class_names"
        )
    dtype = {"image": "uint8", "tokens": "int64"}.get(config.kind, "float32")
    spec = SampleSpec(
        config.kind,
        tuple(config.shape),
        dtype,
        vocabulary=config.vocabulary,
    )
    return spec, classes


_EXAMPLES: dict[Kind, tuple[str, list[int]]] = {
    "image": (
        "channels, height and width of the clients' images",
        [3, 32, 32],
    ),
    "series": ("time steps and channels of a sample", [64, 3]),
    "waveform": ("the number of time steps of a sample", [8000]),
    "tokens": ("the number of tokens of a sample", [32]),
    "table": ("the number of columns of a sample", [10]),
}

_TYPES: dict[Kind, tuple[str, ...]] = {
    "image": ("uint8", "float32"),
    "series": ("float32",),
    "waveform": ("int16", "float32"),
    "tokens": ("int64", "int32", "uint16", "int16"),
    "table": ("float32",),
}
"""Types that the arrays of a device's file may have."""


_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    TypeError,  # one array (.npy) under the name of several
    RuntimeError,  # encrypted, or packed by a method that Python does not have
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Raised by NumPy and ``zipfile`` for a file that is damaged or another kind of file."""


class LocalStream:
    """The tasks of one client, from files of its own.

    It is a :class:`~fedknow.client.data.TaskStream` of ``task-000.npz``, ... Tables, NumPy arrays
    and folders of sound are read as simulations read them
    (:mod:`~fedknow.client.data.local_forms`). Otherwise each file holds ``train_x``,
    ``train_y``, ``test_x`` and ``test_y``: samples ``[n, ...]`` of ``data.kind`` and
    ``data.shape``, and integer labels ``[n]``, 0 to ``data.classes - 1``. Images are uint8
    (0..255, which become -1..1) or float32 (taken as they are), waveforms int16 (which become
    -1..1) or float32, tokens integers below ``data.vocabulary``, all others float32.

    An array ``classes`` may say which classes the task is about. Without it these are block
    number ``task`` of ``data.classes_per_task`` classes, or where that is 0 the labels in the
    file. A file is read when its task is needed for the first time, so that tasks may arrive
    while the run goes on.

    Parameters
    ----------
    folder : Path
        Where the files lie; or a table or archive.
    config : DataConfig
        The experiment's ``data``.

    Raises
    ------
    ConfigError
        If the first task's file is missing or not as described.
    """

    def __init__(self, folder: Path, config: DataConfig) -> None:
        self.folder = folder
        self.tasks = config.tasks
        self.clients = config.clients
        self.spec, self.classes = local_spec(config)
        self._block = config.classes_per_task
        self._is_incremental = config.scenario == "class-incremental"
        # Kept for all tasks: a later task's head needs the classes of each earlier one.
        self._slices: dict[int, tuple[int, ...]] = {}
        # Of the task at hand alone: a device may have no memory for two.
        self._recent_task = -1
        self._recent_arrays: dict[str, np.ndarray] = {}
        self._forms = find_forms(folder, config, self.spec, self.classes)
        # A bad first file is refused at the start of the client, not in its first round.
        self._slice(0)

    def length(self, client: int) -> int:
        """Count the client's tasks: as many as the experiment has."""
        return self.tasks

    def task(self, client: int, task: int) -> TaskData:
        """Give the task at a position of the client's own order.

        The folder is one client's, so ``client`` is not looked at.

        Raises
        ------
        ConfigError
            If the task's file is missing or not as described.
        """
        arrays = self._read(task)
        classes = self._slice(task)
        # Again: since its classes were read, the file may have been replaced.
        self._check_labels(task, arrays, classes)
        slices = map(self._slice, range(task + 1))
        return TaskData(
            task=task,
            classes=classes,
            # Tasks may share classes; each counts where it is met for the first time.
            seen=tuple(dict.fromkeys(chain.from_iterable(slices))),
            train=self._split(arrays, "train"),
            test=self._split(arrays, "test"),
            is_incremental=self._is_incremental,
        )

    def _split(self, arrays: Mapping[str, np.ndarray], part: str) -> Split:
        y = torch.from_numpy(arrays[f"{part}_y"].astype(np.int64))
        return Split(local_input(arrays[f"{part}_x"], self.spec), y)

    def _slice(self, task: int) -> tuple[int, ...]:
        """Find the task's classes: its slice of the head."""
        if task not in self._slices:
            arrays = self._read(task)
            # From the most explicit to the least: labels alone may miss a class.
            if "classes" in arrays:
                classes = [int(label) for label in arrays["classes"]]
            elif self._block:
                classes = list(
                    range(task * self._block, (task + 1) * self._block)
                )
            else:
                labels = np.concatenate([arrays["train_y"], arrays["test_y"]])
                classes = np.unique(labels).tolist()
            self._check_labels(task, arrays, classes)
            self._slices[task] = tuple(classes)
        return self._slices[task]

    def _check_labels(
        self,
        task: int,
        arrays: dict[str, np.ndarray],
        classes: Sequence[int],
    ) -> None:
        labels = {*arrays["train_y"].tolist(), *arrays["test_y"].tolist()}
        strange = sorted(labels - set(classes))
        if strange or not all(0 <= label < self.classes for label in classes):
            raise self._error(
                task,
                f"labels {strange[:5] or list(classes[:5])} are none of the task's; "
                f"its classes are {list(classes)}, out of 0..{self.classes - 1} "
                "(data.classes, data.classes_per_task, or an array 'classes' in the file)",
            )

    def _read(self, task: int) -> dict[str, np.ndarray]:
        if not 0 <= task < self.tasks:
            raise IndexError(
                f"task {task}: the number of tasks is {self.tasks}, from 0"
            )
        if self._recent_task != task:
            arrays = self._load(task)
            for part in ("train", "test"):
                self._check_part(task, part, arrays)
            if "classes" in arrays:
                self._check_classes(task, arrays["classes"])
            self._recent_task = task
            self._recent_arrays = arrays
        return self._recent_arrays

    def _load(self, task: int) -> dict[str, np.ndarray]:
        if self._forms is not None:
            return self._forms.arrays(task)
        try:
            # Without pickle: a file from elsewhere must not run code.
            with np.load(self._path(task), allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except FileNotFoundError:
            names = sorted(path.name for path in self.folder.glob("*"))
            # To this machine's own log alone: the error goes to the server too.
            log.warning(
                "%s holds %s", self.folder, ", ".join(names[:8]) or "nothing"
            )
            raise self._error(
                task,
                f"no such file; the folder holds {counted(len(names), 'file')} (the "
                "client's log names them)",
            ) from None
        except _UNREADABLE as error:
            reason = str(error) or type(error).__name__
            raise self._error(
                task, f"not a file that numpy.savez wrote: {reason}"
            ) from None

    def _check_part(
        self,
        task: int,
        part: str,
        arrays: Mapping[str, np.ndarray],
    ) -> None:
        types, shape = _TYPES[self.spec.kind], self.spec.shape
        x = arrays.get(f"{part}_x")
        y = arrays.get(f"{part}_y")
        if (
            x is None
            or x.dtype not in types
            or x.shape[1:] != shape
            or len(x) == 0
        ):
            expected = f"{' or '.join(types)} [n, {', '.join(map(str, shape))}]"
            advice = _advice(x, self.spec)
            raise self._error(
                task,
                f"{part}_x is {_described(x)}; it must be {expected}{advice}",
            )
        # One NaN in a sample would spread to all weights in the first step.
        if not np.isfinite(x).all():
            raise self._error(task, f"{part}_x holds NaN or infinity")
        if self.spec.kind == "tokens" and not (
            x.min() >= 0 and x.max() < self.spec.vocabulary
        ):
            raise self._error(
                task,
                f"{part}_x has token ids from {x.min()} to {x.max()}; with data.vocabulary "
                f"= {self.spec.vocabulary} they are 0 to {self.spec.vocabulary - 1}",
            )
        # Signed or not, of any width: they are converted to int64.
        if y is None or y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            raise self._error(
                task,
                f"{part}_y is {_described(y)}; it must be integers [{len(x)}]",
            )

    def _check_classes(self, task: int, classes: np.ndarray) -> None:
        if (
            classes.dtype.kind not in "iu"
            or classes.ndim != 1
            or len(classes) == 0
        ):
            raise self._error(
                task,
                f"classes is {_described(classes)}; it must be a list of integers",
            )
        # A class that comes twice would have two logits in the loss.
        if len(np.unique(classes)) < len(classes):
            raise self._error(
                task,
                f"classes is {classes.tolist()}; it must name each class once",
            )

    def _path(self, task: int) -> Path:
        if self._forms is not None:
            return self.folder
        return self.folder / f"task-{task:03d}.npz"

    def _error(self, task: int, problem: str) -> ConfigError:
        # A single file of all tasks does not say by its name which one it is.
        place = f", task {task}" if self._forms is not None else ""
        return ConfigError(f"{self._path(task)}{place}: {problem}")


def _advice(x: np.ndarray | None, spec: SampleSpec) -> str:
    """Say how to put the channels at the front, where they stand at the end."""
    if spec.kind != "image":
        return ""
    channels, height, width = spec.shape
    if x is None or x.shape[1:] != (height, width, channels):
        return ""
    return " (channels first: x.transpose(0, 3, 1, 2))"


def _described(array: np.ndarray | None) -> str:
    return "missing" if array is None else f"{array.dtype} {list(array.shape)}"
