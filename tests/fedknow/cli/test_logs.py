"""The log as JSON, one object a line."""

import json
import logging

import pytest

from fedknow.cli.logs import LogFormat, start_log


@pytest.fixture(autouse=True)
def restored():
    root, ours = logging.getLogger(), logging.getLogger("fedknow")
    handlers, level = list(root.handlers), ours.level
    yield
    root.handlers[:] = handlers
    ours.setLevel(level)


def test_each_line_is_an_object(capsys):
    start_log(LogFormat.JSON, False, {"run": "runs/field"})
    log = logging.getLogger("fedknow.server.grids")
    log.info("client %d is here\nand well", 3)
    try:
        raise ValueError("bad")
    except ValueError:
        log.exception("it failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "logger": "fedknow.server.grids",
        "message": "client 3 is here\nand well",
        "run": "runs/field",
        "client": 3,
    }
    assert "ValueError: bad" in second["exception"]
    assert "client" not in second


def test_a_client_knows_its_own_number(capsys):
    start_log(LogFormat.JSON, False, {"client": 1})
    logging.getLogger("fedknow").info("client 2 said so")
    assert json.loads(capsys.readouterr().err)["client"] == 1


def test_plain_lines_are_as_before(capsys):
    start_log(LogFormat.PLAIN, True, {})
    logging.getLogger("fedknow").info("not said")
    logging.getLogger("fedknow").warning("said")
    assert capsys.readouterr().err.endswith(" WARNING said\n")
