"""Following a record that another process writes."""

import json

import pytest

from fedknow.server.run.integrity import chain_start, seal_line
from fedknow.server.watch.tail import Tail

FINGERPRINT = "0badcafe"


def lines(*values):
    chain = chain_start(FINGERPRINT)
    found = []
    for value in values:
        line, chain = seal_line({"event": "round", "value": value}, chain)
        found.append(line)
    return found


def seen(news):
    return [event["value"] for event in news.events]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def tail(path):
    return Tail(path, FINGERPRINT)


def test_a_file_that_does_not_exist_yet_is_waited_for(path, tail):
    assert seen(tail.read()) == []
    path.write_bytes(lines(1)[0])
    assert seen(tail.read()) == [1]


def test_half_a_line_is_read_when_it_is_whole(path, tail):
    one, two = lines(1, 2)
    path.write_bytes(one + two[:20])
    assert seen(tail.read()) == [1]
    path.write_bytes(one + two)
    assert seen(tail.read()) == [2]
    assert seen(tail.read()) == []


def test_a_file_cut_back_is_read_anew(path, tail):
    path.write_bytes(b"".join(lines(1, 2, 3)))
    tail.read()
    path.write_bytes(b"".join(lines(1)))
    news = tail.read()
    assert (seen(news), news.is_anew, news.fault) == ([1], True, "")


def test_a_file_cut_back_and_grown_again_is_noticed_by_its_checksums(path, tail):
    path.write_bytes(b"".join(lines(1, 2)))
    tail.read()
    path.write_bytes(b"".join(lines(1, 5, 6, 7)))
    news = tail.read()
    assert (seen(news), news.is_anew) == ([1, 5, 6, 7], True)


def test_a_file_that_is_gone_empties_the_page(path, tail):
    path.write_bytes(b"".join(lines(1)))
    tail.read()
    path.unlink()
    assert tail.read().is_anew
    assert not tail.read().is_anew


def test_a_damaged_file_is_said_to_be_damaged_until_it_is_mended(path, tail):
    good = lines(1, 2)
    path.write_bytes(good[0] + good[1].replace(b'"value": 2', b'"value": 3'))
    news = tail.read()
    assert news.events == []
    assert "metrics.jsonl is not what the run wrote: line 2" in news.fault
    path.write_bytes(b"".join(good))
    assert seen(tail.read()) == [1, 2]


def test_lines_of_earlier_versions_have_no_checksum(path):
    path.write_text(json.dumps({"event": "round", "value": 1}) + "\n")
    assert seen(Tail(path).read()) == [1]
