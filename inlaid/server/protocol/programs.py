"""POST /v1/programs: a program as JSON, its results, and the events of a stream."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from inlaid.program.nodes import AnyNode
from inlaid.program.options import Options
from inlaid.server.errors import ErrorBody
from inlaid.server.protocol.base import Body, Payload
from inlaid.server.protocol.openai import Usage


class ProgramBody(Body, frozen=True, kw_only=True):
    nodes: Annotated[list[AnyNode], Meta(min_length=1)]
    inputs: Annotated[dict[str, Any], Meta(description="values by the names that nodes refer to")] = msgspec.field(
        default_factory=dict
    )
    outputs: Annotated[list[str], Meta(description="default: the nodes that no other refers to")] | None = None
    options: Options = Options()
    seed: Annotated[int, Meta(description="of calls that sample without a seed of their own")] | None = None
    max_calls: Annotated[int, Meta(ge=1, description="fewer than --max-program-calls")] | None = None
    max_tokens: Annotated[int, Meta(ge=1, description="fewer than --max-program-tokens")] | None = None
    seconds: Annotated[float, Meta(gt=0, description="after which what is not done fails")] | None = None
    stream: bool | None = None
    user: str | None = None
    priority: int | None = None
    request_id: Annotated[str, Meta(max_length=256)] | None = None


class ProgramResult(Payload, kw_only=True):
    """One of: a value, an error, or the results of a list some of whose elements have failed."""

    value: Any = msgspec.UNSET
    error: ErrorBody | msgspec.UnsetType = msgspec.UNSET
    elements: list[ProgramResult] | msgspec.UnsetType = msgspec.UNSET


class ProgramCall(Payload, kw_only=True):
    """One call. A call that equals another was not made and has its name."""

    name: str
    adapter: str | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    finish_reason: str | None = None
    equals: str | msgspec.UnsetType = msgspec.UNSET
    error: ErrorBody | msgspec.UnsetType = msgspec.UNSET


class ProgramAnswer(Payload, kw_only=True):
    id: str
    object: Literal["program"] = "program"
    created: int
    results: dict[str, ProgramResult]
    calls: list[ProgramCall]
    usage: Usage


class ProgramEvent(Payload, kw_only=True):
    """An event of a stream: more text of a result, a whole result, or at the end all calls and what they took.

    `path` leads to an element of a result that is a list.
    """

    id: str
    object: Literal["program.event"] = "program.event"
    created: int
    name: str | msgspec.UnsetType = msgspec.UNSET
    path: list[int] | msgspec.UnsetType = msgspec.UNSET
    delta: str | msgspec.UnsetType = msgspec.UNSET
    result: ProgramResult | msgspec.UnsetType = msgspec.UNSET
    calls: list[ProgramCall] | msgspec.UnsetType = msgspec.UNSET
    usage: Usage | msgspec.UnsetType = msgspec.UNSET
