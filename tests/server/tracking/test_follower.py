import logging
import sys
import threading
import time
from pathlib import Path

import pytest

from fedknow.protocols.config import ConfigError, ExperimentConfig, TrackingConfig
from fedknow.server.run.events import Evaluated, RunInterrupted, RunStarted
from fedknow.server.run.folder import RunFolder
from fedknow.server.tracking import TrackedRun, following
from fedknow.server.tracking.follower import Follower, former_ids, store_id
from fedknow.simulations.simulate import simulate

STARTED = RunStarted(
    clients=3,
    tasks=2,
    rounds=2,
    travelling=4,
    bytes=16,
    learner="fedavg",
    strategy="fedavg",
    partition="",
)
EVALUATED = Evaluated(
    task=0,
    round=1,
    accuracy=0.5,
    accuracy_global=0.25,
    forgetting=0.0,
    per_task=(0.5,),
    seconds=1.0,
)


@pytest.fixture(autouse=True)
def pretended(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sys.modules.pop("pretended", None)
    import pretended

    pretended.Keeping.told = []
    yield pretended
    pretended.Blocking.forever.set()


def tracked(config, *names, wait=5.0):
    return config.model_copy(
        update={"tracking": TrackingConfig(to=list(names), wait=wait)}
    )


def test_a_tracker_is_told_all(config, plain, pretended, tmp_path):
    simulate(
        tracked(config, "pretended:Keeping"), tmp_path / "mine", report=False
    )
    (_, run), *rest = pretended.Keeping.told
    assert (run.name, run.project, run.step, run.former) == (
        "mine",
        "digits",
        0,
        "",
    )
    assert run.config.learner.name == "fedavg"
    assert rest[-1] == ("finish", "complete")
    steps = [step for step, _ in rest[:-1]]
    assert steps == [1, 2, 2, 2, 3, 4, 4, 4, 4]  # rounds, evaluations, ends
    names = set().union(*(numbers for _, numbers in rest[:-1]))
    assert {
        "round/loss",
        "round/traffic/up",
        "evaluation/per_task/2",
        "end/forgetting",
    } <= names
    assert former_ids(tmp_path / "mine") == {"pretended:Keeping": "its-id"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "pretended:Raising",
            "failed: SystemExit: the tracker's machine is down",
        ),
        ("pretended:Blocking", "did not take all numbers in time"),
        ("pretended:Slow", "did not take all numbers in time"),
    ],
)
def test_it_changes_no_byte_and_costs_one_line(
    config, plain, tmp_path, caplog, name, text
):
    begin = time.monotonic()
    simulate(config, tmp_path / "again", report=False)
    alone = time.monotonic() - begin
    begin = time.monotonic()
    run = tmp_path / "run"
    with caplog.at_level(logging.WARNING, "fedknow"):
        simulate(tracked(config, name, wait=0.1), run, report=False)
    # The machine of the tests is a busy one.
    assert time.monotonic() - begin < 3 * alone + 5
    (record,) = caplog.records
    assert text in record.getMessage()
    assert f"fedknow track {run} --to {name}" in record.getMessage()
    for file in ("accuracy.npz", "config.toml", "partition.json"):
        assert (run / file).read_bytes() == (plain / file).read_bytes()
    events = [event["event"] for event in RunFolder.open(run).events()]
    assert events == [event["event"] for event in RunFolder.open(plain).events()]


def test_a_full_queue_costs_numbers_and_one_line(
    config, pretended, tmp_path, caplog
):
    blocking = pretended.Blocking()
    run = TrackedRun("run", "project", tmp_path, config)
    follower = Follower("blocking", blocking, run, size=3)
    with caplog.at_level(logging.WARNING, "fedknow"):
        for event in [STARTED, *[EVALUATED] * 10]:
            follower(event)
        follower.end("complete")
        follower.join(0)
    (record,) = caplog.records
    assert "is too slow and lacks numbers" in record.getMessage()


def test_one_that_blocks_does_not_keep_others_from_finishing(
    config, pretended, tmp_path, caplog
):
    finished = threading.Event()

    class Patient(pretended.Keeping):
        def finish(self, status):
            finished.wait(0.2)
            super().finish(status)

    trackers = {"blocking": pretended.Blocking(), "patient": Patient()}
    asked = TrackingConfig(wait=1.0)
    with following(trackers, config, asked, tmp_path) as followers:
        for subscriber in followers:
            subscriber(STARTED)
            subscriber(RunInterrupted(task=None, round=None))
    assert len(caplog.records) == 1
    finished.set()
    follower = next(f for f in followers[1:] if f.name == "patient")
    follower.join(60)
    assert pretended.Keeping.told[-1] == ("finish", "interrupted")


def test_a_run_that_fails_says_so(config, pretended, tmp_path):
    def fail(event):
        raise RuntimeError("a callback")

    with pytest.raises(RuntimeError):
        simulate(
            tracked(config, "pretended:Keeping", wait=60),
            tmp_path / "run",
            observers=[fail],
            report=False,
        )
    assert pretended.Keeping.told[-1] == ("finish", "failed")


def test_a_resumed_run_goes_on_with_its_trackers(
    config, plain, pretended, tmp_path
):
    def stop(event):
        if event.event == "round" and event.server_round == 2:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    named = tracked(config, "pretended:Keeping", wait=60)
    with pytest.raises(KeyboardInterrupt):
        simulate(named, run, observers=[stop], report=False)
    assert pretended.Keeping.told[-1] == ("finish", "interrupted")
    store_id(run, "AnObject", "")  # which only Python can give again
    pretended.Keeping.told.clear()
    simulate(config, run, resume=True, report=False)
    (_, again), *rest = pretended.Keeping.told
    assert (again.former, again.step) == ("its-id", 1)
    assert rest[0][0] == 2
    assert rest[-1] == ("finish", "complete")
    assert (run / "accuracy.npz").read_bytes() == (
        plain / "accuracy.npz"
    ).read_bytes()


def test_none_stops_the_trackers_of_a_resumed_run(config, pretended, tmp_path):
    from fedknow.server.tracking import tracking

    store_id(tmp_path, "pretended:Keeping", "its-id")
    with tracking(
        config, TrackingConfig(to="none"), tmp_path, True
    ) as subscribers:
        assert list(subscribers) == []
    with tracking(config, TrackingConfig(), tmp_path, True) as subscribers:
        assert len(subscribers) == 2
    with tracking(config, TrackingConfig(), tmp_path, False) as subscribers:
        assert list(subscribers) == []


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["mlfow"], "no such tracker (did you mean 'mlflow'?)"),
        (["none", "mlflow"], "'none' stands alone"),
        (["json:dumps"], "is a function; it must be a class"),
        (["pathlib:Path"], "lacks the methods start, log and finish"),
        (["pretended:Unmade"], "no such store"),
    ],
)
def test_a_wrong_tracker_is_refused_before_the_run(config, tmp_path, names, text):
    with pytest.raises(ConfigError) as error:
        simulate(tracked(config, *names), tmp_path / "run", report=False)
    assert text in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_section_changes_no_result(config):
    text = config.to_toml()
    assert "[tracking]" not in text
    named = ExperimentConfig.model_validate({"tracking": "mlflow, wandb"})
    assert named.tracking.to == ["mlflow", "wandb"]
    assert named.digest_fields() == ExperimentConfig().digest_fields()
    assert "[tracking]" in named.to_toml()
    assert named.untracked() == ExperimentConfig()
