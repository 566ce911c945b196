"""Who waits at a server's doors, and who knocks too often."""

import asyncio
import logging
import queue
from contextlib import ExitStack

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedknow.protocols.config import read_config
from fedknow.protocols.messages import node_of
from fedknow.protocols.wire import JOIN, hello, parse
from fedknow.server.grids.grpc_doors import Crowded, DoorLimits, Doors, Repeats
from fedknow.server.grids.grpc_grid import GrpcGrid

WAIT = 30
"""Seconds that nothing here takes."""
SMALL = DoorLimits(waiting=2, waiting_all=3, burst=3, rate=2.0, visitors=2)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_visitor_begins_so_many_calls_at_once_and_then_so_many_a_second(clock):
    doors = Doors(SMALL, clock)
    for _ in range(3):
        doors.knock("a")
    with pytest.raises(Crowded, match="a begins more than 2 calls a second"):
        doors.knock("a")
    doors.knock("b")  # is another one
    clock.now = 1.0
    doors.knock("a")
    doors.knock("a")
    with pytest.raises(Crowded):
        doors.knock("a")
    assert doors.counts == {"crowded": 2}


def test_a_member_has_a_rate_of_its_own(clock):
    doors = Doors(DoorLimits(2, 3, 3, 2.0, member_burst=1), clock)
    doors.knock("client 3", is_member=True)
    with pytest.raises(Crowded, match="client 3 begins"):
        doors.knock("client 3", is_member=True)
    doors.knock("127.0.0.1")


def test_only_so_many_visitors_are_remembered(clock):
    doors = Doors(SMALL, clock)
    for number in range(100):
        doors.knock(f"visitor {number}")
    assert len(doors._buckets) == 2


def waits(doors, *visitors):
    """Have visitors wait, one after the other; gives who had to give way."""

    async def main():
        displaced = []
        entered = asyncio.Event()

        async def wait(place, visitor):
            try:
                async with asyncio.timeout(WAIT) as patience:
                    with doors.waiting(visitor, patience):
                        entered.set()
                        await asyncio.Event().wait()
            except TimeoutError:
                displaced.append(place)

        tasks = []
        for place, visitor in enumerate(visitors):
            entered.clear()
            tasks.append(asyncio.create_task(wait(place, visitor)))
            await entered.wait()
        for _ in range(3):  # those that give way come to their end
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return displaced

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("visitors", "displaced"),
    [
        ("aab", []),
        ("aaa", [0]),
        ("aaaa", [0, 1]),
        ("aabc", [0]),  # the crowd gives way to whoever comes
        ("abcd", [0]),
    ],
)
def test_the_oldest_stream_of_a_crowd_gives_way(visitors, displaced):
    doors = Doors(SMALL)
    assert waits(doors, *visitors) == displaced
    assert doors.counts["displaced"] == len(displaced)
    assert not doors._waiting
    assert not doors._by_visitor


def test_many_events_of_a_kind_are_few_lines(clock, caplog):
    repeats = Repeats(logging.getLogger("fedknow.test"), 2, 10.0, clock)
    with caplog.at_level("INFO", "fedknow"):
        for number in range(1000):
            repeats.write(logging.INFO, "hellos", f"hello {number}")
        repeats.write(logging.INFO, "other", "another kind")
        clock.now = 10.0
        repeats.write(logging.INFO, "hellos", "later")
        repeats.flush_all()
    assert caplog.messages == [
        "hello 0",
        "hello 1",
        "another kind",
        "hellos: 998 more like these",
        "later",
    ]


# --- over sockets
# --------------------------------------------------------------------------------------


@pytest.fixture
def grid():
    made = GrpcGrid(read_config({"data": {"clients": 3}}), "127.0.0.1:0")
    yield made
    made.close()


@pytest.fixture
def channels(grid):
    """Makes connections of their own."""
    with ExitStack() as stack:

        def make():
            options = [("grpc.use_local_subchannel_pool", 1)]
            address = f"127.0.0.1:{grid.port}"
            channel = grpc.insecure_channel(address, options)
            return stack.enter_context(channel)

        yield make


def welcomed(channel, client):
    """Join as a client; gives the kind of the server's answer."""
    outgoing = queue.SimpleQueue()
    outgoing.put(hello(node_of(client)))
    stream = channel.stream_stream(JOIN)(iter(outgoing.get, None), timeout=WAIT)
    kind = parse(next(iter(stream))).WhichOneof("kind")
    outgoing.put(None)
    return kind


def test_silent_streams_and_watchers_take_no_place(grid, channels):
    """The attack: 70 watchers of health and 70 silent streams shut every client out."""
    silent = queue.SimpleQueue()
    requests = []
    for _ in range(4):
        channel = channels()
        watch = health_pb2_grpc.HealthStub(channel).Watch
        for _ in range(18):
            requests.append(watch(health_pb2.HealthCheckRequest()))
            requests.append(channel.stream_stream(JOIN)(iter(silent.get, None)))
    kinds = [welcomed(channels(), client) for client in range(3)]
    assert kinds == ["welcome"] * 3
    for _ in range(72):
        silent.put(None)
    for request in requests:
        request.cancel()


def test_health_has_few_watchers_and_answers_checks(grid, channels):
    channel = channels()
    stub = health_pb2_grpc.HealthStub(channel)
    watchers = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(4)]
    for watcher in watchers:
        assert next(iter(watcher)).status == 1
    with pytest.raises(grpc.RpcError) as error:
        next(iter(stub.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT)))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    check = stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT)
    assert check.status == health_pb2.HealthCheckResponse.SERVING
    for watcher in watchers:
        watcher.cancel()


def test_a_storm_of_bad_hellos_is_bounded_and_a_few_lines(grid, channels, caplog):
    channel = channels()
    codes = set()
    with caplog.at_level("INFO", "fedknow"):
        for _ in range(200):
            try:
                list(
                    channel.stream_stream(JOIN)(iter([b"\xff\xff"]), timeout=WAIT)
                )
            except grpc.RpcError as error:
                codes.add(error.code())
        grid.close()
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert grid.status()["doors"]["crowded"] > 50
    assert len(caplog.messages) < 20
    assert "refusals of code MALFORMED" in caplog.text
