import io

from rich.console import Console

from fedknow.progress import RunProgress
from fedknow.protocols.config import read_config

CONFIG = read_config({"data": {"tasks": 2}, "train": {"rounds": 2}})


def events():
    yield {"event": "start", "time": 100.0, "resumed_from": None}
    done = 0
    for task in range(2):
        for round in (1, 2):
            done += 1
            yield {
                "event": "round", "time": 100.0 + 10 * done, "task": task, "round": round,
                "server_round": done,
                "clients": 8, "loss": 0.5, "accuracy": None, "seconds": 9.5, "failures": 0,
            }  # fmt: skip
        yield {
            "event": "evaluation", "time": 101.0 + 10 * done, "task": task, "round": 2,
            "accuracy": 0.75,
            "accuracy_global": 0.5 if task else None, "forgetting": 0.125 if task else None,
        }  # fmt: skip
    yield {
        "event": "failure",
        "time": 150.0,
        "reason": "client 3, task 1, round 2 (train): [boom]",
    }
    yield {"event": "warning", "time": 151.0, "reason": "nothing aggregated"}
    yield {"event": "something_new", "time": 151.0}
    yield {"event": "interrupted", "time": 152.0, "task": 1, "round": 2}


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
        for event in [*events()][:3]:
            progress({**event, "virtual_seconds": 20.0 * event.get("server_round", 0)})
        progress(
            {**[*events()][5], "virtual_seconds": 104.0}
        )  # the last round takes longer than there is time
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
        progress({**next(events()), "clients": 1})
        progress({**[*events()][1], "clients": 1, "accuracy": 0.948})
    assert stream.getvalue().splitlines() == [
        "[   10.0 s] task 1/2 round 1/2: loss 0.500, training accuracy 94.8 %, 1 client, 9.5 s",
    ]
