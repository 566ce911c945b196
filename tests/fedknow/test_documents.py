"""The documents name only files and modules that exist."""

import importlib
import os
import re
from pathlib import Path

import pytest

import fedknow
from fedknow.protocols.installed import GROUPS

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md")
    for path in ROOT.glob(pattern)
)
FOLDERS = "protocols|client|strategies|server|simulations|fedknow"
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
ANCHOR = re.compile(r"\]\(([^)#\s]*)#([^)]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(
    rf"(?:{FOLDERS}|tests|benchmarks|docs|examples|tools|docker)/[\w./-]*"
)
FILE = re.compile(r"\w+\.(?:py|toml|proto|sh)")
MODULE = re.compile(rf"(?:fedknow\.)?(?:{FOLDERS})(?:\.\w+)+")
PLACEHOLDER = re.compile(r"NAME|PATH")
"""Capitals stand for a name that the reader chooses."""
CURRENT = [name for name in DOCUMENTS if name != "CHANGELOG.md"]
"""Documents that name only what is there: the changelog tells of older versions."""
USERS_FILES = {
    "best.toml",
    "config.toml",
    "experiment.toml",
    "field.toml",
    "mine.toml",
    "my_anchor.py",
    "my_data.py",
    "my_learner.py",
    "my_model.py",
}
"""Files that a run or its user makes."""


GENERATED = {
    f"docs/reference/{name}.md"
    for name in re.findall(
        r'^    "([\w-]+)": \w+(?:\.\w+)?,$',
        (ROOT / "tools/site/reference.py").read_text("utf-8"),
        re.M,
    )
}
"""Pages of the site that no folder holds; the site's own test checks links to them."""


def is_generated(page, target):
    return os.path.relpath(page.parent / target, ROOT) in GENERATED


def codes(name):
    """The pieces of code in the text of a document, without its blocks of code."""
    page = re.sub(r"```.*?```", "", (ROOT / name).read_text("utf-8"), flags=re.S)
    return CODE.findall(page)


def slug(heading):
    """The anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


ROW = re.compile(r"^\| `[\w.]+` \| `([\w.]+)` \|$", re.M)
"""A module that moved: its old name and its new one."""


def exists(module):
    """Whether a dotted name is a module, an object of one, or a group of entry points."""
    public = module.removeprefix("fedknow.")
    if module in GROUPS.values() or public in fedknow.__all__:
        return True
    parts = module.removeprefix("fedknow.").split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(["fedknow", *parts[:count]])
        try:
            target = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            if not hasattr(target, attribute):
                return False
            target = getattr(target, attribute)
        return True
    return False


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    targets = LINK.findall((ROOT / name).read_text("utf-8"))
    local = [target for target in targets if "://" not in target]
    page = ROOT / name
    missing = [target for target in local if not (page.parent / target).exists()]
    assert [target for target in missing if not is_generated(page, target)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_anchors_are_headings(name):
    page = ROOT / name
    for target, anchor in ANCHOR.findall(page.read_text("utf-8")):
        if "://" in target or is_generated(page, target):
            continue
        linked = (page.parent / target) if target else page
        headings = re.findall(r"^#+ (.*)", linked.read_text("utf-8"), re.M)
        assert anchor in map(slug, headings)


@pytest.mark.parametrize("name", CURRENT)
def test_named_paths_exist(name):
    paths = [text for text in codes(name) if PATH.fullmatch(text)]
    real = [path for path in paths if not PLACEHOLDER.search(path)]
    assert [path for path in real if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", CURRENT)
def test_named_files_exist(name):
    files = {text for text in codes(name) if FILE.fullmatch(text)}
    present = {path.name for path in ROOT.glob("*/**/*.*")}
    assert sorted(files - present - USERS_FILES) == []


@pytest.mark.parametrize("name", CURRENT)
def test_named_modules_exist(name):
    names = {text for text in codes(name) if MODULE.fullmatch(text)}
    modules = {text for text in names if not FILE.fullmatch(text)}
    assert [text for text in sorted(modules) if not exists(text)] == []


def test_modules_that_moved_are_where_the_changelog_says():
    page = (ROOT / "CHANGELOG.md").read_text("utf-8")
    modules = ROW.findall(page.partition("## Modules with new names")[2])
    assert len(modules) > 30
    assert [module for module in modules if not exists(module)] == []


def test_the_tests_that_the_threat_model_names_are_there():
    text = (ROOT / "docs/explanation/security.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    assert len(named) > 15
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text("utf-8"), name
