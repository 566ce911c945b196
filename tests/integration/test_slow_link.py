"""A run over a link of 50 kB/s with 100 ms and 5 % of packets lost each way, between two network
namespaces.

The link is a pair of TUN devices with this process between them, as not every kernel has netem.
"""

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import threading
import time
import tomllib
from itertools import count
from pathlib import Path

import pytest

from fedknow.protocols.config import read_config
from fedknow.server.certs import make_certificates
from fedknow.simulations.simulate import simulate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]

FEDKNOW = Path(sys.executable).with_name("fedknow")
RATE, DELAY, LOSS, BUFFER = 50_000, 0.1, 0.05, 50_000
SERVER, CLIENTS = "10.77.0.1", "10.77.0.2"

EXPERIMENT = """
name = "slow"
data = {name = "digits", clients = 2, tasks = 2}
model = {name = "mlp", hidden = 200}
train = {rounds = 2, epochs = 1}
learner = "fedknow"
evaluation = {global_model = true}
"""


class Way:
    """One direction of the link: a bottleneck with a buffer, a delay and losses."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.free = 0.0
        self.waiting = []
        self.order = count()
        self.bytes = self.packets = self.lost = 0

    def put(self, packet, now):
        backlog = max(0.0, self.free - now) * RATE
        if self.draw.random() < LOSS or backlog > BUFFER:
            self.lost += 1
            return
        self.free = max(self.free, now) + len(packet) / RATE
        self.bytes += len(packet)
        self.packets += 1
        heapq.heappush(
            self.waiting, (self.free + DELAY, next(self.order), packet)
        )

    def due(self, now):
        while self.waiting and self.waiting[0][0] <= now:
            yield heapq.heappop(self.waiting)[2]


class Link:
    """Two network namespaces and what lies between them."""

    def __init__(self, names):
        self.names = names
        self.ways = Way(1), Way(2)
        self.devices = []
        self.end, self.told = os.pipe()
        self.thread = threading.Thread(target=self._carry)

    def open(self):
        for name, address in zip(self.names, (SERVER, CLIENTS), strict=True):
            _ip("netns", "add", name)
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            self.devices.append(device)
            fcntl.ioctl(
                device, 0x400454CA, struct.pack("16sH", name.encode(), 0x1001)
            )  # TUNSETIFF: TUN, no header
            _ip("link", "set", name, "netns", name)
            _ip("-n", name, "address", "add", f"{address}/30", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
        self.thread.start()

    def close(self):
        os.write(self.told, b".")
        if self.thread.ident:
            self.thread.join()
        for descriptor in (*self.devices, self.end, self.told):
            os.close(descriptor)
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False)

    def _carry(self):
        while True:
            times = [way.waiting[0][0] for way in self.ways if way.waiting]
            left = max(0.0, min(times) - time.monotonic()) if times else None
            ready = select.select([*self.devices, self.end], [], [], left)[0]
            if self.end in ready:
                return
            now = time.monotonic()
            for place, device in enumerate(self.devices):
                if device in ready:
                    self.ways[place].put(os.read(device, 65536), now)
                for packet in self.ways[1 - place].due(now):
                    os.write(device, packet)


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def link():
    link = Link([f"fk{os.getpid() % 10**7}{end}" for end in "ab"])
    try:
        link.open()
    except (OSError, subprocess.CalledProcessError) as error:
        link.close()
        pytest.skip(f"no network namespaces with TUN devices here: {error}")
    yield link
    link.close()


@pytest.mark.timeout(900)
def test_the_numbers_are_the_same_over_a_slow_link_that_loses_packets(
    link, tmp_path, numbers
):
    config = read_config(tomllib.loads(EXPERIMENT), ["engine.backend=inline"])
    expected = numbers(simulate(config, tmp_path / "inline").folder)
    (tmp_path / "slow.toml").write_text(EXPERIMENT)
    certs = tmp_path / "certs"
    make_certificates(certs, 2, [SERVER])
    run = tmp_path / "run"
    began = time.monotonic()
    started = [
        _start(link.names[0], tmp_path / "server.log",
               "server", tmp_path / "slow.toml", "--listen", f"{SERVER}:8700",
               "--tls", certs / "server", "--out", run),
        *(_start(link.names[1], tmp_path / f"client-{n}.log",
                 "client", "--server", f"{SERVER}:8700",
                 "--tls", certs / "clients" / f"{n:03d}",
                 "--state", tmp_path / f"state-{n}") for n in range(2)),
    ]  # fmt: skip
    try:
        codes = [process.wait(800) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    seconds = time.monotonic() - began
    logs = "\n".join(
        file.read_text("utf-8") for file in sorted(tmp_path.glob("*.log"))
    )
    assert codes == [0, 0, 0], logs
    assert numbers(run) == expected
    for way in link.ways:
        assert way.lost > 0.03 * way.packets  # the link was what it says
        assert way.bytes <= RATE * seconds
    sent = sum(way.bytes for way in link.ways)
    print(
        f"{seconds:.0f} s, {sent / 1e6:.1f} MB, {sum(way.lost for way in link.ways)} packets lost"
    )


def _start(namespace, log, *command):
    with log.open("wb") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", namespace, FEDKNOW, *map(str, command)],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
