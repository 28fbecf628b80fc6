"""The messages between the server and the engine process, and their framing: length-prefixed msgpack of tagged structs
over a socket pair. `client.py` speaks the one side, `process.py` the other.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from inlaid.config import EngineConfig
from inlaid.engine.refusal import Refusal
from inlaid.engine.request import FinishReason, NewRequest, Output

_LENGTH = struct.Struct("<I")
MAX_MESSAGE = 1 << 28
WAITED = "member_wait_seconds_"  # in the figures of `stats`, before the number of a member of a tensor-parallel group
_ENCODER = msgspec.msgpack.Encoder()


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A message; the name of its class travels with it."""


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter as seen from outside."""

    name: str
    identity: str
    path: str
    rank: int
    bytes: int
    tier: str  # the fastest place where all of it is: "device", "host" or "disk"
    requests: int = 0  # that hold it now
    load_seconds: float = 0.0  # from disk to host memory, the last time
    check_seconds: float = 0.0  # of these, checking and laying out
    on_host: bool = True  # whether host memory holds it, be it on the device or not
    reads: int = 0  # from disk, after the first
    loads: int = 0  # to the device
    evictions: int = 0  # from the device, to make room
    hits: int = 0  # requests that found it on the device and did not have to wait for it
    copy_seconds: float = 0.0  # from host memory to the device, the last time; 0: never yet
    pinned: bool = False  # whether it stays on the device
    replicas: dict[str, str] = {}  # its tier on each replica, where there are several


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about the loaded model that the server needs."""

    folder: str
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    max_loras: int
    base_version: str
    device: str
    dtype: str
    kv_cache_dtype: str = "auto"  # the form of keys and values, see kv_format.py
    kv_token_bytes: int = 0  # of a token over all layers
    eos_ids: tuple[int, ...] = ()


class ReplicaLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The state of an engine, which comes with its answers."""

    running: int
    waiting: int
    free_blocks: int
    blocks: int
    on_device: list[str]  # identities of adapters


# From the server.


class Start(Message, frozen=True, kw_only=True):
    """The first message. With `strict`, an adapter that cannot be loaded ends the start; else it is left out. A process
    that follows another gets what was changed while that one served."""

    config: EngineConfig
    adapters: dict[str, str]
    factory: str  # "module:function" that makes the Loaded that process.py steps
    strict: bool = True
    scheduler: dict[str, Any] = {}  # settings, as control.change takes them
    accepted: dict[str, list[float]] = {}  # when requests of rate-limited tenants were accepted, in monotonic seconds
    window: float = 0.0  # the longest in which they count
    report_load: bool = False  # with outputs, for a placement over several engines
    image: str = ""  # a weight image to start from, see worker/images.py


class Add(Message, frozen=True, kw_only=True):
    request: NewRequest


class Abort(Message, frozen=True, kw_only=True):
    """End a request now. With STOP its answer is whole, as a stop string was found; the predictor learns its length."""

    id: str
    reason: FinishReason = FinishReason.ABORT
    num_tokens: int | None = None  # with STOP: the answer's tokens; later ones are not charged


class Call(Message, frozen=True, kw_only=True):
    """A question with one Reply or Failure."""

    call: int
    name: str  # a method of calls.Queries, or one that calls.Calls names
    arguments: dict[str, Any] = {}


# From the engine.


class Ready(Message, frozen=True, kw_only=True):
    model: ModelInfo
    adapters: list[AdapterInfo]
    left_out: dict[str, str] = {}  # adapters that could not be loaded, and why


class Fatal(Message, frozen=True, kw_only=True):
    """The engine cannot start, or cannot go on."""

    message: str


class Outputs(Message, frozen=True, kw_only=True):
    """Outputs of one step. A request that is not taken has an output too, with FinishReason.ERROR and a refusal."""

    outputs: list[Output]
    load: ReplicaLoad | None = None  # a few times a second, if asked for at the start


class Accepted(Message, frozen=True, kw_only=True):
    """A request of a rate-limited tenant has been accepted."""

    tenant: str
    when: float  # monotonic seconds
    window: float  # in which it counts


class Reply(Message, frozen=True, kw_only=True):
    call: int
    value: Any


class Failure(Message, frozen=True, kw_only=True):
    call: int
    refusal: Refusal


Command = Start | Add | Abort | Call
Event = Ready | Fatal | Outputs | Accepted | Reply | Failure


class Framing:
    """Messages out of a byte stream that arrives in pieces of any size."""

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray) -> list[Any]:
        """Return the messages that these bytes complete. ValueError: this is no stream of ours."""
        self._buffer += data
        messages = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer, start)
            if size > MAX_MESSAGE:
                raise ValueError(f"a message of {size} bytes is announced, more than {MAX_MESSAGE}")
            end = start + _LENGTH.size + size
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(self._buffer)[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return messages


class Unsendable(ValueError):
    """A message cannot cross the socket."""


def frame(message: Message) -> bytearray:
    """Return a message as it crosses the socket. Characters that UTF-8 does not have (half a surrogate pair, from a
    file's name or a JSON text) cross as the escapes that Python writes for them."""
    try:
        return _framed(message)
    except UnicodeEncodeError:
        return _framed(_escaped(msgspec.to_builtins(message)))


def _framed(message: Any) -> bytearray:
    data = bytearray(_LENGTH.size)
    try:
        _ENCODER.encode_into(message, data, _LENGTH.size)
    except (TypeError, OverflowError, RecursionError) as error:
        raise Unsendable(f"a message cannot be sent: {error}") from error
    size = len(data) - _LENGTH.size
    if size > MAX_MESSAGE:
        raise Unsendable(f"a message has {size} bytes; at most {MAX_MESSAGE}")
    _LENGTH.pack_into(data, 0, size)
    return data


def _escaped(value: Any) -> Any:
    """Return a plain value with every character that UTF-8 does not have escaped."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, (list, tuple)) else value
