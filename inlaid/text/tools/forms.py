"""The forms in which models write tool calls, and which of them a chat template belongs to."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from inlaid.text.tools.events import Parser
from inlaid.text.tools.marked import MarkedCalls, Marks
from inlaid.text.tools.pythonic import PythonicCalls
from inlaid.text.tools.words import WordCalls

_SHORT_ID = 9  # letters and digits: Mistral's templates refuse others


@dataclass(frozen=True)
class CallForm:
    """One form: its parser for the names of known tools, and the marks in it, which may be special tokens."""

    make: Callable[[Collection[str]], Parser]
    marks: tuple[str, ...] = ()
    short_ids: bool = False

    def call_id(self) -> str:
        """Return the id of a new call."""
        if self.short_ids:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(_SHORT_ID))
        return f"call_{secrets.token_hex(12)}"


def _marked(marks: Marks) -> Callable[[Collection[str]], Parser]:
    return lambda names: MarkedCalls(marks, names)


CALL_FORMS: Mapping[str, CallForm] = MappingProxyType(
    {
        # [{"name": …, "arguments": {…}}, …], after text or alone: OpenAI's list, forced calls
        "json": CallForm(_marked(Marks(('[{"',), kept=2, end="]", known=True))),
        # <tool_call>{"name": …, "arguments": {…}}</tool_call>, once for each call
        "hermes": CallForm(_marked(Marks(("<tool_call>",), end="</tool_call>")), ("<tool_call>", "</tool_call>")),
        # {"name": …, "parameters": {…}}, alone or after <|python_tag|>; several are separated by semicolons
        "llama3_json": CallForm(_marked(Marks(("<|python_tag|>",), start="{", known=True)), ("<|python_tag|>",)),
        # [TOOL_CALLS][{"name": …, "arguments": {…}}, …], or [TOOL_CALLS]name[ARGS]{…} for each call
        "mistral": CallForm(_marked(Marks(("[TOOL_CALLS]",), named=True)), ("[TOOL_CALLS]", "[ARGS]"), True),
        # [name(argument=value, …), …], as Python writes it
        "pythonic": CallForm(PythonicCalls, ("<|python_start|>", "<|python_end|>")),
        # call name of tool: key = value, …; a line for each call: the demo's template, which says so in a comment
        "words": CallForm(WordCalls),
    }
)
CALL_FORMS_OF_VLLM: Mapping[str, str] = MappingProxyType({"qwen": "hermes", "llama3": "llama3_json", "openai": "json"})


def call_form_of(template: str) -> str | None:
    """Return the form in which a chat template writes earlier calls; None: it writes none."""
    if "tool_calls" not in template:
        return None
    if "<function=" in template:  # a form of XML that no parser here reads
        return None
    for mark, form in (
        ("{#- calls: words -#}", "words"),
        ("<tool_call>", "hermes"),
        ("[TOOL_CALLS]", "mistral"),
        ("<|python_start|>", "pythonic"),
        ("<|python_tag|>", "llama3_json"),
        ("<|start_header_id|>", "llama3_json"),
    ):
        if mark in template:
            return form
    return "json"
