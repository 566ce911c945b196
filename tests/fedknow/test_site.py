"""The site builds without a warning, and loads nothing from elsewhere."""

import os
import shutil
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright import sync_api

ROOT = Path(__file__).parents[2]
CHROMIUM = (
    shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
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
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--site-dir",
            target,
        ],
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
        links = {*page.links, *page.loaded}
        wrong = [link for link in links if not leads_somewhere(path, link)]
        astray += [f"{path.relative_to(site)}: {link}" for link in wrong]
    assert sorted(astray) == []


def leads_somewhere(path, link):
    """Whether a link leads to another place, or to a file and an anchor that exist."""
    parts = urlsplit(link)
    if parts.scheme:
        return True
    target = (path.parent / unquote(parts.path)) if parts.path else path
    target = target.resolve()
    if target.suffix != ".html" or not parts.fragment:
        return target.exists()
    return target.is_file() and unquote(parts.fragment) in read(target).anchors


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
    assert "fedknow.api.simulation.simulate" in names
    assert "ewc" in read(site / "reference/learners.html").anchors
    assert "round" in read(site / "reference/events.html").anchors


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as driver:
        # Without a sandbox: as root, Chromium has none. It opens pages of ours alone.
        started = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield started
        started.close()


def test_search_needs_no_server(site, browser):
    page = browser.new_page()
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((site / "index.html").as_uri())
    page.click("input[name=query]")
    # The index is read first.
    page.get_by_text("Type to start searching").wait_for()
    page.keyboard.type("staleness")
    page.wait_for_selector(".md-search-result__link")
    ours = ("file:", "data:", "blob:")
    assert [url for url in requests if not url.startswith(ours)] == []
    assert errors == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_telephone(site, browser, scheme):
    page = browser.new_page(
        viewport={"width": 360, "height": 740}, color_scheme=scheme
    )
    for name in (
        "index",
        "tutorials/first-run",
        "reference/api",
        "evidence/results",
    ):
        page.goto((site / f"{name}.html").as_uri())
        wide = "document.documentElement.scrollWidth > window.innerWidth"
        assert not page.evaluate(wide), name
    page.close()
