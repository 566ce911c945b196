from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    def __init__(self, certificate: _Optional[bytes] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("hello", "welcome", "refusal", "heartbeat", "chunk", "goodbye", "data")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    welcome: Welcome
    refusal: Refusal
    heartbeat: Heartbeat
    chunk: Chunk
    goodbye: Goodbye
    data: bytes
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "package", "node", "fence")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    package: str
    node: int
    fence: bytes
    def __init__(self, protocol: _Optional[int] = ..., package: _Optional[str] = ..., node: _Optional[int] = ..., fence: _Optional[bytes] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "package", "node", "config", "run", "fence", "signature")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    package: str
    node: int
    config: str
    run: str
    fence: bytes
    signature: bytes
    def __init__(self, protocol: _Optional[int] = ..., package: _Optional[str] = ..., node: _Optional[int] = ..., config: _Optional[str] = ..., run: _Optional[str] = ..., fence: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "reason")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CODE_UNSPECIFIED: _ClassVar[Refusal.Code]
        MALFORMED: _ClassVar[Refusal.Code]
        TRUNCATED: _ClassVar[Refusal.Code]
        TOO_LARGE: _ClassVar[Refusal.Code]
        BAD_CHECKSUM: _ClassVar[Refusal.Code]
        BAD_DTYPE: _ClassVar[Refusal.Code]
        BAD_SHAPE: _ClassVar[Refusal.Code]
        BAD_VALUE: _ClassVar[Refusal.Code]
        OUT_OF_ORDER: _ClassVar[Refusal.Code]
        VERSION: _ClassVar[Refusal.Code]
        CREDENTIAL: _ClassVar[Refusal.Code]
        REPLACED: _ClassVar[Refusal.Code]
        FOREIGN: _ClassVar[Refusal.Code]
        NO_ROOM: _ClassVar[Refusal.Code]
        DUPLICATE: _ClassVar[Refusal.Code]
        EJECTED: _ClassVar[Refusal.Code]
    CODE_UNSPECIFIED: Refusal.Code
    MALFORMED: Refusal.Code
    TRUNCATED: Refusal.Code
    TOO_LARGE: Refusal.Code
    BAD_CHECKSUM: Refusal.Code
    BAD_DTYPE: Refusal.Code
    BAD_SHAPE: Refusal.Code
    BAD_VALUE: Refusal.Code
    OUT_OF_ORDER: Refusal.Code
    VERSION: Refusal.Code
    CREDENTIAL: Refusal.Code
    REPLACED: Refusal.Code
    FOREIGN: Refusal.Code
    NO_ROOM: Refusal.Code
    DUPLICATE: Refusal.Code
    EJECTED: Refusal.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: Refusal.Code
    reason: str
    def __init__(self, code: _Optional[_Union[Refusal.Code, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("finished", "reason")
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    finished: bool
    reason: str
    def __init__(self, finished: bool = ..., reason: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("stream", "sequence", "crc32", "envelope")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    stream: int
    sequence: int
    crc32: int
    envelope: Envelope
    def __init__(self, stream: _Optional[int] = ..., sequence: _Optional[int] = ..., crc32: _Optional[int] = ..., envelope: _Optional[_Union[Envelope, _Mapping]] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("node", "id", "reply_to", "size", "header_size", "chunk_size", "version", "committed")
    NODE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    REPLY_TO_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    HEADER_SIZE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_SIZE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    node: int
    id: str
    reply_to: str
    size: int
    header_size: int
    chunk_size: int
    version: int
    committed: int
    def __init__(self, node: _Optional[int] = ..., id: _Optional[str] = ..., reply_to: _Optional[str] = ..., size: _Optional[int] = ..., header_size: _Optional[int] = ..., chunk_size: _Optional[int] = ..., version: _Optional[int] = ..., committed: _Optional[int] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("protocol", "kind", "group", "failure", "records")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    kind: str
    group: str
    failure: Failure
    records: _containers.RepeatedCompositeFieldContainer[Record]
    def __init__(self, protocol: _Optional[int] = ..., kind: _Optional[str] = ..., group: _Optional[str] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "reason")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("name", "arrays", "metrics", "config")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    name: str
    arrays: Arrays
    metrics: Values
    config: Values
    def __init__(self, name: _Optional[str] = ..., arrays: _Optional[_Union[Arrays, _Mapping]] = ..., metrics: _Optional[_Union[Values, _Mapping]] = ..., config: _Optional[_Union[Values, _Mapping]] = ...) -> None: ...

class Arrays(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "type", "shape", "layout", "offset", "length", "crc32", "count", "scale")
    class Type(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        TYPE_UNSPECIFIED: _ClassVar[Tensor.Type]
        BOOL: _ClassVar[Tensor.Type]
        INT8: _ClassVar[Tensor.Type]
        INT16: _ClassVar[Tensor.Type]
        INT32: _ClassVar[Tensor.Type]
        INT64: _ClassVar[Tensor.Type]
        UINT8: _ClassVar[Tensor.Type]
        UINT16: _ClassVar[Tensor.Type]
        UINT32: _ClassVar[Tensor.Type]
        UINT64: _ClassVar[Tensor.Type]
        FLOAT16: _ClassVar[Tensor.Type]
        FLOAT32: _ClassVar[Tensor.Type]
        FLOAT64: _ClassVar[Tensor.Type]
    TYPE_UNSPECIFIED: Tensor.Type
    BOOL: Tensor.Type
    INT8: Tensor.Type
    INT16: Tensor.Type
    INT32: Tensor.Type
    INT64: Tensor.Type
    UINT8: Tensor.Type
    UINT16: Tensor.Type
    UINT32: Tensor.Type
    UINT64: Tensor.Type
    FLOAT16: Tensor.Type
    FLOAT32: Tensor.Type
    FLOAT64: Tensor.Type
    class Layout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        LAYOUT_UNSPECIFIED: _ClassVar[Tensor.Layout]
        DENSE: _ClassVar[Tensor.Layout]
        MASK: _ClassVar[Tensor.Layout]
        GAPS: _ClassVar[Tensor.Layout]
        FP16: _ClassVar[Tensor.Layout]
        BF16: _ClassVar[Tensor.Layout]
        SCALED: _ClassVar[Tensor.Layout]
    LAYOUT_UNSPECIFIED: Tensor.Layout
    DENSE: Tensor.Layout
    MASK: Tensor.Layout
    GAPS: Tensor.Layout
    FP16: Tensor.Layout
    BF16: Tensor.Layout
    SCALED: Tensor.Layout
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    name: str
    type: Tensor.Type
    shape: _containers.RepeatedScalarFieldContainer[int]
    layout: Tensor.Layout
    offset: int
    length: int
    crc32: int
    count: int
    scale: float
    def __init__(self, name: _Optional[str] = ..., type: _Optional[_Union[Tensor.Type, str]] = ..., shape: _Optional[_Iterable[int]] = ..., layout: _Optional[_Union[Tensor.Layout, str]] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., crc32: _Optional[int] = ..., count: _Optional[int] = ..., scale: _Optional[float] = ...) -> None: ...

class Values(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[Entry]
    def __init__(self, entries: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("name", "flag", "integer", "real", "text", "blob", "flags", "integers", "reals", "texts", "blobs")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    INTEGERS_FIELD_NUMBER: _ClassVar[int]
    REALS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    name: str
    flag: bool
    integer: int
    real: float
    text: str
    blob: bytes
    flags: Flags
    integers: Integers
    reals: Reals
    texts: Texts
    blobs: Blobs
    def __init__(self, name: _Optional[str] = ..., flag: bool = ..., integer: _Optional[int] = ..., real: _Optional[float] = ..., text: _Optional[str] = ..., blob: _Optional[bytes] = ..., flags: _Optional[_Union[Flags, _Mapping]] = ..., integers: _Optional[_Union[Integers, _Mapping]] = ..., reals: _Optional[_Union[Reals, _Mapping]] = ..., texts: _Optional[_Union[Texts, _Mapping]] = ..., blobs: _Optional[_Union[Blobs, _Mapping]] = ...) -> None: ...

class Flags(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, items: _Optional[_Iterable[bool]] = ...) -> None: ...

class Integers(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, items: _Optional[_Iterable[int]] = ...) -> None: ...

class Reals(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, items: _Optional[_Iterable[float]] = ...) -> None: ...

class Texts(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, items: _Optional[_Iterable[str]] = ...) -> None: ...

class Blobs(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, items: _Optional[_Iterable[bytes]] = ...) -> None: ...
