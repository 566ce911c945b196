"""What goes wrong is said in a sentence that names it and what to do, and nothing that was earned
is lost."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from fedknow.client import state
from fedknow.protocols import files
from fedknow.protocols.config import read_config
from fedknow.protocols.seeds import integer
from fedknow.server.run.checkpoint import load_checkpoint
from fedknow.server.run.folder import RunFolder

pytestmark = pytest.mark.usefixtures("no_report")

TINY = (
    "data.clients=3", "data.tasks=2", "data.classes_max=2", "train.rounds=2",
    "train.epochs=1", "model=mlp",
    "model.hidden=16", "engine.backend=inline", "learner=fedavg", "strategy.fraction=1.0",
)  # fmt: skip
CLIENT, TASK, ROUND = 1, 1, 2
"""Whose reply is spoiled, and when: the fourth round of four."""


@pytest.fixture
def simulate(folder, fedknow):
    """Run ``fedknow simulate digits`` with tiny settings in a folder of its own."""

    def run(*changes, out="run", arguments=()):
        done = fedknow(
            "simulate",
            "digits",
            "--out",
            out,
            *arguments,
            changes=[*TINY, *changes],
        )
        assert "Traceback" not in done.output
        return done

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, fedknow, numbers):
    """Numbers of undisturbed runs, by learner."""
    found = {}
    for learner in ("fedavg", "fedknow"):
        path = tmp_path_factory.mktemp("whole") / learner
        done = fedknow(
            "simulate",
            "digits",
            "--out",
            path,
            changes=[*TINY, f"learner={learner}"],
        )
        assert done.exit_code == 0, done.output
        found[learner] = numbers(path)
    return found


def go_on(done, fedknow):
    """Do what the message says: the command it gives."""
    hint = re.search(
        r"Go on with: fedknow (simulate .* --resume)$", done.stderr, re.M
    )
    assert hint is not None, done.stderr
    return fedknow(*hint[1].split())


def odd(folder, round=ROUND):
    """The client misbehaves in this round from now on."""
    path = folder / "odd"
    path.write_text(str(integer(0, "train", CLIENT, TASK, round)))
    return path


# --- what is refused before anything runs
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.name=cifar100", "data.dir=nowhere"],
            ["data.dir = 'nowhere'", "no such folder", "cifar100/train-*"]),
        (["data.name=cifar100", "data.dir=empty"],
            ["no cifar100/train-*.parquet", "it holds: nothing", "--data-dir"]),
        (["data.name=cifar100", "data.dir=odd"],
            ["column 'fine_label' is missing", "found: img, label"]),
        (["data.name=digit"], ["data.name = 'digit'", "did you mean 'digits'"]),
        (["data.tasks=11"], ["data.tasks = 11", "digits has 10"]),
        (["data.partition=iid", "data.clients=999"],
            ["data.clients = 999", "every client", "set data.clients to "]),
        (["data.partition=dirichlet", "data.clients=999"],
            ["data.clients = 999", "set data.clients to "]),
        (["data.share=disjoint", "data.clients=999"],
            ["data.clients = 999", 'or let clients', "data.share"]),
        (["data.classes_min=4"],
            ["data.classes_min = 4", "data.classes_max = 2", "lower the first"]),
        (["learner=fedknw"], ["learner.name = 'fedknw'", "did you mean 'fedknow'"]),
        (["learner=fedknow", "learner.roh=0.2"], ["learner.roh", "did you mean 'rho'"]),
        (["learner=fedknow", "learner.rho=2"], ["learner.rho = 2", "less than or equal to 1"]),
        (["strategy=fedadm"], ["strategy.name = 'fedadm'", "did you mean 'fedadam'"]),
        (["strategy.fractoin=0.2"], ["strategy.fractoin", "no such option"]),
        (["strategy.fraction=7"], ["strategy.fraction_train = 7", "at most 1"]),
        (["strategy.min_train_nodes=7"], ["min_train_nodes = 7", "data.clients = 3", "lower"]),
        (["model=cnn9"], ["model.name = 'cnn9'", "mlp"]),
        (["model.hiden=3"], ["model.hiden", "did you mean 'hidden'"]),
        (["model.hidden=-1"], ["model.hidden = -1", "greater than or equal to 1"]),
        (["train.lr=nan"], ["train.lr = nan"]),
        (["train.rounds=0"], ["train.rounds = 0", "greater than or equal to 1"]),
        (["train.optimizer=sdg"], ["train.optimizer = 'sdg'", "'sgd', 'adam' or 'adamw'"]),
        (["train.round=2"], ["train.round: unknown key", "did you mean 'rounds'"]),
        (["trian.rounds=2"], ["trian: unknown key", "did you mean 'train'"]),
        (["train.rounds"], ["'train.rounds'", "write key=value"]),
        (["learner=odd_parts:Missing"], ["learner.name = 'odd_parts:Missing'", "has no 'Missing'"]),
        (["strategy=no_parts:Odd"],
            ["strategy.name = 'no_parts:Odd'", "No module named 'no_parts'"]),
        (["learner=odd_parts:RefusesToo"],
            ["learner.name = 'odd_parts:RefusesToo'", "LookupError: no licence (odd_p"]),
        (["strategy=odd_parts:Refuses"],
            ["strategy odd_parts:Refuses", "LookupError: no licence (odd_parts.py, line"]),
        (["model=odd_parts:no_model"],
            ["model.name = 'odd_parts:no_model'", "RuntimeError", "(odd_parts.py, line "]),
        (["data.name=odd_parts:no_data"],
            ["data.name = 'odd_parts:no_data'", "LookupError: no licence (odd_parts.py"]),
    ],
)  # fmt: skip
def test_refused_before_anything_runs(folder, simulate, changes, words):
    (folder / "empty").mkdir()
    (folder / "odd" / "cifar100").mkdir(parents=True)
    for part in ("train", "test"):
        parquet.write_table(
            pa.table({"img": [b""], "label": [0]}),
            folder / "odd" / "cifar100" / f"{part}-0.parquet",
        )
    done = simulate(*changes)
    assert done.exit_code == 2, done.output
    for word in words:
        assert word in done.stderr
    assert not (folder / "run").exists()


def test_an_unknown_preset(folder, fedknow):
    done = fedknow("simulate", "digit")
    assert done.exit_code == 2
    assert "did you mean 'digits'" in done.stderr
    assert not list(folder.iterdir())


# --- users' parts at fault in the middle of a run
# -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            "strategy=odd_parts:ReturnsNone",
            [
                "strategy odd_parts:ReturnsNone",
                "returned nothing (None)",
                "a pair",
            ],
        ),
        (
            "strategy=odd_parts:Divides",
            [
                "aggregate_train, task 2, round 1",
                "ZeroDivisionError",
                "(odd_parts.py, li",
            ],
        ),
        (
            "learner=odd_parts:Raises",
            [
                "client 1, task 2, round 2",
                "ValueError: out of ideas (odd_parts.py, line ",
            ],
        ),
        (
            "learner=odd_parts:Poisons",
            [
                "client 1, task 2, round 2",
                "head.weight: NaN or infinite in 1 of ",
            ],
        ),
        (
            "learner=odd_parts:Reshapes",
            ["client 1, task 2, round 2", "head.bias has shape (3,), not (4,)"],
        ),
    ],
)
def test_the_run_stops_and_can_go_on_when_the_fault_is_mended(
    folder, simulate, fedknow, numbers, whole, part, words
):
    fault = odd(folder)
    done = simulate(part)
    assert done.exit_code == 1, done.output
    for word in words:
        assert word in done.stderr
    if part.startswith("learner"):
        assert "--set engine.on_client_error=skip" in done.stderr
        assert RunFolder.open("run").events()[-1]["client"] == CLIENT
    assert "RunError" in Path("run/error.log").read_text()
    earned = load_checkpoint(Path("run/checkpoint"))
    assert earned.server_round == (2 if part.startswith("strategy") else 3)
    fault.unlink()
    assert go_on(done, fedknow).exit_code == 0
    assert numbers("run") == whole["fedavg"]


@pytest.mark.parametrize("learner", ["Raises", "Poisons", "Reshapes"])
def test_or_the_client_is_left_out(folder, simulate, learner):
    odd(folder, round=1)
    done = simulate(f"learner=odd_parts:{learner}", "engine.on_client_error=skip")
    assert done.exit_code == 0, done.output
    events = RunFolder.open("run").events()
    assert [
        event["client"] for event in events if event["event"] == "failure"
    ] == [CLIENT]
    assert [
        (e["clients"], e["failures"]) for e in events if e["event"] == "round"
    ] == [
        (3, 0),
        (3, 0),
        (2, 1),
        (3, 0),
    ]
    assert "failed: client 1, task 2, round 1" in done.stdout
    assert all(
        np.isfinite(array).all()
        for array in load_checkpoint(Path("run/checkpoint")).arrays.values()
    )


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (
            "Forgets",
            "failed in state_dict, task 1, round 1: KeyError: 'momentum'",
        ),
        ("Empties", "body.1.weight"),
    ],
)
def test_a_strategy_at_fault_from_the_beginning(simulate, strategy, words):
    done = simulate(f"strategy=odd_parts:{strategy}")
    assert done.exit_code == 1
    assert f"strategy odd_parts:{strategy}" in done.stderr
    assert words in done.stderr
    assert load_checkpoint(Path("run/checkpoint")) is None


# --- the disk
# --------------------------------------------------------------------------------------


class Disk:
    """Stands for ``open`` where files are written whole: takes so many bytes, then is full."""

    def __init__(self, room):
        self.left = room

    def __call__(self, path, mode):
        disk, file = self, open(path, mode)  # noqa: SIM115 (whoever asked closes it)
        real = file.write

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, data):
                real(data[: disk.left])
                if len(data) > disk.left:
                    raise OSError(errno.ENOSPC, "No space left on device")
                disk.left -= len(data)

        return Full()


@pytest.mark.parametrize("room", [0, 5_000, 40_000, 80_000, 120_000])
def test_a_full_disk(simulate, fedknow, numbers, whole, monkeypatch, room):
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", Disk(room), raising=False)
        done = simulate("learner=fedknow")
    assert done.exit_code == 1, done.output
    assert "the disk that holds run is full" in done.stderr
    assert "make room, then go on with --resume" in done.stderr
    assert not list(Path("run").rglob("*.tmp"))
    done = go_on(done, fedknow) if room else simulate("learner=fedknow")
    assert done.exit_code == 0, done.output
    assert numbers("run") == whole["fedknow"]


def test_a_really_full_disk(folder, fedknow, numbers, whole):
    script = """
    mkdir small && mount -t tmpfs -o size=100k none small || exit 77
    "$@" --out small/run; echo "exit $?"
    mount -o remount,size=50m small && cp -r small/run kept
    """
    command = [sys.executable, "-m", "fedknow", "simulate", "digits", "-q"]
    changes = [
        part
        for change in (*TINY, "learner=fedknow")
        for part in ("--set", change)
    ]
    line = [
        "unshare",
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        script,
        "sh",
        *command,
        *changes,
    ]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here to make a small disk with")
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    if "exit " not in done.stdout:
        pytest.skip(f"no small disk can be made here: {done.stderr}")
    assert done.stdout == "exit 1\n", done.stderr
    assert "the disk that holds small/run is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert load_checkpoint(Path("kept/checkpoint")).server_round >= 1
    resumed = fedknow("simulate", "kept/config.toml", "--out", "kept", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert numbers("kept") == whole["fedknow"]


# --- killed while it writes
# -----------------------------------------------------------------------------------------


def killed(parts, folder, kills):
    """Exit codes of processes that each go on with a run, and die in the middle of the n-th file
    they write."""
    arguments = ["simulate", "digits", "-q"]
    arguments += [
        part
        for change in (*TINY, "learner=fedknow")
        for part in ("--set", change)
    ]
    line = [
        sys.executable,
        parts / "killed.py",
        json.dumps(arguments),
        json.dumps(kills),
    ]
    done = subprocess.run(
        line, capture_output=True, text=True, cwd=folder, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return [
        int(line)
        for line in done.stdout.splitlines()
        if line.lstrip("-").isdigit()
    ]


def test_killed_in_mid_write_again_and_again(folder, parts, numbers, whole):
    # Of 44 files; a round has 8. Config, before the first round, a client, a checkpoint, after
    # a resume, ...
    codes = killed(
        parts,
        folder,
        [("run", kill) for kill in (1, 2, 4, 13, 3, 9, 16, 1, 8, 0)],
    )
    assert codes == [-9] * 9 + [0]
    assert numbers("run") == whole["fedknow"]
    resumed = [
        event["resumed_from"]
        for event in RunFolder.open("run").events()
        if event["event"] == "start"
    ]
    assert len(resumed) > 2
    assert not list(Path("run").rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_in_every_fourth_write(folder, parts, numbers, whole):
    codes = killed(
        parts,
        folder,
        [(f"run{kill}", n) for kill in range(1, 70, 4) for n in (kill, 0)],
    )
    writes = codes[::2].index(
        0
    )  # the first run that was over before its turn to be killed
    assert writes > 8
    assert codes[: 2 * writes] == [-9, 0] * writes
    for kill in range(1, 4 * writes, 4):
        assert numbers(f"run{kill}") == whole["fedknow"]


# --- the run folder
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(folder, simulate):
    """A run with three of four rounds done, which a fault ended; the fault is mended."""
    fault = odd(folder)
    assert simulate("learner=odd_parts:Raises").exit_code == 1
    fault.unlink()
    return Path("run")


def test_a_run_folder_is_never_overwritten(unfinished, simulate):
    Path("notes").mkdir()
    Path("notes/notes.txt").write_text("mine")
    before = {
        path: path.read_bytes()
        for path in unfinished.rglob("*")
        if path.is_file()
    }
    for out, words in (
        ("run", "holds an unfinished run; go on with it by --resume"),
        ("notes", "is no empty folder"),
    ):
        done = simulate(out=out)
        assert done.exit_code == 2
        assert words in done.stderr
        assert "--out" in done.stderr
    assert {
        path: path.read_bytes()
        for path in unfinished.rglob("*")
        if path.is_file()
    } == before
    assert Path("notes/notes.txt").read_text() == "mine"


def test_resuming_with_other_settings(unfinished, simulate):
    done = simulate(
        "learner=odd_parts:Raises",
        "train.lr=0.5",
        "data.clients=4",
        arguments=["--resume"],
    )
    assert done.exit_code == 2
    assert "data.clients: was 3, now 4" in done.stderr
    assert "train.lr: was 0.001, now 0.5" in done.stderr
    assert "choose another --out" in done.stderr
    # How it is run is not what is run.
    done = simulate(
        "learner=odd_parts:Raises", "engine.memory_mb=16", arguments=["--resume"]
    )
    assert done.exit_code == 0, done.output


def test_resuming_what_is_complete_or_not_there(simulate):
    done = simulate(arguments=["--resume"])
    assert done.exit_code == 2
    assert "run holds no run" in done.stderr
    assert simulate().exit_code == 0
    for arguments, words in (
        (["--resume"], "nothing to resume (its report: fedknow report run)"),
        ([], "finished run"),
    ):
        done = simulate(arguments=arguments)
        assert done.exit_code == 2
        assert words in done.stderr


def test_two_runs_in_one_folder_at_once(unfinished, simulate):
    config = read_config(unfinished / "config.toml")
    with RunFolder.resume(unfinished, config):  # as another process would
        for arguments in ([], ["--resume"]):
            done = simulate("learner=odd_parts:Raises", arguments=arguments)
            assert done.exit_code == 2
            assert (
                "in use by a run that is going on; choose another --out"
                in done.stderr
            )
    assert (
        simulate("learner=odd_parts:Raises", arguments=["--resume"]).exit_code
        == 0
    )


@pytest.mark.parametrize(
    "name", ["latest", "state.safetensors", "arrays.safetensors"]
)
def test_a_damaged_checkpoint(unfinished, simulate, name):
    [path] = (unfinished / "checkpoint").rglob(name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    path.write_bytes(data)
    done = simulate("learner=odd_parts:Raises", arguments=["--resume"])
    assert done.exit_code == 1, done.output
    assert "the checkpoint cannot be read" in done.stderr
    assert "start again with another --out" in done.stderr
    assert "Go on with" not in done.stderr


def test_a_damaged_client_state(folder, fedknow, simulate):
    odd(folder)
    assert simulate("learner=fedper", "strategy=odd_parts:Divides").exit_code == 1
    versions = load_checkpoint(Path("run/checkpoint")).versions
    path = state.StateStore("run/clients", 0).path(2, versions[2])
    path.write_bytes(path.read_bytes()[:-1])
    done = simulate(
        "learner=fedper", "strategy=odd_parts:Divides", arguments=["--resume"]
    )
    assert done.exit_code == 1
    assert f"{path}: not a readable client state" in done.stderr
    assert (
        "go on with --resume after fedknow forget run --client 2" in done.stderr
    )
    assert "Go on with" not in done.stderr


def test_a_line_half_written(unfinished, simulate, numbers, whole):
    with (unfinished / "metrics.jsonl").open("a") as file:
        file.write('{"event": "rou')
    assert (
        simulate("learner=odd_parts:Raises", arguments=["--resume"]).exit_code
        == 0
    )
    assert numbers(unfinished) == whole["fedavg"]
    assert [
        e["server_round"]
        for e in RunFolder.open("run").events()
        if e["event"] == "round"
    ] == [1, 2, 3, 4]
