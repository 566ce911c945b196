"""Generated pages of the site, and files of the repository on it.

Pages may link to files outside ``docs/``, as they do for readers of the repository. The site
holds copies of these files, below ``files/``, so it needs no other place.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]

LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")
CODE = re.compile(r"(```.*?```)", re.DOTALL)
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Pages that lie at the root of the repository, and their places on the site."""
UNIT = re.compile(r"(?<=\d) (?=%|± )|(?<=\d ±) (?=\d)")
SHOWN = (".json", ".png", ".svg")
"""Files that browsers show by themselves; others are shown as text."""


def on_files(files: Files, config: Any) -> Files:
    """Add generated pages, those of the root, and files that pages link to."""
    # Here and late: mkdocs undoes changes of the path, and this import loads all parts.
    sys.path.insert(0, str(Path(__file__).parent))
    import reference

    for path, text in reference.pages().items():
        files.append(File.generated(config, path, content=text))
    for name, path in PAGES.items():
        text = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, path, content=text))
    for source in linked_files(Path(config.docs_dir)):
        copy = File.generated(
            config, copied(source), abs_src_path=str(ROOT / source)
        )
        files.append(copy)
    _add_to_guides(files, config.nav)
    return files


def _add_to_guides(files: Files, nav: list[dict[str, Any]]) -> None:
    """Enter guides that the navigation does not name at the end of the guides."""
    guides = next(part["How-to"] for part in nav if "How-to" in part)
    named: set[str] = set()
    for entry in guides:
        named.update(_paths(entry))
    for file in files.documentation_pages():
        if file.src_uri.startswith("how-to/") and file.src_uri not in named:
            guides.append(file.src_uri)


def _paths(entry: str | dict[str, Any]) -> list[str]:
    return [entry] if isinstance(entry, str) else list(entry.values())


def linked_files(docs: Path) -> set[str]:
    """Find the files of the repository that pages link to, below the root."""
    targets: set[str] = set()
    pages = {
        path: path.relative_to(ROOT).as_posix() for path in docs.rglob("*.md")
    }
    pages |= {ROOT / name: name for name in PAGES}
    for path, name in pages.items():
        for _, link, _ in LINK.findall(CODE.sub("", path.read_text("utf-8"))):
            target = _target(name, link)
            if target is not None and target not in PAGES:
                targets.add(target)
    return {target for target in targets if (ROOT / target).is_file()}


def _target(page: str, link: str) -> str | None:
    """Find the path from the root that a link leads to, if not to ``docs/``."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def _page(link: str) -> str:
    """Name the page that a link from the root leads to."""
    if (ROOT / link).is_dir():
        link = posixpath.join(link, "README.md")
    return link.removeprefix("docs/")


def copied(source: str) -> str:
    """Name the copy of a file of the repository."""
    return f"files/{source}" if source.endswith(SHOWN) else f"files/{source}.txt"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to files of the repository lead to their copies."""
    path = page.file.src_uri
    origins = {place: name for name, place in PAGES.items()}
    source = origins.get(path, f"docs/{path}")
    folder = posixpath.dirname(path)

    def moved(match: re.Match[str]) -> str:
        label, link, anchor = match[1], match[2], match[3] or ""
        target = _target(source, link)
        if target is None:
            # A page of the root has another folder on the site than in the repository.
            if path in origins and link.startswith("docs/"):
                return f"[{label}]({_page(link)}{anchor})"
            return match[0]
        if target in PAGES:
            return (
                f"[{label}]({posixpath.relpath(PAGES[target], folder)}{anchor})"
            )
        if not (ROOT / target).is_file():
            return label  # a folder: there is nothing to show
        return f"[{label}]({posixpath.relpath(copied(target), folder)})"

    pieces = CODE.split(markdown)
    pieces[::2] = [_joined(LINK.sub(moved, piece)) for piece in pieces[::2]]
    return "".join(pieces)


def _joined(text: str) -> str:
    """Keep a number and its unit on one line."""
    pieces = re.split(r"(`[^`]*`)", text)
    pieces[::2] = [UNIT.sub("\N{NO-BREAK SPACE}", piece) for piece in pieces[::2]]
    return "".join(pieces)
