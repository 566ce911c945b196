"""Ray for the runs of this process, started once."""

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
from pathlib import Path
from typing import Any

import grpc
import psutil
import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError

from fedknow.protocols.config import ConfigError
from fedknow.protocols.values import show

__all__ = ["one_ray", "start_ray"]

CONNECT_SECONDS = 10.0
"""Time for a cluster to answer at its address. Ray itself waits for minutes."""

OTHERS = ("RAY_ADDRESS", "RAY_REDIS_ADDRESS", "RAY_GCS_SERVER_PORT")
"""Variables that make a new Ray join another one, or take its port."""

DEFAULTS = {
    # No reports to anyone.
    "RAY_USAGE_STATS_ENABLED": "0",
    # The coming default; without it, Ray warns.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # That handler ends this process at SIGTERM, with a stack trace.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
}


@contextmanager
def one_ray(address: str, meanwhile: str = "", code: str = "") -> Iterator[None]:
    """Let the grids that are made within share one Ray.

    Otherwise each of them starts one for itself.

    Parameters
    ----------
    address : str
        As ``engine.address``: a cluster to join; empty: a Ray of our own.
    meanwhile : str
        Name of a module to import while Ray's processes start. That takes as long as an import
        of torch.
    code : str
        As ``engine.code``: a folder of modules for the cluster's machines.
    """
    if ray.is_initialized():
        yield
        return
    # Ray starts in this thread: the system ends its processes with the thread that started them.
    importing = _import_in_background(meanwhile) if meanwhile else None
    try:
        start_ray(address, code)
        if importing is not None:
            importing.result()
        yield
    finally:
        ray.shutdown()


def start_ray(address: str, code: str = "") -> None:
    """Start Ray in this process.

    Parameters
    ----------
    address : str
        As in :func:`one_ray`. If it is empty, no other Ray is joined, even if the environment
        names one, or one runs on this machine.
    code : str
        As in :func:`one_ray`.

    Raises
    ------
    ConnectionError
        If there is no Ray cluster at the address.
    ConfigError
        If the address is malformed, its cluster cannot be joined (it runs another version), there
        is no such folder of code, or a Ray of our own cannot be started.
    """
    # A user's own settings of these variables stay.
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if code:
        options["runtime_env"] = {"working_dir": str(_code_folder(code))}
    if address:
        _join(address, options)
        return
    options["object_store_memory"] = _store_bytes()
    try:
        with _own_sigterm(), _without(OTHERS):
            ray.init(address="local", include_dashboard=False, **options)
    except Exception as error:
        reason = _first_line(error)
        raise ConfigError(
            f"Ray cannot be started on this machine: {reason}; Ray keeps its files in /tmp, or in "
            "RAY_TMPDIR; --set engine.backend=inline runs without Ray"
        ) from error


def _code_folder(code: str) -> Path:
    folder = Path(code).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(
            f"engine.code = {show(code)}: no such folder; name the one that holds your modules"
        )
    return folder


def _store_bytes() -> int:
    """Return the size of a Ray object store for this machine."""
    # Enough for the data and the answers of a wave; Ray spills the rest to disk.
    size: int = psutil.virtual_memory().total * 3 // 10
    # In containers it is often 64 MB, and Ray would fall back to slow files.
    if os.path.isdir("/dev/shm"):
        size = min(size, psutil.disk_usage("/dev/shm").free * 9 // 10)
    return max(100 * 2**20, min(size, 4 * 2**30))


def _join(address: str, options: dict[str, Any]) -> None:
    """Join the cluster at an address."""
    setting = f"engine.address = {address!r}"
    try:
        if "://" not in address:
            head = canonicalize_bootstrap_address(address)
            if head is None:
                raise ValueError("leave it empty for a Ray of our own")
            # Even a cluster that "auto" finds may be long gone.
            _knock(head)
        with _own_sigterm():
            ray.init(address=address, **options)
    except OSError as error:
        raise ConnectionError(
            f"{setting}: no Ray cluster answers ({_first_line(error)}); give HOST:PORT of its "
            "head as ray start --head prints it, or leave it empty for a Ray of our own"
        ) from error
    except (RuntimeError, ValueError, RayError) as error:
        # Ray says which versions of Ray and Python run there and here, one a line.
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{setting}: this Ray cluster cannot be joined: {reason}"
        ) from error


def _knock(address: str) -> None:
    """Refuse an address at which no Ray answers.

    Ray itself would ask there for many minutes.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection(
        (host.strip("[]"), int(port)), CONNECT_SECONDS
    ).close()
    # Only Ray has the keys for a closer look.
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    # Without a proxy, as Ray's own connections go.
    with grpc.insecure_channel(
        address, [("grpc.enable_http_proxy", 0)]
    ) as channel:
        try:
            grpc.channel_ready_future(channel).result(CONNECT_SECONDS)
        except grpc.FutureTimeoutError as error:
            raise ConnectionError("what listens is none") from error


def _import_in_background(module: str) -> Future[Any]:
    """Import a module in a thread; its result raises what went wrong."""
    pool = ThreadPoolExecutor(1)
    importing = pool.submit(import_module, module)
    # The import goes on; only no further work is taken.
    pool.shutdown(wait=False)
    return importing


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Hide environment variables, also from processes started within."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's own answer to SIGTERM.

    Ray sets it aside when it starts.
    """
    # Only the main thread may set handlers. In others Ray leaves them alone too.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        # The signal came while Ray started: Ray's handler turned it into this exit.
        signal.signal(signal.SIGTERM, previous)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
