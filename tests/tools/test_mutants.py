"""The list of deliberate faults fits the code; ``python tools/mutants.py`` tries them."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location(
    "mutants", ROOT / "tools" / "mutants.py"
)
mutants = importlib.util.module_from_spec(SPEC)
sys.modules["mutants"] = mutants
SPEC.loader.exec_module(mutants)
LIST = mutants.read_mutants()


def test_there_are_sixty_and_their_names_differ():
    assert len({mutant.name for mutant in LIST}) == len(LIST) >= 60


@pytest.mark.parametrize("mutant", LIST, ids=lambda mutant: mutant.name)
def test_a_fault_changes_the_file_it_names_and_has_tests(mutant):
    assert mutant.mutated() != (ROOT / mutant.file).read_text("utf-8")
    compile(mutant.mutated(), mutant.file, "exec")
    assert all((ROOT / path).exists() for path in mutant.tests)
    assert mutant.tests


@pytest.mark.slow
def test_a_fault_is_noticed_and_a_harmless_change_is_not():
    metrics = "server/run/metrics.py"
    tests = ("tests/server/run/test_metrics.py",)
    old = "_max(a[u, u:m])"
    fault = mutants.Mutant("fault", metrics, old, "_max(a[u, : m + 1])", tests)
    harmless = mutants.Mutant(
        "none", metrics, old, "_max(a[u, u : m + 0])", tests
    )
    assert mutants.is_noticed(fault)
    assert not mutants.is_noticed(harmless)
