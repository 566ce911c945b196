import re

import pytest
from typer.testing import CliRunner

from fedknow.cli.app import app
from fedknow.protocols.config import ConfigError, read_config
from fedknow.server.run.audit import AuditLog
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.members import MEMBERS, admit, eject, read_ejections


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run"
    with RunFolder.create(path, read_config({"data": {"clients": 3}})):
        pass
    return path


def test_a_client_is_out_until_it_is_admitted(run):
    assert read_ejections(run) == {}
    eject(run, [1, 2], "sends \x1b[31mnonsense")
    assert read_ejections(run)[1].reason == r"sends \x1b[31mnonsense"
    admit(run, [1])
    assert read_ejections(run).keys() == {2}
    with pytest.raises(ConfigError, match="--client 1: it is not out"):
        admit(run, [1])
    with pytest.raises(ConfigError, match=r"--client 3: the run in .* has 3"):
        eject(run, [3], "why")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"ejected": [1]}', '{"ejected": {"x": {}}}']
)
def test_a_damaged_list_is_named(run, text):
    (run / MEMBERS).write_text(text)
    with pytest.raises(ConfigError, match=r"members\.json: not a list"):
        read_ejections(run)


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


def test_the_commands(run):
    invoke("eject", run, "--client", 1, "--reason", "broken")
    shown = invoke("members", run)
    assert re.search(
        r"client 0: in the run\nclient 1: out since .*: broken", shown
    )
    invoke("admit", run, "--client", 1)
    assert "out" not in invoke("members", run)
    invoke("admit", run, "--client", 1, code=2)


def test_the_audit_command_proves_the_chain(run):
    log = AuditLog(run)
    log.write("joined", client=1)
    first = re.search(r"last hash (\w{64})", invoke("audit", run))[1]
    log.write("left", client=1)
    assert "2 lines" in invoke("audit", run, "--head", first)
    lines = (run / "audit.jsonl").read_bytes().splitlines(keepends=True)
    (run / "audit.jsonl").write_bytes(lines[1])
    invoke("audit", run, code=2)
    (run / "audit.jsonl").write_bytes(b"")
    invoke("audit", run, "--head", first, code=2)
