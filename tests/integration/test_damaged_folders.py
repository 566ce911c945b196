"""A byte of a run folder is missing, changed or exchanged: the numbers are right, or a sentence
says what is wrong.

The short form tries a few places of each file; the long one (``-m slow``) two hundred.
"""

import random
import re
import shutil

import pytest

from fedknow.protocols.config import read_config
from fedknow.server import serve as serving
from fedknow.server.reports import page
from fedknow.server.reports.summary import summarise
from fedknow.server.run.folder import RunFolder
from fedknow.simulations import simulate as simulations

CONFIG = {
    "data": {"clients": 3, "tasks": 2, "classes_max": 2, "test_samples": 0.5},
    "train": {"rounds": 2, "epochs": 1, "batch_size": 8, "lr": 3e-3},
    "learner": {"name": "fedknow"},
    "strategy": {"name": "fedadam"},  # with a memory of its own
    "engine": {"backend": "inline"},
    "fleet": {"devices": "infinite"},
    "evaluation": {"every": 1},
}
TIMES = re.compile(r"seconds|time|memory")
"""What is another number in each run."""


@pytest.fixture(scope="module", autouse=True)
def no_plots():
    """Pages and plots take longer than these runs; what they are made of is read all the same."""

    def read(runs, *_):
        return [summarise(run).measures() for run in runs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulations, "write_report", read)
        patch.setattr(serving, "write_report", read)
        patch.setattr(
            page,
            "write_report",
            lambda runs, out, *_: read(runs) and out / "report.html",
        )
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run that was interrupted, and the same one at its end."""
    base = tmp_path_factory.mktemp("runs")

    def stop(event):
        if event.event == "round" and event.server_round == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulations.simulate(
            read_config(CONFIG), base / "unfinished", observers=[stop]
        )
    shutil.copytree(base / "unfinished", base / "finished")
    simulations.simulate(read_config(CONFIG), base / "finished", resume=True)
    for name in ("unfinished", "finished"):
        (base / name / "report.html").write_text("<html>")
        (base / name / "plots").mkdir()
        (base / name / "plots" / "accuracy.png").write_bytes(b"PNG" * 20)
    return base


def files(folder):
    """All files, each under the name of its kind: there is one client's state for all."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    )
    states = [path for path in paths if path.parent.name == "clients"]
    kinds = {".part." in path.name: path for path in states}
    return [
        path.relative_to(folder)
        for path in paths
        if path not in states or path in kinds.values()
    ]


def damaged(data, draw):
    """Some bytes with one of four kinds of damage, and which that was."""
    place = draw.randrange(len(data))
    kind = draw.choice(["flipped", "changed", "missing", "short", "exchanged"])
    if kind == "flipped":
        new = (
            data[:place]
            + bytes([data[place] ^ 1 << draw.randrange(8)])
            + data[place + 1 :]
        )
    elif kind == "changed":
        new = data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
    elif kind == "missing":
        new = data[:place] + data[place + 1 :]
    elif kind == "short":
        new = data[:place]
    else:
        other = draw.randrange(len(data))
        swapped = bytearray(data)
        swapped[place], swapped[other] = swapped[other], swapped[place]
        new = bytes(swapped)
    return kind, place, new


def timeless(value):
    """A tree without what is another number in each run."""
    if isinstance(value, dict):
        return {
            key: timeless(item)
            for key, item in value.items()
            if not TIMES.search(key)
        }
    return value


def came_to(folder):
    """All numbers of a finished run but those of time and memory."""
    run = RunFolder.open(folder)
    accuracy = {name: array.tobytes() for name, array in run.accuracy().items()}
    measures = {
        key: repr(value)
        for key, value in summarise(run).measures().items()
        if not TIMES.search(key)
    }
    kinds = ("round", "evaluation", "task_end", "end")
    events = [
        timeless(event) for event in run.events() if event["event"] in kinds
    ]
    return accuracy, measures, events, summarise(run).fleet


def parameters(folder):
    """The final global parameters."""
    [arrays] = folder.glob("checkpoint/checkpoint-*/arrays.safetensors")
    return arrays.read_bytes()


def is_sentence(done):
    """Whether a command was refused as documented: no traceback, a sentence, exit code 1 or 2."""
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (1, 2)
    assert "Error: " in done.stderr
    assert "Traceback" not in done.output
    return True


def check(folders, scratch, fedknow, command, name, draw):
    """Damage one place of a file and give a command."""
    origin = folders / ("unfinished" if command == "resume" else "finished")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(origin, scratch)
    kind, place, data = damaged((scratch / name).read_bytes(), draw)
    (scratch / name).write_bytes(data)
    if command == "resume":
        done = fedknow(
            "simulate",
            scratch / "config.toml",
            "--out",
            scratch,
            "--resume",
            "--quiet",
        )
    else:
        done = fedknow("report", scratch)
    where = f"{command} with {name}, byte {place} {kind}: {done.output}{done.exception!r}"
    try:
        if done.exit_code == 0:
            expected = came_to(folders / "finished")
            if command == "report" and not RunFolder.open(scratch).complete:
                # Nothing but the end is gone, and the page says that the run has not ended.
                assert summarise(RunFolder.open(scratch)).status != "complete"
                assert came_to(scratch)[0] == expected[0]
            else:
                assert came_to(scratch) == expected
            if command == "resume":
                assert parameters(scratch) == parameters(folders / "finished")
        else:
            assert is_sentence(done)
    except Exception as error:
        raise AssertionError(where) from error
    return done.exit_code


@pytest.mark.parametrize("command", ["resume", "report"])
@pytest.mark.parametrize(
    "places",
    [3, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_no_damage_is_taken_for_a_result(
    folders, tmp_path, fedknow, command, places
):
    origin = folders / ("unfinished" if command == "resume" else "finished")
    codes = {}
    for name in files(origin):
        draw = random.Random(f"{command} {name.suffix} {name.parent.name}")
        codes[name] = [
            check(folders, tmp_path / "run", fedknow, command, name, draw)
            for _ in range(places)
        ]
    refused = {name.name for name, found in codes.items() if any(found)}
    harmless = {name.name for name, found in codes.items() if not any(found)}
    assert {"report.html", "accuracy.png", "partition.json"} <= harmless
    assert {"config.toml", "metrics.jsonl"} <= refused


@pytest.mark.parametrize("command", ["resume", "report"])
def test_no_missing_file_is_taken_for_a_result(
    folders, tmp_path, fedknow, command
):
    origin = folders / ("unfinished" if command == "resume" else "finished")
    for name in files(origin):
        scratch = tmp_path / "run"
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(origin, scratch)
        (scratch / name).unlink()
        if command == "resume":
            done = fedknow(
                "simulate",
                scratch / "config.toml",
                "--out",
                scratch,
                "--resume",
                "--quiet",
            )
        else:
            done = fedknow("report", scratch)
        if done.exit_code:
            assert is_sentence(done), name
        elif name.name != "metrics.jsonl" or command == "resume":
            assert came_to(scratch) == came_to(folders / "finished"), name
