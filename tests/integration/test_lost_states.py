"""A client that failed, or lost its state, takes part again: the same way in a simulation and over
gRPC."""

import json
import shutil
import socket

import numpy as np
import pytest
from real_clients import Clients

from fedknow.client.data.local import LocalStream
from fedknow.client.edge import client as edge
from fedknow.client.node import Node
from fedknow.protocols.config import ConfigError, read_config
from fedknow.server import serve as serving
from fedknow.server.checks.faults import RunError
from fedknow.server.reports.summary import summarise
from fedknow.server.run.checkpoint import load_checkpoint
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_report")

BASE = {
    "data": {"clients": 2, "tasks": 2, "classes_max": 2, "test_samples": 0.5},
    "train": {"rounds": 3, "epochs": 2, "lr": 3e-3},
    "learner": {"name": "fedrep"},
    # Real clients keep their heads at home unless told otherwise.
    "evaluation": {"global_model": True},
    "engine": {"backend": "inline"},
}
FRESH = ["engine.on_lost_state=fresh"]
LOST = 1
"""The client whose state is lost."""


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(edge, "LONGEST_DELAY", 0.1)


def stop_in(server_round):
    """An observer that ends a run as Ctrl-C does, in a round."""

    def observe(event):
        if event.event == "round" and event.server_round == server_round:
            raise KeyboardInterrupt

    return observe


def begin(out):
    with pytest.raises(KeyboardInterrupt):
        simulate(read_config(BASE), out, observers=[stop_in(5)])


def lose(folder):
    """Delete the files of a client's state, or damage the bytes of one."""
    paths = sorted(folder.glob(f"{LOST:06d}-*"))
    assert paths
    for path in paths[1:]:
        path.unlink()
    paths[0].write_bytes(paths[0].read_bytes()[:-1])


def forgotten(out):
    return [
        event
        for event in RunFolder.open(out).events()
        if event["event"] == "forgotten"
    ]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, numbers, no_report):
    """A run in which a client began anew after a checkpoint, and its numbers."""
    out = tmp_path_factory.mktemp("fresh") / "run"
    begin(out)
    lose(out / "clients")
    simulate(read_config(BASE, FRESH), out, resume=True)
    return out, numbers(out)


def test_a_fresh_client_is_on_record(fresh, tmp_path, numbers):
    out, found = fresh
    [event] = forgotten(out)
    assert (event["client"], event["task"], event["round"]) == (LOST, 1, 2)
    assert f"client {LOST} begins anew: " in event["reason"]
    assert ".safetensors: n" in event["reason"]
    assert event in summarise(RunFolder.open(out)).troubles
    simulate(read_config(BASE), tmp_path / "undisturbed")
    assert numbers(tmp_path / "undisturbed").keys() == found.keys()
    assert numbers(tmp_path / "undisturbed") != found


def test_by_default_the_run_stops_and_says_what_can_be_done(
    fresh, tmp_path, fedknow, numbers
):
    out = tmp_path / "run"
    begin(out)
    lose(out / "clients")
    with pytest.raises(
        RunError,
        match=r"client 1, task 2, round 2 \(train\): .*fedknow forget .*run --client 1",
    ):
        simulate(read_config(BASE), out, resume=True)
    done = fedknow("forget", out, "--client", LOST)
    assert done.exit_code == 0, done.output
    assert "Client 1 begins anew when the run is resumed." in done.stdout
    simulate(read_config(BASE), out, resume=True)
    [event] = forgotten(out)
    assert (
        event["reason"]
        == "client 1 begins anew: its state was given up by fedknow forget"
    )
    assert numbers(out) == fresh[1]


@pytest.mark.parametrize("change", ["fleet=infinite", "engine.vectorize=on"])
def test_a_client_begins_anew_whatever_carries_the_run(
    fresh, tmp_path, numbers, change
):
    out = tmp_path / "run"
    changes = [change, "learner=fedavg"] if "vectorize" in change else [change]
    with pytest.raises(KeyboardInterrupt):
        simulate(read_config(BASE, changes), out, observers=[stop_in(5)])
    if "vectorize" in change:  # a method that keeps nothing loses nothing
        assert not list((out / "clients").glob("*"))
    else:
        lose(out / "clients")
    simulate(read_config(BASE, [*changes, *FRESH]), out, resume=True)
    if "vectorize" not in change:
        assert numbers(out) == fresh[1]
        assert [event["client"] for event in forgotten(out)] == [LOST]


@pytest.mark.parametrize(
    ("client", "message"),
    [
        (2, "clients 0 to 1"),
        (None, "no checkpoint yet"),
        (0, "holds a finished run"),
        (1, "keeps nothing that could"),
    ],
)
def test_what_cannot_be_forgotten_is_refused(
    fresh, tmp_path, fedknow, client, message
):
    out = tmp_path / "run"
    changes = ["learner=fedavg"] if client == 1 else []
    if client == 0:
        out = fresh[0]
    else:
        with pytest.raises(KeyboardInterrupt):
            simulate(
                read_config(BASE, changes),
                out,
                observers=[stop_in(1 if client is None else 2)],
            )
    before = {
        path: path.read_bytes() for path in out.rglob("*") if path.is_file()
    }
    done = fedknow("forget", out, "--client", client or 0)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert {
        path: path.read_bytes() for path in out.rglob("*") if path.is_file()
    } == before


# --- real clients
# --------------------------------------------------------------------------------------


@pytest.fixture
def port():
    """One that is free now, and that a resumed server has again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(out, port, *changes, resume=True, base=BASE, observers=()):
    config = read_config(base, changes)
    return serving.serve(
        config, out, f"127.0.0.1:{port}", resume=resume, observers=observers
    )


@pytest.mark.parametrize("way", ["setting", "command"])
def test_a_real_client_that_lost_its_state_begins_anew(
    fresh, tmp_path, fedknow, numbers, port, way
):
    out = tmp_path / "run"
    clients = Clients(port, tmp_path, 2)
    with pytest.raises(KeyboardInterrupt):
        serve(out, port, observers=[stop_in(5)])
    clients.stop()
    version = load_checkpoint(out / "checkpoint").versions[LOST]
    assert (
        tmp_path / str(LOST) / "states" / f"{LOST:06d}-{version:x}.safetensors"
    ).is_file()
    shutil.rmtree(tmp_path / str(LOST))
    if way == "command":
        clients = Clients(port, tmp_path, 2)
        with pytest.raises(RunError, match=r"fedknow forget .*run --client 1"):
            serve(out, port)
        clients.stop()
        assert fedknow("forget", out, "--client", LOST).exit_code == 0
    clients = Clients(port, tmp_path, 2)
    serve(out, port, *(FRESH if way == "setting" else []))
    assert clients.ended() == [None, None]
    assert numbers(out) == fresh[1]
    assert [event["client"] for event in forgotten(out)] == [LOST]


def test_a_client_that_failed_goes_on_when_the_cause_is_gone(
    tmp_path, numbers, port
):
    """Its data of the second task are missing at first. Neither client is restarted."""
    data, draw = tmp_path / "data", np.random.default_rng(0)
    for client in range(2):
        (data / str(client)).mkdir(parents=True)
        for task in range(2):
            arrays = {}
            for part in ("train", "test"):
                labels = draw.integers(0, 2, 12) + 2 * task
                arrays[f"{part}_x"] = (
                    labels[:, None, None, None] * 60
                    + draw.integers(0, 60, (12, 1, 8, 8))
                ).astype(np.uint8)
                arrays[f"{part}_y"] = labels
            np.savez(data / str(client) / f"task-{task:03d}.npz", **arrays)
    local = BASE | {
        "data": {
            "name": "local",
            "clients": 2,
            "tasks": 2,
            "classes": 4,
            "shape": [1, 8, 8],
        }
    }

    def node_over(config, client):
        return Node(config, LocalStream(data / str(client), config.data))

    whole = Clients(port, tmp_path / "whole", 2, node_over)
    serve(tmp_path / "undisturbed", port, base=local)
    assert whole.ended() == [None, None]
    missing = data / str(LOST) / "task-001.npz"
    missing.rename(tmp_path / "away.npz")
    clients = Clients(port, tmp_path, 2, node_over)
    for _ in range(2):
        with pytest.raises(
            RunError,
            match=r"client 1, task 2, round 1 .*task-001.npz: no such file",
        ):
            serve(tmp_path / "run", port, base=local)
    (tmp_path / "away.npz").rename(missing)
    serve(tmp_path / "run", port, base=local)
    assert clients.ended() == [None, None]
    assert numbers(tmp_path / "run") == numbers(tmp_path / "undisturbed")


def test_a_server_that_is_refused_leaves_no_folder(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot be had"):
            serve(tmp_path / "run", taken.getsockname()[1], resume=False)
    assert not (tmp_path / "run").exists()


def test_a_run_is_resumed_from_any_folder(tmp_path, monkeypatch, numbers):
    """Its data, its fleet's devices and their hours are named relative to where it was begun."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    (home / "there.csv").write_text("client,start,end\n0,0,1e6\n1,0,1e6\n")
    changes = ["fleet=infinite", "fleet.availability=there.csv", "data.dir=data"]
    with pytest.raises(KeyboardInterrupt):
        simulate(read_config(BASE, changes), home / "run", observers=[stop_in(2)])
    simulate(read_config(BASE, changes), home / "undisturbed")
    monkeypatch.chdir(tmp_path)
    simulate(read_config(home / "run" / "config.toml"), home / "run", resume=True)
    assert numbers(home / "run") == numbers(home / "undisturbed")
    assert (
        json.loads((home / "run" / "fleet.json").read_text())["virtual_seconds"]
        == 0.0
    )
