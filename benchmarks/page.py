"""Put the figures of ``results/`` into the tables of the documents.

They are ``benchmarks.md``, ``results.md``, ``verified.md`` and ``where-fedknow-leads.md`` in
``docs/evidence``.

    python benchmarks/page.py            # rewrite the tables
    python benchmarks/page.py --check    # exit with 1 if they are not those of the results

A table stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``; everything else on the page is
written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from _protocol_tables import rank_table
from _tables import COMPARISONS, TABLES

HERE = Path(__file__).parent
PAGES = [
    HERE.parent / "docs" / "evidence" / name
    for name in (
        "benchmarks.md",
        "results.md",
        "verified.md",
        "where-fedknow-leads.md",
    )
]
TABLE = re.compile(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", re.DOTALL)
RANKS = "protocol_ranks"
"""The table that is made of several files."""


def main() -> int:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    stale = []
    for page in args.pages:
        text = page.read_text("utf-8")
        rendered = render(text, args.results)
        if text != rendered:
            stale.append(page)
        if not args.check:
            page.write_text(rendered, "utf-8")
    if not args.check:
        return 0
    for page in stale:
        print(f"{page}: run benchmarks/page.py")
    if not stale:
        print("the tables are those of the results")
    return int(bool(stale))


def render(page: str, results: Path) -> str:
    """Return the page with all of its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{_text_of(name, results)}\n<!-- /{name} -->"

    return TABLE.sub(fill, page)


def _text_of(name: str, results: Path) -> str:
    if name == RANKS:
        return rank_table(results)
    file = (
        f"{COMPARISONS[name]}/compare.json"
        if name in COMPARISONS
        else f"{name.removesuffix('_settings')}.json"
    )
    path = results / file
    if not path.exists():
        return "Not measured yet."
    return TABLES[name](json.loads(path.read_text("utf-8")))


if __name__ == "__main__":
    sys.exit(main())
