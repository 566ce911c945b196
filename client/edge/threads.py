"""A thread for work beside an event loop, and coroutines that race."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

__all__ = ["WorkThread", "first_to_end", "forever"]

JOIN_PART_SECONDS = 0.1
"""Seconds between looks at a thread that is to end."""

_Order = tuple[concurrent.futures.Future[Any], Callable[[], Any]]


class WorkThread:
    """One thread that does one thing after the other.

    It does not keep the process from ending. Whoever ends the process joins it before: Python
    stops a daemon thread wherever it is, and inside PyTorch that aborts the process.

    Attributes
    ----------
    is_busy : bool
        Something is being done now.
    """

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self.is_busy = False
        # A daemon: nothing can interrupt training, and Ctrl-C must not wait for its end.
        self._thread = threading.Thread(
            target=self._run, name="fedknow-work", daemon=True
        )
        self._thread.start()

    async def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Have a function called in the thread, after those ordered before.

        Returns
        -------
        object
            What the function gives; what it raises is raised here.
        """
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._orders.put((future, lambda: function(*arguments)))
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """Let the thread end after what it is doing."""
        self._orders.put(None)

    def join(self, seconds: float) -> bool:
        """Wait for the end of a thread that was told to stop.

        What it is busy with is not waited for.

        Parameters
        ----------
        seconds : float
            How long to wait at most.

        Returns
        -------
        bool
            The thread has ended, and with it all that it held.
        """
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and not self.is_busy:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            # In short parts: an order it had taken already makes it busy only now.
            self._thread.join(min(remaining, JOIN_PART_SECONDS))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            self._do(*order)
            # What it held, tensors perhaps, must not wait for the next order to be freed.
            del order

    def _do(
        self,
        future: concurrent.futures.Future[Any],
        call: Callable[[], Any],
    ) -> None:
        """Do what was ordered, and tell who waits for it."""
        if not future.set_running_or_notify_cancel():
            return
        self.is_busy = True
        # Whoever waits is woken by the future, and must then see that nobody is busy.
        try:
            result = call()
        except BaseException as error:
            self.is_busy = False
            future.set_exception(error)
        else:
            self.is_busy = False
            future.set_result(result)


async def first_to_end(*parts: Coroutine[Any, Any, Any]) -> Any:
    """Run coroutines until one ends; the others are cancelled and waited for.

    Returns
    -------
    object
        What the one that ended gives; what it raises is raised here.
    """
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        # Where several ended at once, the one given first has the say.
        return next(task for task in tasks if task in ended).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def forever() -> NoReturn:
    """Wait until this is cancelled."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody sets it")
