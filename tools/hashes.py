"""Hashes of the packages that an installation would take.

    pip install --dry-run --ignore-installed --quiet --report build/report.json \
        -c constraints.txt '.[sim]'
    python tools/hashes.py build/report.json build/hashes.txt

The result is for ``pip install --require-hashes -r build/hashes.txt``, followed by ``pip install
--no-deps .``, as a checkout has no hash. A package that pip would take from a disk or a
repository has none either: it is a comment in the result, and has to be installed first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def main() -> None:
    """Read pip's report, and write the hashes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    report = json.loads(args.report.read_text("utf-8"))
    args.out.write_text("\n".join(lines(report)) + "\n", "utf-8")


def lines(report: Mapping[str, Any]) -> list[str]:
    """Give a line for each package of pip's installation report, by name."""
    return sorted(line(entry) for entry in report["install"])


def line(entry: Mapping[str, Any]) -> str:
    """Pin one package by version and hash."""
    metadata, origin = entry["metadata"], entry["download_info"]
    pinned = f"{metadata['name']}=={metadata['version']}"
    hashes = origin.get("archive_info", {}).get("hashes", {})
    if origin["url"].startswith("file:") or "sha256" not in hashes:
        return f"# {pinned}: no hash, as it comes from {origin['url'].partition(':')[0]}"
    return f"{pinned} --hash=sha256:{hashes['sha256']}"


if __name__ == "__main__":
    main()
