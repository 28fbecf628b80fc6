"""Models, tokens, health and version."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from inlaid.server.protocol.admin import AdapterState
from inlaid.server.protocol.base import Body, Payload
from inlaid.server.protocol.chat import Message, Tool


class ModelCard(Payload, kw_only=True):
    """A model as vLLM describes it, and for an adapter its state beside that."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "inlaid"
    root: str
    parent: str | None = None
    max_model_len: int
    adapter: AdapterState | msgspec.UnsetType = msgspec.UNSET


class ModelList(Payload, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeBody(Body, frozen=True, kw_only=True):
    model: str = ""
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class Tokens(Payload, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(Body, frozen=True, kw_only=True):
    model: str = ""
    tokens: Annotated[list[int], Meta(max_length=4_194_304)]


class Detokenized(Payload, kw_only=True):
    prompt: str


class Health(Payload, kw_only=True):
    status: str
    restarts: int = 0
    replicas: dict[str, str] | msgspec.UnsetType = msgspec.UNSET  # of a cluster, and their states
    background: dict[str, str] | msgspec.UnsetType = msgspec.UNSET  # the server's own tasks, and their states


class Load(Payload, kw_only=True):
    server_load: int


class Version(Payload, kw_only=True):
    version: str
