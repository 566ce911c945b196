"""Pages in a browser: axe-core's rules, the content policy, sorting, and a screen of 360 pixels."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedknow.server.reports.blocks import Cell, Section, Table
from fedknow.server.reports.page import write_page, write_report

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed"
)
axe_module = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMIUM = (
    shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

KINDS = ("run", "two-seeds", "three-seeds", "many", "fleet")
SCREENS = [(1280, "light"), (360, "light"), (360, "dark")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        # Without a sandbox: as root, Chromium has none. It opens pages of ours alone.
        found = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield found
        found.close()


@pytest.fixture
def show(browser) -> Iterator[Callable[..., Any]]:
    """Open a file; what it says on the console and what it asks for are noted on the page."""
    contexts = []

    def opened(path: Path, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.notes, page.requests = [], []
        page.on("console", lambda message: page.notes.append(message.text))
        page.on("pageerror", lambda error: page.notes.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def pages(make_run, tmp_path_factory) -> dict[str, Path]:
    """A page of each kind, made once."""
    folder = tmp_path_factory.mktemp("pages")

    def runs(name: str, learners: int, seeds: int, **options: Any) -> list[Any]:
        return [
            make_run(
                folder / f"{name}-{number}-{seed}",
                {"learner": f"method-{number}", "seed": seed},
                lost=0.01 * number + 0.05 * seed,
                **options,
            )
            for number in range(learners)
            for seed in range(seeds)
        ]

    alone = runs("run", 1, 1, hours=1.0)
    alone[0].append(
        {
            "event": "warning",
            "time": 2e9,
            "task": 0,
            "round": 1,
            "reason": "nothing aggregated",
        }
    )
    fleet = runs("fleet", 2, 1, hours=2.0)
    for run in fleet:
        _add_fleet(run)
    made = {
        "run": alone,
        "two-seeds": runs("two", 2, 2),
        "three-seeds": runs("three", 2, 3),
        "many": runs("many", 24, 1, hours=1.0),
        "fleet": fleet,
    }
    left_out = {"joint": "needs all data at once"}
    return {
        name: write_report(found, folder / name, left_out)
        for name, found in made.items()
    }


def _add_fleet(run: Any) -> None:
    times = {"computing": 10.0, "transfer": 20.0, "idle": 30.0, "away": 0.0}
    counts = dict.fromkeys(
        ("asked", "answered", "late", "lost", "out_of_memory"), 1
    )
    clients = [
        {
            "client": number,
            "device": f"board-{number}",
            "memory": 1e6,
            "joules": 5.0,
            "room": 1e9,
            **times,
            **counts,
        }
        for number in range(2)
    ]
    elapsed = {
        "virtual_seconds": 60.0,
        "communication_seconds": 20.0,
        "computing_seconds": 10.0,
    }
    run.write_fleet({**elapsed, "energy_joules": 10.0, "clients": clients})
    fault = {"fault": "out_of_memory", "client": 1, "task": 1, "round": 1}
    run.append(
        {
            "event": "failure",
            "time": 2e9,
            **fault,
            "reason": "out of memory: board-1 has 1 GB",
        }
    )


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_nothing_and_nothing_is_asked_for(
    pages, show, kind: str, width: int, scheme: str
) -> None:
    page = show(pages[kind], width, scheme)
    found = (
        axe_module.Axe()
        .run(page, options={"resultTypes": ["violations"]})
        .response
    )
    assert [
        (each["id"], each["nodes"][0]["html"]) for each in found["violations"]
    ] == []
    # These two are what earlier pages broke: they must have been looked at.
    assert {"empty-table-header", "svg-img-alt"} <= {
        each["id"] for each in found["passes"]
    }
    assert page.notes == []
    assert page.requests == [pages[kind].as_uri()]
    assert page.evaluate(
        "document.documentElement.scrollWidth <= window.innerWidth"
    )


def test_axe_would_find_what_earlier_pages_had(show, tmp_path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><html lang=en><title>bad</title><main><h1>Bad</h1><div "
        "style='overflow-x:auto;width:50px'>"
        "<table><tr><th></th><th>wide</th></tr><tr><td>one</td><td>twooooooooooooo</td></tr></table></div></main>"
    )
    found = axe_module.Axe().run(show(bad)).response["violations"]
    assert {"empty-table-header", "scrollable-region-focusable"} <= {
        each["id"] for each in found
    }


def test_the_policy_stops_what_is_not_ours(pages, show) -> None:
    page = show(pages["run"])
    page.evaluate(
        """() => {
            const script = document.createElement('script');
            script.textContent = 'window.isOwned = true';
            document.body.append(script);
            const style = document.createElement('style');
            style.textContent = 'h1 { display: none }';
            document.head.append(style);
            document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:9/x.png' }));
        }"""
    )
    assert page.evaluate("window.isOwned") is None
    assert page.locator("h1").is_visible()
    assert (
        len([note for note in page.notes if "Content Security Policy" in note])
        == 3
    )


@pytest.fixture
def sortable(tmp_path) -> Path:
    rows = [
        ["b-10", Cell("1.0 MB", 1e6), "1,200", "–"],
        ["b-9", Cell("15.5 kB", 15_500), "30", "2.0 %"],
        ["a", Cell("–"), "4", "-10.0 %"],
    ]
    table = Table("Sizes", ["Method", "Size", "Count", "Share"], rows)
    return write_page(
        tmp_path / "page.html", "Sizes", [Section("Sizes", [table])], []
    )


@pytest.mark.parametrize(
    ("column", "once", "twice"),
    [
        ("Method", ["a", "b-9", "b-10"], ["b-10", "b-9", "a"]),
        (
            "Size",
            ["b-9", "b-10", "a"],
            ["b-10", "b-9", "a"],
        ),  # what is not known stays last
        ("Count", ["a", "b-9", "b-10"], ["b-10", "b-9", "a"]),
        ("Share", ["a", "b-9", "b-10"], ["b-9", "a", "b-10"]),
    ],
)
def test_tables_are_sorted_by_their_numbers(
    sortable, show, column: str, once: list[str], twice: list[str]
) -> None:
    page = show(sortable)
    head = page.get_by_role("columnheader", name=column)
    for order, state in ((once, "ascending"), (twice, "descending")):
        head.get_by_role("button").press("Enter")
        assert page.locator("tbody th").all_inner_texts() == order
        assert head.get_attribute("aria-sort") == state
    assert page.locator("[aria-sort]").count() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_letters_are_legible_on_a_small_screen(pages, show, kind: str) -> None:
    page = show(pages[kind], 360)
    sizes = page.evaluate(
        """() => [...document.querySelectorAll('svg text')].map((text) => {
            const svg = text.closest('svg');
            const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
            return parseFloat(getComputedStyle(text).fontSize) * scale;
        })"""
    )
    assert sizes
    assert min(sizes) >= 8.5
    small = page.evaluate(
        """() => [...document.querySelectorAll('main *')].filter((each) => !each.closest('svg'))
            .map((each) => parseFloat(getComputedStyle(each).fontSize))"""
    )
    assert min(small) >= 12


def test_the_first_column_stays_when_a_table_is_scrolled(pages, show) -> None:
    page = show(pages["many"], 360)
    moved = page.evaluate(
        """() => {
            const region = [...document.querySelectorAll('section > .scroll')]
                .find((each) => each.scrollWidth > each.clientWidth + 100);
            const cells = [...region.querySelector('tbody tr').cells];
            const places = () => cells.map((cell) => cell.getBoundingClientRect().x);
            const before = places();
            region.scrollLeft = 100;
            return [before[0] - places()[0], before[2] - places()[2]];
        }"""
    )
    assert moved == [0, 100]
