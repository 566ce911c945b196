"""The file that says which clients are at work."""

import json
import logging

from fedknow.protocols.messages import TRAIN, Message, node_of
from fedknow.server.run.activity import ACTIVITY, ActivityLog


def work(*clients):
    return [Message(TRAIN, node_of(client), f"id-{client}") for client in clients]


def lines(folder):
    text = (folder / ACTIVITY).read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [
        {key: value for key, value in line.items() if key != "time"}
        for line in found
    ]


def test_a_wave_its_answers_and_who_gave_none(tmp_path):
    log = ActivityLog(tmp_path)
    one, two, three = work(0, 1, 2)
    log.send([one, two, three], absent=[4])
    log.answer(one.reply({}))
    log.answer(two.fail(2, "broken"))
    log.miss([three])
    first, *answers = lines(tmp_path)
    assert first == {
        "event": "wave",
        "kind": TRAIN,
        "clients": [0, 1, 2],
        "away": [4],
    }
    totals = {}
    for line in answers:
        assert line.pop("event") == "answers"
        totals |= line
    assert totals == {"done": [0], "failed": [1], "missed": [2]}


def test_half_a_line_of_a_killed_process_is_removed(tmp_path):
    (tmp_path / ACTIVITY).write_text('{"event": "presence", "away": []}\n{"eve')
    ActivityLog(tmp_path).presence([1])
    assert [line["away"] for line in lines(tmp_path)] == [[], [1]]


def test_a_file_that_cannot_be_written_costs_no_run(tmp_path, caplog):
    log = ActivityLog(tmp_path / "absent")
    with caplog.at_level(logging.WARNING):
        log.presence([1])
        log.presence([2])
    assert len(caplog.records) == 1
    assert "is not written any more" in caplog.text
