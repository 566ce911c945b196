"""Conversion between our messages and Flower's, without loss.

This is the only module that touches Flower's private parts: the identity a message takes its
sender from, the id of a message and the layout of an array. ``tests/protocols/test_flower.py``
fails if a release of Flower moves one of them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    MetricRecord,
    RecordDict,
)
from flwr.app import Message as FlowerMessage
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedknow.protocols.messages import (
    Arrays,
    Config,
    Content,
    Failure,
    Message,
    Metrics,
    Record,
)

__all__ = [
    "Cache",
    "FlowerCache",
    "LazyArray",
    "Run",
    "empty_run",
    "from_flower",
    "identify",
    "set_id",
    "to_arrays",
    "to_flower",
    "to_record",
    "to_records",
]

SERVER_NODE = 1
"""Node id of the server, Flower's ``SUPERLINK_NODE_ID``."""
NUMPY = "numpy.ndarray"
"""How Flower calls an array stored as ``numpy.save`` writes it."""

Cache = dict[int, tuple[object, "Record"]]
"""Records already converted, by the identity of the Flower record; holds that record, so an
identity stays its own."""

FlowerRecord = ArrayRecord | MetricRecord | ConfigRecord

FlowerCache = dict[int, tuple[Record, FlowerRecord]]
"""The same the other way: by the identity of our record."""


def identify(run_id: int = 1) -> None:
    """Say who sends the messages made in this process: the server of a run.

    Flower keeps this in class attributes, one run a process, and refuses to make a message
    before it is set.
    """
    # On the class and not on an object: Flower reads it there when a message is made.
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE
    TaskIdentity.task_id = run_id


def empty_run(run_id: int = 1) -> Run:
    """Describe a run by its id alone, for code that reads ``grid.run``."""
    return Run.create_empty(run_id)


def set_id(message: FlowerMessage, id: str) -> None:
    """Give a message its id, which Flower leaves to the grid that sends it."""
    # Flower's metadata has no setter for the id.
    message.metadata.__dict__["_message_id"] = id


def to_flower(
    message: Message, reply_to: FlowerMessage | None = None
) -> FlowerMessage:
    """Our message as Flower's.

    Parameters
    ----------
    message : Message
        Work, or an answer.
    reply_to : flwr.app.Message, optional
        The work that an answer answers; Flower takes an answer's sender, receiver, kind and
        group from it.

    Raises
    ------
    ValueError
        If an answer comes without the work it answers, or with other work.
    TypeError
        If a record holds a value that Flower cannot carry (named by Flower).
    """
    # A wrong pair would give one client's answer to another one's work.
    work_id = reply_to.metadata.message_id if reply_to is not None else ""
    if message.reply_to != work_id:
        raise ValueError(
            f"message {message.id!r} answers {message.reply_to!r}, but was given the "
            f"work {work_id!r}"
        )
    if reply_to is None:
        if message.failure is not None:
            raise ValueError(
                f"message {message.id!r} is a failure, but answers nothing"
            )
        flower_message = FlowerMessage(
            RecordDict(to_records(message.content)),
            message.node,
            message.kind,
            group_id=message.group,
        )
    elif message.failure is not None:
        flower_message = FlowerMessage(
            Error(message.failure.code, message.failure.reason), reply_to=reply_to
        )
    else:
        flower_message = FlowerMessage(
            RecordDict(to_records(message.content)), reply_to=reply_to
        )
    set_id(flower_message, message.id)
    return flower_message


def from_flower(message: FlowerMessage, cache: Cache | None = None) -> Message:
    """Flower's message as ours; its arrays are read-only.

    Parameters
    ----------
    message : flwr.app.Message
        Work, or an answer. An error without a reason gets an empty one.
    cache : dict, optional
        Where converted records are kept, so that a record which many messages share is
        converted once and is one object for all of them. Use a new one for each wave: Flower's
        records can be changed.
    """
    metadata = message.metadata
    content: Content = {}
    failure = None
    if message.has_error():
        failure = Failure(message.error.code, message.error.reason or "")
    else:
        cache = {} if cache is None else cache
        for name, record in message.content.items():
            if id(record) not in cache:
                # The record is held too: once freed, its id could be given to another one.
                cache[id(record)] = record, _from_record(record)
            content[name] = cache[id(record)][1]
    return Message(
        kind=metadata.message_type,
        # Ours has one node, the client: the sender of an answer, the receiver of work.
        node=metadata.src_node_id
        if metadata.reply_to_message_id
        else metadata.dst_node_id,
        id=metadata.message_id,
        reply_to=metadata.reply_to_message_id,
        group=metadata.group_id,
        content=content,
        failure=failure,
    )


def to_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Named arrays as Flower's record, in the same order.

    Read-only arrays must not be changed any more: the record refers to them. Others are copied.
    """
    record = ArrayRecord()
    for name, array in arrays.items():
        # Flower's own way refuses what it cannot store
        record[name] = (
            LazyArray(array) if array.dtype.kind in "biufc" else Array(array)
        )
    return record


def to_arrays(record: ArrayRecord) -> Arrays:
    """Give Flower's record as named arrays (read-only), in the same order.

    Nothing is copied where Flower's layout allows.
    """
    return Arrays((name, _view(array)) for name, array in record.items())


def to_records(
    content: Mapping[str, Record], cache: FlowerCache | None = None
) -> dict[str, FlowerRecord]:
    """Give our records as Flower's.

    With a cache, a record that many messages share is converted once.
    """
    cache = {} if cache is None else cache
    for record in content.values():
        if id(record) not in cache:
            cache[id(record)] = record, _to_record(record)
    return {name: cache[id(record)][1] for name, record in content.items()}


def _from_record(record: FlowerRecord) -> Record:
    if isinstance(record, ArrayRecord):
        return to_arrays(record)
    return Metrics(record) if isinstance(record, MetricRecord) else Config(record)


def _to_record(record: Record) -> FlowerRecord:
    if isinstance(record, Arrays):
        return to_record(record)
    if isinstance(record, Config):
        return ConfigRecord(record)
    metric_record = MetricRecord()
    held = metric_record.__dict__[
        "_data"
    ]  # set with Flower's check of each value, an answer's numbers take longer than arrays
    for name, value in record.items():
        # Exact types: a bool or a NumPy number goes on to Flower's own check.
        if type(value) is float or type(value) is int:
            held[name] = value
        else:
            metric_record[name] = value
    return metric_record


class LazyArray(Array):
    """Flower's array, of which the bytes are made when somebody asks for them.

    Flower keeps arrays as ``numpy.save`` writes them, and a strategy that averages reads them
    back: two passes of parsing and copying a tensor and client, for bytes that nobody sees
    where clients run in the server's process or beside it. To whoever uses it this is a plain
    ``Array``, and pickle makes one of it.

    Parameters
    ----------
    array : ndarray
        Of numbers or booleans. Copied if it is writeable, as its owner could change it.
    """

    __qualname__ = (
        Array.__qualname__
    )  # by which Flower tells kinds of objects on its wire

    def __init__(self, array: np.ndarray) -> None:
        if array.flags.writeable:
            # Read-only from here on, so that several messages may share it.
            array = array.copy()
            array.flags.writeable = False
        self.__dict__.update(
            dtype=_name(array.dtype), shape=array.shape, stype=NUMPY, array=array
        )

    @property
    def data(self) -> bytes:
        """What ``numpy.save`` would write."""
        content: bytes | None = self.__dict__.get("bytes")
        if content is None:
            array = self.__dict__["array"]
            # One copy of the data instead of several, and the header made once a shape.
            content = b"".join(
                (
                    _header(array.dtype.str, array.shape),
                    np.asarray(array, order="C").data,
                )
            )
            self.__dict__["bytes"] = (
                content  # not by attribute, a change of which makes Flower forget the array's id
            )
        return content

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__.update(bytes=value, array=None)

    def numpy(self) -> np.ndarray:
        """Return a copy, as Flower's method gives one."""
        array: np.ndarray | None = self.__dict__["array"]
        return (
            array.copy()
            if array is not None and self.stype == NUMPY
            else super().numpy()
        )

    def __eq__(self, value: object) -> bool:
        fields = ("dtype", "shape", "stype", "data")
        return isinstance(value, Array) and all(
            getattr(self, name) == getattr(value, name) for name in fields
        )

    __hash__ = None  # type: ignore[assignment]  # as Flower's

    def __reduce__(
        self,
    ) -> tuple[type[Array], tuple[str, tuple[int, ...], str, bytes]]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


def _view(array: Array) -> np.ndarray:
    """Give the numbers of a Flower array, read-only.

    They stay in place where they lie as :class:`LazyArray` would write them.
    """
    held: np.ndarray | None = vars(array).get("array")
    if held is not None and array.stype == NUMPY:
        return held
    if array.stype == NUMPY and array.dtype in np.sctypeDict:
        header = _header(np.dtype(array.dtype).str, tuple(array.shape))
        # Any other layout, such as Fortran order, goes through NumPy's own reader.
        if array.data.startswith(header):
            flat = np.frombuffer(
                array.data, array.dtype, math.prod(array.shape), len(header)
            )
            return flat.reshape(array.shape)
    value = array.numpy()
    value.flags.writeable = False  # many clients share it
    return value


@lru_cache(maxsize=64)
def _name(dtype: np.dtype[Any]) -> str:
    return str(dtype)


@lru_cache(maxsize=4096)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return header.getvalue()
