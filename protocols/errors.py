"""The exceptions whose text is for a person, and the exit codes."""

from __future__ import annotations

from typing import ClassVar

__all__ = ["FAILED", "INTERRUPTED", "REFUSED", "FedknowError"]

FAILED = 1
"""Exit code of a run, or a client, that could not be finished."""
REFUSED = 2
"""Exit code of a command or a configuration that cannot be run."""
INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""


class FedknowError(Exception):
    """Something that a person is told in a sentence: no fault of this program.

    Any other exception that reaches a command is a fault of this program, and is shown with its
    traceback. Exceptions of the wire, of certificates, of proxies and of training seldom reach
    one: their callers turn them into a failed answer, and the run goes on.

    Attributes
    ----------
    exit_code : int
        What a command ends with.
    is_resumable : bool
        Whether a run that ended with it can go on from what is kept.

    Examples
    --------
    >>> import fedknow
    >>> try:
    ...     fedknow.load_run("nowhere")
    ... except fedknow.FedknowError as error:
    ...     print(error.exit_code, error.is_resumable)
    2 False
    """

    exit_code: ClassVar[int] = FAILED
    is_resumable: ClassVar[bool] = True
