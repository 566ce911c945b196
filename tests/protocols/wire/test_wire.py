"""Messages as frames and back: nothing is lost, one serialisation serves all, hostile frames end
in a WireError."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import random
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fedknow
from fedknow.protocols.messages import Arrays, Config, Failure, Message, Metrics
from fedknow.protocols.wire import (
    CHUNK_BYTES,
    HEARTBEAT,
    JOIN,
    PROTOCOL,
    Assembler,
    Code,
    Encoding,
    Frame,
    Limits,
    Parcel,
    Refusal,
    WireError,
    check_version,
    hello,
    pack,
    parse,
    refusal,
    refused,
    unpack,
    welcome,
)
from fedknow.protocols.wire import fedknow_pb2 as pb
from fedknow.protocols.wire.frames import cut

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
SCALARS = {
    bool: st.booleans(),
    int: INTEGERS,
    float: st.floats(),
    str: NAMES,
    bytes: st.binary(max_size=12),
}
LISTS = st.one_of(*(st.lists(values, max_size=4) for values in SCALARS.values()))
NUMBERS = st.one_of(
    INTEGERS,
    st.floats(),
    st.lists(INTEGERS, max_size=4),
    st.lists(st.floats(), max_size=4),
)
ARRAYS = hnp.arrays(
    st.sampled_from(
        [
            "bool",
            "int8",
            "int64",
            "uint16",
            "uint64",
            "float16",
            "float32",
            "float64",
        ]
    ),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
)
RECORDS = st.one_of(
    st.dictionaries(NAMES, ARRAYS, max_size=4).map(Arrays),
    st.dictionaries(NAMES, NUMBERS, max_size=4).map(Metrics),
    st.dictionaries(NAMES, st.one_of(*SCALARS.values(), LISTS), max_size=6).map(
        Config
    ),
)
MESSAGES = st.builds(
    Message,
    kind=NAMES,
    node=st.integers(0, 2**64 - 1),
    id=NAMES,
    reply_to=NAMES,
    group=NAMES,
    content=st.dictionaries(NAMES, RECORDS, max_size=4),
    failure=st.none() | st.builds(Failure, INTEGERS, NAMES),
)


def receive(frames, limits=None):
    assembler = Assembler(limits)
    return [parcel for frame in frames if (parcel := assembler.add(parse(frame)))]


def there_and_back(message, encoding=Encoding.DENSE, **options):
    (parcel,) = receive(pack(message, encoding, **options).frames())
    return unpack(parcel)


def plain(value):
    """A value with its types, NaN and signs of zero, so that ``==`` compares them too."""
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tobytes()
    if isinstance(value, list):
        return [plain(item) for item in value]
    return type(value), np.float64(value).tobytes() if isinstance(
        value, float
    ) else value


def same(message, other):
    def about(it):
        return it.kind, it.node, it.id, it.reply_to, it.group, it.failure

    def content(it):
        return [
            (n, type(r), [(key, plain(value)) for key, value in r.items()])
            for n, r in it.content.items()
        ]

    return about(message) == about(other) and content(message) == content(other)


def refusing(code):
    return pytest.raises(WireError, match=f"^{code.name}: ")


def large(tensors=6, size=70_000, seed=0):
    """A message of a few chunks."""
    rng = np.random.default_rng(seed)
    arrays = Arrays(
        {
            f"w{i}": rng.standard_normal(size + i, dtype=np.float32)
            for i in range(tensors)
        }
    )
    return Message(
        "train", 7, "m7", "", "3", {"arrays": arrays, "config": Config(task=1)}
    )


# Messages


@given(MESSAGES, st.sampled_from([Encoding.DENSE, Encoding.SPARSE]))
@settings(deadline=None)
def test_nothing_is_lost(message, encoding):
    assert same(there_and_back(message, encoding), message)


@pytest.mark.parametrize(
    "value",
    [
        True,
        1,
        1.0,
        "1",
        b"1",
        0,
        0.0,
        -0.0,
        "",
        b"",
        [],
        [True],
        [1],
        [1.0],
        ["1"],
        [b"1"],
        2**63 - 1,
        -(2**63),
    ],
)
def test_each_type_comes_back_as_itself(value):
    back = there_and_back(
        Message("train", 2, "1", content={"config": Config(key=value)})
    ).config()["key"]
    assert plain(back) == plain(value)


def test_lossy_encodings_leave_other_tensors_exact():
    arrays = Arrays(
        w=np.full(5, 0.1, np.float32),
        n=np.array(2**40 + 1),
        half=np.full(3, 0.1, np.float16),
    )
    message = Message("train", 2, "1", content={"arrays": arrays})
    for encoding, expected in (
        (Encoding.FP16, 0.0999755859375),
        (Encoding.BF16, 0.10009765625),
        (Encoding.INT8, 0.1),
    ):
        back = there_and_back(message, encoding).arrays()
        assert back["w"].tolist() == np.full(5, expected, np.float32).tolist()
        assert plain(back["n"]) == plain(arrays["n"])
        assert plain(back["half"]) == plain(arrays["half"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"c": Config(k=2**63)}, "c.k is an integer of 64 bits"),
        ({"c": Config(k=10**5000)}, "c.k is an integer of 16610 bits"),
        (
            {"c": Config(k=[1, 2.0])},
            r"c.k = \[1, 2.0\]: a list holds scalars, all of one type",
        ),
        ({"c": Config(k=[[1]])}, "c.k = .*: a list holds scalars"),
        ({"c": Config(k=(1, 2))}, r"c.k = \(1, 2\) is a tuple; must be"),
        ({"c": Config(k=None)}, "c.k = None is a NoneType; must be"),
        ({"c": Config(k=np.int64(3))}, r"c.k = .* is a int64; must be"),
        ({"c": Config(k="\ud800")}, "c.k .*UTF-8"),
        ({"c": Config({1: 2})}, "key of record 'c' 1: must be text"),
        ({"m": Metrics(k=True)}, "m.k = True: metrics are int, float"),
        ({"m": Metrics(k="a")}, "m.k = 'a': metrics are int, float"),
        ({"\ud800": Config()}, "record .*UTF-8"),
        (
            {"x": {"a": 1}},
            "record 'x' is a dict; must be Arrays, Metrics or Config",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(content, words):
    with pytest.raises(WireError, match=words) as raised:
        pack(Message("train", 2, "1", content=content))
    assert raised.value.code is Code.BAD_VALUE


def test_the_envelope_too_is_checked_before_it_is_written():
    with refusing(Code.BAD_VALUE):
        pack(Message("train", -1, "1"))
    with refusing(Code.BAD_VALUE):
        pack(Message("train", 2, "1", failure=Failure(2**63, "")))
    with pytest.raises(
        ValueError, match="chunk_bytes = 100: must be 4096 to 1048576"
    ):
        pack(Message("train", 2, "1"), chunk_bytes=100)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(name_bytes=8), Message("train", 2, "x" * 9)),
        (
            Limits(name_bytes=8),
            Message("train", 2, "1", content={"é" * 5: Config()}),
        ),
        (
            Limits(records=1),
            Message("train", 2, "1", content={"a": Config(), "b": Config()}),
        ),
        (Limits(tensors=5), large()),
        (
            Limits(dims=1),
            Message("train", 2, "1", content={"a": Arrays(w=np.ones((1, 1)))}),
        ),
        (Limits(elements=69_999), large()),
        (Limits(decoded_bytes=4 * 6 * 70_000), large()),
        (Limits(message_bytes=4 * 6 * 70_000), large()),
        (
            Limits(header_bytes=99),
            Message("train", 2, "1", content={"a": Config(k=b"1" * 99)}),
        ),
    ],
)
def test_limits_hold_on_both_sides(limits, message):
    with refusing(Code.TOO_LARGE):
        pack(message, limits=limits)
    frames = list(pack(message).frames())
    with refusing(Code.TOO_LARGE):
        [unpack(parcel, limits) for parcel in receive(frames, limits)]


def parcel_of(header, payload=b""):
    return Parcel(
        2, "1", "", memoryview(header.SerializeToString()), memoryview(payload)
    )


def header_of(message):
    (parcel,) = receive(pack(message).frames())
    return pb.Header.FromString(bytes(parcel.header)), bytes(parcel.payload)


def test_headers_that_contradict_themselves_are_refused():
    header, payload = header_of(
        Message(
            "train", 2, "1", content={"a": Arrays(u=np.ones(3), v=np.ones(4))}
        )
    )
    assert unpack(parcel_of(header, payload)).arrays()["v"].tolist() == [1] * 4
    with refusing(Code.TRUNCATED):
        unpack(parcel_of(header, payload[:-8]))
    with refusing(Code.MALFORMED):
        unpack(parcel_of(header, payload + bytes(8)))
    overlapping = copy.deepcopy(header)
    overlapping.records[0].arrays.tensors[1].offset = 0
    twice = copy.deepcopy(header)
    twice.records[0].arrays.tensors[1].name = "u"
    for bad in (overlapping, twice):
        with refusing(Code.MALFORMED):
            unpack(parcel_of(bad, payload))


@pytest.mark.parametrize(
    "record",
    [
        pb.Record(name="a"),
        pb.Record(name="a", config=pb.Values(entries=[pb.Entry(name="k")])),
        pb.Record(
            name="a",
            config=pb.Values(entries=[pb.Entry(name="k", flag=True)] * 2),
        ),
        pb.Record(
            name="a", metrics=pb.Values(entries=[pb.Entry(name="k", flag=True)])
        ),
        pb.Record(
            name="a",
            metrics=pb.Values(
                entries=[pb.Entry(name="k", texts=pb.Texts(items=["a"]))]
            ),
        ),
    ],
)
def test_records_that_cannot_be_read_are_refused(record):
    with refusing(Code.MALFORMED):
        unpack(parcel_of(pb.Header(protocol=PROTOCOL, records=[record])))
    known = pb.Record(name="b", config=pb.Values())
    with refusing(Code.MALFORMED):
        unpack(parcel_of(pb.Header(protocol=PROTOCOL, records=[known, known])))


def test_arrays_are_views_of_one_buffer():
    back = there_and_back(large()).arrays()
    assert all(
        array.flags.writeable and array.ctypes.data % 8 == 0
        for array in back.values()
    )
    assert back["w0"].base is not None
    gap = back["w1"].ctypes.data - back["w0"].ctypes.data
    assert gap == back["w0"].nbytes  # 280,000 bytes, a multiple of 8


def test_arrays_may_change_once_they_are_packed():
    message = large()
    before = message.arrays()["w0"].copy()
    packed = pack(message)
    message.arrays()["w0"][:] = 0
    (parcel,) = receive(packed.frames())
    assert np.array_equal(unpack(parcel).arrays()["w0"], before)


# Frames


@given(
    st.integers(0, 3000),
    st.integers(1, 40),
    st.sampled_from([4096, 5000, CHUNK_BYTES]),
    st.integers(0, 99),
)
@settings(deadline=None)
def test_any_pieces_arrive_whole(size, header, chunk_bytes, seed):
    draw = random.Random(seed)
    data = draw.randbytes(8 * size)
    marks = sorted(draw.randrange(len(data) + 1) for _ in range(5))
    pieces = [
        memoryview(data)[a:b]
        for a, b in itertools.pairwise([0, *marks, len(data)])
    ]
    packed = cut(bytes(header), pieces, node=2, id="1", chunk_bytes=chunk_bytes)
    frames = list(packed.frames())
    (parcel,) = receive(frames)
    assert (bytes(parcel.header), bytes(parcel.payload)) == (bytes(header), data)
    whole = header + -header % 8 + len(data)
    assert packed.envelope.size == whole
    assert len(frames) == -(-whole // chunk_bytes)
    assert max(len(parse(frame).data) for frame in frames) <= chunk_bytes


def test_frames_are_what_protobuf_would_write():
    for frame in pack(large(), chunk_bytes=1 << 18).frames():
        parsed = Frame.FromString(frame)
        assert parsed.SerializeToString() == frame
        assert len(frame) < (1 << 18) + 64
        assert parsed.chunk.crc32 == zlib.crc32(parsed.data)


def test_a_broadcast_is_serialised_once():
    packed = pack(large())
    sent = {node: list(packed.frames(node, f"id-{node}")) for node in (2, 3, 4)}
    assert {len(frames) for frames in sent.values()} == {2}
    assert len({id(frames[1]) for frames in sent.values()}) == 1
    for node, frames in sent.items():
        (parcel,) = receive(frames)
        back = unpack(parcel)
        assert (back.node, back.id) == (node, f"id-{node}")
        assert same(dataclasses.replace(back, node=7, id="m7"), large())
    assert packed.size == pytest.approx(sum(map(len, sent[2])), abs=64)


@given(st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_messages_interleave_and_heartbeats_pass_between(draw):
    messages = [large(seed=seed) for seed in range(3)]
    queues = [
        list(pack(message, chunk_bytes=1 << 17).frames(id=str(i)))
        for i, message in enumerate(messages)
    ]
    assembler, arrived = Assembler(), {}
    while any(queues):
        frame = parse(draw.choice([queue for queue in queues if queue]).pop(0))
        assert parse(HEARTBEAT).WhichOneof("kind") == "heartbeat"
        if parcel := assembler.add(frame):
            arrived[int(parcel.id)] = unpack(parcel)
    for index, message in enumerate(messages):
        assert plain(arrived[index].arrays()["w5"]) == plain(
            message.arrays()["w5"]
        )


def frames_of(message=None, **options):
    return [
        parse(frame) for frame in pack(message or large(), **options).frames()
    ]


def add_all(frames, limits=None):
    assembler = Assembler(limits)
    for frame in frames:
        assembler.add(frame)


def test_frames_out_of_order_twice_or_foreign_are_refused():
    frames = frames_of(chunk_bytes=1 << 18)
    assert len(frames) == 7
    add_all(frames)
    for wrong in (
        [frames[1]],
        [*frames[:2], frames[3]],
        [*frames[:3], frames[2]],
        [frames[0], frames[0]],
    ):
        with refusing(Code.OUT_OF_ORDER):
            add_all(wrong)
    with refusing(Code.OUT_OF_ORDER):
        add_all([*frames, frames[-1]])  # its message is complete
    foreign = frames_of(chunk_bytes=1 << 18)
    with refusing(Code.OUT_OF_ORDER):
        add_all([frames[0], foreign[1]])
    enveloped = copy.deepcopy(frames[1])
    enveloped.chunk.envelope.CopyFrom(frames[0].chunk.envelope)
    with refusing(Code.OUT_OF_ORDER):
        add_all([frames[0], enveloped])


def changed(frame, data=None, **envelope):
    frame = copy.deepcopy(frame)
    for field, value in envelope.items():
        setattr(frame.chunk.envelope, field, value)
    if data is not None:
        frame.data, frame.chunk.crc32 = data, zlib.crc32(data)
    return frame


def test_chunks_of_the_wrong_size_are_refused():
    first, second, *_ = frames_of(chunk_bytes=1 << 18)
    for data, code in (
        (second.data[:-1], Code.TRUNCATED),
        (b"", Code.TRUNCATED),
        (second.data + b"1", Code.TRUNCATED),
    ):
        with refusing(code):
            add_all([first, changed(second, data)])
    (small,) = frames_of(Message("train", 2, "1"))
    with refusing(Code.TOO_LARGE):
        add_all([changed(small, small.data + b"1")])
    flipped = copy.deepcopy(second)
    flipped.data = bytes([flipped.data[0] ^ 1]) + flipped.data[1:]
    with refusing(Code.BAD_CHECKSUM):
        add_all([first, flipped])


@pytest.mark.parametrize(
    ("code", "envelope"),
    [
        (Code.TOO_LARGE, {"size": 1 << 40}),
        (Code.TOO_LARGE, {"size": (1 << 64) - 1}),
        (Code.TOO_LARGE, {"header_size": (1 << 32) - 1}),
        (Code.TOO_LARGE, {"chunk_size": CHUNK_BYTES + 1}),
        (Code.TOO_LARGE, {"id": "x" * 513}),
        (Code.TOO_LARGE, {"reply_to": "x" * 513}),
        (Code.MALFORMED, {"chunk_size": 0}),
        (Code.MALFORMED, {"chunk_size": 4095}),
        (Code.MALFORMED, {"header_size": 0}),
        (Code.MALFORMED, {"size": 0}),
        (Code.MALFORMED, {"size": 8, "header_size": 9}),
    ],
)
def test_envelopes_that_cannot_be_taken_are_refused(code, envelope):
    first, *_ = frames_of()
    with refusing(code):
        add_all([changed(first, **envelope)])


def test_a_peer_has_so_much_under_way_and_no_more():
    starts = [frames_of()[0] for _ in range(4)]
    with pytest.raises(
        WireError, match="TOO_LARGE: more than 3 messages under way"
    ):
        add_all(starts, Limits(streams=3))
    size = starts[0].chunk.envelope.size
    add_all(starts, Limits(message_bytes=4 * size))
    with pytest.raises(
        WireError,
        match=f"TOO_LARGE: messages under way of {4 * size} bytes; at most {4 * size - 1}",
    ):
        add_all(starts, Limits(message_bytes=4 * size - 1))


def test_first_chunk_without_an_envelope_is_refused():
    frame = frames_of()[0]
    frame.chunk.ClearField("envelope")
    with refusing(Code.MALFORMED):
        add_all([frame])


@pytest.mark.parametrize(
    ("code", "data"),
    [
        (Code.MALFORMED, b""),
        (Code.MALFORMED, b"\xff"),
        (Code.MALFORMED, Frame(data=b"1").SerializeToString()),
        (
            Code.MALFORMED,
            Frame(heartbeat=pb.Heartbeat(), data=b"1").SerializeToString(),
        ),
        (
            Code.MALFORMED,
            b"\x0a\x03\x12\x01\xff",
        ),  # a package version that is not UTF-8
        (Code.TOO_LARGE, bytes(CHUNK_BYTES + (1 << 14) + 1)),
    ],
)
def test_bytes_that_are_no_frame_are_refused(code, data):
    with refusing(code):
        parse(data)


def test_memory_follows_what_arrives_not_what_is_announced():
    first, second, *_ = frames_of(chunk_bytes=1 << 18)
    announcing = changed(first, size=1 << 40)
    limits = Limits(message_bytes=1 << 41, decoded_bytes=1 << 41)
    header, _ = header_of(
        Message("train", 2, "1", content={"a": Arrays(w=np.ones(3))})
    )
    tensor = header.records[0].arrays.tensors[0]
    tensor.shape[:], tensor.length = [1 << 60], 1 << 63
    huge = parcel_of(header, bytes(24))
    tensor.shape[:], tensor.length, tensor.layout, tensor.count = (
        [1 << 28],
        0,
        pb.Tensor.GAPS,
        0,
    )
    empty = parcel_of(header)
    tracemalloc.start()
    try:
        add_all([announcing, second], limits)  # two chunks of a terabyte
        assert tracemalloc.get_traced_memory()[1] < 4 << 18
        tracemalloc.reset_peak()
        with refusing(Code.TOO_LARGE):
            add_all([announcing])
        with refusing(Code.TOO_LARGE):
            unpack(huge, limits)
        with refusing(Code.TOO_LARGE):
            unpack(empty)  # two gigabytes of zeros in no bytes
        assert (
            tracemalloc.get_traced_memory()[1] < 2 << 18
        )  # one chunk, read off its frame
    finally:
        tracemalloc.stop()


# Greeting and refusing


def test_greetings_carry_both_versions():
    greeting, answer = (
        parse(hello(9)).hello,
        parse(welcome(9, "[data]\n")).welcome,
    )
    assert (greeting.protocol, greeting.package, greeting.node) == (
        PROTOCOL,
        fedknow.__version__,
        9,
    )
    assert (answer.protocol, answer.package, answer.node, answer.config) == (
        1,
        fedknow.__version__,
        9,
        "[data]\n",
    )
    check_version(greeting)
    check_version(answer)


def test_another_version_is_refused_by_name():
    peer = pb.Hello(protocol=PROTOCOL + 1, package="9.9")
    with pytest.raises(WireError) as raised:
        check_version(peer)
    assert raised.value.code is Code.VERSION
    assert (
        f"protocol {PROTOCOL} (fedknow {fedknow.__version__})"
        in raised.value.reason
    )
    assert f"protocol {PROTOCOL + 1} (fedknow '9.9')" in raised.value.reason
    with refusing(Code.VERSION):
        unpack(parcel_of(pb.Header(protocol=PROTOCOL + 1)))


def test_refusals_travel():
    error = WireError(Code.BAD_SHAPE, "tensor 'w'")
    back = refused(parse(refusal(error)).refusal)
    assert (back.code, back.reason, str(back)) == (
        Code.BAD_SHAPE,
        "tensor 'w'",
        "BAD_SHAPE: tensor 'w'",
    )
    assert refused(Refusal(code=99, reason="new")).code is Code.CODE_UNSPECIFIED
    copied = copy.copy(error)  # as another process gets it
    assert (copied.code, copied.reason) == (error.code, error.reason)


def test_codes_are_those_of_the_protocol():
    assert {code.name: code.value for code in Code} == dict(Refusal.Code.items())
    assert JOIN == "/fedknow.v1.Fedknow/Join"


def test_the_generated_code_is_up_to_date():
    pytest.importorskip("grpc_tools", reason="the compiler is in the dev extra")
    from fedknow.protocols.wire.generate import HERE, compiled

    for name, text in compiled().items():
        assert (HERE / name).read_text() == text, (
            f"{name}: python protocols/wire/generate.py"
        )


# Hostile bytes


@pytest.fixture(scope="module")
def fuzzer():
    spec = importlib.util.spec_from_file_location(
        "fuzz_wire", BENCHMARKS / "fuzz_wire.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_read_or_refused(fuzzer, data):
    fuzzer.fuzz(data)


def test_valid_inputs_of_the_fuzzer_are_read(fuzzer):
    outcomes = {fuzzer.fuzz(data) for data in fuzzer.corpus()}
    assert outcomes == {
        "read",
        "MALFORMED",
    }  # MALFORMED is the refusal among them


@pytest.mark.filterwarnings("error")
def test_mutated_messages_are_read_or_refused_and_take_no_memory(fuzzer):
    fuzzer.run(200, 30, seed=1)
    tracemalloc.start()
    try:
        outcomes = fuzzer.run(4000, 30, seed=2)
        assert (
            tracemalloc.get_traced_memory()[1] < 4 * fuzzer.LIMITS.decoded_bytes
        )
    finally:
        tracemalloc.stop()
    assert {
        "read",
        "MALFORMED",
        "TRUNCATED",
        "BAD_CHECKSUM",
        "BAD_SHAPE",
        "BAD_DTYPE",
        "TOO_LARGE",
    } <= outcomes.keys()
