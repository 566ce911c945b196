"""The examples in the docstrings of the public names run as they are written."""

import doctest
import sys

import pytest

import fedknow

NAMES = sorted(set(fedknow.__all__) - {"__version__"})
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples(name):
    """The tests of a public name's docstring, and of its methods."""
    part = getattr(fedknow, name)
    module = sys.modules[part.__module__]
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = finder.find(part, name, module, extraglobs={"fedknow": fedknow})
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_as_it_is_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tests = examples(name)
    assert tests, f"fedknow.{name} has no example"
    for test in tests:
        report: list[str] = []
        runner = doctest.DocTestRunner(optionflags=FLAGS)
        assert not runner.run(test, out=report.append).failed, "".join(report)
