"""Conversion to Flower's messages and back, and a watch on the private parts of Flower that it
touches."""

import copy
import io
import pickle
import random

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    MetricRecord,
    RecordDict,
)
from flwr.app import Message as FlowerMessage
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SType
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from fedknow.protocols import flower
from fedknow.protocols.flower import (
    LazyArray,
    from_flower,
    identify,
    set_id,
    to_arrays,
    to_flower,
    to_record,
)
from fedknow.protocols.messages import (
    CLIENT_FAILED,
    Arrays,
    Config,
    Failure,
    Message,
    Metrics,
)

NAMES = st.text(min_size=1, max_size=8)
FLOATS = st.floats(allow_nan=False)
INTS = st.integers(-(2**63), 2**63 - 1)
NUMBERS = (
    INTS | FLOATS | st.lists(INTS, max_size=4) | st.lists(FLOATS, max_size=4)
)
SETTINGS = (
    NUMBERS
    | st.booleans()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.lists(st.booleans(), max_size=4)
    | st.lists(st.text(max_size=4), max_size=4)
    | st.lists(st.binary(max_size=4), max_size=4)
)
INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
DTYPES = st.sampled_from(
    ["bool", *INTEGERS, "float16", "float32", "float64", "complex64"]
)
ARRAYS = DTYPES.flatmap(
    lambda t: stnp.arrays(
        t, stnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)
    )
)
RECORDS = (
    st.dictionaries(NAMES, ARRAYS, max_size=4).map(Arrays)
    | st.dictionaries(NAMES, NUMBERS, max_size=4).map(Metrics)
    | st.dictionaries(NAMES, SETTINGS, max_size=4).map(Config)
)
KINDS = st.sampled_from(["train", "evaluate", "query", "train.end_task"])


def work(content=None, kind="train", node=5, id="7", group="3"):
    return Message(
        kind, node, id, group=group, content={} if content is None else content
    )


def assert_same(a: Message, b: Message) -> None:
    assert (a.kind, a.node, a.id, a.reply_to, a.group, a.failure) == (
        b.kind,
        b.node,
        b.id,
        b.reply_to,
        b.group,
        b.failure,
    )
    assert list(a.content) == list(b.content)
    for x, y in zip(a.content.values(), b.content.values(), strict=True):
        assert type(x) is type(y)
        assert list(x) == list(y)
        for p, q in zip(x.values(), y.values(), strict=True):
            assert type(p) is type(q)
            if isinstance(p, np.ndarray):
                assert p.dtype == q.dtype
                assert p.shape == q.shape
                assert p.tobytes() == q.tobytes()
            else:
                assert p == q
                assert (
                    [type(i) for i in p] == [type(i) for i in q]
                    if isinstance(p, list)
                    else True
                )


@pytest.fixture(autouse=True)
def _identity():
    identify()


@given(
    st.dictionaries(NAMES, RECORDS, max_size=4),
    KINDS,
    st.integers(2, 2**40),
    NAMES,
    st.text(max_size=4),
)
def test_work_is_converted_without_loss(content, kind, node, id, group):
    identify()
    message = work(content, kind, node, id, group)
    there = to_flower(message)
    assert there.metadata.src_node_id == 1
    assert there.metadata.dst_node_id == node
    assert_same(from_flower(there), message)


@given(st.dictionaries(NAMES, RECORDS, max_size=4), KINDS)
def test_an_answer_is_converted_without_loss(content, kind):
    identify()
    asked = work(kind=kind)
    there = to_flower(asked)
    answer = asked.reply(content)
    back = to_flower(answer, there)
    assert back.metadata.src_node_id == asked.node
    assert back.metadata.dst_node_id == 1
    assert_same(from_flower(back), answer)


@given(st.integers(0, 300), st.text(max_size=20))
def test_a_failure_is_converted_without_loss(code, reason):
    identify()
    asked = work()
    answer = asked.fail(code, reason)
    back = to_flower(answer, to_flower(asked))
    assert (back.error.code, back.error.reason) == (code, reason)
    assert_same(from_flower(back), answer)


@given(ARRAYS)
def test_arrays_are_the_bytes_that_flower_would_store(array):
    mine, theirs = to_record({"x": array})["x"], Array(array)
    assert (mine.dtype, mine.shape, mine.stype) == (
        theirs.dtype,
        theirs.shape,
        theirs.stype,
    )
    assert mine.data == theirs.data


@given(ARRAYS)
def test_a_lazy_array_is_flowers_to_whoever_uses_it(array):
    theirs = Array(array)
    for lazy in (
        LazyArray(array),
        pickle.loads(pickle.dumps(LazyArray(array))),
        copy.deepcopy(LazyArray(array)),
    ):
        assert lazy == theirs
        assert theirs == lazy
        assert lazy.object_id == theirs.object_id
        assert lazy.deflate() == theirs.deflate()
        found = lazy.numpy()
        assert (found.dtype, found.shape, found.tobytes()) == (
            array.dtype,
            array.shape,
            array.tobytes(),
        )
        assert found.flags.writeable  # a strategy may compute in place


def test_a_lazy_array_changes_with_its_bytes_and_with_nothing_else():
    values = np.arange(3, dtype=np.float32)
    lazy = LazyArray(values)
    values[0] = 7
    lazy.numpy()[1] = 7
    np.testing.assert_array_equal(lazy.numpy(), [0, 1, 2])
    id = lazy.object_id
    lazy.data = Array(values).data
    np.testing.assert_array_equal(lazy.numpy(), [7, 1, 2])
    assert lazy.object_id != id


def test_read_only_arrays_travel_through_flowers_records_without_a_copy():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    values.flags.writeable = False
    assert to_arrays(to_record({"x": values}))["x"] is values


@given(ARRAYS)
def test_flowers_own_arrays_are_read_where_they_lie(array):
    theirs = Array(array)
    found = to_arrays(ArrayRecord({"x": theirs}))["x"]
    assert (found.dtype, found.shape, found.tobytes()) == (
        array.dtype,
        array.shape,
        array.tobytes(),
    )
    assert not found.flags.writeable
    assert array.size == 0 or np.shares_memory(
        found, np.frombuffer(theirs.data, np.uint8)
    )


def test_arrays_in_another_order_or_byte_order_keep_their_values():
    for array in (
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(6)[::2],
        np.arange(3, dtype=">f4"),
    ):
        back = to_arrays(to_record({"x": array}))["x"]
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)


def test_objects_are_refused_and_not_stored():
    with pytest.raises(ValueError, match="pickle"):
        to_record({"x": np.array([{}], dtype=object)})


def test_what_messages_share_is_converted_once_and_is_read_only():
    arrays = ArrayRecord([np.arange(4.0)])
    shared = RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": 0.1})})
    own = RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": 0.2})})
    cache: flower.Cache = {}
    a, b, c = (
        from_flower(FlowerMessage(r, 2, "train"), cache)
        for r in (shared, shared, own)
    )
    assert a.content["arrays"] is b.content["arrays"] is c.content["arrays"]
    assert a.content["config"] is b.content["config"]
    assert c.config() == {"lr": 0.2}
    with pytest.raises(ValueError, match="read-only"):
        a.arrays()["0"][0] = 1.0
    arrays["0"] = Array(np.zeros(1))
    assert from_flower(FlowerMessage(shared, 2, "train"), {}).arrays()[
        "0"
    ].shape == (1,)


def test_an_error_without_a_reason_gets_an_empty_one():
    asked = to_flower(work())
    assert from_flower(
        FlowerMessage(Error(3), reply_to=asked)
    ).failure == Failure(3, "")


def test_an_answer_needs_the_work_it_answers():
    answer = work(id="7").reply({})
    with pytest.raises(ValueError, match="answers '7'"):
        to_flower(answer)
    with pytest.raises(
        ValueError, match="answers '7', but was given the work '8'"
    ):
        to_flower(answer, to_flower(work(id="8")))
    with pytest.raises(ValueError, match="answers nothing"):
        to_flower(Message("train", 2, "1", failure=Failure(2, "no")))


def test_a_value_flower_cannot_carry_is_refused():
    with pytest.raises(TypeError):
        to_flower(work({"metrics": Metrics({"x": True})}))


# --- the private parts of Flower
# ------------------------------------------------------------------------------------


def test_contract_a_message_takes_its_sender_from_the_task_identity():
    for name in ("run_id", "node_id", "task_id"):
        assert hasattr(TaskIdentity, f"_{name}")
    identify(random.Random(0).getrandbits(40))
    try:
        message = FlowerMessage(RecordDict(), 2, "train")
        assert (
            message.metadata.run_id
            == TaskIdentity.run_id
            == random.Random(0).getrandbits(40)
        )
        assert (
            message.metadata.src_node_id
            == TaskIdentity.node_id
            == flower.SERVER_NODE
            == SUPERLINK_NODE_ID
        )
    finally:
        identify()


def test_contract_the_id_of_a_message_is_set_by_the_grid():
    message = FlowerMessage(RecordDict(), 2, "train")
    assert message.metadata.message_id == ""
    set_id(message, "17")
    assert message.metadata.message_id == "17"
    assert (
        FlowerMessage(RecordDict(), reply_to=message).metadata.reply_to_message_id
        == "17"
    )


def test_contract_an_array_is_what_numpy_saves():
    buffer = io.BytesIO()
    np.save(buffer, np.arange(6, dtype=np.float32).reshape(2, 3))
    array = Array(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert (array.data, array.dtype, array.shape) == (
        buffer.getvalue(),
        "float32",
        (2, 3),
    )
    assert array.stype == SType.NUMPY == flower.NUMPY


def test_contract_an_empty_run_can_be_made():
    assert flower.empty_run(3).run_id == 3


def test_contract_failure_codes():
    assert ErrorCode.CLIENT_APP_RAISED_EXCEPTION == CLIENT_FAILED
    pytest.importorskip("ray")
    from fedknow.simulations.engine.batches import WORKER_DIED

    assert ErrorCode.CLIENT_APP_CRASHED == WORKER_DIED


def test_contract_metrics_are_numbers_and_no_booleans():
    assert dict(MetricRecord({"a": 1, "b": [0.5]})) == {"a": 1, "b": [0.5]}
    with pytest.raises(TypeError):
        MetricRecord({"a": True})
