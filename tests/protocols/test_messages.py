"""Messages, their sizes, and the seeds every draw comes from."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedknow.protocols import seeds
from fedknow.protocols.messages import (
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
    client_of,
    nbytes,
    node_of,
)


def test_a_reply_points_back_to_its_work():
    work = Message(
        TRAIN, node_of(3), "m7", group="2", content={"config": Config(task=1)}
    )
    reply = work.reply({"metrics": Metrics(loss=0.5)})
    assert (reply.kind, client_of(reply.node), reply.reply_to, reply.group) == (
        TRAIN,
        3,
        "m7",
        "2",
    )
    failure = work.fail(2, "no data").failure
    assert failure is not None
    assert (failure.code, failure.reason) == (2, "no data")


def test_records_are_found_by_kind():
    message = Message(
        TRAIN,
        2,
        "m",
        content={"m": Metrics(), "a": Arrays(x=np.zeros(2)), "c": Config(k=1)},
    )
    assert message.arrays().keys() == {"x"}
    assert message.config() == {"k": 1}
    assert Message(TRAIN, 2, "m").arrays() == {}


def test_payload_by_hand():
    content = {
        "a": Arrays(x=np.zeros((2, 3), np.float32), y=np.zeros(5, np.int64)),
        "c": Config(task=1, name="abc", raw=b"12", words=["ab", "c"]),
        "m": Metrics(loss=0.5, right=[1, 2, 3]),
    }
    assert nbytes(content) == (24 + 40) + (8 + 3 + 2 + 3) + (8 + 24)


@given(st.integers(0, 2**31 - 1), st.lists(st.integers(0, 10**6), max_size=4))
def test_seeds_depend_on_all_they_are_given_and_on_nothing_else(seed, numbers):
    assert seeds.integer(seed, "train", *numbers) == seeds.integer(
        seed, "train", *numbers
    )
    assert seeds.integer(seed, "train", *numbers) != seeds.integer(
        seed, "evaluate", *numbers
    )
    assert seeds.integer(seed, "train", *numbers, 1) != seeds.integer(
        seed, "train", *numbers, 2
    )
    assert 0 <= seeds.integer(seed, "train", *numbers) < 2**63


def test_seeds_stay_what_they_were_from_release_to_release():
    # A saved run is resumed with these; a change here breaks resuming and every recorded result.
    assert seeds.integer(0, "train", 1, 2, 3) == 3716132166500501476
    assert seeds.generator(0, "partition").integers(1000, size=3).tolist() == [
        102,
        962,
        144,
    ]
