"""A request for a response as a chat request: its items become messages."""

from __future__ import annotations

from collections.abc import Sequence

from inlaid.server.errors import BadRequest
from inlaid.server.protocol.chat import (
    AllowedTools,
    ChatBody,
    ContentPart,
    FunctionCall,
    FunctionDefinition,
    Message,
    NamedFunction,
    NamedTool,
    Tool,
    ToolCall,
    ToolChoice,
)
from inlaid.server.protocol.openai import JsonSchemaFormat, ResponseFormat
from inlaid.server.protocol.responses import InputItem, InputPart, ResponseBody, ResponseTool, ResponseToolChoice
from inlaid.server.stored import StoredResponses

_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def conversation(body: ResponseBody, stored: StoredResponses, owner: str) -> list[InputItem]:
    """Return the items of the whole conversation: those of the previous response, and the new ones."""
    given = [InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    items = [stored.item(owner, _needed(item, "id")) if item.type == "item_reference" else item for item in given]
    if body.previous_response_id is None:
        return items
    return [*stored.get(owner, body.previous_response_id).items, *items]


def chat_body(body: ResponseBody, items: Sequence[InputItem]) -> ChatBody:
    """Return the chat request that asks for the same."""
    messages = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    messages += as_messages(items)
    if not messages:
        raise BadRequest("input is empty and there are no instructions", "input")
    return ChatBody(
        model=body.model,
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        priority=body.priority,
        request_id=body.request_id,
        cache_salt=body.cache_salt,
        logprobs=True if body.top_logprobs else None,
        top_logprobs=body.top_logprobs,
        tools=None if body.tools is None else [_tool(tool) for tool in body.tools],
        tool_choice=_choice(body.tool_choice) if isinstance(body.tool_choice, ResponseToolChoice) else body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        user=body.user,
        metadata=body.metadata,
    )


def as_messages(items: Sequence[InputItem]) -> list[Message]:
    """Return items as messages: calls belong to the assistant's turn that they follow; reasoning is not told again."""
    messages: list[Message] = []
    for item in items:
        kind = item.type or "message"
        if kind == "message":
            if item.role is None:
                raise BadRequest("a message in input has no role", "input")
            messages.append(Message(role=item.role, content=_content(item.content)))
        elif kind == "function_call":
            function = FunctionCall(name=_needed(item, "name"), arguments=_needed(item, "arguments"))
            call = ToolCall(id=_needed(item, "call_id"), function=function)
            last = messages.pop() if messages and messages[-1].role == "assistant" else Message(role="assistant")
            messages.append(
                Message(role="assistant", content=last.content, tool_calls=[*(last.tool_calls or ()), call])
            )
        elif kind == "function_call_output":
            content = _content(item.output)
            messages.append(Message(role="tool", tool_call_id=_needed(item, "call_id"), content=content or ""))
    return messages


def _needed(item: InputItem, name: str) -> str:
    value: str | None = getattr(item, name)
    if value is None:
        raise BadRequest(f"an item of type {item.type} in input has no {name}", "input")
    return value


def _content(content: str | list[InputPart] | None) -> str | list[ContentPart] | None:
    if content is None or isinstance(content, str):
        return content
    return [_part(part) for part in content]


def _part(part: InputPart) -> ContentPart:
    text = part.refusal if part.type == "refusal" else part.text
    if text is None or part.type not in (*_TEXTS, "refusal"):
        text = f"input has a part of type {part.type!r}; these models read text only: describe it in words"
        raise BadRequest(text, "input")
    return ContentPart(type="text", text=text)


def _tool(tool: ResponseTool) -> Tool:
    if tool.type != "function" or tool.name is None:
        text = f"a tool of type {tool.type!r} is not served here: only functions, which the client runs, and by name"
        raise BadRequest(text, "tools")
    function = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _choice(choice: ResponseToolChoice) -> ToolChoice:
    if choice.type == "function":
        return ToolChoice(type="function", function=None if choice.name is None else NamedFunction(name=choice.name))
    tools = [NamedTool(type="function", function=NamedFunction(name=tool.name)) for tool in choice.tools or ()]
    return ToolChoice(type="allowed_tools", allowed_tools=AllowedTools(mode=choice.mode or "auto", tools=tools))


def _format(body: ResponseBody) -> ResponseFormat | None:
    form = None if body.text is None else body.text.format
    if form is None:
        return None
    if form.type != "json_schema":
        return ResponseFormat(type=form.type)
    schema = JsonSchemaFormat(name=form.name, description=form.description, schema=form.schema, strict=form.strict)
    return ResponseFormat(type="json_schema", json_schema=schema)
