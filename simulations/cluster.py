"""Ray for the runs made here: started once, with what a run needs and no more."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Thread
from typing import Any

import psutil
import ray

__all__ = ["one_ray", "start_ray"]


@contextmanager
def one_ray(address: str, meanwhile: str = "") -> Iterator[None]:
    """Let the grids made within share one Ray, which each of them would start for itself otherwise.

    Parameters
    ----------
    address : str
        As ``engine.address``: a cluster to join; empty: a Ray of our own.
    meanwhile : str
        Name of a module to import while Ray's processes start, which takes as long as to import torch.
    """
    if ray.is_initialized():
        yield
        return
    # Ray starts in this thread: the system ends its processes with the thread that started them.
    importing = Thread(target=import_module, args=[meanwhile]) if meanwhile else None
    if importing is not None:
        importing.start()
    start_ray(address)
    try:
        if importing is not None:
            importing.join()
        yield
    finally:
        ray.shutdown()


def start_ray(address: str) -> None:
    """Start Ray in this process.

    Parameters
    ----------
    address : str
        As in :func:`one_ray`.

    Raises
    ------
    ConnectionError
        If there is no Ray cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to anyone
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; without, Ray warns about it
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **options)
        return
    # Room for the data and the answers of a wave; Ray spills the rest to disk.
    room = psutil.virtual_memory().total * 3 // 10
    if os.path.isdir("/dev/shm"):
        room = min(room, psutil.disk_usage("/dev/shm").free * 9 // 10)
    ray.init(include_dashboard=False, object_store_memory=max(100 * 2**20, min(room, 4 * 2**30)), **options)
