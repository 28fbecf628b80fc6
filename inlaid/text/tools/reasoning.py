"""Reasoning between two marks, as in <think>…</think>, at the beginning of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from inlaid.text.tools.events import Event, Reasoning, Text, joined, overlap


@dataclass(frozen=True)
class ReasoningForm:
    """The marks around a model's reasoning."""

    start: str
    end: str


_THINK = ReasoningForm("<think>", "</think>")
REASONING_FORMS: Mapping[str, ReasoningForm] = MappingProxyType(
    {
        "think": _THINK,
        "deepseek_r1": _THINK,
        "qwen3": _THINK,
        "mistral": ReasoningForm("[THINK]", "[/THINK]"),
    }
)


def reasoning_form_of(template: str) -> str | None:
    """Return the form that a chat template writes or takes out of earlier turns."""
    for name in ("think", "mistral"):
        if REASONING_FORMS[name].end in template:
            return name
    return None


class ReasoningParser:
    """Tells reasoning from the rest of an answer. With `inside` the prompt has opened it already."""

    def __init__(self, form: ReasoningForm, inside: bool) -> None:
        self._form = form
        self._state = "inside" if inside else "start"
        self._pending = ""

    def feed(self, text: str) -> list[Event]:
        """Return what is certain after this text."""
        self._pending += text
        made: list[Event] = []
        while (step := getattr(self, f"_{self._state}")(made)) is not None:
            self._state = step
        return joined(made)

    def finish(self) -> list[Event]:
        """Return what was held back."""
        text, self._pending = self._pending, ""
        return joined([Reasoning(text) if self._state == "inside" else Text(text)])

    def _start(self, made: list[Event]) -> str | None:
        """Wait until the answer begins with the mark, or with something else."""
        text = self._pending.lstrip()
        if text.startswith(self._form.start):
            self._pending = text[len(self._form.start) :]
            return "inside"
        return None if self._form.start.startswith(text) else "after"

    def _inside(self, made: list[Event]) -> str | None:
        if self._pending.startswith(self._form.start):  # the prompt has opened it, and the model once more
            self._pending = self._pending[len(self._form.start) :]
        reasoning, mark, rest = self._pending.partition(self._form.end)
        if mark:
            made.append(Reasoning(reasoning))
            self._pending = rest
            return "between"
        keep = overlap(self._pending, self._form.end)
        if self._form.start.startswith(self._pending):
            keep = len(self._pending)
        cut = len(self._pending) - keep
        made.append(Reasoning(self._pending[:cut]))
        self._pending = self._pending[cut:]
        return None

    def _between(self, made: list[Event]) -> str | None:
        """Leave out the blanks between the reasoning and the answer."""
        self._pending = self._pending.lstrip()
        return "after" if self._pending else None

    def _after(self, made: list[Event]) -> str | None:
        made.append(Text(self._pending))
        self._pending = ""
        return None
