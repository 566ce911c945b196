"""Try whether the tests notice deliberate faults in the core.

Usage: ``python tools/mutants.py [--only TEXT] [--jobs N]``. ``mutants.toml`` lists the faults.
Each is a text of one file that is replaced by another, and the tests that must fail then. The
faulty code lives in a copy, so the working tree is not touched. The exit code is 1 if less than
95 % of the faults are noticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("mutants.toml")
FOLDERS = ["protocols", "client", "strategies", "server", "simulations"]
SHARE = 0.95
"""Of the faults, so many must be noticed."""
SECONDS = 600
"""A fault that makes tests hang counts as noticed after so long."""


@dataclass(frozen=True)
class Mutant:
    """A deliberate fault.

    Attributes
    ----------
    name : str
        The fault in words.
    file : str
        The file that has it, from the project's root.
    old, new : str
        The text that is replaced, which occurs once, and what takes its place.
    tests : tuple of str
        Test files and folders, one of whose tests must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def mutated(self) -> str:
        """Return the file's text with the fault.

        Raises
        ------
        ValueError
            If the text to replace does not occur once.
        """
        text = (ROOT / self.file).read_text("utf-8")
        count = text.count(self.old)
        if count != 1:
            raise ValueError(
                f"{self.name}: {self.old!r} occurs {count} times in {self.file}; "
                f"mend {LIST.name}"
            )
        return text.replace(self.old, self.new)


def read_mutants() -> list[Mutant]:
    """Read the list of faults."""
    table = tomllib.loads(LIST.read_text("utf-8"))
    return [
        Mutant(
            entry["name"],
            entry["file"],
            entry["old"],
            entry["new"],
            tuple(entry["tests"]),
        )
        for entry in table["mutant"]
    ]


def is_noticed(mutant: Mutant) -> bool:
    """Run the tests of a fault in a copy that has it."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "fedknow"
        shutil.copytree(ROOT / "fedknow", package)
        for name in FOLDERS:
            shutil.copytree(ROOT / name, package / name)
        (package / mutant.file).write_text(mutant.mutated(), "utf-8")
        shutil.copytree(ROOT / "tests", Path(folder) / "tests")
        shutil.copy(ROOT / "pyproject.toml", folder)
        return _run(mutant.tests, Path(folder)) != 0


def _run(tests: Sequence[str], folder: Path) -> int:
    """Run tests against the package in a folder; gives the exit code."""
    # The folder comes first, so that its package hides the one that is installed.
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    try:
        result = subprocess.run(
            [*command, *tests],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return 1
    # 2 to 5: the tests could not run, which says nothing about the fault.
    if result.returncode > 1:
        raise RuntimeError(result.stdout + result.stderr)
    return result.returncode


def main() -> int:
    """Try the faults; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", default="", help="a part of the faults' names")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    mutants = [m for m in read_mutants() if arguments.only in m.name]
    results = []
    with ThreadPoolExecutor(arguments.jobs) as threads:
        for mutant, noticed in zip(
            mutants, threads.map(is_noticed, mutants), strict=True
        ):
            print("noticed " if noticed else "SURVIVED", mutant.name, flush=True)
            results.append(noticed)
    share = sum(results) / len(results)
    print(f"{sum(results)} of {len(results)} faults are noticed: {share:.1%}")
    return int(share < SHARE)


if __name__ == "__main__":
    sys.exit(main())
