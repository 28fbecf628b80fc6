"""Conversations as text: messages in the form that chat templates expect, and the model's template that writes them
out as one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from inlaid.engine.refusal import Refusal, Refused
from inlaid.text.confined import Confined
from inlaid.text.nesting import check_depth

if TYPE_CHECKING:
    from inlaid.text.renderer import Renderer

RESERVED = ("messages", "conversation", "tools", "chat_template", "tokenize", "return_tensors", "return_dict")

Message = dict[str, Any]


class ChatTemplate:
    """A model's chat template, or the one that replaces it."""

    def __init__(self, templates: str | dict[str, str] | None, special_tokens: Mapping[str, str]) -> None:
        """Take a template, or several by name, and the special tokens by the names that templates know."""
        self._templates, self._special_tokens = templates, dict(special_tokens)
        self._renderer: Confined | Renderer | None = None  # made when one is first needed

    @property
    def source(self) -> str:
        """The text of the template, or of all where a model has several."""
        template = self._templates
        return "\n".join(template.values()) if isinstance(template, dict) else template or ""

    @property
    def exists(self) -> bool:
        """Tell whether there is a template at all."""
        return self._templates is not None

    def confine(self, max_chars: int) -> None:
        """Write conversations out in a process with bounds on time and memory from now on, as a server must."""
        if self._templates is not None:
            self._renderer = Confined(self._templates, self._special_tokens, max_chars)

    def close(self) -> None:
        """End the processes of `confine`."""
        if isinstance(self._renderer, Confined):
            self._renderer.close()

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, options: Mapping[str, Any] | None = None
    ) -> str:
        """Return the prompt that the template makes of messages. Content that is null, as of an answer that is all tool
        calls, reaches the template as null, or as an empty text where it cannot take null. Refused: it does not take
        these messages."""
        if not self.exists:
            raise _refused("the model has no chat template; give one with --chat-template, or use completions")
        if not any(message.get("content", "") is None for message in messages):
            return self._render(messages, tools, options)
        empty = [message | {"content": message.get("content", "") or ""} for message in messages]
        try:
            text = self._render(messages, tools, options)
        except Refused:  # most templates add texts together, and null is none
            return self._render(empty, tools, options)
        return self._without_none(text, empty, tools, options)

    def _without_none(self, text: str, empty: Sequence[Message], tools: Any, options: Any) -> str:
        """Return the text of messages whose content is null, without the word None where the template wrote it out."""
        if "None" not in text:
            return text
        try:
            other = self._render(empty, tools, options)
        except Refused:
            return text
        return other if text.replace("None", "") == other.replace("None", "") else text

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, options: Mapping[str, Any] | None
    ) -> str:
        if self._renderer is None:
            from inlaid.text.renderer import Renderer  # its jinja is loaded where templates run

            assert self._templates is not None
            self._renderer = Renderer(self._templates, self._special_tokens)
        try:
            return self._renderer.render(messages, tools or None, {"add_generation_prompt": True, **(options or {})})
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise _refused(f"the chat template refuses these messages: {error}") from error


def plain_message(message: Message) -> Message:
    """Return a message as chat templates expect it: content as one text, arguments of tool calls as objects."""
    plain = dict(message)
    if isinstance(plain.get("content"), list):
        plain["content"] = content_text(plain["content"])
    if plain.get("role") == "developer":
        plain["role"] = "system"
    if plain.get("role") == "assistant":
        plain.setdefault("content", None)  # some templates tell answers that are all tool calls by it
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in plain["tool_calls"]]
    return plain


def content_text(content: str | Sequence[dict[str, Any]] | None) -> str:
    """Return a message's content as one text."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(map(_part_text, content))


def _part_text(part: dict[str, Any]) -> str:
    text = part.get("refusal" if part.get("type") == "refusal" else "text")
    if not isinstance(text, str) or part.get("type", "text") not in ("text", "refusal"):
        served = "these models read text only: describe it in words"
        raise _refused(f"a message has a part of type {part.get('type')!r}; {served}")
    return text


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments decoded; the text itself where a model wrote what is not JSON."""
    function = dict(call["function"])
    try:
        function["arguments"] = msgspec.json.decode(function["arguments"])
    except (msgspec.DecodeError, TypeError):
        pass
    else:
        check_depth("messages", function["arguments"])
    return {**call, "type": "function", "function": function}


def _refused(message: str) -> Refused:
    return Refused(Refusal(message, param="messages"))
