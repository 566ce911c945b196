"""States that travel between the run folder and machines that do not see it."""

import os
import shutil

import numpy as np
import pytest
import torch

from fedknow.client.state import StateLost, StateStore
from fedknow.simulations.engine import travel
from fedknow.simulations.engine.packing import Job
from fedknow.simulations.engine.travel import (
    Courier,
    ScratchStore,
    Started,
    States,
)

PRIVATE = Started(1.0, "elsewhere", "node-1", is_private=True)
BIG = 2**15
"""Numbers of a tensor that is worth a part."""


@pytest.fixture
def courier(tmp_path):
    courier = Courier(StateStore(tmp_path / "run", 0), has_other_machines=True)
    courier.take_on(0, PRIVATE)
    yield courier
    courier.close()


@pytest.fixture
def scratch():
    store = ScratchStore(10**6)
    yield store
    store.remove()


def names(store):
    return {path.name for path in store.folder.glob("*.safetensors")}


def state(number, past=None):
    fresh = {"w": torch.full((4,), float(number))}
    return fresh if past is None else fresh | {"past": past}


def do_batch(courier, scratch, jobs, versions, states):
    """Send states, have them changed, and bring them back."""
    files, fitting = courier.pack(0, jobs)
    assert fitting == len(jobs)
    scratch.receive(files)
    for job in jobs:
        if job.version:
            scratch.load(job.client, job.version)
        scratch.save(job.client, versions[job.client], states[job.client])
    new = scratch.give_back()
    scratch.keep_only(versions)
    courier.unpack(0, new, versions.items())
    return files, new


def test_a_state_comes_back_and_is_not_sent_again(courier, scratch, tmp_path):
    sent, new = do_batch(courier, scratch, [Job(3, 0)], {3: 7}, {3: state(1)})
    assert (len(sent), len(new)) == (0, 1)
    run = StateStore(tmp_path / "run", 0)
    assert torch.equal(run.load(3, 7)["w"], torch.ones(4))
    sent, _ = do_batch(courier, scratch, [Job(3, 7)], {3: 8}, {3: state(2)})
    assert not sent
    assert names(scratch) == {"000003-8.safetensors"}
    assert names(run) == {"000003-7.safetensors", "000003-8.safetensors"}


def test_a_state_that_was_refused_is_replaced_by_the_one_before(courier, scratch):
    do_batch(courier, scratch, [Job(3, 0)], {3: 7}, {3: state(1)})
    do_batch(courier, scratch, [Job(3, 7)], {3: 8}, {3: state(2)})
    files, _ = courier.pack(0, [Job(3, 7)])
    assert list(files) == ["000003-7.safetensors"]
    scratch.receive(files)
    assert torch.equal(scratch.load(3, 7)["w"], torch.ones(4))


def test_a_new_worker_in_the_place_is_sent_everything(courier, scratch):
    do_batch(courier, scratch, [Job(3, 0)], {3: 7}, {3: state(1)})
    courier.take_on(0, PRIVATE)
    assert list(courier.pack(0, [Job(3, 7)])[0]) == ["000003-7.safetensors"]


def test_what_has_not_changed_travels_once(courier, scratch, tmp_path):
    """The third version names the part that the second one wrote."""
    past = torch.arange(BIG, dtype=torch.float32)
    do_batch(courier, scratch, [Job(1, 0)], {1: 1}, {1: state(1, past)})
    kept = scratch.load(1, 1)["past"]
    _, second = do_batch(
        courier, scratch, [Job(1, 1)], {1: 2}, {1: state(2, kept)}
    )
    assert set(second) == {
        "000001-2.safetensors",
        "000001-2.part.safetensors",
    }
    kept = scratch.load(1, 2)["past"]
    _, third = do_batch(
        courier, scratch, [Job(1, 2)], {1: 3}, {1: state(3, kept)}
    )
    assert set(third) == {"000001-3.safetensors"}
    assert third["000001-3.safetensors"].nbytes < past.nbytes / 10
    assert names(scratch) == {
        "000001-3.safetensors",
        "000001-2.part.safetensors",
    }
    run = StateStore(tmp_path / "run", 0)
    assert torch.equal(run.load(1, 3)["past"], past)
    courier.take_on(1, PRIVATE)
    assert set(courier.pack(1, [Job(1, 3)])[0]) == names(scratch)


def test_a_batch_takes_along_as_much_as_there_is_room_for(
    courier, scratch, monkeypatch
):
    versions = dict.fromkeys(range(4), 5)
    states = {client: state(client) for client in versions}
    do_batch(
        courier,
        scratch,
        [Job(client, 0) for client in versions],
        versions,
        states,
    )
    courier.take_on(0, PRIVATE)
    jobs = [Job(client, 5) for client in versions]
    size = courier.pack(0, jobs[:1])[0]["000000-5.safetensors"].nbytes
    monkeypatch.setattr(travel, "MOST_BYTES", 2 * size)
    files, fitting = courier.pack(0, jobs)
    assert (len(files), fitting) == (2, 2)
    monkeypatch.setattr(travel, "MOST_BYTES", 1)
    # A single client goes, however much it has.
    assert courier.pack(0, jobs)[1] == 1


def test_a_state_that_the_run_folder_lacks_is_lost(courier, scratch):
    files, fitting = courier.pack(0, [Job(2, 9)])
    assert (files, fitting) == ({}, 1)
    with pytest.raises(StateLost, match="000002-9"):
        scratch.load(2, 9)


def test_a_worker_that_sees_the_folder_uses_it(courier, tmp_path):
    store = courier.states.store(0, durable=False)
    assert type(store) is StateStore
    assert store.folder == tmp_path / "run"
    courier.take_on(4, Started(1.0, "here", "node-0", is_private=False))
    store.save(3, 7, state(1))
    assert courier.pack(4, [Job(3, 7)]) == ({}, 1)


def test_a_copy_of_the_folder_on_another_machine_is_not_taken_for_it(
    courier, tmp_path
):
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    elsewhere = Courier(StateStore(tmp_path / "run", 0), has_other_machines=True)
    there = States(
        tmp_path / "copy", tmp_path / "copy" / elsewhere.states.token.name
    )
    store = there.store(0, durable=False)
    assert isinstance(store, ScratchStore)
    store.remove()
    elsewhere.close()
    assert len(list((tmp_path / "run").glob(".seen-*"))) == 1


def test_scratch_folders_of_dead_processes_go(monkeypatch, tmp_path):
    monkeypatch.setattr(travel.tempfile, "gettempdir", lambda: str(tmp_path))
    dead = tmp_path / "fedknow-states-999999999-x"
    alive = tmp_path / f"fedknow-states-{os.getppid()}-x"
    for folder in (dead, alive):
        folder.mkdir()
        np.zeros(1).tofile(folder / "000001-1.safetensors")
    ScratchStore(0).remove()
    assert [path.name for path in tmp_path.iterdir()] == [alive.name]
