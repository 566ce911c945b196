"""The public names of fedknow: few, and always the same."""

import ast
import subprocess
import sys
from pathlib import Path

import fedknow

NAMES = [
    "Callback",
    "ComparedRuns",
    "ConfigError",
    "Dataset",
    "EarlyStopping",
    "ExperimentConfig",
    "FedknowError",
    "KeepBest",
    "Learner",
    "LearnerSettings",
    "LivePlot",
    "Run",
    "SearchResult",
    "SplitModel",
    "StopRun",
    "__version__",
    "compare",
    "experiment",
    "list_learners",
    "list_models",
    "load_run",
    "search",
    "simulate",
]


def test_the_public_names_are_these():
    assert sorted(fedknow.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(fedknow))


def test_each_is_there_and_documented():
    for name in NAMES:
        part = getattr(fedknow, name)
        assert name == "__version__" or part.__doc__


def test_editors_know_the_same_names():
    tree = ast.parse((Path(fedknow.__file__).parent / "__init__.pyi").read_text())
    imported = {
        alias.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(NAMES) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(fedknow, "nothing_of_this_name")


def test_importing_it_imports_no_heavy_part():
    heavy = ("torch", "flwr", "ray", "numpy")
    code = f"import fedknow, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
