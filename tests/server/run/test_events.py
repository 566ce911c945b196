"""Events are lines and lines are events; nobody who hears of them can change a number."""

import json
import math

import pytest

from fedknow.protocols.config import read_config
from fedknow.server.run import events
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.recorder import Recorder

TRAFFIC = '{"train": {"down": 1, "up": 2, "messages": 3}}'
LINES = [
    '{"event": "start", "time": 1.5, "clients": 4, "tasks": 2, "rounds": 3, "travelling": 3,'
    ' "bytes": 12, "learner": "er", "strategy": "fedavg", "partition": "abc",'
    ' "resumed_from": null, "versions": {"torch": "2"}}',
    f'{{"event": "round", "time": 1.5, "task": 0, "round": 1, "server_round": 1, "clients": 4,'
    f' "loss": null, "accuracy": 0.25, "samples": 8.0, "metrics": {{"a": [1, 2.5]}},'
    f' "seconds": 0.5, "traffic": {TRAFFIC}, "peak_memory_mb": 10.0,'
    ' "client_memory_bytes": null, "flops": null, "failures": 0, "virtual_seconds": 9.0,'
    ' "communication_seconds": 1.0, "computing_seconds": 2.0, "waiting_seconds": 6.0,'
    ' "energy_joules": null}',
    '{"event": "evaluation", "time": 1.5, "task": 1, "round": 3, "accuracy": 0.5,'
    ' "accuracy_global": null, "forgetting": null, "per_task": [0.5, null], "metrics": {},'
    ' "seconds": 0.5}',
    '{"event": "task_end", "time": 1.5, "task": 0, "knowledge_bytes": 5.0, "server_bytes": 0,'
    ' "client_memory_bytes": null, "samples": 0.0, "flops": 0.0, "seconds": 0.5}',
    '{"event": "failure", "time": 1.5, "fault": "norm", "client": 2, "task": 1, "round": 2,'
    ' "kind": "train", "tensor": "w", "reason": "too far"}',
    '{"event": "warning", "time": 1.5, "reason": "of the whole run"}',
    '{"event": "warning", "time": 1.5, "task": 0, "round": 1, "reason": "of a round"}',
    '{"event": "warning", "time": 1.5, "task": 0, "round": 1, "clients": [1, 2],'
    ' "reason": "without them"}',
    '{"event": "forgotten", "time": 1.5, "client": 1, "task": 0, "round": 2,'
    ' "reason": "it is lost"}',
    '{"event": "membership", "time": 1.5, "change": "ejected", "client": 1,'
    ' "reason": "too slow"}',
    '{"event": "people", "time": 1.5, "task": 1, "people": ["ann", "bob"], "accuracy": 0.5,'
    ' "per_person": [0.5, null], "per_task": [null, 0.5], "seconds": 0.5}',
    '{"event": "boundary", "time": 1.5, "client": 2, "task": 1, "round": 1, "boundaries": 1,'
    ' "delay": 12}',
    '{"event": "interrupted", "time": 1.5, "task": null, "round": null}',
    f'{{"event": "end", "time": 1.5, "seconds": 9.5, "accuracy": 0.5, "accuracy_global": 0.25,'
    f' "forgetting": 0.125, "forgetting_relative": null, "forgetting_max": 0.125,'
    f' "backward_transfer": -0.125, "forward_transfer": null, "gap": 0.25,'
    f' "traffic": {TRAFFIC}}}',
    '{"event": "of a later version", "time": 1.5, "more": {"a": [null]}}',
]
"""Lines as versions before the dataclasses wrote them."""


@pytest.mark.parametrize("line", LINES)
def test_an_event_is_written_as_the_line_that_it_was_read_of(line):
    event = events.parse(json.loads(line))
    assert json.dumps(event.line()) == line
    assert event.time == 1.5


def test_every_kind_is_among_these_lines():
    kinds = {json.loads(line)["event"] for line in LINES}
    assert kinds == {*events.KINDS, "of a later version"}


def test_what_was_not_measured_is_not_what_was_not_said():
    event = events.parse(
        {"event": "task_end", "task": 0, "knowledge_bytes": None, "seconds": 1.0}
    )
    assert math.isnan(event.knowledge_bytes)
    assert event.samples is None
    assert event.elapsed is None


def test_a_line_of_an_older_fleet_lacks_its_waiting():
    line = json.loads(LINES[1])
    del line["waiting_seconds"]
    assert events.parse(line).elapsed.waiting_seconds is None


def test_a_line_that_lacks_what_its_kind_says_is_refused():
    with pytest.raises(ValueError, match="an event 'task_end' without seconds"):
        events.parse({"event": "task_end", "task": 0, "knowledge_bytes": 1.0})


def test_a_subscriber_hears_of_each_event_and_changes_nothing(tmp_path):
    traffic = {"train": {"down": 1, "up": 2, "messages": 3}}
    ended = events.parse(json.loads(LINES[-2]))
    heard = []
    with RunFolder.create(tmp_path / "run", read_config({})) as folder:
        recorder = Recorder(folder, [heard.append])
        recorder.subscribe(lambda event: event.traffic.clear())
        line = recorder.record(
            events.RunEnded(
                **{**vars(ended), "traffic": traffic, "gap": math.inf}
            )
        )
        assert folder.events() == [line]
    assert line["traffic"] == {"train": {"down": 1, "up": 2, "messages": 3}}
    assert line["gap"] is None
    assert math.isnan(heard[0].gap)
    assert heard[0].time > 1.5


def test_an_exception_of_a_subscriber_ends_the_run(tmp_path):
    def stop(event):
        raise KeyboardInterrupt

    with RunFolder.create(tmp_path / "run", read_config({})) as folder:
        recorder = Recorder(folder, [stop])
        with pytest.raises(KeyboardInterrupt):
            recorder.record(events.Warned(reason="now"))
        assert folder.events()[0]["reason"] == "now"
