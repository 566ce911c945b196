"""The class-incremental comparisons: their scores and their table."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks import one another by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_scores_are_pooled_over_clients() -> None:
    nan = math.nan
    # Two clients and two tasks; the second client has no sample of the second task.
    correct = np.array([[[3, 1], [nan, 4]], [[9, 5], [nan, 0]]], float)
    weights = np.array([[4, 5], [16, 0]], float)
    found = importlib.import_module("class_incremental").pooled(
        {"correct_global": correct, "weights": weights}
    )
    assert found["curve"] == [12 / 20, 10 / 25]
    assert found["final"] == 0.4
    assert found["average"] == pytest.approx(0.5)
    assert found["forgetting"] == pytest.approx(12 / 20 - 6 / 20)


def test_a_run_has_one_score_where_all_parameters_travel() -> None:
    arrays = {
        "correct_personal": np.array([[[1.0]]]),
        "weights": np.array([[2.0]]),
    }
    found = importlib.import_module("class_incremental").pooled(arrays)
    assert found["final"] == 0.5
    assert found["forgetting"] is None


def test_the_table_has_each_split_and_ranks_methods() -> None:
    def row(method: str, alpha: float, final: float, seed: int) -> dict:
        return {
            "method": method,
            "alpha": alpha,
            "seed": seed,
            "final": final,
            "average": final + 0.1,
            "forgetting": 0.2,
            "bytes": 1e6,
            "bytes_extra": None,
            "knowledge_bytes": 0.0,
            "flops": 2e9,
            "seconds": 3.0,
        }

    rows = [
        row("er", 0.05, 0.4, 1),
        row("er", 0.5, 0.3, 1),
        row("afcl", 0.5, 0.6, 1),
    ]
    about = {"command": "python x.py", "cpu": "C", "cores": 2}
    text = importlib.import_module("_class_incremental_table").class_incremental(
        {"about": about, "rows": rows, "failures": {}}
    )
    lines = text.splitlines()
    assert lines[0] == "Dirichlet 0.5:"
    assert lines[4].startswith("| `afcl` | 60.0 | 70.0 | 20.0 | 1.0 MB | 0 B |")
    assert lines[5].startswith("| `er` | 30.0 |")
    assert "Dirichlet 0.05:" in lines
    assert "No run failed." in text


def test_the_cases_can_be_planned() -> None:
    module = importlib.import_module("class_incremental")
    for cases in module.CASES.values():
        for case in cases:
            assert case.seeds == 3
            assert len(set(case.methods)) == len(case.methods)
