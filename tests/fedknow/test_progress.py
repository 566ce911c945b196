import io
import math
from dataclasses import replace

from rich.console import Console

from fedknow.progress import RunProgress
from fedknow.protocols.config import read_config
from fedknow.server.run.events import (
    ClientFailed,
    Evaluated,
    OtherEvent,
    RoundEnded,
    RunInterrupted,
    RunStarted,
    VirtualTime,
    Warned,
)

CONFIG = read_config({"data": {"tasks": 2}, "train": {"rounds": 2}})


def events():
    yield RunStarted(
        time=100.0, clients=8, tasks=2, rounds=2, travelling=1, bytes=4,
        learner="fedavg", strategy="fedavg", partition="",
    )  # fmt: skip
    done = 0
    for task in range(2):
        for round in (1, 2):
            done += 1
            yield RoundEnded(
                time=100.0 + 10 * done, task=task, round=round, server_round=done,
                clients=8, loss=0.5, accuracy=math.nan, seconds=9.5, traffic={},
            )  # fmt: skip
        yield Evaluated(
            time=101.0 + 10 * done, task=task, round=2, accuracy=0.75,
            accuracy_global=0.5 if task else math.nan,
            forgetting=0.125 if task else math.nan, per_task=(0.75,), seconds=1.0,
        )  # fmt: skip
    yield ClientFailed(
        time=150.0, fault="failed", client=3, task=0, round=2, kind="train", tensor="",
        reason="client 3, task 1, round 2 (train): [boom]",
    )  # fmt: skip
    yield Warned(time=151.0, reason="nothing aggregated")
    yield OtherEvent(time=151.0, values={"event": "something_new"})
    yield RunInterrupted(time=152.0, task=1, round=2)


def at(seconds, event):
    """The event of a run whose clients have devices, at a moment of virtual time."""
    return replace(event, elapsed=VirtualTime(seconds, 0.0, seconds))


def shown(terminal: bool, title: str = "") -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=80)
    with RunProgress(CONFIG, console, title) as progress:
        for event in events():
            progress(event)
    return stream.getvalue()


def test_a_log_gets_one_plain_line_an_event():
    assert shown(terminal=False).splitlines() == [
        "[   10.0 s] task 1/2 round 1/2: loss 0.500, 8 clients, 9.5 s",
        "[   20.0 s] task 1/2 round 2/2: loss 0.500, 8 clients, 9.5 s; about 20.0 s left",
        "[   21.0 s] task 1/2 after round 2/2: accuracy 75.0 %",
        "[   30.0 s] task 2/2 round 1/2: loss 0.500, 8 clients, 9.5 s; about 10.0 s left",
        "[   40.0 s] task 2/2 round 2/2: loss 0.500, 8 clients, 9.5 s; about 0.0 s left",
        "[   41.0 s] task 2/2 after round 2/2: accuracy 75.0 %, global model "
        "50.0 %, forgetting 12.5 %",
        "[   50.0 s] failed: client 3, task 1, round 2 (train): [boom]",
        "[   51.0 s] warning: nothing aggregated",
        "[   52.0 s] interrupted",
    ]


def test_with_times_of_tasks_what_is_left_is_told_from_virtual_time():
    config = read_config(
        {
            "data": {"tasks": 2, "arrival_seconds": 50},
            "train": {"rounds": 9},
            "fleet": {"devices": "infinite"},
        }
    )
    stream = io.StringIO()
    with RunProgress(config, Console(file=stream, width=80)) as progress:
        start, first, second, _, _, last, *_ = events()
        progress(start)
        progress(at(20.0, first))
        progress(at(40.0, second))
        progress(at(104.0, last))  # it takes longer than there is time
    assert stream.getvalue().splitlines() == [
        "[   10.0 s] task 1/2 round 1: loss 0.500, 8 clients, 9.5 s",
        "[   20.0 s] task 1/2 round 2: loss 0.500, 8 clients, 9.5 s; about 30.0 s left",
        "[   40.0 s] task 2/2 round 2: loss 0.500, 8 clients, 9.5 s; about 0.0 s left",
    ]


def test_runs_of_a_comparison_are_told_apart():
    assert all(
        line.startswith("fedknow seed 1 (4/6): [")
        for line in shown(False, "fedknow seed 1 (4/6)").splitlines()
    )


def test_a_terminal_gets_a_bar_and_the_evaluations():
    text = shown(terminal=True)
    assert "\x1b[" in text
    assert "100 %" in text
    assert "task 2/2 round 2/2 accuracy 75.0 %" in text
    assert "accuracy 75.0 %" in text
    assert "[boom]" in text


def test_accuracies_are_in_percent_and_one_client_is_one():
    stream = io.StringIO()
    with RunProgress(CONFIG, Console(file=stream, width=80)) as progress:
        progress(next(events()))
        progress(replace([*events()][1], clients=1, accuracy=0.948))
    assert stream.getvalue().splitlines() == [
        "[   10.0 s] task 1/2 round 1/2: loss 0.500, training accuracy 94.8 %, 1 client, 9.5 s",
    ]
