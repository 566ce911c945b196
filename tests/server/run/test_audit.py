import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedknow.protocols.config import ConfigError
from fedknow.server.run.audit import AUDIT, AuditLog, read_audit


@pytest.fixture
def log(tmp_path):
    made = AuditLog(tmp_path)
    made.write("joined", client=3, address="192.0.2.7")
    made.write("ejected", client=3, reason="sends nonsense")
    made.write("left", client=3)
    return tmp_path


def test_lines_are_read_as_they_were_written(log):
    entries = [entry for entry, _ in read_audit(log)]
    assert [entry["event"] for entry in entries] == ["joined", "ejected", "left"]
    assert entries[1]["reason"] == "sends nonsense"
    assert all(entry["time"] > 1e9 for entry in entries)


def test_it_goes_on_after_a_restart_and_a_kill_within_a_line(log):
    _, head = list(read_audit(log))[-1]
    with (log / AUDIT).open("ab") as file:
        file.write(b'{"time": 1, "event": "joi')
    AuditLog(log).write("joined", client=1)
    entries = list(read_audit(log))
    assert len(entries) == 4
    assert entries[2][1] == head  # what was noted elsewhere is still in it


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [lines[0].replace(b"3", b"4", 1), *lines[1:]], 2),
        (lambda lines: [lines[0], lines[2]], 2),
        (lambda lines: [lines[1], lines[0], lines[2]], 1),
        (lambda lines: lines[1:], 1),
        (lambda lines: [*lines[:2], b"[]", lines[2]], 3),
        (lambda lines: [*lines, json.dumps({"before": "0" * 64}).encode()], 4),
    ],
)
def test_no_line_can_be_changed_taken_out_or_put_in(log, change, line):
    lines = change((log / AUDIT).read_bytes().splitlines())
    (log / AUDIT).write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ConfigError, match=f"the chain breaks at line {line}"):
        list(read_audit(log))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_chain_or_a_sentence(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("audit")
    (folder / AUDIT).write_bytes(data)
    try:
        list(read_audit(folder))
    except ConfigError as error:
        assert "the chain breaks" in str(error)  # noqa: PT017


def test_a_full_disk_costs_the_log_and_not_the_run(tmp_path, caplog):
    log = AuditLog(tmp_path)
    (tmp_path / AUDIT).mkdir()
    log.write("joined", client=1)
    log.write("joined", client=2)
    assert caplog.text.count("is not written any more") == 1


def test_without_a_log_the_path_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"audit\.jsonl: cannot be read"):
        list(read_audit(tmp_path))
