"""The desk of a client: the work it was given, and the answer it has.

The connection lays work on it, and the worker lays answers on it. Either may come and go without
the other.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from fedknow.protocols.config import ConfigError
from fedknow.protocols.messages import CLIENT_FAILED, Message
from fedknow.protocols.wire import Packed, Parcel, WireError, pack

__all__ = ["Desk", "Job", "Result"]


@dataclass(frozen=True, eq=False)
class Job:
    """Work that the server wants an answer to.

    Attributes
    ----------
    key : str
        What tells the work from other work (:func:`~fedknow.client.edge.journal.key_of`).
    parcel : Parcel
        The work as it came.
    """

    key: str
    parcel: Parcel


@dataclass(frozen=True, eq=False)
class Result:
    """The answer to the work of a key.

    Attributes
    ----------
    key : str
        The work's.
    asked_by : str
        Id of the message that asked for it.
    answer : Packed
        The answer as it is sent.
    version : int
        Version of the client's state after the work.
    work : Message
        The work, without its content.
    old_version : int
        Version of the client's state before the work.
    has_failed : bool
        The answer is a failure.
    """

    key: str
    asked_by: str
    answer: Packed
    version: int
    work: Message
    old_version: int
    has_failed: bool

    def is_for(self, job: Job) -> bool:
        """Say if this is the answer to a job.

        Work that was done is known by its key, whoever asks for it again. A failure is not work
        done: it answers the one message that it was made for, and work asked for by another
        message is tried anew.
        """
        is_same = self.key == job.key
        return is_same and (not self.has_failed or self.asked_by == job.parcel.id)

    def failed(self, reason: str) -> Result:
        """Give a failure in the answer's stead."""
        answer = pack(self.work.fail(CLIENT_FAILED, reason))
        return replace(
            self, answer=answer, version=self.old_version, has_failed=True
        )


class Desk:
    """The newest work, the last answer, and what stands against going on.

    Attributes
    ----------
    job : Job, optional
        The newest work; a newer one takes the place of an older one.
    result : Result, optional
        The last answer.
    problem : WireError or ConfigError, optional
        Why this side ends the stream.
    has_job : asyncio.Event
        There may be new work.
    has_changed : asyncio.Event
        There may be something to send.
    """

    def __init__(self) -> None:
        self.job: Job | None = None
        self.result: Result | None = None
        self.problem: WireError | ConfigError | None = None
        self.has_job = asyncio.Event()
        self.has_changed = asyncio.Event()

    def put_job(self, job: Job) -> None:
        """Lay new work on the desk."""
        self.job = job
        self.has_job.set()
        self.has_changed.set()

    def take_answered(self) -> tuple[Job, Result] | None:
        """Take the work from the desk, with its answer, if there is one."""
        job = self.job
        result = self.result
        if job is None or result is None or not result.is_for(job):
            return None
        self.job = None
        return job, result

    def complain(self, problem: WireError | ConfigError) -> None:
        """Have the server told why this side ends the stream.

        The stream then ends, and the problem is raised.
        """
        self.problem = problem
        self.has_changed.set()
