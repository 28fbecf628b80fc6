"""The messages between the lead of a tensor-parallel group and its other members: msgpack of tagged structs, one in
each packet of a socket pair. Inputs of steps and weights of adapters are not in them: they lie in shared memory.
"""

from __future__ import annotations

from typing import Any

import msgspec

from inlaid.adapters.adapter import AdapterEntry
from inlaid.config import EngineConfig
from inlaid.worker.messages import Message

# From the lead. All but Compute and Clear are answered.


class Begin(Message, frozen=True, kw_only=True):
    """Load your shard. `step_bytes`: room for the inputs of a step, of which there are two in shared memory."""

    config: EngineConfig
    index: int
    count: int
    step_bytes: int


class MakeCache(Message, frozen=True, kw_only=True):
    """Make KV pages; `shared_elements`: of the memory that adapters share with them, 0: they do not."""

    num_blocks: int
    shared_elements: int


class Compute(Message, frozen=True, kw_only=True):
    """Compute the step whose inputs lie in place `turn`."""

    number: int
    turn: int


class Take(Message, frozen=True, kw_only=True):
    """Take bytes [start, start + count) of an adapter of `size` bytes from shared memory."""

    size: int
    start: int
    count: int


class Show(Message, frozen=True, kw_only=True):
    """Put the adapter that was taken to its place, and show it to the steps that follow."""

    slot: int
    entries: tuple[AdapterEntry, ...]
    starts: tuple[int, ...]


class Clear(Message, frozen=True, kw_only=True):
    """Empty a slot."""

    slot: int


# From a member.


class Done(Message, frozen=True, kw_only=True):
    pass


class Failed(Message, frozen=True, kw_only=True):
    message: str


Command = Begin | MakeCache | Compute | Take | Show | Clear
Answer = Done | Failed
PACKET = 1 << 20  # bytes that one message may have
PIECE = 16 << 20  # bytes of an adapter that travel at once, through shared memory


def encode(message: Command | Answer) -> bytes:
    """Return a packet."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes, kind: Any) -> Any:
    """Return the message of a packet; `kind` is Command or Answer."""
    return msgspec.msgpack.decode(data, type=kind)
