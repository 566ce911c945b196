"""From exceptions to sentences and exit codes.

The exceptions and codes are in :mod:`fedknow.protocols.errors`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from rich.markup import escape

from fedknow.cli.output import err
from fedknow.protocols.config import ConfigError
from fedknow.protocols.errors import FAILED, INTERRUPTED, REFUSED, FedknowError
from fedknow.protocols.extras import how_to_install, providing_extra
from fedknow.protocols.interruption import is_interrupted

__all__ = ["explained", "report_failures"]


@contextmanager
def explained(
    run: Path | None, command: str = "simulate", extra: str | None = None
) -> Iterator[None]:
    """Turn a failure into a sentence on stderr and an exit code.

    Parameters
    ----------
    run : Path, optional
        The run folder, or the folder of several.
    command : str
        The command that resumes the run.
    extra : str, optional
        The extra with all packages of the command; by default the one with the first package
        that is missing.
    """
    try:
        yield
    except KeyboardInterrupt:
        _end_interrupted(run, command)
    except ModuleNotFoundError as error:
        _end_without_package(error, extra)
    except Exception as error:
        # An import or a library call may turn the interruption that reaches it into an error.
        if is_interrupted() and not isinstance(error, ConfigError):
            _end_interrupted(run, command)
        _end_with_sentence(error, run, command)


def report_failures(failures: Mapping[str, str], is_fatal: bool = True) -> None:
    """Name the runs that failed, and end the command where they count."""
    for name, reason in failures.items():
        err.print(
            f"[red]{escape(name)} failed:[/] {escape(reason)}", highlight=False
        )
    if failures and is_fatal:
        raise typer.Exit(FAILED)


def _end_with_sentence(
    error: Exception, run: Path | None, command: str
) -> NoReturn:
    """Show an exception that is made for a person.

    Any other is a fault of this program, and is raised again with its traceback.

    Parameters
    ----------
    error : Exception
        The failure that ended the command.
    run, command
        As for :func:`explained`.
    """
    if isinstance(error, FedknowError):
        exit_code = error.exit_code
        is_resumable = error.is_resumable
    elif isinstance(error, OSError):
        # A full disk, a port in use: a fault of the machine, and the run can go on later.
        exit_code = FAILED
        is_resumable = True
    else:
        # A fault of this program, whose traceback is what a report of it needs.
        raise error
    err.print(
        f"[red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True
    )
    hint = _resume_hint(run, command) if is_resumable else ""
    if hint:
        err.print(escape(hint), highlight=False, soft_wrap=True)
    raise typer.Exit(exit_code) from None


def _end_without_package(
    error: ModuleNotFoundError, extra: str | None
) -> NoReturn:
    """Say how to install a package that an edge installation lacks."""
    default_extra = providing_extra(error.name)
    # No extra brings it, so its lack is a fault of this program.
    if default_extra is None:
        raise error
    err.print(
        f"[red]Error:[/] this command needs {error.name}, which is not installed; "
        f"{escape(how_to_install(extra or default_extra))}",
        highlight=False,
        soft_wrap=True,
    )
    raise typer.Exit(REFUSED) from None


def _end_interrupted(run: Path | None, command: str) -> NoReturn:
    """Say in one line that the command was interrupted, and how to go on."""
    hint = _resume_hint(run, command)
    if run is not None and not hint:
        hint = f"Nothing is kept yet. Begin again with: {_same_command()}"
    text = f"[yellow]Interrupted.[/] {escape(hint)}".strip()
    err.print(text, highlight=False, soft_wrap=True)
    raise typer.Exit(INTERRUPTED) from None


def _resume_hint(run: Path | None, verb: str) -> str:
    """Say which results are stored and how to go on; empty where none are.

    Nothing is imported here, because an import may have been interrupted.
    """
    if run is None:
        return ""
    config = run / "config.toml"
    if config.is_file():
        if _is_finished(run):
            command = shlex.join(["fedknow", "report", str(run)])
            return (
                f"The run in {run} is finished. Write its report with: {command}"
            )
        words = ["fedknow", verb, str(config), "--out", str(run), "--resume"]
        return (
            f"All up to the last complete round is kept in {run}. "
            f"Go on with: {shlex.join(words)}"
        )
    # A comparison has a folder a run, an experiment of the paper a folder a comparison.
    if any(run.glob("*/config.toml")) or any(run.glob("*/*/config.toml")):
        return f"What was done is kept in {run}. Go on with: {_same_command()}"
    return ""


def _is_finished(run: Path) -> bool:
    """Say whether the last event of a run is its end."""
    record = run / "metrics.jsonl"
    if not record.is_file():
        return False
    lines = record.read_bytes().splitlines()
    # As bytes: a parser would have to be imported, and the last line may be cut off.
    return bool(lines) and b'"event":"end"' in lines[-1].replace(b" ", b"")


def _same_command() -> str:
    """Write the command that started this process."""
    return shlex.join(["fedknow", *sys.argv[1:]])
