"""From exceptions to sentences and exit codes (:mod:`fedknow.protocols.errors`)."""

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
    """Turn what may go wrong into a sentence on stderr and an exit code.

    Parameters
    ----------
    run : Path, optional
        The run folder, or the folder of several.
    command : str
        What goes on with the run.
    extra : str, optional
        What brings all that the command needs; by default what brings the first package missed.
    """
    try:
        yield
    except KeyboardInterrupt:
        _end_interrupted(run, command)
    except ModuleNotFoundError as error:
        _end_for_lack_of(error, extra)
    except Exception as error:
        # An import or a library call may turn the interruption that reaches it into an error.
        if is_interrupted() and not isinstance(error, ConfigError):
            _end_interrupted(run, command)
        _end_with_sentence(error, run, command)


def report_failures(failures: Mapping[str, str], is_fatal: bool = True) -> None:
    """Name the runs that failed, and end the command with the code for that where they count."""
    for name, reason in failures.items():
        err.print(f"[red]{escape(name)} failed:[/] {escape(reason)}", highlight=False)
    if failures and is_fatal:
        raise typer.Exit(FAILED)


def _end_with_sentence(error: Exception, run: Path | None, command: str) -> NoReturn:
    """Show an exception that is made for a person; any other is a fault of this program.

    Parameters
    ----------
    error : Exception
        What ended the command.
    run, command
        As for :func:`explained`.
    """
    if isinstance(error, FedknowError):
        exit_code, is_resumable = error.exit_code, error.is_resumable
    elif isinstance(
        error, OSError
    ):  # a full disk, a port in use: of the machine, not of this program
        exit_code, is_resumable = FAILED, True
    else:
        raise error
    err.print(f"[red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    if is_resumable and (kept := _kept(run, command)):
        err.print(escape(kept), highlight=False, soft_wrap=True)
    raise typer.Exit(exit_code) from None


def _end_for_lack_of(error: ModuleNotFoundError, extra: str | None) -> NoReturn:
    """Say how to install a package that an edge installation lacks."""
    needed = providing_extra(error.name)
    if needed is None:
        raise error
    err.print(
        f"[red]Error:[/] this command needs {error.name}, which is not installed; "
        f"{escape(how_to_install(extra or needed))}",
        highlight=False,
        soft_wrap=True,
    )
    raise typer.Exit(REFUSED) from None


def _end_interrupted(run: Path | None, command: str) -> NoReturn:
    """Say in one line that the command was interrupted, what is kept, and how to go on."""
    kept = _kept(run, command)
    if run is not None and not kept:
        kept = f"Nothing is kept yet. Begin again with: {_same_command()}"
    text = f"[yellow]Interrupted.[/] {escape(kept)}".strip()
    err.print(text, highlight=False, soft_wrap=True)
    raise typer.Exit(INTERRUPTED) from None


def _kept(run: Path | None, verb: str) -> str:
    """Say what is kept, and how to go on; empty where nothing is.

    Nothing is imported here, as what was interrupted may be an import.
    """
    if run is None:
        return ""
    config = run / "config.toml"
    if config.is_file():
        if _is_finished(run):
            command = shlex.join(["fedknow", "report", str(run)])
            return f"The run in {run} is finished. Write its report with: {command}"
        command = shlex.join(
            ["fedknow", verb, str(config), "--out", str(run), "--resume"]
        )
        return (
            f"All up to the last complete round is kept in {run}. Go on with: {command}"
        )
    if any(run.glob("*/config.toml")) or any(run.glob("*/*/config.toml")):
        return f"What was done is kept in {run}. Go on with: {_same_command()}"
    return ""


def _is_finished(run: Path) -> bool:
    """Whether the record of a run ends with its end."""
    record = run / "metrics.jsonl"
    lines = record.read_bytes().splitlines() if record.is_file() else []
    return bool(lines) and b'"event":"end"' in lines[-1].replace(b" ", b"")


def _same_command() -> str:
    """Spell the command that this process was given."""
    return shlex.join(["fedknow", *sys.argv[1:]])
