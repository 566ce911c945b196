r"""The client as a Flower ``ClientApp``.

A SuperNode or a simulation runs it.

Flower starts a process for a message as it pleases, and keeps its ``context.state`` in memory
for one run. So the client's state lies on disk, as everywhere
(:class:`fedknow.client.state.StateStore`), in a folder a client; the experiment itself comes
with each message (:class:`fedknow.server.grids.flower_grid.FlowerGrid`). A node says which
client it is by its ``partition-id``. Its ``state-dir`` is where states are kept (by default
``$FEDKNOW_STATE``, else ``~/.fedknow/flower``), and its ``data-dir`` where the data lie (by
default ``$FEDKNOW_DATA``)::

    flower-supernode --superlink HOST:PORT \
        --node-config "partition-id=0 num-partitions=4 state-dir='/var/lib/fedknow'"

What the node's owner allows stands there too: ``allow``, ``limit`` (both with commas between),
``signed-by`` and ``keep-own``, as the options of ``fedknow client``.

The one module of the client that imports Flower.
"""

from __future__ import annotations

import logging
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp

from fedknow.client.data import make_benchmark
from fedknow.client.data.local import LOCAL, LocalStream
from fedknow.client.host import Host, one_thread
from fedknow.client.node import Node
from fedknow.client.permissions import Limits, Permissions, sends_own
from fedknow.client.state import StateStore
from fedknow.protocols.config import ConfigError, read_config
from fedknow.protocols.flower import from_flower, to_flower
from fedknow.protocols.hostile import check_honest
from fedknow.protocols.messages import ENVELOPE, Config, node_of
from fedknow.protocols.security.signing import PublicKey
from fedknow.protocols.work import merge_settings

__all__ = ["app"]

log = logging.getLogger(__name__)

app = ClientApp()

OWNERS = ("allow", "limit", "signed-by", "keep-own")
"""Keys of a node's configuration by which its owner sets bounds."""


@app.train()
@app.train("end_task")
@app.evaluate()
def work(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Do a piece of work from the state that the server names.

    The answer names the version of the state after it.
    """
    received = from_flower(message)
    content = dict(received.content)
    envelope = content.pop(ENVELOPE, None)
    if not isinstance(envelope, Config):
        raise ValueError(
            f"this app does the work of fedknow.server.flower_app; the message has no "
            f"{ENVELOPE} record"
        )
    client, version = _number(envelope, "client"), _number(envelope, "version")
    folder = _state_folder(context, envelope) / f"{client:06d}"
    permissions = _permissions(context.node_config)
    # Before the state is touched: nobody's work but the owner's may delete old ones.
    node = _node(
        _text(envelope, "config"),
        str(context.node_config.get("data-dir", "")),
        permissions,
        _signature(envelope),
    )
    permissions.check_work(merge_settings(content), node.config.train)
    permissions.check_disk(_size(folder))
    # No memory for states: Flower may start a process for each message.
    store = StateStore(folder, 0)
    # The committed one too, as the server may go back to its last checkpoint.
    store.retain(client, {version, _number(envelope, "committed")})
    host = Host(node.config, node.stream, store, node)
    # Our own id: states' versions are made from it, and Flower's ids are random.
    task = replace(
        received, id=_text(envelope, "id"), node=node_of(client), content=content
    )
    with one_thread():
        reply, version = host.handle(task, version)
    answer = to_flower(replace(reply, reply_to=received.id), message)
    if not answer.has_error():
        answer.content[ENVELOPE] = ConfigRecord({"version": version})
    return answer


@app.query()
def identify(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Say which client this node is."""
    identity = ConfigRecord()
    for key in ("partition-id", "num-partitions"):
        if key in context.node_config:
            identity[key] = context.node_config[key]
    return FlowerMessage(RecordDict({ENVELOPE: identity}), reply_to=message)


@lru_cache(maxsize=1)
def _node(
    text: str, folder: str, permissions: Permissions, signature: bytes
) -> Node:
    """Make what answers, once for each experiment and folder of data."""
    config = read_config(tomllib.loads(text))
    # Before anything that a server named is imported, read or built.
    permissions.check_signature(config, signature)
    # The node's owner allows code by name; the server's word is not enough.
    check_honest(config)
    permissions.check(config)
    if sends_own(config):
        log.warning(
            "evaluation.global_model = true: this node sends the parameters that it keeps to "
            "itself; keep-own=true in its --node-config refuses such experiments"
        )
    if config.data.name == LOCAL:
        brought = LocalStream(Path(folder), config.data)
        permissions.check_model(config.model, brought.spec, brought.classes)
        return Node(config, brought)
    # The server's data lie where they lie on the server.
    data = config.data.model_copy(update={"dir": folder})
    permissions.check_download(data)
    config = config.model_copy(update={"data": data})
    stream = make_benchmark(config)
    permissions.check_model(config.model, stream.spec, stream.classes)
    return Node(config, stream)


def _permissions(settings: Mapping[str, Any]) -> Permissions:
    """Read what the node's owner allows, from the node's own configuration."""
    for key in settings:
        meant = key.lower().replace("_", "-")
        # A bound that is spelled another way would be none, and nobody would notice.
        if meant in OWNERS and key not in OWNERS:
            raise ConfigError(f"--node-config: {key} is spelled {meant!r}")
    return _read_permissions(*(str(settings.get(key, "")) for key in OWNERS))


@lru_cache(maxsize=1)
def _read_permissions(
    allow: str, limit: str, signed_by: str, keep_own: str
) -> Permissions:
    """Read an owner's bounds, once: a key is read from its file."""
    if keep_own.lower() not in ("", "true", "false"):
        raise ConfigError(
            f"--node-config: keep-own={keep_own}: must be true or false"
        )
    return Permissions(
        # Not at commas within parentheses, which name a model's settings.
        frozenset(filter(None, re.split(r",(?![^(]*\))", allow))),
        Limits.parse(filter(None, limit.split(","))),
        PublicKey(Path(signed_by)) if signed_by else None,
        keep_own.lower() == "true",
    )


def _signature(envelope: Config) -> bytes:
    value = envelope.get("signature", b"")
    if not isinstance(value, bytes):
        raise ValueError(f"{ENVELOPE} record: signature must be bytes")
    return value


def _size(folder: Path) -> int:
    """Count the bytes of a folder's files."""
    return sum(
        file.stat().st_size for file in folder.rglob("*") if file.is_file()
    )


def _state_folder(context: Context, envelope: Config) -> Path:
    run = _text(envelope, "run")
    # The name becomes a folder here, and ../ must not lead out of the state's.
    if not re.fullmatch(r"[0-9a-f]{1,32}", run):
        raise ValueError(
            f"run = {run!r}: a run's name is up to 32 hexadecimal digits"
        )
    place = context.node_config.get("state-dir") or os.environ.get(
        "FEDKNOW_STATE"
    )
    return (
        Path(str(place)) if place else Path.home() / ".fedknow" / "flower"
    ) / run


def _number(envelope: Config, key: str) -> int:
    value = envelope.get(key)
    if not isinstance(value, int) or value < 0:
        raise ValueError(
            f"{ENVELOPE} record: {key} = {value!r}; it must be a number from 0"
        )
    return value


def _text(envelope: Config, key: str) -> str:
    value = envelope.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{ENVELOPE} record: {key} = {value!r}; it must be text")
    return value
