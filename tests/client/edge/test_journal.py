"""What a real client keeps on disk."""

import numpy as np
import pytest
import torch

from fedknow.client.edge.journal import Journal, key_of
from fedknow.client.state import StateLost
from fedknow.protocols.config import ConfigError
from fedknow.protocols.messages import Arrays, Config, Message, Metrics
from fedknow.protocols.wire import Assembler, pack, parse


def parcel(value=1.0, id="1", version=0, round=1):
    message = Message(
        "train",
        2,
        id,
        content={"a": Arrays(w=np.full(3, value)), "config": Config(round=round)},
    )
    frames = pack(message).frames(version=version)
    return Assembler().add(parse(next(frames)))


def answer(value=1.0):
    return Message(
        "train",
        2,
        "1:reply",
        "1",
        "",
        {"a": Arrays(w=np.full(40000, value)), "m": Metrics(n=3)},
    )


@pytest.fixture
def journal(tmp_path):
    it = Journal(tmp_path / "state")
    it.begin("run", 2)
    yield it
    it.close()


def test_nobody_else_can_enter_the_folder(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    journal = Journal(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    journal.close()


def states(journal):
    return sorted(
        int(path.stem.partition("-")[2], 16)
        for path in journal.store.folder.glob("*.safetensors")
    )


def save(journal, *versions):
    for version in versions:
        journal.store.save(0, version, {"w": torch.tensor([float(version)])})


def test_the_same_work_has_the_same_key_whoever_sends_it():
    assert key_of(parcel()) == key_of(parcel(id="other"))
    others = [parcel(value=2.0), parcel(version=1), parcel(round=2)]
    assert len({key_of(one) for one in [parcel(), *others]}) == 4


def test_answers_are_found_again_by_another_process(journal, tmp_path):
    journal.keep_answer("k1", 5, pack(answer()), 9)
    assert journal.find("k1", 4) is None
    assert journal.find("k2", 5) is None
    journal.close()
    again = Journal(tmp_path / "state")
    again.begin("run", 2)
    found, version = again.find("k1", 5)
    assert version == 9
    np.testing.assert_array_equal(found.content["a"]["w"], np.full(40000, 1.0))
    assert found.content["m"] == {"n": 3}
    assert again.node == 2
    again.close()


@pytest.mark.parametrize(
    "damage", [b"", b"\0", slice(0, 1000), slice(0, -1), "bit"]
)
def test_a_damaged_answer_is_none(journal, damage):
    journal.keep_answer("k1", 5, pack(answer()), 9)
    (path,) = journal.folder.glob("answers/5/k1-9")
    data = path.read_bytes()
    if damage == "bit":
        path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    else:
        path.write_bytes(data[damage] if isinstance(damage, slice) else damage)
    assert journal.find("k1", 5) is None
    assert not path.exists()


def test_all_from_the_committed_version_on_is_kept_and_the_rest_deleted(journal):
    save(journal, 1, 2, 3, 4)
    journal.keep_answer("k1", 1, pack(answer()), 2)
    journal.keep_answer("k2", 1, pack(answer()), 3)
    journal.commit(0, 3, 1)
    assert states(journal) == [1, 2, 3]  # 4 is nothing's
    journal.commit(
        0, 1, 1
    )  # the server was killed, and resumed from its checkpoint
    assert states(journal) == [1, 2, 3]
    assert journal.find("k2", 1)[1] == 3
    journal.commit(0, 3, 3)  # a new checkpoint
    assert states(journal) == [3]
    assert journal.find("k1", 1) is None


def test_old_answers_make_room(journal):
    for number in range(12):
        journal.keep_answer(f"k{number}", 1, pack(answer()), number + 1)
    assert len(list(journal.folder.glob("answers/1/*"))) == 8
    assert journal.find("k11", 1)[1] == 12


def test_another_run_or_another_node_begins_anew(journal):
    for run, node in (("other", 2), ("other", 3)):
        save(journal, 1)
        journal.keep_answer("k", 1, pack(answer()), 1)
        journal.begin(run, node)
        assert states(journal) == []
        assert journal.find("k", 1) is None
    save(journal, 1)
    journal.begin("other", 3)  # the same again
    assert states(journal) == [1]


def test_a_folder_is_one_clients(journal, tmp_path):
    with pytest.raises(ConfigError, match="is in use by another client"):
        Journal(tmp_path / "state")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        Journal(tmp_path / "file")


@pytest.mark.parametrize("place", range(17))
def test_a_damaged_mark_is_a_sentence_and_deletes_nothing(
    journal, tmp_path, place
):
    journal.begin("run", 3)
    save(journal, 1)
    path = journal.folder / "run"
    data = path.read_bytes()
    path.write_bytes(
        data[:place] + bytes([data[place % len(data)] ^ 1]) + data[place + 1 :]
    )
    with pytest.raises(
        ConfigError, match=r"the file `run` in it is damaged; .* fedknow forget"
    ):
        journal.begin("run", 3)
    assert states(journal) == [1]


def test_the_mark_of_an_earlier_version_is_read(journal):
    (journal.folder / "run").write_text("7 run")
    save(journal, 1)
    assert journal.node == 7
    journal.begin("run", 7)
    assert states(journal) == [1]


def test_an_answer_in_anothers_place_is_none(journal):
    journal.keep_answer("k1", 5, pack(answer()), 9)
    journal.keep_answer("k2", 5, pack(answer(2.0)), 9)
    kept = journal.folder / "answers" / "5"
    (kept / "k2-9").rename(kept / "k1-9")
    assert journal.find("k1", 5) is None
    journal.keep_answer("k1", 5, pack(answer()), 9)
    (kept / "k1-9").rename(kept / "k1-a")
    assert journal.find("k1", 5) is None


KEY = bytes(range(32))


def fill(folder, key=None):
    journal = Journal(folder, key=key)
    journal.begin("run", 2)
    journal.store.save(0, 1, {"w": torch.full((40000,), 1.5)})
    journal.keep_answer("k1", 0, pack(answer(1.5)), 1)
    journal.keep_fence(b"a secret of the stream")
    journal.close()


@pytest.mark.parametrize("key", [None, KEY])
def test_all_files_are_the_owners_alone(tmp_path, key):
    fill(tmp_path / "state", key)
    paths = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert len(paths) == (5 if key is None else 6)
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}


def test_files_of_an_earlier_version_become_the_owners(tmp_path):
    fill(tmp_path)
    (tmp_path / "run").chmod(0o644)
    Journal(tmp_path).close()
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("key", [None, KEY])
def test_with_a_key_nothing_is_in_the_clear(tmp_path, key):
    fill(tmp_path, key)
    contents = b"".join(
        path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )
    clear = [
        np.full(8, 1.5).tobytes(),
        np.full(8, 1.5, np.float32).tobytes(),
        b"2 run",
        b"a secret",
    ]
    assert [text in contents for text in clear] == [key is None] * 4
    again = Journal(tmp_path, key=key)
    again.begin("run", 2)
    assert again.store.load(0, 1)["w"][0] == 1.5
    assert again.find("k1", 0)[1] == 1
    assert again.fence == b"a secret of the stream"
    again.close()


def test_a_wrong_or_missing_key_is_refused(tmp_path):
    fill(tmp_path / "sealed", KEY)
    with pytest.raises(ConfigError, match="give the key that they were"):
        Journal(tmp_path / "sealed")
    with pytest.raises(ConfigError, match="with another key"):
        Journal(tmp_path / "sealed", key=bytes(32))
    fill(tmp_path / "clear")
    with pytest.raises(ConfigError, match="its files are not encrypted"):
        Journal(tmp_path / "clear", key=KEY)
    # The folder is free again for the right one.
    Journal(tmp_path / "sealed", key=KEY).close()


def test_damage_to_sealed_files_is_found(tmp_path):
    fill(tmp_path, KEY)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name not in (".lock", "sealed"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
    journal = Journal(tmp_path, key=KEY)
    with pytest.raises(ConfigError, match="`run` in it is damaged"):
        journal.begin("run", 2)
    assert journal.fence == b""
    assert journal.find("k1", 0) is None
    with pytest.raises(StateLost, match="damaged"):
        journal.store.load(0, 1)
    journal.close()
