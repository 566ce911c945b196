import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fedknow.cli.tables import comparison_table
from fedknow.client.learners.baselines import Local
from fedknow.protocols.config import read_config
from fedknow.server.checks.faults import RunError
from fedknow.server.reports.groups import group
from fedknow.server.reports.measures import (
    MEASURES,
    available_measures,
    duration,
    estimate,
    size,
)
from fedknow.server.reports.page import write_report
from fedknow.server.reports.summary import summarise
from fedknow.server.run.evaluation import Scores
from fedknow.server.run.folder import RunFolder

TRAFFIC = {
    "train": {"down": 3_000_000, "up": 2_000_000, "messages": 12},
    "train.end_task": {"down": 500_000, "up": 0, "messages": 6},
    "evaluate": {"down": 7_000_000, "up": 10, "messages": 6},
}


class Page(HTMLParser):
    """Reads a page: is it well formed, and what does it refer to?"""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.starts: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(
        self, tag: str, attrs: list[tuple[str, str | None]]
    ) -> None:
        self.starts.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(
        self, tag: str, attrs: list[tuple[str, str | None]]
    ) -> None:
        self._attributes(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data.strip())

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            self.references += re.findall(r"url\((.*?)\)", value or "")


def test_the_numbers_of_a_run(make_run, tmp_path):
    run = summarise(make_run(tmp_path / "run"))
    assert (run.status, run.tasks, run.seconds, run.peak_memory_mb) == (
        "complete",
        3,
        61.0,
        302.0,
    )
    np.testing.assert_allclose(run.personal.average, [0.9, 0.85, 0.8])
    np.testing.assert_allclose(run.personal.learned, [0.9, 0.9, 0.9])
    np.testing.assert_allclose(run.personal.current, [0.7, 0.8, 0.9])
    values = run.measures()
    assert values["accuracy"] == pytest.approx(0.8)
    assert values["accuracy_global"] == pytest.approx(0.4)
    assert values["gap"] == pytest.approx(0.4)
    assert values["forgetting"] == pytest.approx(0.15)
    assert values["forgetting_relative"] == pytest.approx(0.15 / 0.9)
    assert values["backward_transfer"] == pytest.approx(-0.15)
    assert (
        values["bytes"] == 5_500_000
    )  # scoring is measurement: it is not the method's traffic
    assert math.isnan(values["forward_transfer"])
    assert "forward_transfer" not in [
        measure.key for measure in available_measures([values])
    ]
    assert values.keys() == {measure.key for measure in MEASURES}


def test_report_of_a_run(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    page_path = write_report([run], run.path)
    text = page_path.read_text("utf-8")
    page = Page(text)
    assert page_path == run.path / "report.html"
    for shown in (
        "80.0 %",
        "40.0 %",
        "15.0 %",
        "5.5 MB",
        "1.0 min",
        "complete",
        "train.end_task",
        "302.0 MB",
    ):
        assert shown in page.words, shown
    assert "config.toml" in text
    assert 'name = "made"' in " ".join(page.words)
    assert text.count("run with python 3.99, torch 9.9.</footer>") == 1
    names = {path.name for path in (run.path / "plots").iterdir()}
    assert names == {
        f"{n}.png"
        for n in (
            "accuracy",
            "forgetting",
            "matrix",
            "tasks",
            "traffic",
            "loss",
            "seconds",
        )
    }
    for path in (run.path / "plots").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 600


@pytest.mark.parametrize("runs", [1, 3])
def test_a_report_needs_nothing_from_outside(make_run, tmp_path, runs):
    made = [
        make_run(tmp_path / str(seed), {"seed": seed}) for seed in range(runs)
    ]
    text = write_report(made, tmp_path / "out").read_text("utf-8")
    page = Page(text)
    inside = [
        reference[1:]
        for reference in page.references
        if reference.startswith("#")
    ]
    outside = [
        reference
        for reference in page.references
        if not reference.startswith(("#", "data:image/png;base64,"))
    ]
    assert not outside
    assert inside
    assert not set(page.starts) & {"link", "img", "iframe", "object"}
    assert "@import" not in text
    assert set(inside) <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)


def test_plots_take_the_colour_of_the_page(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    text = write_report([run], run.path).read_text("utf-8")
    assert "currentColor" in text
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_run_is_reported_as_far_as_it_got(
    make_run, tmp_path, done
):
    run = make_run(tmp_path / "run", done=done)
    page = Page(write_report([run], run.path).read_text("utf-8"))
    assert "interrupted" in page.words
    assert any(f"{done} of 3 tasks" in words for words in page.words)
    assert summarise(run).tasks == done


def test_a_run_that_has_just_begun(tmp_path):
    with RunFolder.create(tmp_path / "run", read_config({})) as run:
        assert (
            "unfinished"
            in Page(write_report([run], run.path).read_text("utf-8")).words
        )


def test_text_from_a_run_cannot_become_markup(make_run, tmp_path):
    run = make_run(tmp_path / "run", done=1)
    run.append(
        {
            "event": "warning",
            "time": 1e9,
            "reason": "<script>alert(1)</script> & more",
        }
    )
    page = Page(write_report([run], run.path).read_text("utf-8"))
    assert page.starts.count("script") == 1  # the page's own
    assert any(
        "<script>alert(1)</script> & more" in words for words in page.words
    )


def test_the_same_failure_round_after_round_is_one_line(make_run, tmp_path):
    run = make_run(tmp_path / "run", done=1)
    for client in (4, 7):
        for task in range(10):
            for round in range(1, 16):
                reason = f"client {client}, task {task + 1}, round {round}: needs {1000 + task} MB"
                where = {
                    "task": task,
                    "round": round,
                    "client": client,
                    "fault": "out_of_memory",
                }
                run.append(
                    {
                        "event": "failure",
                        "time": 1e9,
                        **where,
                        "kind": "train",
                        "tensor": "",
                        "reason": reason,
                    }
                )
    for clients in ([1], [1, 2], [3]):
        reason = (
            f"no answer to 'train' in time from clients {clients}; the run goes on "
            f"without them"
        )
        run.append(
            {
                "event": "warning",
                "time": 1e9,
                "task": 0,
                "round": 2,
                "clients": clients,
                "reason": reason,
            }
        )
    words = Page(write_report([run], run.path).read_text("utf-8")).words
    assert [line for line in words if " times; " in line] == [
        f"out_of_memory; 150 times; task 1, round 1 to task 10, round 15; "
        f"client {client}, task 10, round 15: needs 1009 MB"
        for client in (4, 7)
    ] + [
        "3 times; task 1, round 2; no answer to 'train' in time from clients "
        "[3]; the run goes on without them"
    ]


def test_a_page_does_not_grow_with_kinds_of_failures(make_run, tmp_path):
    run = make_run(tmp_path / "run", done=1)
    for client in range(500):
        for _ in range(2):
            run.append(
                {
                    "event": "failure",
                    "time": 1e9,
                    "task": 0,
                    "round": 1,
                    "client": client,
                    "reason": "tired",
                }
            )
    page = Page(write_report([run], run.path).read_text("utf-8"))
    assert sum("tired" in words for words in page.words) == 200
    assert "600 more; metrics.jsonl has all" in page.words


def test_more_tasks_than_a_plot_has_room_to_number(tmp_path):
    config = read_config({"data": {"tasks": 30, "clients": 1}})
    scores = Scores(1, 30)
    for task in range(30):
        right = np.where(np.arange(30) <= task, 5.0, np.nan)[None]
        scores.add_task(
            task,
            {"personal": right, "global": right * np.nan},
            np.where(np.isnan(right), np.nan, 10.0),
        )
    with RunFolder.create(tmp_path / "run", config) as run:
        run.write_accuracy(scores.arrays())
        assert (
            "50.0 %"
            in Page(write_report([run], run.path).read_text("utf-8")).words
        )


def test_comparison(make_run, tmp_path):
    runs = [
        make_run(
            tmp_path / f"{learner}-{seed}",
            {"learner": learner, "seed": seed},
            lost=lost + 0.01 * seed,
        )
        for learner, lost in (("fedavg", 0.2), ("fedknow", 0.0))
        for seed in range(3)
    ]
    page = Page(write_report(runs, tmp_path / "out").read_text("utf-8"))
    # Average accuracy after the last task is 0.9 - lost: 70, 69, 68 % and so on; t(0.975, 2) =
    # 4.302653.
    half = 4.302653 * 1.0 / math.sqrt(3)
    assert f"69.0 ± {half:.1f} %" in page.words
    assert f"89.0 ± {half:.1f} %" in page.words
    assert any("95 % interval" in words for words in page.words)
    assert (tmp_path / "out" / "plots" / "accuracy-global.png").is_file()


def test_what_a_run_cost(make_run, tmp_path):
    run = make_run(tmp_path / "run", done=2)
    extra = TRAFFIC | {"train.extra": {"down": 1000, "up": 500, "messages": 4}}
    for knowledge in (100.0, 300.0):
        run.append(
            {
                "event": "task_end",
                "time": 2e9,
                "task": 0,
                "knowledge_bytes": knowledge,
                "seconds": 1.0,
            }
        )
    values = summarise(run).measures()
    assert values["knowledge_bytes"] == 300.0
    assert math.isnan(values["server_bytes"])  # a run of an earlier version
    assert math.isnan(values["client_memory_bytes"])
    assert math.isnan(values["samples"])  # these clients did not say
    assert math.isnan(values["bytes_extra"])
    assert math.isnan(values["flops"])
    for kept, needed in ((500.0, None), (0.0, 80.0)):
        told = {
            "server_bytes": kept,
            "client_memory_bytes": needed,
            "knowledge_bytes": 1.0,
        }
        run.append(
            {"event": "task_end", "time": 2e9, "task": 1, "seconds": 1.0, **told}
        )
    values = summarise(run).measures()
    assert (values["server_bytes"], values["client_memory_bytes"]) == (
        500.0,
        80.0,
    )
    assert values["bytes_evaluate"] == 7_000_010
    for samples in (40.0, 50.0):
        run.append(
            {
                "event": "round",
                "samples": samples,
                "traffic": extra,
                "peak_memory_mb": 1.0,
                "time": 3e9,
            }
        )
    assert math.isnan(
        summarise(run).measures()["samples"]
    )  # one round's are not known: neither is the sum
    rest = {"traffic": extra, "peak_memory_mb": 1.0, "seconds": 1.0, "time": 1.0}
    (run.path / "metrics.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "event": event,
                    **samples,
                    "flops": flops,
                    "knowledge_bytes": 1.0,
                    **rest,
                }
            )
            + "\n"
            for event, flops, samples in (
                ("round", 4e9, {"samples": 45.0}),
                ("round", 5e9, {"samples": 45.0}),
                ("task_end", 1e8, {}),  # of an earlier version
            )
        )
    )
    run = RunFolder.open(run.path)
    values = summarise(run).measures()
    assert (values["samples"], values["bytes"], values["bytes_extra"]) == (
        90.0,
        5_501_500,
        1500,
    )
    assert values["flops"] == 9.1e9
    for samples, total in ((7.0, 97.0), (None, math.nan)):
        run.append(
            {
                "event": "task_end",
                "samples": samples,
                "flops": 0.0,
                "knowledge_bytes": 1.0,
                **rest,
            }
        )
        assert summarise(run).measures()["samples"] == pytest.approx(
            total, nan_ok=True
        )


def test_twenty_methods_side_by_side(make_run, tmp_path):
    names = [f"method-number-{number}" for number in range(20)]
    runs = [
        make_run(
            tmp_path / f"{name}-{seed}",
            {"learner": name, "seed": seed},
            lost=0.01 * place + 0.002 * seed,
        )
        for place, name in enumerate(reversed(names))
        for seed in range(2)
    ]
    page = Page(write_report(runs, tmp_path / "out").read_text("utf-8"))
    rows = [page.words.index(name) for name in names]
    assert rows == sorted(rows, reverse=True)  # the best first
    drawn = (
        (tmp_path / "out" / "report.html")
        .read_text("utf-8")
        .partition("<figure>")[2]
        .partition("</figure>")[0]
    )
    assert all(name in drawn for name in names)  # each line has its name
    stream = io.StringIO()
    Console(file=stream, width=100).print(
        comparison_table(group(map(summarise, runs)))
    )
    lines = stream.getvalue().splitlines()
    cells = [line.split() for line in lines if "method-number" in line]
    assert [row[0] for row in cells] == names[
        ::-1
    ]  # in one piece each, in 100 columns
    assert cells[0][1:3] == ["90.0,", "89.8"]  # two seeds: each, and no interval
    assert "…" not in stream.getvalue()


def test_a_method_that_comes_with_its_strategy_is_called_by_its_own_name(
    make_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(Local, "strategy", "fedyogi")
    trees = [
        {"learner": "local", "strategy": "fedyogi"},
        {"learner": "fedrep"},
        {"learner": "fedper"},
    ]
    groups = group(
        summarise(make_run(tmp_path / str(i), tree))
        for i, tree in enumerate(trees)
    )
    assert [members.label for members in groups] == ["local", "fedrep", "fedper"]


def test_comparison_without_global_scores_and_with_one_seed(make_run, tmp_path):
    runs = [
        make_run(tmp_path / name, {"learner": name}, shared=False)
        for name in ("fedavg", "fedknow")
    ]
    page = Page(write_report(runs, tmp_path / "out").read_text("utf-8"))
    assert any("no interval" in words for words in page.words)
    assert not any(
        "±" in words and "interval" not in words for words in page.words
    )
    assert not (tmp_path / "out" / "plots" / "accuracy-global.png").exists()


def test_runs_are_grouped_by_all_that_changes_a_result_but_the_seed(
    make_run, tmp_path
):
    trees = [
        {"learner": "fedavg", "seed": 0},
        {"learner": "fedavg", "seed": 1, "engine": {"workers": 7}},
        {"learner": "fedavg", "train": {"rounds": 2, "lr": 0.1}},
        {"learner": {"name": "fedknow", "k": 3}, "strategy": "fedadam"},
    ]
    groups = group(
        summarise(make_run(tmp_path / str(i), tree))
        for i, tree in enumerate(trees)
    )
    assert [(members.label, len(members.runs)) for members in groups] == [
        ("fedavg + fedavg (train.lr=0.001)", 2),
        ("fedavg + fedavg (train.lr=0.1)", 1),
        ("fedknow + fedadam", 1),
    ]


def test_a_setting_that_a_run_is_older_than_is_at_its_default(make_run, tmp_path):
    older, newer = (
        {"name": "fedknow", "k": 3},
        {"name": "fedknow", "k": 3, "margin": 0.0},
    )
    runs = [
        make_run(tmp_path / str(i), {"learner": it, "seed": i})
        for i, it in enumerate((older, newer))
    ]
    assert [
        (members.label, len(members.runs))
        for members in group(map(summarise, runs))
    ] == [("fedknow", 2)]


def test_runs_of_different_lengths_are_compared_as_far_as_both_go(
    make_run, tmp_path
):
    runs = [
        make_run(tmp_path / "0", {"seed": 0}),
        make_run(tmp_path / "1", {"seed": 1}, done=2),
    ]
    (members,) = group(map(summarise, runs))
    np.testing.assert_allclose(members.curve("average"), [0.9, 0.85, 0.8])
    points = members.estimates("average")
    assert [point.count for point in points] == [2, 2, 1]
    np.testing.assert_allclose(
        [point.half for point in points], [0.0, 0.0, np.nan], atol=1e-12
    )
    write_report(runs, tmp_path / "out")


def test_a_full_disk_leaves_the_report_that_was_there(
    make_run, tmp_path, monkeypatch
):
    run = make_run(tmp_path / "run")
    before = write_report([run], run.path).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="full"):
        write_report([run], run.path)
    assert (run.path / "report.html").read_bytes() == before
    assert not list(run.path.rglob("*.tmp"))


def test_the_same_run_gives_the_same_plots(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    write_report([run], tmp_path / "a")
    write_report([run], tmp_path / "b")
    for path in (tmp_path / "a" / "plots").iterdir():
        assert (
            path.read_bytes()
            == (tmp_path / "b" / "plots" / path.name).read_bytes()
        )
    made = re.compile(r"Written .* UTC")
    first, second = (
        made.sub("", (tmp_path / name / "report.html").read_text("utf-8"))
        for name in "ab"
    )
    assert first == second


def test_estimate():
    point = estimate([1.0, 2.0, 3.0, 4.0, math.nan])
    assert (point.mean, point.count) == (2.5, 4)
    assert point.half == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-6)
    assert math.isnan(estimate([0.5]).half)
    assert math.isnan(estimate([]).mean)
    assert MEASURES[0].text(math.nan) == "–"
    assert json.dumps(estimate([0.25, 0.75]).mean) == "0.5"


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (2.5e6, "2.5 MB"),
        (7.25e12, "7,250.0 GB"),
    ],
)
def test_size(bytes_, text):
    assert size(bytes_) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "40.0 ms"),
        (0.06, "0.1 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (3599.9, "1 h 0 min"),
        (7380, "2 h 3 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
