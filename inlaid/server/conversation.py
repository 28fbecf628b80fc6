"""ClientRequest, made of a conversation: messages and tools through the chat template, the choice of tools, and how the
answer is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from inlaid.engine.request import Grammar
from inlaid.server.constraints import constraint
from inlaid.server.errors import BadRequest
from inlaid.server.prepare import (
    ClientRequest,
    client_request,
    engine_requests,
    max_tokens_of,
    prepared,
    refuse_unserved,
    target,
)
from inlaid.server.protocol.chat import ChatBody, Message, Tool, ToolChoice
from inlaid.server.service import Service
from inlaid.text.encoder import check_template_options, last_tokens
from inlaid.text.nesting import check_depth
from inlaid.text.params import schema_grammar
from inlaid.text.tools.answer import AnswerForm
from inlaid.text.tools.force import MOST_CALLS, ONE_LINE, answer_or_calls_schema, calls_schema
from inlaid.text.tools.forms import CALL_FORMS
from inlaid.text.tools.word_schema import calls_pattern

_NO_EFFECT = ("cache_control", "thinking_blocks", "annotations", "refusal", "reasoning")
_TAIL = 32  # tokens at the end of a prompt that may open the reasoning


async def chat_request(service: Service, body: ChatBody, headers: Mapping[str, str], size: int) -> ClientRequest:
    """Prepare a chat completion, whose body has `size` bytes."""
    adapter, model = await target(service, body)
    prepare = partial(_chat, service, body, headers, adapter, model)
    return await prepared(service, adapter, size, prepare, is_chat=True)


def _chat(
    service: Service, body: ChatBody, headers: Mapping[str, str], adapter: str | None, model: str
) -> ClientRequest:
    refuse_unserved(body)
    _refuse_replaced(body)
    tools, forced, most = chosen_tools(body)
    tokens = chat_tokens(service, body.messages, tools, template_options(body), bool(body.add_special_tokens))
    prompt = last_tokens(tokens, body.truncate_prompt_tokens)
    max_tokens = max_tokens_of(body)
    if max_tokens is None:
        max_tokens = max(1, service.encoder.max_model_len - len(prompt))
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    grammar, form = _grammar_and_form(service, body, tools, forced, most, prompt)
    changes: dict[str, Any] = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None, "grammar": grammar}
    if body.skip_special_tokens is None and any(map(service.tokenizer.is_special, form.marks)):
        changes["skip_special_tokens"] = False  # the marks have to be seen
    requests = engine_requests(service, body, headers, adapter, [prompt], max_tokens, changes)
    made = client_request(service, "chatcmpl", body, model, requests, [None])
    return replace(made, form=form)


def _refuse_replaced(body: ChatBody) -> None:
    """Refuse fields that have another form here."""
    if body.functions is not None or body.function_call is not None:
        raise BadRequest("functions and function_call are old names: send tools and tool_choice", "functions")
    if body.chat_template is not None:
        text = "a request cannot bring a chat_template: start the server with --chat-template, or write the prompt"
        raise BadRequest(f"{text} yourself and use completions", "chat_template")


def chosen_tools(body: ChatBody) -> tuple[list[Tool] | None, bool, int]:
    """Return the tools that may be called, True if one must be, and how many calls may be made at most."""
    choice, tools = body.tool_choice, body.tools or []
    most = 1 if body.parallel_tool_calls is False else 0
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise BadRequest("two tools have the same name; give each a name of its own", "tools")
    if choice in (None, "auto", "none"):
        return (None if choice == "none" else body.tools), False, most
    if not tools:
        raise BadRequest("tool_choice demands a call, and there are no tools", "tool_choice")
    one = 1 if body.parallel_tool_calls is not True else 0  # a model that is unsure would add calls for ever
    if choice == "required":
        return tools, True, one
    assert isinstance(choice, ToolChoice)
    wanted, forced = _named(choice)
    if unknown := sorted(set(wanted) - set(names)):
        raise BadRequest(f"tool_choice names {', '.join(unknown)}; the tools are {', '.join(names)}", "tool_choice")
    allowed = [tool for tool in tools if tool.function.name in wanted]
    if choice.type == "function":
        return allowed, forced, 1
    return allowed, forced, one if forced else most


def _named(choice: ToolChoice) -> tuple[list[str], bool]:
    """Return the names in a choice, and True if one of them must be called."""
    if choice.type == "function" and choice.function is not None and choice.allowed_tools is None:
        return [choice.function.name], True
    if choice.type == "allowed_tools" and choice.allowed_tools is not None and choice.function is None:
        allowed = choice.allowed_tools
        return [tool.function.name for tool in allowed.tools], allowed.mode == "required"
    raise BadRequest(f"tool_choice of type {choice.type} needs {choice.type}, and nothing else", "tool_choice")


def _grammar_and_form(
    service: Service, body: ChatBody, tools: Sequence[Tool] | None, forced: bool, most: int, prompt: list[int]
) -> tuple[Grammar | None, AnswerForm]:
    """Return the constraint on an answer and how it is read. Calls that are forced are written in JSON whatever the
    model is used to, as are those beside a schema for the answer; a model of words writes words if they will do."""
    asked = constraint(body)
    by_name = {tool.function.name: tool.function.parameters for tool in tools or ()}
    calls = service.forms.calls if tools else None
    if forced and asked is not None:
        raise BadRequest("a call is forced by tool_choice, and a form for the text is given too: choose one")
    if forced and calls is CALL_FORMS["words"] and (pattern := calls_pattern(by_name, most or MOST_CALLS)) is not None:
        return Grammar(regex=pattern), AnswerForm(calls=calls, names=by_name)
    if forced:
        schema = calls_schema(by_name, most)
    elif tools and asked is not None and asked.json_schema is not None:
        schema = answer_or_calls_schema(by_name, most, asked.json_schema)
    elif asked is not None and asked.json_schema is not None:
        return asked, AnswerForm()  # what the client asked for is the text
    else:
        return asked, _read_as(service, body, AnswerForm(calls=calls, names=by_name), prompt)
    check_depth("tools", schema)
    schema["x-guidance"] = {**ONE_LINE, "lenient": not _all_strict(tools)}
    return schema_grammar("tools", schema), AnswerForm(calls=CALL_FORMS["json"], names=by_name)


def _all_strict(tools: Sequence[Tool] | None) -> bool:
    """Tell whether every part of the schemas has to be obeyed; else parts that the grammar does not know are left."""
    return all(tool.function.strict for tool in tools or ())


def _read_as(service: Service, body: ChatBody, form: AnswerForm, prompt: list[int]) -> AnswerForm:
    """Add the reasoning to a form, if the model writes any and the client wants it apart."""
    reasoning = service.forms.reasoning
    if reasoning is None or body.separate_reasoning is False:
        return form
    end = service.tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False).rstrip()
    return AnswerForm(form.calls, form.names, reasoning, end.endswith(reasoning.start))


def template_options(body: Any) -> dict[str, Any]:
    """Return what the chat template is told besides messages and tools."""
    options = dict(body.chat_template_kwargs or {})
    check_template_options(options)
    if body.add_generation_prompt is not None:
        options["add_generation_prompt"] = body.add_generation_prompt
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise BadRequest("continue_final_message and add_generation_prompt exclude each other")
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    for name in ("reasoning_effort", "documents"):
        if getattr(body, name, None) is not None:
            check_depth(name, getattr(body, name))
            options[name] = getattr(body, name)
    return options


def chat_tokens(
    service: Service,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    options: dict[str, Any],
    add_special_tokens: bool = False,
) -> list[int]:
    """Return the tokens of a conversation. It waits for the process of the chat template, so it runs on a thread."""
    assert not _on_event_loop(), "a template is waited for on the event loop: use offload.run_chat"
    service.encoder.check_messages(len(messages))
    plain_tools = None if tools is None else [msgspec.to_builtins(tool) for tool in tools]
    return service.encoder.conversation([_plain(one) for one in messages], plain_tools, options, add_special_tokens)


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _plain(message: Message) -> dict[str, Any]:
    """Return a message without what no template is told."""
    plain: dict[str, Any] = msgspec.to_builtins(message)
    if message.reasoning is not None:
        plain.setdefault("reasoning_content", message.reasoning)
    for name in _NO_EFFECT:
        plain.pop(name, None)
    return plain
