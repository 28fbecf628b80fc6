"""An answer with reasoning and tool calls: how a model writes them, and the parser of one answer.

The server makes an AnswerForm for each request; its parser turns the answer's text into events.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from inlaid.text.tools.events import Event, Parser, Text, joined
from inlaid.text.tools.forms import CALL_FORMS, CALL_FORMS_OF_VLLM, CallForm, call_form_of
from inlaid.text.tools.reasoning import REASONING_FORMS, ReasoningForm, ReasoningParser, reasoning_form_of

AUTO, NONE = "auto", "none"
CALL_PARSERS = (AUTO, NONE, *CALL_FORMS, *CALL_FORMS_OF_VLLM)
REASONING_PARSERS = (AUTO, NONE, *REASONING_FORMS)


@dataclass(frozen=True)
class ModelForms:
    """The forms in which a model writes calls and reasoning; None: it is not known to write any."""

    calls: CallForm | None
    reasoning: ReasoningForm | None

    @classmethod
    def of(cls, template: str, calls: str = AUTO, reasoning: str = AUTO) -> ModelForms:
        """Return the forms of these names; with AUTO those that the chat template belongs to."""
        call_name = call_form_of(template) if calls == AUTO else CALL_FORMS_OF_VLLM.get(calls, calls)
        reasoning_name = reasoning_form_of(template) if reasoning == AUTO else reasoning
        return cls(CALL_FORMS.get(call_name or NONE), REASONING_FORMS.get(reasoning_name or NONE))


@dataclass(frozen=True)
class AnswerForm:
    """The way to read one answer. Without either form all of it is text."""

    calls: CallForm | None = None
    names: Collection[str] = ()  # of the tools; of a mapping, with the schemas of their arguments
    reasoning: ReasoningForm | None = None
    begins_inside: bool = False  # the prompt has opened the reasoning

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks that must be seen in the text, special tokens or not."""
        reasoning = () if self.reasoning is None else (self.reasoning.start, self.reasoning.end)
        return (*reasoning, *(self.calls.marks if self.calls is not None else ()))

    def parser(self) -> Parser:
        """Return the parser of one answer."""
        return _AnswerParser(self)


class _AnswerParser:
    """Reads reasoning first, and calls in what follows."""

    def __init__(self, form: AnswerForm) -> None:
        self._reasoning = ReasoningParser(form.reasoning, form.begins_inside) if form.reasoning is not None else None
        self._calls = form.calls.make(form.names) if form.calls is not None else None

    def feed(self, text: str) -> list[Event]:
        """Return what is certain after this text."""
        return self._read([Text(text)] if self._reasoning is None else self._reasoning.feed(text))

    def finish(self) -> list[Event]:
        """Return what was held back."""
        made = [] if self._reasoning is None else self._read(self._reasoning.finish())
        return joined(made + ([] if self._calls is None else self._calls.finish()))

    def _read(self, events: list[Event]) -> list[Event]:
        if self._calls is None:
            return joined(events)
        made: list[Event] = []
        for event in events:
            made += self._calls.feed(event.text) if isinstance(event, Text) else [event]
        return joined(made)
