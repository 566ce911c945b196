"""Client states: what is kept comes back, whole or not at all, within a budget of memory."""

import errno
import json
import os
import shutil
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from safetensors import torch as safetensors_torch

from fedknow.client.state import (
    StateError,
    StateLost,
    StateStore,
    load_state,
    save_state,
)
from fedknow.client.state import (
    store as stores,
)
from fedknow.client.state.layout import list_files
from fedknow.protocols import files

INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
DTYPES = st.sampled_from(
    ["bool", *INTEGERS, "float16", "float32", "float64", "complex64"]
)
ARRAYS = DTYPES.flatmap(
    lambda t: stnp.arrays(
        t, stnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    )
)
TENSORS = ARRAYS.map(lambda a: torch.from_numpy(a.copy()))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | ARRAYS
    | TENSORS
)
KEYS = st.text(max_size=5)
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if (
            a.numel()
        ):  # bit by bit, so that what is not a number is equal to itself
            assert torch.equal(
                *(
                    tensor.reshape(-1).contiguous().view(torch.uint8)
                    for tensor in (a, b)
                )
            )
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    else:
        assert a == b


@given(STATES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_saved_comes_back(tmp_path, state):
    save_state(tmp_path / "state", state)
    assert_same(load_state(tmp_path / "state"), state)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool]
)
def test_types_that_numpy_lacks_come_back(tmp_path, dtype):
    state = {"x": torch.tensor([[0.0, 1.0], [2.0, -3.0]]).to(dtype)}
    save_state(tmp_path / "state", state)
    assert_same(load_state(tmp_path / "state"), state)


def test_views_parameters_and_twins_come_back_dense_and_apart(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "base": base,
        "row": base[1],
        "t": base.t(),
        "again": base,
        "p": torch.nn.Parameter(base * 2),
    }
    save_state(tmp_path / "state", state)
    back = load_state(tmp_path / "state")
    for name, value in state.items():
        assert torch.equal(back[name], value)
        assert back[name].is_contiguous()
        assert not back[name].requires_grad
    back["base"] += 1
    assert torch.equal(back["again"], base)


def test_special_numbers_come_back(tmp_path):
    save_state(
        tmp_path / "state",
        {"x": [float("inf"), -0.0, float("nan"), 2**200, 5e-324]},
    )
    inf, zero, nan, big, small = load_state(tmp_path / "state")["x"]
    assert (inf, str(zero), nan != nan, big, small) == (
        float("inf"),
        "-0.0",
        True,
        2**200,
        5e-324,
    )


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"a": {"b": (1, 2)}}, r"state\['a'\]\['b'\]: a tuple cannot be kept"),
        ({"a": [1, b"x"]}, r"state\['a'\]\[1\]: a bytes cannot be kept"),
        ({"a": {1: 2}}, r"state\['a'\]: a dict cannot be kept"),
        ({"a": np.float64(1)}, r"a float64 cannot be kept"),
        (
            {"a": np.array(["x"])},
            r"state\['a'\]: an array of type <U1 cannot be kept",
        ),
        (
            {"a": np.arange(2, dtype=">f4")},
            r"an array of type >f4 cannot be kept",
        ),
        (
            {"a": torch.eye(2).to_sparse()},
            r"state\['a'\]: a torch.sparse_coo tensor",
        ),
        (
            {"a": torch.zeros(2, dtype=torch.complex128)},
            r"type torch.complex128 cannot be kept",
        ),
        ([1], "a state is a dictionary, not a list"),
    ],
)
def test_what_cannot_be_kept_is_named(tmp_path, state, says):
    save_state(tmp_path / "state", {"old": 1})
    with pytest.raises(StateError, match=says):
        save_state(tmp_path / "state", state)
    assert load_state(tmp_path / "state") == {"old": 1}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path, monkeypatch, call):
    save_state(tmp_path / "state", {"x": torch.ones(3)})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(
        StateError,
        match=r"state: .* cannot be written: No space left on device; .* is intact",
    ):
        save_state(tmp_path / "state", {"x": torch.zeros(3)})
    monkeypatch.undo()
    assert torch.equal(load_state(tmp_path / "state")["x"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_the_disk_is_waited_for_where_that_is_asked_for(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        files.os,
        "fsync",
        lambda descriptor: synced.append(
            os.readlink(f"/proc/self/fd/{descriptor}")
        ),
    )
    StateStore(tmp_path, 0, durable=False).save(0, 1, {"x": 1})
    assert not synced
    files.sync_disk(tmp_path)
    store = StateStore(tmp_path, 0)
    store.save(0, 2, {"x": 2})
    assert synced == [
        f"{store.path(0, 2)}.{os.getpid()}.tmp",
        str(tmp_path),
    ]  # what it holds, then its name
    with pytest.raises(OSError, match="No such file"):
        files.sync_disk(tmp_path / "missing")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_state(tmp_path / "state", {"x": 1})

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path / "state", {"x": 2})
    assert load_state(tmp_path / "state") == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    path = tmp_path / "state"
    save_state(path, {"x": torch.arange(10), "n": 3})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(StateError, match="not a readable client state"):
            load_state(path)


def test_a_byte_changed_anywhere_is_noticed(tmp_path):
    path, state = tmp_path / "state", {"x": torch.arange(4), "n": 3}
    save_state(path, state)
    data = path.read_bytes()
    unnoticed = 0
    for place in range(len(data)):
        path.write_bytes(
            data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        )
        try:
            assert_same(load_state(path), state)
            unnoticed += 1  # padding
        except StateError:
            pass
    assert unnoticed < 10
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StateError, match="its checksum is wrong"):
        load_state(path)


def test_a_state_in_anothers_place_is_refused(tmp_path):
    store = StateStore(tmp_path, 0)
    for client, version in ((0, 1), (0, 2), (1, 1)):
        store.save(client, version, {"x": torch.tensor([client, version])})
    for client, version in ((0, 2), (1, 1)):
        shutil.copyfile(store.path(client, version), store.path(0, 1))
        name = store.path(client, version).name
        with pytest.raises(
            StateLost,
            match=rf"000000-1.*: it was written as {name}, so it holds another client",
        ):
            store.load(0, 1)


def test_a_part_in_anothers_place_is_refused(tmp_path):
    store = StateStore(tmp_path, 0)
    for client in (0, 1):
        live(store, torch.arange(30_000), range(1, 4), client=client)
    shutil.copyfile(
        tmp_path / "000001-2.part.safetensors",
        tmp_path / "000000-2.part.safetensors",
    )
    with pytest.raises(
        StateLost,
        match=r"000000-2\.part.*: it was written as 000001-2\.part\.safetensors",
    ):
        store.load(0, 3)
    assert store.load(1, 3)["new"][0] == 3


@pytest.mark.parametrize(
    ("old", "new"), [(b"F32", b"I32"), (b"[2,3]", b"[3,2]"), (b'"0"', b'"1"')]
)
def test_bytes_taken_for_another_tensor_are_noticed(tmp_path, old, new):
    path = tmp_path / "state"
    save_state(path, {"x": torch.rand(2, 3)})
    data = path.read_bytes()
    place = data.index(old, data.rindex(b"dtype") - 8)
    path.write_bytes(data[:place] + new + data[place + len(old) :])
    with pytest.raises(StateLost, match="not a readable client state"):
        load_state(path)


def test_files_of_earlier_versions_are_read(tmp_path):
    """They have one checksum and no name."""
    path, x = tmp_path / "state", torch.arange(4)
    text = json.dumps({"x": ["tensor", 0], "n": 3})
    checksum = zlib.crc32(x.numpy().tobytes(), zlib.crc32(text.encode()))
    data = safetensors_torch.save({"0": x}, {"state": f"{checksum:08x} {text}"})
    path.write_bytes(data)
    assert_same(load_state(path), {"x": x, "n": 3})
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StateLost, match="its checksum is wrong"):
        load_state(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        StateError, match=r"000003-7\.safetensors: no such client state"
    ):
        StateStore(tmp_path, 1000).load(3, 7)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StateError, match="file/clients: cannot be made: Not a directory"
    ):
        StateStore(tmp_path / "file" / "clients", 0)


def test_a_fresh_client_has_an_empty_state(tmp_path):
    assert StateStore(tmp_path, 1000).load(0, 0) == {}


def test_versions_lie_side_by_side_until_pruned(tmp_path):
    store = StateStore(tmp_path, 0)
    for version in (5, 9):
        for client in (0, 1):
            store.save(client, version, {"x": version * 10 + client})
    assert store.load(1, 5) == {"x": 51}
    (tmp_path / "000007-1.safetensors.123.tmp").write_text(
        "left by a process that died"
    )
    store.prune({0: 9, 1: 5, 2: 0})
    store.save(2, 3, {"x": 23})  # saved after it was said what is to go
    store.settle()
    (tmp_path / "000002-3.safetensors").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000000-9.safetensors",
        "000001-5.safetensors",
    ]
    assert store.load(0, 9) == {"x": 90}
    with pytest.raises(StateError, match="no such client state"):
        store.load(0, 5)


def test_only_files_of_clients_that_were_touched_are_looked_at(tmp_path):
    store = StateStore(tmp_path, 0)
    for client in (0, 1, 1500):
        for version in (5, 9):
            store.save(client, version, {"x": version})
    store.prune({0: 9, 1: 9, 1500: 9})
    store.settle()
    # Another process writes in the same folder.
    for client in (0, 1, 1500):
        StateStore(tmp_path, 0).save(client, 10, {"x": 10})
    store.touch([1, 1500, 7])
    store.prune({0: 10, 1: 10, 1500: 10})
    store.settle()
    assert sorted(path.name for path in list_files(tmp_path)) == [
        "000000-9.safetensors",
        "000000-a.safetensors",
        "000001-a.safetensors",
        "001500-a.safetensors",
    ]


def test_memory_is_given_back_every_so_many_states(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(stores, "release_freed_memory", lambda: given.append(1))
    store = StateStore(tmp_path, 0, durable=False)
    for version in range(1, 33):
        store.save(version % 3, version, {"x": version})
    assert len(given) == 2


def test_a_file_that_cannot_be_deleted_is_said_the_next_time(
    tmp_path, monkeypatch
):
    store = StateStore(tmp_path, 0)
    store.save(0, 1, {"x": 1})

    def refuse(path):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(stores.Path, "unlink", refuse)
    store.prune({})
    with pytest.raises(
        StateError,
        match=r"old client states cannot be deleted: .*Permission denied",
    ):
        store.prune({})
    store.settle()


def test_memory_holds_the_latest_states_within_the_budget(tmp_path, monkeypatch):
    store = StateStore(tmp_path, memory_bytes=100)
    read, reading = [], stores.read
    monkeypatch.setattr(
        stores, "read", lambda path, _: read.append(path.name) or reading(path)
    )
    for client in range(3):  # 40 bytes each: two fit
        store.save(client, 1, {"x": torch.full((10,), float(client))})
    for client in (1, 2):
        assert store.load(client, 1)["x"][0] == client
    assert read == []
    assert store.load(0, 1)["x"][0] == 0
    assert read == ["000000-1.safetensors"]
    store.load(2, 1)  # 0 and 2 are at hand now, 1 was used longest ago
    assert read == ["000000-1.safetensors"]
    store.load(1, 1)
    assert read == ["000000-1.safetensors", "000001-1.safetensors"]


def live(store, kept, versions, client=0, **more):
    """Versions of a client whose ``kept`` stays as it is while ``more`` is new each time."""
    for version in versions:
        state = store.load(client, version - 1) if version > 1 else {}
        after = {
            "kept": state.get("kept", kept),
            "new": torch.full((50,), float(version)),
            "list": [1, more],
        }
        store.save(client, version, after)
        assert_same(store.load(client, version), after)


def sizes(folder):
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("memory", [0, 2**30])
def test_what_stays_as_it_is_is_written_to_a_part_once(tmp_path, memory):
    kept = {
        "big": torch.arange(30_000),
        "also": torch.ones(7, dtype=torch.bool),
        "empty": torch.empty(0),
    }
    store = StateStore(tmp_path, memory)
    live(store, kept, range(1, 6))
    found = sizes(tmp_path)
    assert list(found) == [
        "000000-1.safetensors",
        "000000-2.part.safetensors",
        "000000-2.safetensors",
        "000000-3.safetensors",
        "000000-4.safetensors",
        "000000-5.safetensors",
    ]
    assert (
        found["000000-1.safetensors"]
        > 240_000
        < found["000000-2.part.safetensors"]
    )
    assert all(
        found[f"000000-{version}.safetensors"] < 2000 for version in (2, 3, 4, 5)
    )
    for fresh in (StateStore(tmp_path, 0), store):
        for version in range(1, 6):
            assert_same(fresh.load(0, version)["kept"], kept)
            assert fresh.load(0, version)["new"][0] == version


def test_a_state_names_the_parts_of_several_versions(tmp_path):
    store = StateStore(tmp_path, 0)
    state = {}
    for version in range(1, 7):
        before = store.load(0, version - 1) if version > 1 else {}
        state = before | {
            f"task {version}": torch.full((20_000,), float(version))
        }
        store.save(0, version, state)
    assert all(
        sizes(tmp_path)[f"000000-{version}.safetensors"] < 82_000
        for version in range(1, 7)
    )
    assert_same(StateStore(tmp_path, 0).load(0, 6), state)
    store.prune({0: 6})
    store.settle()
    assert [name for name in sizes(tmp_path) if "part" not in name] == [
        "000000-6.safetensors"
    ]
    assert len(sizes(tmp_path)) == 1 + 5
    assert_same(StateStore(tmp_path, 0).load(0, 6), state)


@pytest.mark.parametrize("act", ["prune", "retain"])
def test_parts_go_when_no_version_that_is_kept_names_them(tmp_path, act):
    store = StateStore(tmp_path, 0)
    live(store, torch.arange(30_000), range(1, 4))
    live(store, torch.arange(20_000), range(1, 4), client=1)
    store.save(0, 4, {"new": torch.zeros(3)})

    def keep(versions):
        if act == "prune":
            store.prune(versions)
            store.settle()
        else:  # of one client; there is no other in its folder
            for path in tmp_path.glob("000001*"):
                path.unlink()
            store.retain(0, [versions[0]])

    keep({0: 3, 1: 3})
    ours = [name for name in sizes(tmp_path) if name.startswith("000000")]
    assert ours == ["000000-2.part.safetensors", "000000-3.safetensors"]
    keep({0: 3, 1: 3})  # asked again, of the same
    assert [name for name in sizes(tmp_path) if name.startswith("000000")] == ours
    store.save(0, 5, {"new": torch.zeros(3)})
    keep({0: 5, 1: 3})
    assert [name for name in sizes(tmp_path) if name.startswith("000000")] == [
        "000000-5.safetensors"
    ]
    if act == "prune":
        assert_same(store.load(1, 3)["kept"], torch.arange(20_000))


def test_small_tensors_are_written_each_time(tmp_path):
    store = StateStore(tmp_path, 2**30)
    live(store, {"small": torch.arange(8000)}, range(1, 4))
    assert not [name for name in sizes(tmp_path) if "part" in name]
    assert not store._stored


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: x.data.add_(1),
        lambda x: np.add(x.numpy(), 1, out=x.numpy()),
        lambda x: torch._fused_sgd_(
            [x], [-torch.ones_like(x)], [], lr=1.0, weight_decay=0, momentum=0, dampening=0,
            nesterov=False,
            maximize=False, is_first_step=True,
        ),
    ],
    ids=["in place", "data", "numpy", "fused"],
)  # fmt: skip
def test_a_change_in_place_is_against_the_contract_and_is_not_lost(
    tmp_path, change
):
    store = StateStore(tmp_path, 2**30)
    live(store, torch.zeros(20_000), range(1, 4))
    state = store.load(0, 3)
    change(state["kept"])
    store.save(0, 4, state)
    assert_same(StateStore(tmp_path, 0).load(0, 4)["kept"], torch.ones(20_000))
    assert_same(StateStore(tmp_path, 0).load(0, 3)["kept"], torch.zeros(20_000))


def test_what_is_of_no_use_any_more_does_not_fill_the_disk(tmp_path):
    """A large tensor that is another in each task, and a small one a task that stays."""
    store = StateStore(tmp_path, 0)
    for version in range(1, 41):
        state = store.load(0, version - 1) if version > 1 else {}
        if version % 2:
            state = state | {
                "model": torch.full((200_000,), float(version)),
                f"task {version}": torch.ones(2000),
            }
        store.save(0, version, state)
        store.prune({0: version})
        store.settle()
    assert len(state) == 21
    live_bytes = sum(tensor.nbytes for tensor in state.values())
    assert sum(sizes(tmp_path).values()) < 2 * live_bytes
    assert_same(StateStore(tmp_path, 0).load(0, 40), state)


def test_a_version_that_is_not_listed_yet_keeps_its_parts(tmp_path):
    store = StateStore(tmp_path, 0)
    live(store, torch.arange(30_000), range(1, 4))
    late = [path for path in tmp_path.iterdir() if path != store.path(0, 3)]
    store._pruning.delete_except({store.path(0, 3).name}, late)
    assert_same(store.load(0, 3)["kept"], torch.arange(30_000))
    store.path(0, 3).rename(tmp_path / "away")  # nor is it there
    store._pruning.delete_except(
        {store.path(0, 3).name}, list(tmp_path.iterdir())
    )
    assert "000000-2.part.safetensors" in sizes(tmp_path)


def test_a_damaged_file_stops_nobody_else(tmp_path):
    store = StateStore(tmp_path, 0)
    for client in (0, 1):
        live(store, torch.arange(30_000), range(1, 4), client=client)
    store.path(0, 2).write_bytes(b"rubbish")
    store.prune({0: 2, 1: 3})
    store.settle()
    names = ["000000-2.part.safetensors", "000000-2.safetensors"]
    assert list(sizes(tmp_path)) == [
        *names,
        "000001-2.part.safetensors",
        "000001-3.safetensors",
    ]
    with pytest.raises(
        StateLost, match=r"000000-2\.safetensors: not a readable client state"
    ):
        store.load(0, 2)


def test_a_part_that_is_gone_is_written_again(tmp_path):
    store = StateStore(tmp_path, 2**30)
    live(store, torch.arange(30_000), range(1, 4))
    (tmp_path / "000000-2.part.safetensors").unlink()
    live(store, torch.arange(30_000), [4])
    assert_same(StateStore(tmp_path, 0).load(0, 4)["kept"], torch.arange(30_000))


def test_nothing_is_known_of_states_that_nobody_holds(tmp_path):
    store = StateStore(tmp_path, memory_bytes=500_000)
    for client in range(3):
        live(store, torch.arange(30_000), range(1, 4), client=client)
    assert sorted(store._stored) == [1, 2]
    empty = StateStore(tmp_path, 0)
    live(empty, torch.arange(30_000), range(1, 4), client=5)
    assert sorted(empty._stored) == [5]  # as it was loaded last
    empty.save(5, 4, empty.load(5, 3))
    assert not empty._stored


def test_other_tensors_in_the_same_memory_are_others(tmp_path):
    store = StateStore(tmp_path, 2**30)
    store.save(0, 1, {"x": torch.arange(20_000)})
    x = store.load(0, 1)["x"]
    states = [
        {"x": x.view(100, 200)},
        {"x": x.view(torch.float64)},
        {"x": x[:19_000], "y": x, "z": x},
    ]
    for version, state in enumerate(states, 2):
        store.save(0, version, state)
        assert_same(StateStore(tmp_path, 0).load(0, version), state)
        assert_same(store.load(0, 1)["x"], torch.arange(20_000))


def test_work_that_is_done_again_from_an_older_version_is_the_same(tmp_path):
    first, second = StateStore(tmp_path, 2**30), StateStore(tmp_path, 0)
    live(first, torch.arange(30_000), range(1, 5))
    before = {name: (tmp_path / name).read_bytes() for name in sizes(tmp_path)}
    live(
        second, torch.arange(30_000), range(3, 5)
    )  # another process, after the first was lost
    assert {
        name: (tmp_path / name).read_bytes() for name in sizes(tmp_path)
    } == before
    live(first, torch.arange(30_000), [2])
    live(first, torch.arange(30_000), [5])
    assert_same(second.load(0, 5)["kept"], torch.arange(30_000))


def test_a_part_that_is_missing_or_damaged_is_noticed(tmp_path):
    store = StateStore(tmp_path, 0)
    live(store, torch.arange(30_000), range(1, 4))
    part = tmp_path / "000000-2.part.safetensors"
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(
        StateLost, match=r"000000-2\.part\.safetensors: .*checksum is wrong"
    ):
        store.load(0, 3)
    part.unlink()
    with pytest.raises(
        StateLost, match=r"000000-2\.part\.safetensors: no such client state"
    ):
        store.load(0, 3)
    assert store.load(0, 1)["new"][0] == 1


@given(data=st.data())
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=50,
    deadline=None,
)
def test_any_mixture_of_old_and_new_comes_back(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("states")
    stores = [StateStore(folder, 2**30), StateStore(folder, 0)]
    now: dict[str, object] = {}
    for version in range(1, 8):
        store = data.draw(st.sampled_from(stores))
        state = store.load(0, version - 1) if version > 1 else {}
        assert_same(state, now)
        kept = {
            key: value for key, value in state.items() if data.draw(st.booleans())
        }
        new = {
            str(version + i): torch.full(
                (data.draw(st.sampled_from([3, 20_000])),), version + i
            )
            for i in (0.0, 0.5)
        }
        now = kept | new
        store.save(0, version, now)
        if data.draw(st.booleans()):
            store.prune({0: version})
            store.settle()


def test_memory_never_serves_another_version(tmp_path):
    store = StateStore(tmp_path, 1000)
    store.save(0, 1, {"x": 1})
    store.save(0, 2, {"x": 2})
    assert store.load(0, 1) == {"x": 1}
    assert store.load(0, 2) == {"x": 2}


def test_a_state_larger_than_the_budget_is_read_from_disk(tmp_path):
    store = StateStore(tmp_path, memory_bytes=100)
    store.save(0, 1, {"x": torch.ones(10)})
    store.save(1, 1, {"x": torch.ones(1000)})
    (tmp_path / "000000-1.safetensors").unlink()
    (tmp_path / "000001-1.safetensors").unlink()
    assert torch.equal(
        store.load(0, 1)["x"], torch.ones(10)
    )  # not driven out by it
    with pytest.raises(StateError):
        store.load(1, 1)


def test_memory_gives_what_disk_would_give(tmp_path):
    image = (
        torch.arange(24.0)
        .reshape(1, 2, 3, 4)
        .to(memory_format=torch.channels_last)
    )
    view = torch.zeros(1000)[:3]
    warm, cold = StateStore(tmp_path, 10**6), StateStore(tmp_path, 0)
    warm.save(0, 1, {"image": image, "view": view, "array": np.arange(4)[::2]})
    a, b = warm.load(0, 1), cold.load(0, 1)
    assert_same(a, b)
    for name in ("image", "view"):
        assert a[name].stride() == b[name].stride()
        assert a[name].untyped_storage().nbytes() == b[name].nbytes


def test_memory_keeps_tensors_by_reference(tmp_path):
    store = StateStore(tmp_path, 1000)
    tensor = torch.ones(4)
    store.save(0, 1, {"x": tensor})
    assert store.load(0, 1)["x"].data_ptr() == tensor.data_ptr()


def test_many_clients_lie_in_folders_of_a_thousand(tmp_path):
    """What is pruned, what stays, and what is read is the same in each of them."""
    store = StateStore(tmp_path, 0)
    clients = (0, 999, 1000, 12345)
    for client in clients:
        for version in (1, 2):
            store.save(client, version, {"w": torch.full((3,), client + version)})
    assert store.path(999, 1).parent == tmp_path
    assert store.path(1000, 1) == tmp_path / "0001" / "001000-1.safetensors"
    assert store.path(12345, 1).parent == tmp_path / "0012"
    store.prune(dict.fromkeys(clients, 2))
    store.settle()
    left = sorted(path.name for path in tmp_path.rglob("*.safetensors"))
    assert left == [f"{client:06d}-2.safetensors" for client in clients]
    fresh = StateStore(tmp_path, 0)
    for client in clients:
        assert fresh.load(client, 2)["w"].tolist() == [client + 2] * 3
    fresh.retain(None, ())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_parts_lie_beside_their_versions(tmp_path):
    store = StateStore(tmp_path, 10**7)
    past = torch.arange(2**15, dtype=torch.float32)
    store.save(5000, 1, {"past": past})
    store.save(
        5000, 2, {"past": store.load(5000, 1)["past"], "new": torch.ones(1)}
    )
    part = tmp_path / "0005" / "005000-2.part.safetensors"
    assert part.exists()
    store.prune({5000: 2})
    store.settle()
    assert part.exists()
    assert torch.equal(StateStore(tmp_path, 0).load(5000, 2)["past"], past)
