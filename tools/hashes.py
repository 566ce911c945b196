"""Hashes of the packages that an installation would take.

    python tools/hashes.py --requirements secure > build/client.in
    pip install --dry-run --ignore-installed --quiet --report build/report.json \
        -c constraints.txt -r build/client.in
    python tools/hashes.py build/report.json build/hashes.txt

The result is for ``pip install --require-hashes -r build/hashes.txt``, followed by ``pip install
--no-deps .``, as a checkout has no hash. Several reports, of several kinds of machines, make one
result: a package has then a hash for each of its files. A package that pip would take from a
disk or a repository has none: it is a comment in the result, and has to be installed first.

The first command prints what a client needs, with some extras, but PyTorch: where its build comes
from is decided on each machine. ``bash .ci/hashes`` does all of this for ``hashes-client.txt``.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
LEFT_OUT = "torch"
"""Comes from an index of its own or from a disk, and is installed first."""


def main() -> None:
    """Read pip's reports and write the hashes, or print requirements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", type=Path, nargs="*")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--requirements", nargs="*", metavar="EXTRA")
    parser.add_argument("--header", default="")
    args = parser.parse_args()
    if args.requirements is not None:
        print("\n".join(requirements(args.requirements)))
        return
    *reports, out = [*args.reports, *([args.out] if args.out else [])]
    read = [json.loads(path.read_text("utf-8")) for path in reports]
    header = [f"# {line}" for line in args.header.splitlines()]
    out.write_text("\n".join([*header, *merged(read)]) + "\n", "utf-8")


def requirements(extras: Sequence[str]) -> list[str]:
    """List what a client needs, with extras, but PyTorch."""
    project = tomllib.loads(PROJECT.read_text("utf-8"))["project"]
    texts = set(project["dependencies"])
    waiting = list(extras)
    while waiting:
        for text in project["optional-dependencies"][waiting.pop()]:
            # An extra may be made of others, and an index does not have this project.
            inner = re.fullmatch(rf"{project['name']}\[(.+)\]", text)
            waiting += inner[1].split(",") if inner else []
            texts |= set() if inner else {text}
    names = {text: re.split(r"[^\w.-]", text)[0] for text in texts}
    return sorted(text for text, name in names.items() if name != LEFT_OUT)


def merged(reports: Iterable[Mapping[str, Any]]) -> list[str]:
    """Give a line for each package of pip's installation reports, by name.

    A package of several reports has the hashes of all of them.
    """
    hashes: dict[str, set[str]] = {}
    comments: set[str] = set()
    for report in reports:
        for entry in report["install"]:
            pinned, digest, origin = read_entry(entry)
            if digest:
                hashes.setdefault(pinned, set()).add(digest)
            else:
                comments.add(f"# {pinned}: no hash, as it comes from {origin}")
    lines = [pin(pinned, digests) for pinned, digests in hashes.items()]
    return sorted([*lines, *comments], key=str.lower)


def pin(pinned: str, digests: Iterable[str]) -> str:
    """Write a requirement with its hashes, each on a line of its own."""
    options = [f"--hash=sha256:{digest}" for digest in sorted(digests)]
    return " \\\n    ".join([pinned, *options])


def read_entry(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    """Read one package of a report.

    Returns
    -------
    tuple of str
        Its name and version; its file's hash, empty without one; the kind of place it is from.
    """
    metadata, origin = entry["metadata"], entry["download_info"]
    digest = origin.get("archive_info", {}).get("hashes", {}).get("sha256", "")
    place = origin["url"].partition(":")[0]
    pinned = f"{metadata['name']}=={metadata['version']}"
    # A file on this disk is no file of the index, which may have another build.
    return pinned, "" if place == "file" else digest, place


if __name__ == "__main__":
    main()
