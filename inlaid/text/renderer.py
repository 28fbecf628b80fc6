"""A chat template compiled and run. It writes what `apply_chat_template` of transformers does, and spares each process
the second of a processor that importing transformers takes.

A template is somebody's program: it runs in jinja's sandbox and sees plain values only. `text/confined.py` bounds its
time and memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import msgspec
from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that clients give it; templates read the first
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # its space shows whether the template trims what a message ends in


class Renderer:
    """A model's template, or several by name, and its special tokens by the names that templates know."""

    def __init__(self, templates: str | Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._templates, self._special_tokens = templates, special_tokens
        self._compiled: dict[str, Template] = {}

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, options: Mapping[str, Any]
    ) -> str:
        """Return the text of a conversation. Null reaches the template as content alone: other keys of a message that
        are null are left out. ValueError and what else a template raises: it does not take these messages."""
        if not messages:
            raise ValueError("there are no messages")
        given = msgspec.to_builtins((list(messages), list(tools or ()), dict(options)))
        told, tools, options = [_as_told(message) for message in given[0]], given[1] or None, given[2]
        if any(not isinstance(tool, dict) for tool in tools or ()):
            raise TypeError("a tool must be an object with its type and its function")
        variables = {"documents": None, **self._special_tokens, **options}
        last = _mark(told[-1]) if variables.pop("continue_final_message", False) else None
        try:
            text = self._template(tools).render(messages=told, tools=tools, **variables)
        except TemplateError as error:
            raise ValueError(str(error)) from error
        return text if last is None else _cut(text, last)

    def _template(self, tools: Sequence[Any] | None) -> Template:
        """Return the one template, compiled; of several that for tools if there are any, or the default."""
        source = self._templates
        if isinstance(source, Mapping):
            name = "tool_use" if tools is not None and "tool_use" in source else "default"
            if name not in source:
                raise ValueError(f"none of the model's chat templates is the default: {', '.join(sorted(source))}")
            source = source[name]
        if source not in self._compiled:
            self._compiled[source] = _environment().from_string(source)
        return self._compiled[source]


def _as_told(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as templates expect it: reasoning under each of the names that they read."""
    told = {key: value for key, value in message.items() if value is not None or key == "content"}
    reasoning = next((told[key] for key in _REASONING if key in told), None)
    return told if reasoning is None else {"thinking": reasoning, **told, "reasoning_content": reasoning}


def _mark(message: dict[str, Any]) -> str:
    """Mark the end of the message that is to be continued, and return its content."""
    content = message.get("content")
    if not isinstance(content, str):
        raise ValueError("continue_final_message needs a final message whose content is a text")
    message["content"] = content + _TAG
    return content


def _cut(text: str, last: str) -> str:
    """Return the text up to the mark, and without the space before it if the template trims messages."""
    place = text.rfind(_TAG.strip())
    if place < 0 or last.strip() not in text:
        raise ValueError("continue_final_message: the chat template does not write the final message out as it is")
    return text[:place] if text.startswith(_TAG, place) else text[:place].rstrip()


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the sandbox, with what templates may use beside jinja's own."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}
    return made


class _Generation(Extension):
    """The block that tells training which text an assistant wrote; here it is its content."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON as models were trained with: jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


class _Dict:
    """The type dict as far as a template may use it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore, which lead into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # an attribute may be called self
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace of a chat template has no attribute {name!r}: it begins with an underscore")
