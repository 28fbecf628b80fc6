"""Anthropic's messages as a chat request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from inlaid.server.errors import BadRequest
from inlaid.server.protocol.anthropic import CountBody, InputBlock, InputMessage, MessagesBody, MessageTool
from inlaid.server.protocol.chat import (
    ChatBody,
    FunctionCall,
    FunctionDefinition,
    Message,
    NamedFunction,
    Tool,
    ToolCall,
    ToolChoice,
)
from inlaid.server.protocol.openai import JsonSchemaFormat, ResponseFormat

_THOUGHTS = ("thinking", "redacted_thinking")


def chat_body(body: CountBody) -> ChatBody:
    """Return the chat request that asks for the same."""
    messages = [Message(role="system", content=_text(body.system, "system"))] if body.system else []
    messages += [made for message in body.messages for made in _messages(message)]
    chat = ChatBody(
        model=body.model,
        messages=messages,
        tools=None if body.tools is None else [_tool(tool) for tool in body.tools],
        tool_choice=_choice(body),
        parallel_tool_calls=_parallel(body),
        response_format=_format(body),
        reasoning_effort=None if body.output_config is None else body.output_config.effort,
    )
    if not isinstance(body, MessagesBody):
        return chat
    return msgspec.structs.replace(
        chat,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        user=None if body.metadata is None else body.metadata.user_id,
    )


def _messages(message: InputMessage) -> Iterator[Message]:
    """Yield a message: the results of calls come first, each as a message of its own; thoughts are not told again."""
    if isinstance(message.content, str):
        yield Message(role=message.role, content=message.content)
        return
    blocks = [block for block in message.content if block.type not in _THOUGHTS]
    for block in blocks:
        if block.type == "tool_result":
            text = _text(block.content, "messages")
            yield Message(role="tool", tool_call_id=_needed(block, "tool_use_id"), content=text)
    calls = [_call(block) for block in blocks if block.type == "tool_use"]
    rest = [block for block in blocks if block.type not in ("tool_use", "tool_result")]
    if rest or calls or not blocks:
        yield Message(role=message.role, content=_text(rest, "messages"), tool_calls=calls or None)


def _text(content: str | Sequence[InputBlock] | None, param: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_block_text(block, param) for block in content)


def _block_text(block: InputBlock, param: str) -> str:
    if block.type == "text" and block.text is not None:
        return block.text
    source = block.source if block.type == "document" and isinstance(block.source, dict) else {}
    if source.get("type") == "text" and isinstance(source.get("data"), str):
        return "\n".join(filter(None, (block.title, source["data"])))
    text = f"{param} has a block of type {block.type!r}; these models read text only: describe it in words"
    raise BadRequest(text, param)


def _call(block: InputBlock) -> ToolCall:
    arguments = msgspec.json.encode(block.input or {}).decode()
    return ToolCall(id=_needed(block, "id"), function=FunctionCall(name=_needed(block, "name"), arguments=arguments))


def _needed(block: InputBlock, name: str) -> str:
    value: str | None = getattr(block, name)
    if value is None:
        raise BadRequest(f"a block of type {block.type} in messages has no {name}", "messages")
    return value


def _tool(tool: MessageTool) -> Tool:
    if tool.type not in (None, "custom"):
        text = f"a tool of type {tool.type!r} is not served here: only tools with an input_schema, run by the client"
        raise BadRequest(text, "tools")
    function = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _parallel(body: CountBody) -> bool | None:
    disabled = None if body.tool_choice is None else body.tool_choice.disable_parallel_tool_use
    return None if disabled is None else not disabled


def _choice(body: CountBody) -> ToolChoice | Literal["none", "auto", "required"] | None:
    choice = body.tool_choice
    if choice is None:
        return None
    if choice.type == "auto" or choice.type == "none":
        return choice.type
    if choice.type == "any":
        return "required"
    if choice.name is None:
        raise BadRequest("tool_choice of type tool needs a name", "tool_choice")
    return ToolChoice(type="function", function=NamedFunction(name=choice.name))


def _format(body: CountBody) -> ResponseFormat | None:
    config = body.output_config
    form = body.output_format or (None if config is None else config.format)
    if form is None:
        return None
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=form.schema))
