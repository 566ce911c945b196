"""The same experiment gives the same numbers, bit for bit, wherever it runs and whatever happens
to it on the way."""

import functools
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import psutil
import pytest
import ray

from fedknow.client.state import StateStore
from fedknow.protocols.config import read_config
from fedknow.server.run.folder import RunFolder
from fedknow.simulations import simulate as simulations
from fedknow.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_report")

BASE = {
    "data": {"clients": 6, "tasks": 2, "classes_max": 2, "test_samples": 0.5},
    "train": {"rounds": 2, "epochs": 2, "batch_size": 8, "lr": 3e-3},
}
EXPERIMENTS = {
    "fedknow": ["data.tasks=3", "strategy.fraction=0.5"],
    "fedper, normed": ["learner=fedper", "model=odd_parts:Normed"],
    "fedavg, normed": [
        "learner=fedavg",
        "model=odd_parts:Normed",
        "strategy=fedadam",
    ],
    "fedweit": [
        "learner=fedweit",
        "strategy.fraction=0.5",
    ],  # more than parameters passes, and not to all
    # Sums come in rounds and when a task is over, and the server solves at both.
    "afcl": [
        "learner=afcl",
        "model.train=head",
        "model.random_features=64",
        "data.scenario=class-incremental",
        "strategy.fraction=0.3",
    ],
    "class-incremental": [
        "data.scenario=class-incremental",
        "data.task_order=shuffled",
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, parts):
    """Current folder of this process and of Ray's workers; all runs lie in it."""
    path = tmp_path_factory.mktemp("identity")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(parts)
        patch.setenv("PYTHONPATH", str(parts))
        yield path


@pytest.fixture(scope="module")
def cluster(place):
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
    )
    yield
    ray.shutdown()


def experiment(name, *changes):
    return read_config(BASE, [*EXPERIMENTS[name], *changes])


@pytest.fixture(scope="module")
def expected(place, numbers):
    """Numbers of an experiment that ran undisturbed in one process.

    Its folder is called otherwise than the package, which it would stand before on the workers'
    path.
    """

    @functools.cache
    def of(name):
        return numbers(
            simulate(
                experiment(name, "engine.backend=inline"),
                place / f"{name}, inline",
            ).folder
        )

    return of


@contextmanager
def fifo(path):
    """A FIFO at a path, and its read end."""
    os.mkfifo(path)
    end = os.open(path, os.O_RDWR)  # reading alone would wait for a writer
    try:
        yield end
    finally:
        os.close(end)


def told(end):
    """The pid that comes through a FIFO."""
    ready, _, _ = select.select([end], [], [], 120)
    assert ready, "nobody came to the place where it should wait"
    return int(os.read(end, 32))


def once(kind, task):
    """An observer that interrupts at a task's first event of a kind."""
    seen = []

    def observe(event):
        if event.event == kind and event.task == task and not seen:
            seen.append(event)
            raise KeyboardInterrupt

    return observe


def test_the_experiments_say_something(expected, place):
    for name in EXPERIMENTS:
        expected(name)
        accuracy = RunFolder.open(place / f"{name}, inline").accuracy()
        assert accuracy["personal"][:, :, -1].max() > 0.55  # guessing gives 0.5
        assert len(np.unique(accuracy["personal"][:, :, -1])) > 2
    assert len({expected(name)["parameters"] for name in EXPERIMENTS}) == len(
        EXPERIMENTS
    )


def test_the_command_gives_the_same_numbers(
    expected, tmp_path, place, numbers, fedknow
):
    name = "fedper, normed"
    (tmp_path / "same.toml").write_text(experiment(name).to_toml())
    done = fedknow(
        "simulate",
        tmp_path / "same.toml",
        "--out",
        tmp_path / "run",
        "--quiet",
        changes=["engine.backend=inline"],
    )
    assert done.exit_code == 0, done.output
    assert numbers(tmp_path / "run") == expected(name)


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        *(
            ("fedknow", workers) for workers in (1, 4)
        ),  # and with two, of which some are killed, below
        *((name, 2) for name in EXPERIMENTS if name != "fedknow"),
    ],
)
def test_workers_do_not_matter(
    cluster, expected, tmp_path, numbers, name, workers
):
    result = simulate(
        experiment(name, f"engine.workers={workers}"), tmp_path / "run"
    )
    assert numbers(result.folder) == expected(name)


def test_whether_states_are_at_hand_or_read_back_does_not_matter(
    expected, tmp_path, numbers, monkeypatch
):
    monkeypatch.setattr(
        simulations,
        "open_states",
        lambda folder, memory, durable: StateStore(folder, 0, durable),
    )
    result = simulate(
        experiment("fedknow", "engine.backend=inline"), tmp_path / "run"
    )
    assert numbers(result.folder) == expected("fedknow")


def a_worker():
    """The id of a worker's process; on a busy machine a new one may not have its name yet."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.name().startswith("ray::Worker"):
                    return process.pid
        time.sleep(0.01)
    raise AssertionError("no worker has come")


def test_workers_killed_at_work_and_between_rounds_do_not_matter(
    cluster, expected, tmp_path, place, numbers
):
    at_work, idle = [], []

    def kill(end):
        at_work.append(told(end))
        os.kill(at_work[0], signal.SIGKILL)

    def kill_one(event):
        if event.event == "round" and event.server_round in (
            2,
            5,
        ):  # the one at work is killed in round 4
            idle.append(a_worker())
            os.kill(idle[-1], signal.SIGKILL)

    with fifo(place / "waiting") as end:
        killer = threading.Thread(target=kill, args=[end], daemon=True)
        killer.start()
        config = experiment(
            "fedknow", "learner=odd_parts:Waits", "engine.workers=2"
        )
        result = simulate(config, tmp_path / "run", observers=[kill_one])
        killer.join()
    assert at_work != [os.getpid()]
    assert len({*at_work, *idle}) == 3
    assert not os.path.exists(place / "waiting")
    assert numbers(result.folder) == expected("fedknow")


@pytest.mark.parametrize(
    ("name", "kind", "task", "first", "second"),
    [
        ("fedknow", "round", 1, "inline", "inline"),
        ("fedknow", "evaluation", 1, "ray", "inline"),
        ("fedknow", "task_end", 0, "inline", "ray"),
        ("fedper, normed", "round", 1, "inline", "inline"),
        ("class-incremental", "round", 0, "inline", "inline"),
    ],
)
def test_an_interrupt_does_not_matter(
    cluster, expected, tmp_path, numbers, name, kind, task, first, second
):
    engines = (
        [f"engine.backend={first}", "engine.workers=2"],
        [f"engine.backend={second}", "engine.workers=1"],
    )
    with pytest.raises(KeyboardInterrupt):
        simulate(
            experiment(name, *engines[0]),
            tmp_path / "run",
            observers=[once(kind, task)],
        )
    result = simulate(
        experiment(name, *engines[1]), tmp_path / "run", resume=True
    )
    assert numbers(result.folder) == expected(name)


def test_ctrl_c_on_a_real_run_does_not_matter(
    expected, tmp_path, parts, numbers, fedknow, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(
        parts / "odd_parts.py", tmp_path
    )  # as a user has it: in the current folder
    (tmp_path / "waits.toml").write_text(
        experiment(
            "fedknow", "learner=odd_parts:Waits", "engine.workers=2"
        ).to_toml()
    )
    with fifo(tmp_path / "waiting") as end:
        command = [
            sys.executable,
            "-m",
            "fedknow",
            "simulate",
            "waits.toml",
            "--out",
            "run",
        ]
        run = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        told(end)
        os.killpg(run.pid, signal.SIGINT)  # a terminal sends it to all there is
        out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "Traceback" not in out + err
    assert RunFolder.open("run").events()[-1] == RunFolder.open("run").events()[-1] | {
        "event": "interrupted", "task": 1, "round": 1,
    }  # fmt: skip
    hint = re.search(r"fedknow (simulate .* --resume)$", err, re.M)
    assert hint is not None, err
    resumed = fedknow(*hint[1].split(), changes=["engine.backend=inline"])
    assert resumed.exit_code == 0, resumed.output
    assert "resumed after round 3" in resumed.stdout
    assert numbers("run") == expected("fedknow")
