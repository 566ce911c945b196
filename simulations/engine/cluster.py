"""Ray for the runs made here: started once, with what a run needs and no more."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import grpc
import psutil
import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError

from fedknow.protocols.config import ConfigError

__all__ = ["one_ray", "start_ray"]

CONNECT_SECONDS = 10.0
"""How long to wait for somebody to listen at a cluster's address. Ray itself waits for minutes."""

OTHERS = ("RAY_ADDRESS", "RAY_REDIS_ADDRESS", "RAY_GCS_SERVER_PORT")
"""Variables that make a new Ray a part of another one, or have it take another one's port."""

DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no reports to anyone
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; without, Ray warns about it
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # which ends this process at SIGTERM, with a stack
}


@contextmanager
def one_ray(address: str, meanwhile: str = "") -> Iterator[None]:
    """Let the grids made within share one Ray, which each of them would start for itself otherwise.

    Parameters
    ----------
    address : str
        As ``engine.address``: a cluster to join; empty: a Ray of our own.
    meanwhile : str
        Name of a module to import while Ray's processes start, which takes as long as to import
        torch.
    """
    if ray.is_initialized():
        yield
        return
    # Ray starts in this thread: the system ends its processes with the thread that started them.
    importing = _import_in_background(meanwhile) if meanwhile else None
    try:
        start_ray(address)
        if importing is not None:
            importing.result()
        yield
    finally:
        ray.shutdown()


def start_ray(address: str) -> None:
    """Start Ray in this process.

    Parameters
    ----------
    address : str
        As in :func:`one_ray`. If it is empty, no other Ray is joined, whatever the environment says
        and whatever Ray runs or ran on this machine.

    Raises
    ------
    ConnectionError
        If there is no Ray cluster at the address.
    ConfigError
        If the address is none, its cluster cannot be joined (it runs another version), or a Ray of
        our own cannot be started.
    """
    for name, value in DEFAULTS.items():
        # Only defaults: a user's own setting counts more.
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        _join(address, options)
        return
    # Room for the data and the answers of a wave; Ray spills the rest to disk.
    room = psutil.virtual_memory().total * 3 // 10
    if os.path.isdir("/dev/shm"):
        # In containers /dev/shm is often 64 MB, and Ray would fall back to slow files.
        room = min(room, psutil.disk_usage("/dev/shm").free * 9 // 10)
    options["object_store_memory"] = max(100 * 2**20, min(room, 4 * 2**30))
    try:
        with _own_sigterm(), _without(OTHERS):
            ray.init(address="local", include_dashboard=False, **options)
    except Exception as error:
        reason = _first_line(error)
        raise ConfigError(
            f"Ray cannot be started on this machine: {reason}; Ray keeps its files in /tmp, or in "
            "RAY_TMPDIR; --set engine.backend=inline runs without Ray"
        ) from error


def _join(address: str, options: dict[str, Any]) -> None:
    """Join the cluster at an address."""
    where = f"engine.address = {address!r}"
    try:
        if "://" not in address:
            found = canonicalize_bootstrap_address(address)
            if found is None:
                raise ValueError("leave it empty for a Ray of our own")
            _knock(found)  # even what "auto" finds may be long gone
        with _own_sigterm():
            ray.init(address=address, **options)
    except OSError as error:
        raise ConnectionError(
            f"{where}: no Ray cluster answers ({_first_line(error)}); give HOST:PORT of its head as "
            "ray start --head prints it, or leave it empty for a Ray of our own"
        ) from error
    except (RuntimeError, ValueError, RayError) as error:
        # Ray says which versions of Ray and Python run there and here, one a line.
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{where}: this Ray cluster cannot be joined: {reason}"
        ) from error


def _knock(address: str) -> None:
    """Refuse an address at which no Ray answers, before Ray asks there for many minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    if os.environ.get("RAY_USE_TLS", "0") != "0":  # Ray has the keys for a closer look
        return
    # Without a proxy, as Ray's own connections go.
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(CONNECT_SECONDS)
        except grpc.FutureTimeoutError as error:
            raise ConnectionError("what listens is none") from error


def _import_in_background(module: str) -> Future[Any]:
    """Import a module in a thread; what goes wrong is raised where its result is asked for."""
    pool = ThreadPoolExecutor(1)
    importing = pool.submit(import_module, module)
    # The import goes on; only no further work is taken.
    pool.shutdown(wait=False)
    return importing


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Hide environment variables, from the processes started within too."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's own answer to SIGTERM, which Ray sets aside when it starts."""
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # where Ray leaves it alone too
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
