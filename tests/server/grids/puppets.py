"""Clients in the hands of a test, and what they are given to do."""

import queue
import threading
import time
from dataclasses import replace

import grpc
import numpy as np

from fedknow.protocols.messages import (
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
    node_of,
)
from fedknow.protocols.wire import (
    JOIN,
    Assembler,
    hello,
    pack,
    parse,
    refused,
    unpack,
)

WAIT = 30
"""Seconds that nothing here takes."""


class Puppet:
    """A client in the hands of a test: one stream, whose frames it says and hears one by one."""

    def __init__(self, port, client=None, first=None, credentials=None):
        target = f"localhost:{port}"
        self.channel = (
            grpc.secure_channel(target, credentials)
            if credentials
            else grpc.insecure_channel(target)
        )
        self.outgoing = queue.SimpleQueue()
        self.stream = self.channel.stream_stream(JOIN)(
            iter(self.outgoing.get, None)
        )
        self.assembler = Assembler()
        self.say(
            hello(0 if client is None else node_of(client))
            if first is None
            else first
        )

    def say(self, *frames):
        for frame in frames:
            self.outgoing.put(frame)

    def hear(self):
        """The next frame that is no heartbeat."""
        for data in self.stream:
            frame = parse(data)
            if frame.WhichOneof("kind") != "heartbeat":
                return frame
        return None

    def welcome(self):
        frame = self.hear()
        assert frame.WhichOneof("kind") == "welcome", frame
        self.node = frame.welcome.node
        return frame.welcome

    def refusal(self):
        """Why the stream ended; nothing follows."""
        while (frame := self.hear()).WhichOneof("kind") == "chunk":
            pass
        assert frame.WhichOneof("kind") == "refusal", frame
        assert self.hear() is None
        return refused(frame.refusal)

    def parcel(self):
        """The next work."""
        while True:
            frame = self.hear()
            assert frame is not None
            assert frame.WhichOneof("kind") == "chunk", frame
            parcel = self.assembler.add(frame)
            if parcel is not None:
                return parcel

    def answer(self, parcel, add=1.0, version=7, **changes):
        """Answer with what came, plus something."""
        message = replace(unpack(parcel), **changes)
        arrays = Arrays(
            {
                name: array + np.float32(add)
                for name, array in message.arrays().items()
            }
        )
        reply = message.reply(
            {"arrays": arrays, "metrics": Metrics({"num-examples": 1})}
        )
        self.say(*pack(reply).frames(version=version))

    def drop(self):
        self.say(None)
        self.stream.cancel()
        self.channel.close()


def work(*clients, kind=TRAIN):
    content = {
        "arrays": Arrays({"w": np.arange(3, dtype=np.float32)}),
        "config": Config({"task": 0, "round": 1}),
    }
    return [
        Message(kind, node_of(client), "", content=content) for client in clients
    ]


class Exchange:
    """An exchange in a thread of its own."""

    def __init__(self, it, messages, *options, **named):
        self.result = queue.SimpleQueue()
        call = lambda: self.result.put(it.exchange(messages, *options, **named))  # noqa: E731
        threading.Thread(target=call, daemon=True).start()

    def replies(self):
        return self.result.get(timeout=WAIT)


def all_in(it, puppet, clients=3):
    """That many puppets, welcomed."""
    puppets = [puppet(it, client) for client in range(clients)]
    for one in puppets:
        one.welcome()
    return puppets


def eventually(true):
    """Whether something comes true that another process or thread is to bring about."""
    until = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def sums(replies):
    return {reply.node: float(reply.arrays()["w"].sum()) for reply in replies}
