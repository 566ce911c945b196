"""Real processes over real sockets and TLS: whatever dies on the way, the numbers are those of an
undisturbed run."""

import functools
import json
import os
import queue
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from safetensors.torch import save_file

from fedknow.client.edge.status import fetch_status
from fedknow.client.models import build_model
from fedknow.protocols.config import ModelConfig, read_config
from fedknow.protocols.messages import Message, Metrics, node_of
from fedknow.protocols.wire import (
    JOIN,
    PROTOCOL,
    Frame,
    hello,
    pack,
    parse,
    refused,
)
from fedknow.protocols.work import COSTS
from fedknow.server.certs import make_certificates
from fedknow.server.run.checkpoint import load_checkpoint
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_report")

CLIENTS = 3
BASE = {
    "data": {
        "clients": CLIENTS,
        "tasks": 2,
        "classes_max": 2,
        "test_samples": 0.5,
    },
    "train": {"rounds": 3, "epochs": 2, "batch_size": 8, "lr": 3e-3},
    # Real clients keep their heads at home unless told otherwise.
    "evaluation": {"global_model": True},
    "strategy": {"name": "fedadam"},  # with a memory of its own
}
WAIT = 120
"""Seconds that nothing here takes, on a busy machine."""


@pytest.fixture(scope="module")
def zygote(parts):
    """Starts commands: gives a function of arguments and the current folder."""
    process = subprocess.Popen(
        [sys.executable, parts / "zygote.py"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, bufsize=1,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(parts)},
    )  # fmt: skip
    born, dead, lock = queue.SimpleQueue(), {}, threading.Condition()

    def listen():
        for line in process.stdout:
            told = json.loads(line)
            if "code" in told:
                with lock:
                    dead[told["pid"]] = told["code"]
                    lock.notify_all()
            else:
                born.put(told["pid"])

    threading.Thread(target=listen, daemon=True).start()

    class Command:
        def __init__(self, cwd, name, *arguments):
            self.log = Path(cwd) / f"{name}.log"
            order = {
                "arguments": [str(a) for a in arguments],
                "log": str(self.log),
                "cwd": str(cwd),
            }
            process.stdin.write(json.dumps(order) + "\n")
            self.pid = born.get(timeout=WAIT)

        @property
        def alive(self):
            return self.pid not in dead

        def end(self, timeout=WAIT):
            """Its exit code, once it has ended."""
            with lock:
                assert lock.wait_for(lambda: not self.alive, timeout), (
                    self.log.read_text()
                )
            return dead[self.pid]

        def kill(self, how=signal.SIGKILL):
            if self.alive:
                os.kill(self.pid, how)
            return self.end()

        def text(self):
            return self.log.read_text()

    yield Command
    process.stdin.close()
    assert process.wait(WAIT) == 0


@pytest.fixture(scope="module")
def expected_of(tmp_path_factory, numbers):
    """The numbers of an undisturbed run in one process, by what is changed in the experiment."""

    @functools.cache
    def of(*changes):
        out = tmp_path_factory.mktemp("expected") / "run"
        simulate(read_config(BASE, ["engine.backend=inline", *changes]), out)
        accuracy = RunFolder.open(out).accuracy()["personal"][:, :, -1]
        assert accuracy.max() > 0.55
        assert len(np.unique(accuracy)) > 2
        return numbers(out)

    return of


@pytest.fixture(scope="module")
def expected(expected_of):
    return expected_of()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, CLIENTS + 1, [])
    return folder


@pytest.fixture
def stage(zygote, certificates, tmp_path):
    it = Stage(zygote, certificates, tmp_path)
    yield it
    it.clear()


class Stage:
    """A server, its clients, and where they live."""

    def __init__(self, command, certificates, folder):
        self.command, self.certificates, self.folder = (
            command,
            certificates,
            folder,
        )
        self.clients = {}
        self.server = None
        self.port = 0
        (folder / "experiment.toml").write_text(read_config(BASE).to_toml())

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def start_server(self, *changes, arguments=()):
        port_file = self.folder / "port"
        port_file.unlink(missing_ok=True)
        self.server = self.command(
            self.folder, "server", "server", "experiment.toml", "--listen", self.address,
            "--out", "run", "--resume",
            "--tls", self.certificates / "server", "--port-file", port_file, *arguments,
            *(part for change in changes for part in ("--set", change)),
        )  # fmt: skip
        until = time.monotonic() + WAIT
        while not port_file.exists():
            assert self.server.alive, self.server.text()
            assert time.monotonic() < until, self.server.text()
            time.sleep(0.01)
        self.port = int(port_file.read_text())

    def start_client(self, client, *arguments):
        home = self.folder / f"client{client}"
        home.mkdir(exist_ok=True)
        self.clients[client] = self.command(
            home, "client", "client", "--server", self.address, "--state", "state",
            "--tls", self.certificates / "clients" / f"{client:03d}",
            "--allow", "edge_parts:Gated", *arguments,
        )  # fmt: skip
        return self.clients[client]

    def start(self, *changes):
        self.start_server(*changes)
        for client in range(CLIENTS):
            self.start_client(client)

    def end(self):
        """Wait for all to end well."""
        assert self.server.end() == 0, self.server.text()
        for client in self.clients.values():
            assert client.end() == 0, client.text()
        return self.folder / "run"

    def status(self):
        return json.loads(
            fetch_status(self.address, self.certificates / "clients" / "000")
        )

    def log(self):
        return self.server.text()

    def clear(self):
        for process in [self.server, *self.clients.values()]:
            if process is not None:
                process.kill()


def bearer(stage, client):
    """A channel with a client's certificate."""
    folder = stage.certificates / "clients" / f"{client:03d}"
    files = [
        (folder / name).read_bytes() for name in ("ca.pem", "key.pem", "cert.pem")
    ]
    return grpc.secure_channel(
        stage.address, grpc.ssl_channel_credentials(*files)
    )


def talk(channel, *frames):
    """Say frames on a stream of one's own, and hear how it ends."""
    with channel:
        outgoing = queue.SimpleQueue()
        for frame in frames:
            outgoing.put(frame)
        heard = [
            parse(data)
            for data in channel.stream_stream(JOIN)(
                iter(outgoing.get, None), timeout=WAIT
            )
        ]
        outgoing.put(None)
    return refused(heard[-1].refusal)


def peak_kb(pid):
    """The most memory that a process ever had."""
    return int(
        re.search(
            r"^VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M
        )[1]
    )


# --- undisturbed
# --------------------------------------------------------------------------------------


def test_real_processes_over_tls_give_the_numbers_of_one_process(
    stage, expected, numbers
):
    stage.start()
    assert numbers(stage.end()) == expected
    logs = stage.clients[0].text()
    assert re.search(r"connected to 127\.0\.0\.1:\d+ as client 0\n", logs)
    assert re.search(
        r"task 1, round 3: train in \d+\.\d s, 0\.05 MB in, 0\.05 MB out\n", logs
    )
    assert logs.endswith("done: the run is over\n")


def test_ray_gives_the_numbers_of_one_process_too(tmp_path, expected, numbers):
    changes = ["engine.backend=ray", "engine.workers=2"]
    assert (
        numbers(simulate(read_config(BASE, changes), tmp_path / "run").folder)
        == expected
    )


def test_weights_of_ones_own_reach_all_clients(
    stage, expected, expected_of, tmp_path, numbers
):
    """Inline, on Ray and over gRPC alike; the server alone reads the file."""
    own = build_model(ModelConfig(), (1, 8, 8), 10, seed=99).state_dict()
    save_file(own, tmp_path / "own.safetensors")
    changes = [f"start={tmp_path / 'own.safetensors'}", "start.without=head"]
    started = expected_of(*changes)
    assert started["parameters"] != expected["parameters"]
    config = read_config(BASE, [*changes, "engine.workers=2"])
    on_ray = simulate(config, tmp_path / "ray").folder
    assert numbers(on_ray) == started
    stage.start(*changes)
    assert numbers(stage.end()) == started


def test_a_running_mean_is_the_same_in_any_order(stage):
    """The mean is exact, so that the order of arrival does not count; the plain way rounds at each
    client: with SGD, as Adam may turn last bits into whole steps."""
    changes = ["train.optimizer=sgd", "train.lr=0.05"]
    mean = [*changes, "engine.running_mean=true"]
    simulate(
        read_config(BASE, ["engine.backend=inline", *changes]),
        stage.folder / "exact",
    )
    simulate(
        read_config(BASE, ["engine.backend=inline", *mean]),
        stage.folder / "inline",
    )
    stage.start(*mean)
    paths = [stage.folder / "exact", stage.folder / "inline", stage.end()]
    plain, *others = (load_checkpoint(path / "checkpoint") for path in paths)
    for other in others:
        assert other.traffic["train"] == plain.traffic["train"]
        assert other.server_round == plain.server_round
        for name, array in plain.arrays.items():
            np.testing.assert_allclose(
                other.arrays[name], array, rtol=1e-3, atol=1e-4
            )
    inline, real = others
    for name, array in inline.arrays.items():
        assert np.array_equal(real.arrays[name], array), name


def test_with_everybody_in_the_buffer_asynchronous_rounds_are_synchronous_ones(
    stage, expected_of, numbers
):
    stage.start("strategy=fedbuff", f"strategy.buffer={CLIENTS}")
    assert numbers(stage.end()) == expected_of("strategy=fedavg")


def test_a_deadline_that_all_keep_is_none(stage, expected_of, numbers):
    stage.start("strategy=semisync", f"strategy.deadline={WAIT}")
    assert numbers(stage.end()) == expected_of("strategy=fedavg")


def test_who_misses_a_deadline_counts_in_the_next_round(stage):
    stage.start(
        "strategy=semisync", "strategy.deadline=1e-6"
    )  # so the first answer is waited for, and the others late
    events = RunFolder.open(stage.end()).events()
    assert not [event for event in events if event["event"] == "warning"]
    rounds = [event for event in events if event["event"] == "round"]
    assert [(event["task"], event["round"]) for event in rounds] == [
        (t, r) for t in (0, 1) for r in (1, 2, 3)
    ]
    late = [event["metrics"]["staleness-max"] for event in rounds]
    assert [late[0], late[3]] == [0, 0]  # a task begins with everybody
    assert (
        max(late) >= 1
    )  # who is late how often is up to the machine, and so are the scores
    assert events[-1]["event"] == "end"


def test_real_clients_report_the_costs_that_a_simulation_counts(
    stage, parts, monkeypatch
):
    monkeypatch.syspath_prepend(parts)
    ledger = "strategy=odd_parts:Ledger"
    simulate(
        read_config(BASE, [ledger, "engine.backend=inline"]),
        stage.folder / "simulated",
    )
    stage.start(ledger)
    real, simulated = (
        RunFolder.open(path).events()
        for path in (stage.end(), stage.folder / "simulated")
    )
    told = [
        [event["metrics"] for event in events if event["event"] == "round"]
        for events in (real, simulated)
    ]
    assert len(told[0]) == len(told[1]) == 2 * 3
    for ours, theirs in zip(*told, strict=True):
        assert all(
            ours.pop(f"{client}/seconds") > 0 < theirs.pop(f"{client}/seconds")
            for client in range(CLIENTS)
        )
        assert {
            f"{client}/{cost}" for client in range(CLIENTS) for cost in COSTS
        } <= ours.keys()
        assert ours == theirs
    last = told[0][-1]
    assert (
        min(
            last["0/flops"],
            last["0/memory-knowledge"],
            last["0/memory-activations"],
        )
        > 0
    )
    assert real[-1]["traffic"] == simulated[-1]["traffic"]


def test_answers_are_mixed_in_as_they_come(stage):
    stage.start("strategy=fedasync")
    events = RunFolder.open(stage.end()).events()
    rounds = [event for event in events if event["event"] == "round"]
    assert [(event["task"], event["round"]) for event in rounds] == [
        (t, r) for t in (0, 1) for r in (1, 2, 3)
    ]
    assert rounds[-1]["traffic"]["train"]["messages"] == 2 * 3 * CLIENTS
    assert max(event["metrics"]["staleness-max"] for event in rounds) >= 1
    assert events[-1]["accuracy"] > 0.5


def test_tokens_in_the_stead_of_certificates(stage, expected, numbers):
    stage.start_server(arguments=["--tokens"])
    for client in range(CLIENTS):
        folder = stage.certificates / "clients" / f"{client:03d}"
        here = stage.folder / "tokens" / folder.name
        here.mkdir(parents=True)
        for name in ("ca.pem", "token"):
            shutil.copy(folder / name, here / name)
        home = stage.folder / f"client{client}"
        home.mkdir()
        stage.clients[client] = stage.command(
            home,
            "client",
            "client",
            "--server",
            stage.address,
            "--tls",
            here,
            "--state",
            "state",
        )
    assert numbers(stage.end()) == expected


def test_clients_with_data_of_their_own(stage):
    generator = np.random.default_rng(1)
    stage.start_server(
        "data.name=local",
        "data.shape=[1,8,8]",
        "data.classes=4",
        "data.classes_per_task=2",
        "learner=fedper",
        "strategy=fedavg",
    )
    for client in range(CLIENTS):
        data = stage.folder / f"data{client}"
        data.mkdir()
        for task in range(2):
            y = np.tile([2 * task, 2 * task + 1], 20)
            x = (
                generator.integers(0, 100, (40, 1, 8, 8))
                + 100 * (y % 2)[:, None, None, None]
            ).astype(np.uint8)
            np.savez(
                data / f"task-{task:03d}.npz",
                train_x=x,
                train_y=y,
                test_x=x[:10],
                test_y=y[:10],
            )
        stage.start_client(client, "--data", data)
    accuracy = RunFolder.open(stage.end()).accuracy()["personal"]
    assert accuracy[:, :, -1].min() > 0.9  # bright or dark is easy to tell


# --- disturbed
# --------------------------------------------------------------------------------------


def gate(stage, client):
    """The FIFOs of a client that trains behind a gate, and a function that waits."""
    home = stage.folder / f"client{client}"
    home.mkdir()
    os.mkfifo(home / "waiting")
    os.mkfifo(home / "go")
    end = os.open(home / "waiting", os.O_RDWR)

    def wait():
        ready, _, _ = select.select([end], [], [], WAIT)
        assert ready, stage.log()
        pid = int(os.read(end, 32))
        os.close(end)
        assert pid == stage.clients[client].pid
        return pid

    return wait


def test_a_client_killed_while_it_trains_does_not_matter(
    stage, expected, numbers
):
    wait = gate(stage, 1)
    stage.start("learner=edge_parts:Gated")
    wait()
    assert stage.clients[1].kill() == -signal.SIGKILL
    stage.start_client(1)
    assert numbers(stage.end()) == expected


def test_a_server_killed_while_a_client_trains_does_not_matter(
    stage, expected, numbers
):
    wait = gate(stage, 1)
    stage.start("learner=edge_parts:Gated")
    wait()
    assert stage.server.kill() == -signal.SIGKILL
    stage.start_server("learner=edge_parts:Gated")
    (stage.folder / "client1" / "go").write_text(
        ""
    )  # waits for the client, which was at it all the time
    assert numbers(stage.end()) == expected
    assert (
        stage.clients[1].text().count("task 1, round 2: train") == 1
    )  # and what it did was of use


def test_sigterm_is_a_pause(stage, expected, numbers):
    wait = gate(stage, 2)
    stage.start("learner=edge_parts:Gated")
    wait()
    assert stage.server.kill(signal.SIGTERM) == 130
    assert "Interrupted." in stage.log()
    assert "fedknow server run/config.toml --out run --resume" in stage.log()
    assert (
        stage.clients[2].kill(signal.SIGTERM) == 130
    )  # in the midst of training
    stage.start_server("learner=edge_parts:Gated")
    stage.start_client(2)
    assert numbers(stage.end()) == expected
    assert "the server says goodbye" in stage.clients[0].text()


def test_a_server_killed_after_the_end_tells_clients_that_it_is_over(
    stage, expected, numbers
):
    stage.start()
    assert numbers(stage.end()) == expected
    stage.start()  # with --resume, as a service manager does
    assert numbers(stage.end()) == expected
    assert "the run in run is finished" in stage.log()


def test_a_server_killed_before_it_could_say_that_it_is_over_tells_clients_too(
    stage, expected, numbers
):
    """After the last checkpoint nobody is needed any more: clients that are away then still hear
    of the end."""
    stage.start()
    folder = stage.end()
    log = folder / "metrics.jsonl"
    events = log.read_text().splitlines(keepends=True)
    log.write_text(
        "".join(event for event in events if json.loads(event)["event"] != "end")
    )
    assert not RunFolder.open(folder).complete
    stage.start()
    assert numbers(stage.end()) == expected
    assert "the run in run is finished" not in stage.log()


def test_a_late_client_a_deadline_and_who_was_left_out(stage):
    """Client 2 comes late and is killed for good: rounds go on without it."""
    wait = gate(stage, 2)
    stage.start_server(
        "learner=edge_parts:Gated",
        "engine.min_clients=2",
        "engine.round_timeout=2.0",
    )
    for client in (0, 1):
        stage.start_client(client)
    while stage.status()["work"] == {}:
        time.sleep(0.01)
    stage.start_client(2)
    wait()
    stage.clients.pop(2).kill()
    run = stage.end()
    events = RunFolder.open(run).events()
    rounds = [event["clients"] for event in events if event["event"] == "round"]
    assert len(rounds) == 6
    assert rounds[-1] == 2
    # It was at work when it was killed: that wave ended by the deadline, and says so.
    assert any(
        event["event"] == "warning" and event.get("clients") == [2]
        for event in events
    )
    assert set(rounds) <= {2, 3}
    accuracy = RunFolder.open(run).accuracy()["personal"]
    assert np.isfinite(accuracy[:2, :, -1]).all()
    assert np.isnan(accuracy[2, :, -1]).all()


def test_hostile_bytes_do_not_matter(stage, expected, numbers):
    """Somebody with a certificate of client 3's, and of client 1's, says all kinds of things while
    the run goes on."""
    wait = gate(stage, 1)
    stage.start("learner=edge_parts:Gated")
    wait()
    memory = peak_kb(stage.server.pid)
    reply = Message("train", node_of(2), "x").reply(
        {"metrics": Metrics({"num-examples": 1})}
    )
    frame = next(pack(reply).frames())
    corrupt = parse(frame)
    corrupt.chunk.crc32 ^= 1
    huge = parse(frame)
    huge.chunk.envelope.size = 1 << 50
    version = Frame()
    version.hello.protocol = PROTOCOL + 1
    codes = [
        talk(bearer(stage, 3), hello()).code.name,
        talk(bearer(stage, 2), version.SerializeToString()).code.name,
        talk(bearer(stage, 2), hello(node_of(0))).code.name,
        talk(bearer(stage, 2), b"\xff" * 100).code.name,
        talk(bearer(stage, 2), frame).code.name,
    ]
    assert codes == [
        "NO_ROOM",
        "VERSION",
        "CREDENTIAL",
        "MALFORMED",
        "OUT_OF_ORDER",
    ]
    generator = random.Random(3)
    for number in range(60):
        noise = generator.randbytes(generator.randrange(1, 200_000))
        assert talk(
            bearer(stage, 2),
            noise if number % 2 else version.SerializeToString()[:-1] + noise,
        )
    before = stage.status()["refusals"]
    assert sum(before.values()) >= 65
    # In client 1's name, whose stream it cannot take: it knows no secret of this run.
    bad = [corrupt, huge, Frame(hello={})]
    attempts = [[it.SerializeToString()] for it in bad]
    attempts.append(list(pack(reply).frames()))  # client 2's answer
    for words in attempts:
        error = talk(bearer(stage, 1), hello(), *words)
        assert error.code.name == "DUPLICATE"
    assert stage.status()["refusals"]["DUPLICATE"] == 4
    grown = peak_kb(stage.server.pid) - memory
    assert grown < 50_000, grown
    assert "has connected anew" not in stage.clients[1].text()
    stage.clients[1].kill()  # it waits at the gate
    stage.start_client(1)
    assert numbers(stage.end()) == expected


def test_wrong_credentials_do_not_get_in(stage, tmp_path_factory):
    stage.start_server()
    other = tmp_path_factory.mktemp("other")
    make_certificates(other, 1, [])
    right = stage.certificates / "clients" / "000"

    def attempt(tls, name, *arguments):
        (stage.folder / name).mkdir()
        client = stage.command(
            stage.folder / name, "client", "client", "--server", stage.address, "--tls",
            tls, "--state", "state",
            "--give-up", "1", *arguments,
        )  # fmt: skip
        return client.end(), client.text()

    code, text = attempt(other / "clients" / "000", "a")
    assert code == 1, text
    assert "issued by another CA" in text
    code, text = attempt(right, "b", "--client", "1")
    assert code == 2, text
    assert (
        "the credential is client 0's, but the peer says it is client 1"
        in text.replace("\n", " ")
    )
    assert stage.status()["refusals"] == {"CREDENTIAL": 1}


def test_off_loopback_in_the_clear_takes_a_word(stage):
    off = "192.0.2.1:1"
    for arguments in (
        ("server", "--listen", "0.0.0.0:0"),
        ("client", "--server", off),
        ("status", "--server", off),
    ):
        command = stage.command(stage.folder, "refused", *arguments)
        assert command.end() == 2
        assert "give --tls DIR" in command.text()


# --- chaos
# --------------------------------------------------------------------------------------


LONG = "data.tasks=3", "train.rounds=40"


@pytest.mark.parametrize(
    ("seed", "kills", "changes"),
    [
        (1, 3, ()),
        *(
            pytest.param(seed, 30, LONG, marks=pytest.mark.slow)
            for seed in range(2, 6)
        ),
    ],
)
def test_chaos(
    stage, expected_of, numbers, seed, kills, changes, record_property
):
    """Server and clients are killed at random moments and started again; the run comes to the same
    numbers."""
    numbers_of_peace = expected_of(*changes)
    generator = random.Random(seed)
    stage.start(*changes)
    killed = []
    while len(killed) < kills and stage.server.alive:
        time.sleep(
            generator.uniform(0.0, 0.5)
        )  # the moment is the matter of this test
        victim = generator.choice(["server", *range(CLIENTS)])
        if victim == "server":
            if stage.server.kill() == 0:
                break
            stage.start_server(*changes)
        else:
            if stage.clients[victim].kill() == 0:
                break
            stage.start_client(victim)
        killed.append(victim)
    assert numbers(stage.end()) == numbers_of_peace
    record_property("kills", len(killed))
    print(
        f"kills: {len(killed)} of {kills}, the server {killed.count('server')} times"
    )
