"""``module:name`` references."""

import os.path
import sys
from pathlib import Path

import pytest

from fedknow.protocols.config import ConfigError
from fedknow.protocols.plugins import is_reference, load_object


def test_finds_installed_and_nested_names() -> None:
    assert load_object("os.path:join", "model.name") is os.path.join
    assert load_object("pathlib:Path.cwd", "model.name")() == Path.cwd()
    assert is_reference("a:b")
    assert not is_reference("fedavg")


def test_finds_files_of_the_current_folder_but_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "plugin_for_test.py").write_text("value = 3\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('the wrong json')\n")
    assert load_object("plugin_for_test:value", "data.name") == 3
    assert sys.path[-1] == str(tmp_path)
    assert load_object("json:dumps", "data.name")([1]) == "[1]"


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("module:", "write module:name"),
        (":name", "write module:name"),
        (
            "no_such_module_at_all:f",
            "importing 'no_such_module_at_all' failed: ModuleNotFoundError",
        ),
        ("os.path:joyn", r"'os.path' has no 'joyn' \(did you mean 'join'\?\)"),
        (
            "broken_plugin_for_test:f",
            "importing 'broken_plugin_for_test' failed: ZeroDivisionError",
        ),
    ],
)
def test_errors(
    reference: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "broken_plugin_for_test.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=text) as caught:
        load_object(reference, "learner.name")
    assert f"learner.name = {reference!r}" in str(caught.value)
