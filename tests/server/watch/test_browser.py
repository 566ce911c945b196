"""The live page in a browser: curves that grow, axe-core's rules, and a screen of 360 pixels."""

import json
import shutil
import time

import pytest

from fedknow.server.run.integrity import chain_start, seal_line
from fedknow.server.watch.http import LivePage

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


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as driver:
        # Without a sandbox: as root, Chromium has none. It opens pages of ours alone.
        started = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield started
        started.close()


@pytest.fixture
def show(browser):
    """Open a page; what it says on the console and asks for are noted on it."""
    contexts = []

    def opened(url, width=1280, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.notes, page.requests = [], []
        page.on("console", lambda message: page.notes.append(message.text))
        page.on("pageerror", lambda error: page.notes.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(url)
        # The policy forbids eval, and with it Playwright's own way to wait for a condition.
        page.locator("#folder:not(:empty)").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def folders(make_run, tmp_path_factory):
    """Folders of each kind of page, made once."""
    root = tmp_path_factory.mktemp("pages")
    make_run(root / "one", {"learner": "fedavg"})
    for number in range(3):
        run = make_run(
            root / "many" / f"method-{number}-seed0",
            {"learner": f"method-{number}"},
            lost=0.05 * number,
            done=3 - number % 2,
        )
        fault = {"fault": "not_finite", "client": 1, "task": 1, "round": 1}
        run.append(
            {"event": "failure", "time": 2e9, **fault, "reason": "NaN in w"}
        )
    (root / "nothing").mkdir()
    return root


def axe(page):
    response = axe_module.Axe().run(page).response
    return [
        (each["id"], each["nodes"][0]["html"]) for each in response["violations"]
    ]


@pytest.mark.parametrize("kind", ["one", "many"])
@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (360, "light"), (360, "dark")]
)
def test_axe_finds_nothing_and_nothing_leaves_the_machine(
    folders, show, kind, width, scheme
):
    with LivePage(folders / kind) as live:
        page = show(live.url, width, scheme)
        page.locator("summary").first.click()
        assert axe(page) == []
        assert page.notes == []
        assert {url.startswith((live.url, "data:")) for url in page.requests} == {
            True
        }
        # Nothing of the page is wider than the screen.
        assert page.evaluate(
            "document.documentElement.scrollWidth <= window.innerWidth"
        )


def append(run, *events):
    """Write events as the run's own process would."""
    record = run.path / "metrics.jsonl"
    lines = record.read_bytes().splitlines()
    chain = chain_start(run.fingerprint)
    if lines:
        chain = int(json.loads(lines[-1])["crc32"], 16)
    for event in events:
        line, chain = seal_line(event, chain)
        with record.open("ab") as file:
            file.write(line)


def round_event(number, loss, **values):
    return {
        "event": "round", "time": time.time(), "task": 0, "round": number,
        "server_round": number, "clients": 2, "loss": loss, "accuracy": 0.5, "seconds": 1.0,
        "traffic": {"train": {"up": 10, "down": 20, "messages": 2}}, "failures": 0, **values,
    }  # fmt: skip


def points(page, chart):
    figure = page.locator("figure", has=page.get_by_text(chart, exact=True))
    text = figure.locator("polyline").get_attribute("points")
    return len(text.split())


def test_curves_grow_while_a_run_goes_on(make_run, show, tmp_path):
    with LivePage(tmp_path / "run") as live:
        page = show(live.url)
        assert page.get_by_role("heading", name="Waiting for a run").is_visible()
        # Not a frame around nothing.
        assert not page.get_by_text("Clients over time").is_visible()
        run = make_run(tmp_path / "run", {"learner": "fedavg"}, done=0)
        page.get_by_role("heading", name="made with fedavg").wait_for()
        append(run, round_event(1, 0.9), round_event(2, 0.8))
        page.get_by_text("Now: fedavg 0.8").wait_for()
        assert points(page, "Training loss") == 2
        append(run, round_event(3, 0.7))
        page.get_by_text("Now: fedavg 0.7").wait_for()
        assert points(page, "Training loss") == 3
        assert page.notes == []


def test_curves_of_one_picture_are_told_apart(folders, show):
    with LivePage(folders / "one") as live:
        page = show(live.url)
        plot = page.get_by_role("group", name="Traffic of training")
        items = page.locator("figure", has=plot).locator(".readout .value")
        texts = [text.split(",")[0] for text in items.all_inner_texts()]
        assert texts == ["up", "down"]
        keys = items.locator("line")
        drawn = plot.locator("polyline")
        styles = [
            [each.get_attribute("class") for each in kind.all()]
            for kind in (keys, drawn)
        ]
        assert styles[0] == styles[1]
        # One curve needs no key.
        loss = page.get_by_role("group", name="Training loss")
        assert page.locator("figure", has=loss).locator(".value svg").count() == 0


def test_arrow_keys_move_along_a_curve(folders, show):
    with LivePage(folders / "one") as live:
        page = show(live.url)
        plot = page.get_by_role("group", name="Training loss")
        plot.focus()
        plot.press("Home")
        figure = page.locator("figure", has=plot)
        assert figure.locator(".readout").inner_text() == "round 1: fedavg 0.5"
        plot.press("ArrowRight")
        assert figure.locator(".readout").inner_text().startswith("round 2:")


def test_a_browser_that_lost_the_connection_goes_on_where_it_was(
    make_run, show, tmp_path, monkeypatch
):
    run = make_run(tmp_path / "run", {"learner": "fedavg"}, done=0)
    append(run, round_event(1, 0.9), round_event(2, 0.8))
    with LivePage(run.path) as live:
        page = show(live.url)
        page.get_by_text("Now: fedavg 0.8").wait_for()
        hub, wait, starts = live._hub, live._hub.wait, []
        start_of = hub.start_of
        monkeypatch.setattr(
            hub, "start_of", lambda text: starts.append(text) or start_of(text)
        )
        monkeypatch.setattr(hub, "wait", broken)
        append(
            run, {"event": "warning", "time": time.time(), "reason": "wakes it"}
        )
        page.get_by_text("The connection is lost").wait_for()
        monkeypatch.setattr(hub, "wait", wait)
        append(run, round_event(3, 0.7))
        page.get_by_text("Now: fedavg 0.7").wait_for()
        page.get_by_text("The connection is lost").wait_for(state="hidden")
        # It named the last message that it had, so no curve has a point twice.
        assert all(text.startswith(f"{hub.session}-") for text in starts)
        assert points(page, "Training loss") == 3


def broken(start, seconds):
    raise ConnectionResetError


def test_the_page_says_that_its_server_has_ended(folders, show):
    with LivePage(folders / "one") as live:
        page = show(live.url)
    page.get_by_text("The command that served this page has ended").wait_for()


def test_the_policy_stops_what_is_not_ours(folders, show):
    with LivePage(folders / "one") as live:
        page = show(live.url)
        page.evaluate(
            """() => {
                const script = document.createElement('script');
                script.textContent = 'window.isOwned = true';
                document.body.append(script);
                const image = new Image();
                image.src = 'http://127.0.0.1:9/x.png';
                document.body.append(image);
            }"""
        )
        assert page.evaluate("window.isOwned") is None
        # "Refused" or "violates", as versions of Chromium say.
        assert (
            len([note for note in page.notes if "Security Policy" in note]) == 2
        )


def test_names_in_a_record_are_text_and_no_markup(make_run, show, tmp_path):
    run = make_run(tmp_path / "run", {"learner": "fedavg"}, done=0)
    reason = "<img src=x onerror=\"document.title='owned'\">"
    append(run, {"event": "warning", "time": time.time(), "reason": reason})
    with LivePage(run.path) as live:
        page = show(live.url)
        assert page.locator("#events li").inner_text().endswith(reason)
        assert page.locator("img").count() == 0
