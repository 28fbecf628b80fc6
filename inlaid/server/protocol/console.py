"""Bodies that the console sends, and their answers."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from inlaid.server.protocol.base import Body, Payload


class ChangeAdapterBody(Body, frozen=True, kw_only=True):
    """Change an adapter that is served; what is left out stays."""

    lora_name: Annotated[str, Meta(min_length=1, max_length=256)]
    pinned: bool | None = None  # stays on the device
    draining: bool | None = None  # takes no new requests; those that it has go on


class ChangedAdapter(Payload, kw_only=True):
    lora_name: str
    pinned: bool
    draining: bool
    requests: int


class WhatIfBody(Body, frozen=True, kw_only=True):
    """Settings under which the last minutes are replayed, beside those in force."""

    minutes: Annotated[float, Meta(gt=0, le=60)] = 5.0
    policy: Annotated[str, Meta(max_length=256)] | None = None
    weights: dict[str, float] | None = None
    slots: Annotated[list[Annotated[int, Meta(ge=1, le=100_000)]], Meta(max_length=6)] | None = None
    kv_tokens: Annotated[list[Annotated[int, Meta(ge=64, le=20_000_000)]], Meta(max_length=6)] | None = None


class WhatIfAnswer(Payload, kw_only=True):
    requests: int
    seconds: float
    r_squared: float  # of the fitted cost model on the steps that were measured
    rows: list[dict[str, Any]]  # a summary of `inlaid sim` for each setting; the first is the one in force
