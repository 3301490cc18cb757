from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Question(_message.Message):
    __slots__ = ("protocol", "bract")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    BRACT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    bract: str
    def __init__(self, protocol: _Optional[int] = ..., bract: _Optional[str] = ...) -> None: ...

class Announcement(_message.Message):
    __slots__ = ("protocol", "bract", "run", "experiment")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    BRACT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    bract: str
    run: str
    experiment: str
    def __init__(self, protocol: _Optional[int] = ..., bract: _Optional[str] = ..., run: _Optional[str] = ..., experiment: _Optional[str] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("piece", "header", "hello", "welcome", "permit", "receipt", "heartbeat", "ask", "lack", "forget", "farewell")
    PIECE_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    PERMIT_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    LACK_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    FAREWELL_FIELD_NUMBER: _ClassVar[int]
    piece: bytes
    header: Header
    hello: Hello
    welcome: Welcome
    permit: Permit
    receipt: Receipt
    heartbeat: Heartbeat
    ask: Ask
    lack: Lack
    forget: Forget
    farewell: Farewell
    def __init__(self, piece: _Optional[bytes] = ..., header: _Optional[_Union[Header, _Mapping]] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., permit: _Optional[_Union[Permit, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., ask: _Optional[_Union[Ask, _Mapping]] = ..., lack: _Optional[_Union[Lack, _Mapping]] = ..., forget: _Optional[_Union[Forget, _Mapping]] = ..., farewell: _Optional[_Union[Farewell, _Mapping]] = ...) -> None: ...

class Head(_message.Message):
    __slots__ = ("sequence", "mac")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    mac: str
    def __init__(self, sequence: _Optional[int] = ..., mac: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "bract", "name", "instance", "task", "data", "ledger", "capabilities", "holds")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    BRACT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    bract: str
    name: str
    instance: bytes
    task: str
    data: str
    ledger: Head
    capabilities: _containers.RepeatedCompositeFieldContainer[Value]
    holds: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol: _Optional[int] = ..., bract: _Optional[str] = ..., name: _Optional[str] = ..., instance: _Optional[bytes] = ..., task: _Optional[str] = ..., data: _Optional[str] = ..., ledger: _Optional[_Union[Head, _Mapping]] = ..., capabilities: _Optional[_Iterable[_Union[Value, _Mapping]]] = ..., holds: _Optional[_Iterable[str]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "bract", "node", "run", "heartbeat", "silence", "ledger")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    BRACT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    SILENCE_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    bract: str
    node: int
    run: int
    heartbeat: float
    silence: float
    ledger: Head
    def __init__(self, protocol: _Optional[int] = ..., bract: _Optional[str] = ..., node: _Optional[int] = ..., run: _Optional[int] = ..., heartbeat: _Optional[float] = ..., silence: _Optional[float] = ..., ledger: _Optional[_Union[Head, _Mapping]] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("message", "type", "group", "ttl", "size", "manifest", "sha256", "ledger")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    message: str
    type: str
    group: str
    ttl: float
    size: int
    manifest: int
    sha256: bytes
    ledger: Head
    def __init__(self, message: _Optional[str] = ..., type: _Optional[str] = ..., group: _Optional[str] = ..., ttl: _Optional[float] = ..., size: _Optional[int] = ..., manifest: _Optional[int] = ..., sha256: _Optional[bytes] = ..., ledger: _Optional[_Union[Head, _Mapping]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("records", "failure")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[Record]
    failure: Failure
    def __init__(self, records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("name", "kind", "tensors", "values")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ARRAYS: _ClassVar[Record.Kind]
        METRICS: _ClassVar[Record.Kind]
        CONFIG: _ClassVar[Record.Kind]
    ARRAYS: Record.Kind
    METRICS: Record.Kind
    CONFIG: Record.Kind
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: Record.Kind
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    values: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[_Union[Record.Kind, str]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., values: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("size", "sha256")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    size: int
    sha256: bytes
    def __init__(self, size: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "segment")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    segment: Segment
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., segment: _Optional[_Union[Segment, _Mapping]] = ...) -> None: ...

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

class Value(_message.Message):
    __slots__ = ("key", "integer", "real", "truth", "text", "bytes", "integers", "reals", "truths", "texts", "blobs")
    KEY_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    REAL_FIELD_NUMBER: _ClassVar[int]
    TRUTH_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    INTEGERS_FIELD_NUMBER: _ClassVar[int]
    REALS_FIELD_NUMBER: _ClassVar[int]
    TRUTHS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    key: str
    integer: int
    real: float
    truth: bool
    text: str
    bytes: Segment
    integers: Segment
    reals: Segment
    truths: Segment
    texts: Texts
    blobs: Blobs
    def __init__(self, key: _Optional[str] = ..., integer: _Optional[int] = ..., real: _Optional[float] = ..., truth: bool = ..., text: _Optional[str] = ..., bytes: _Optional[_Union[Segment, _Mapping]] = ..., integers: _Optional[_Union[Segment, _Mapping]] = ..., reals: _Optional[_Union[Segment, _Mapping]] = ..., truths: _Optional[_Union[Segment, _Mapping]] = ..., texts: _Optional[_Union[Texts, _Mapping]] = ..., blobs: _Optional[_Union[Blobs, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "reason")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Permit(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("message", "code")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    message: str
    code: str
    def __init__(self, message: _Optional[str] = ..., code: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("message", "stage", "steps", "count")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    message: str
    stage: str
    steps: int
    count: int
    def __init__(self, message: _Optional[str] = ..., stage: _Optional[str] = ..., steps: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...

class Lack(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...

class Forget(_message.Message):
    __slots__ = ("run", "round")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ...) -> None: ...

class Farewell(_message.Message):
    __slots__ = ("code", "sentence", "final")
    CODE_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    code: str
    sentence: str
    final: bool
    def __init__(self, code: _Optional[str] = ..., sentence: _Optional[str] = ..., final: bool = ...) -> None: ...
