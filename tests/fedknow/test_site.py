"""The site builds without a warning, is linked rightly and loads nothing from elsewhere."""

import os
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
LOADED = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
}
"""Elements that make a browser load something, and where they say what."""


class Page(HTMLParser):
    """The anchors, links and loaded files of a page."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values.get("id"), values.get("name")}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in LOADED and values.get(LOADED[tag]):
            self.loaded.append(values[LOADED[tag]])


@cache
def read(path):
    return Page(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built from nothing."""
    target = tmp_path_factory.mktemp("site")
    links = subprocess.run(["make", "-s", "build/links"], cwd=ROOT, check=False)
    assert links.returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", target],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def pages(site):
    found = {path: read(path) for path in site.rglob("*.html")}
    assert len(found) > 40
    return found


def test_links_and_anchors_lead_somewhere(site, pages):
    astray = []
    for path, page in pages.items():
        # The page for addresses that are not there is shown at any address.
        if path.name == "404.html":
            continue
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)) if parts.path else path
            target = target.resolve()
            anchor = unquote(parts.fragment)
            is_page = target.suffix == ".html" and target.is_file()
            if not target.exists() or (
                is_page and anchor and anchor not in read(target).anchors
            ):
                astray.append(f"{path.relative_to(site)}: {link}")
    assert sorted(set(astray)) == []


def test_nothing_is_loaded_from_elsewhere(site, pages):
    loaded = {link for page in pages.values() for link in page.loaded}
    assert [link for link in sorted(loaded) if urlsplit(link).netloc] == []
    styles = "".join(path.read_text("utf-8") for path in site.rglob("*.css"))
    assert "url(http" not in styles
    assert "url(//" not in styles


def test_each_kind_of_reference_is_there(site):
    options = (site / "reference/command-line.html").read_text("utf-8")
    assert "--resume" in options
    settings = (site / "reference/configuration.html").read_text("utf-8")
    assert "train.rounds" in settings
    names = read(site / "reference/api.html").anchors
    assert "fedknow.api.runs.simulate" in names
    assert "ewc" in read(site / "reference/learners.html").anchors
    assert "round" in read(site / "reference/events.html").anchors


def test_search_needs_no_server(site):
    index = (site / "search/search_index.js").read_text("utf-8")
    assert "Gradient Episodic Memory" in index or "gem" in index
