"""Tasks of the base, added and removed while serving, and the versions of the base."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from inlaid.server.protocol.base import Body, Payload

Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]


class AddTaskBody(Body, frozen=True, kw_only=True):
    """A task to add. `adapter`: the name of one that is served, a folder in a --lora-root, or none for the base alone.
    Its data are `examples`, each an object as a line of a .jsonl file would be, or such a file in a --lora-root."""

    name: Name
    adapter: Annotated[str, Meta(min_length=1, max_length=4096)]
    examples: Annotated[list[dict[str, Any]], Meta(min_length=2)] | None = None
    data: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    solve: Literal["exact", "warm"] = "exact"
    check: Literal["exact", "shared"] = "exact"
    threshold: Annotated[float, Meta(ge=0)] = 0.01  # with solve warm
    tolerance: Annotated[float, Meta(ge=0)] | None = None  # without it: --task-tolerance
    force: bool = False  # make it whatever the gate says
    switch: bool = True  # serve it when the gate has passed


class TaskCard(Payload, kw_only=True):
    """A task of the base, or a job that adds or removes one."""

    name: str
    verb: str = ""  # add or remove; empty: in the base, without a job
    state: str = "serving"
    stage: str = ""
    done: int = 0
    total: int = 0
    seconds: dict[str, float] = msgspec.field(default_factory=dict)
    memory: dict[str, int] = msgspec.field(default_factory=dict)
    before: dict[str, float] = msgspec.field(default_factory=dict)
    after: dict[str, float] = msgspec.field(default_factory=dict)
    why: str | None = None
    version: int = 0
    parent: int | None = None
    switch: str = ""  # what the switch will do, or has done


class TaskList(Payload, kw_only=True):
    version: int  # of the base that is served
    tasks: dict[str, float]  # in it, with their losses in nats a token
    jobs: list[TaskCard]


class VersionCard(Payload, kw_only=True):
    number: int
    base_version: str
    parent: int | None
    tasks: list[str]
    created: str
    refused: str | None


class BaseCard(Payload, kw_only=True):
    """The versions of the base that are kept, and the last switch."""

    current: int
    versions: list[VersionCard]
    last_switch: dict[str, Any] | None = None
