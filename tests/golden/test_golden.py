"""No change of the code moves a number of the golden runs (``golden.py``)."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

SPEC = importlib.util.spec_from_file_location(
    "golden", Path(__file__).with_name("golden.py")
)
golden = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(golden)

RECORD = json.loads(golden.FILE.read_text())
EXPERIMENTS = golden.experiments()
MACHINE = golden.machine()
EVERYWHERE = (
    "samples",
    "flops",
    "flops_of_task_ends",
    "knowledge_bytes",
    "traffic",
)
"""What depends on no rounding. Only FedKNOW's operations do: rounding decides what it builds."""
GENERATORS = ("lander", "target")
"""Their pictures are made in hundreds of steps, which amplify other rounding."""


def is_same_machine(name):
    # Some runs were added later, on another machine than the others.
    return RECORD["added"].get(name, RECORD["machine"]) == MACHINE


def assert_as_recorded(name, found):
    expected = RECORD["runs"][name]
    if is_same_machine(name):
        moved = [field for field in expected if found[field] != expected[field]]
        assert not moved, {
            field: (expected[field], found[field]) for field in moved
        }
        return
    for field in EVERYWHERE:
        if "flops" not in field or "fedknow" not in name:
            assert found[field] == expected[field], field
    for scoring in ("personal", "global"):
        before = np.array(expected["accuracy"][scoring], float)
        now = np.array(found["accuracy"][scoring], float)
        # Where tasks are staggered there is no global score at all.
        assert np.array_equal(np.isnan(before), np.isnan(now)), scoring
        if np.isnan(before).all():
            continue
        bound = 0.1 if name.startswith(GENERATORS) else 0.02
        assert abs(np.nanmean(before) - np.nanmean(now)) < bound, scoring


def test_the_record_has_all_runs_and_they_differ():
    assert RECORD["runs"].keys() == EXPERIMENTS.keys()
    models = [run["model"] for run in RECORD["runs"].values()]
    assert len(set(models)) > 0.8 * len(models)


# Their generators take minutes; the class-incremental runs of both are in the short form.
LONG = ("lander, task-incremental", "target, task-incremental")
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in LONG else name
    for name in EXPERIMENTS
]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_in_one_process_gives_the_recorded_numbers(tmp_path, name):
    folder = golden.run_inline(EXPERIMENTS[name], tmp_path / "run")
    assert_as_recorded(name, golden.numbers(folder))


@pytest.mark.parametrize("name", golden.OVER_GRPC)
def test_real_clients_give_the_recorded_accuracy_and_model(tmp_path, name):
    found = golden.numbers(golden.run_grpc(EXPERIMENTS[name], tmp_path / "run"))
    expected = RECORD["runs"][name]
    assert found["samples"] == expected["samples"]
    if is_same_machine(name):
        assert found["accuracy"] == expected["accuracy"]
        assert found["model"] == expected["model"]


@pytest.mark.parametrize(
    "name", ["fedknow, task-incremental", "loci, all clients"]
)
def test_ray_workers_give_the_recorded_numbers(tmp_path, name):
    ray = pytest.importorskip("ray")
    engine = EXPERIMENTS[name].engine.model_copy(
        update={"backend": "ray", "workers": 2}
    )
    config = EXPERIMENTS[name].model_copy(update={"engine": engine})
    try:
        found = golden.numbers(golden.run_inline(config, tmp_path / "run"))
    finally:
        ray.shutdown()
    assert_as_recorded(name, found)
