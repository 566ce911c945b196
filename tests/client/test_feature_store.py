"""A file of features: found again, shared by threads, damaged, full."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedknow.client.feature_store import FeatureStore


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "folder" / "network.sqlite")


def rows(start, count):
    return {
        b"%d" % key: np.full(3, key, np.float32)
        for key in range(start, start + count)
    }


def test_what_is_put_is_got(store):
    store.put(rows(0, 1200))
    found = store.get([b"%d" % key for key in range(1100, 1300)])
    assert set(found) == {b"%d" % key for key in range(1100, 1200)}
    assert found[b"1150"].tolist() == [1150.0] * 3
    assert found[b"1150"].dtype == np.float32


def test_nothing_is_there_at_first(store, tmp_path):
    assert store.get([b"0"]) == {}
    assert not list(tmp_path.iterdir())


def test_the_first_value_of_a_key_stays(store):
    store.put({b"0": np.zeros(3, np.float32)})
    store.put({b"0": np.ones(3, np.float32)})
    assert store.get([b"0"])[b"0"].tolist() == [0.0] * 3


def test_many_write_at_once(store):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: store.put(rows(50 * k, 100)), range(16)))
    assert len(store.get([b"%d" % key for key in range(2000)])) == 850


def test_a_damaged_file_gives_nothing_and_begins_anew(store, caplog):
    store.put(rows(0, 10))
    store._path.write_bytes(b"broken" * 1000)
    assert store.get([b"0"]) == {}
    assert "damaged features" in caplog.text
    store.put(rows(0, 10))
    assert len(store.get([b"0", b"9"])) == 2


def test_a_file_of_something_else_is_no_end(store, caplog):
    store._path.parent.mkdir()
    with sqlite3.connect(store._path) as database:
        database.execute("CREATE TABLE other (key BLOB)")
    database.close()
    assert store.get([b"0"]) == {}
    assert "no such table" in caplog.text
    store.put(rows(0, 1))
    assert len(store.get([b"0"])) == 1


def test_a_place_that_cannot_be_written_is_no_end(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    FeatureStore(tmp_path / "file" / "network.sqlite").put(rows(0, 1))
    assert "cannot be cached" in caplog.text
