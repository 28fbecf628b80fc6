"""Calls in every form, whole and cut into pieces at every place: what is told is always the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from inlaid.text.tools.events import Arguments, Call, Event, Parser, Text
from inlaid.text.tools.forms import CALL_FORMS, call_form_of
from inlaid.text.tools.reasoning import REASONING_FORMS, ReasoningParser, reasoning_form_of

NAMES = ("get_weather", "add")
ONE = ("get_weather", {"city": "Oslo"})
TWO = ("add", {"a": 1, "b": [2, {"c": "}]"}]})
PAIRS = {"city": 'a "quoted" }] text\n', "n": -1.5e3, "deep": {"x": [None, True]}}

Calls = list[tuple[str, Any]]

WRITTEN: list[tuple[str, str, str, Calls]] = [
    ("json", '[{"name": "get_weather", "arguments": {"city": "Oslo"}}]', "", [ONE]),
    ("json", 'Sure. [{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}]"}]}}] ', "Sure. ", [TWO]),
    (
        "json",
        '[{"id": "x", "function": {"arguments": "{\\"city\\": \\"Oslo\\"}", "name": "get_weather"}, "type": "function"}'
        ', {"name":"get_weather","parameters":{"city": "Oslo"}}]',
        "",
        [ONE, ONE],
    ),
    ("json", '[{"name": "add"}]', "", [("add", {})]),
    ("json", '[{"title": "get_weather"}, {"a": 2}] is a list', '[{"title": "get_weather"}, {"a": 2}] is a list', []),
    ("json", '[{"name": "nobody", "arguments": {}}]', '[{"name": "nobody", "arguments": {}}]', []),
    ("json", 'an [{', "an [{", []),
    (
        "hermes",
        'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n<tool_call>'
        '{"arguments": {"a": 1, "b": [2, {"c": "}]"}]}, "name": "add"}</tool_call>',
        "I look.\n",
        [ONE, TWO],
    ),
    ("hermes", "a <tool_call> is a mark, and <tool", "a <tool_call> is a mark, and <tool", []),
    ("hermes", '<tool_call>{"name": "new", "arguments": {}}</tool_call> Done. Yes.', "Done. Yes.", [("new", {})]),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Oslo"}}', "", [ONE]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Oslo"}}; {"name": "add", "parameters": '
        '{"a": 1, "b": [2, {"c": "}]"}]}}',
        "",
        [ONE, TWO],
    ),
    ("llama3_json", '{"city": "Oslo"}', '{"city": "Oslo"}', []),
    ("llama3_json", 'So: {"name": "add", "parameters": {}}', 'So: {"name": "add", "parameters": {}}', []),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo"}}, '
     '{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}]"}]}}]', "", [ONE, TWO]),
    ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]add{"a": 1, "b": [2, {"c": "}]"}]}', "",
     [ONE, TWO]),
    ("mistral", "an [array] of [TOOL_", "an [array] of [TOOL_", []),
    ("pythonic", '[get_weather(city="Oslo"), add(a=1, b=[2, {"c": "}]"}])]', "", [ONE, TWO]),
    ("pythonic", "<|python_start|>[get_weather(city='Oslo')]<|python_end|>", "", [ONE]),
    ("pythonic", "[1, 2] is a list", "[1, 2] is a list", []),
    ("pythonic", "[print(1)]", "[print(1)]", []),
    ("pythonic", "[add(a=true, b=null)]", "", [("add", {"a": True, "b": None})]),
    ("pythonic", "[add(a=" + "[" * 200, "[add(a=" + "[" * 200, []),
    ("words", "call get weather: city = Oslo", "", [ONE]),
    ("words", "I look.\ncall get weather: city = Oslo, near Rome\ncall add: a = 1, big number = -2.5, ok = true\nSo.",
     "I look.\nSo.", [("get_weather", {"city": "Oslo, near Rome"}), ("add", {"a": 1, "big_number": -2.5, "ok": True})]),
    ("words", "call add:", "", [("add", {})]),
    ("words", "call nobody: a = 1", "call nobody: a = 1", []),
    ("words", "I call add: a = 1\ncal", "I call add: a = 1\ncal", []),
    ("json", '[{"name": "add", "arguments": ' + json.dumps(PAIRS) + "}]", "", [("add", PAIRS)]),
]  # fmt: skip


def told(parser: Parser, pieces: list[str]) -> tuple[str, Calls]:
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    events += parser.finish()
    text = "".join(event.text for event in events if isinstance(event, Text))
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, Call):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        elif isinstance(event, Arguments):
            assert event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return text, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize(("form", "written", "text", "calls"), WRITTEN)
def test_calls_are_told_apart_however_they_come(form: str, written: str, text: str, calls: Calls) -> None:
    make = CALL_FORMS[form].make
    assert told(make(NAMES), [written]) == (text, calls)
    assert told(make(NAMES), list(written)) == (text, calls)
    for cut in range(1, len(written)):
        assert told(make(NAMES), [written[:cut], written[cut:]]) == (text, calls), cut


def test_arguments_come_as_they_are_written() -> None:
    parser = CALL_FORMS["hermes"].make(NAMES)
    assert parser.feed('<tool_call>{"name": "add", "arguments": {"a"') == [Call(0, "add"), Arguments(0, '{"a"')]
    assert parser.feed(": 1") == [Arguments(0, ": 1")]
    assert parser.feed("}}") == [Arguments(0, "}")]
    assert parser.feed("</tool_call>") == []


def test_an_answer_that_is_cut_off_keeps_the_call_that_was_told() -> None:
    parser = CALL_FORMS["json"].make(NAMES)
    assert parser.feed('[{"name": "add", "arguments": {"a": ') == [Call(0, "add"), Arguments(0, '{"a": ')]
    assert parser.finish() == []
    parser = CALL_FORMS["json"].make(NAMES)
    assert parser.feed('[{"name": "ad') == []
    assert parser.finish() == [Text('[{"name": "ad')]


def test_each_form_has_its_templates() -> None:
    assert call_form_of("{{ messages }}") is None
    assert call_form_of("tool_calls <tool_call>") == "hermes"
    assert call_form_of("tool_calls <tool_call> <function=") is None
    assert call_form_of("tool_calls [TOOL_CALLS]") == "mistral"
    assert call_form_of("tool_calls <|start_header_id|>") == "llama3_json"
    assert call_form_of("tool_calls tojson") == "json"
    assert call_form_of("{#- calls: words -#} tool_calls") == "words"
    assert reasoning_form_of("split('</think>')") == "think"
    assert reasoning_form_of("plain") is None


@pytest.mark.parametrize(
    ("written", "inside", "reasoning", "text"),
    [
        ("<think>\na b\n</think>\n\nThe answer", False, "\na b\n", "The answer"),
        ("a b</think>The answer", True, "a b", "The answer"),
        ("<think>a b</think>c", True, "a b", "c"),
        ("The <think>answer</think>", False, "", "The <think>answer</think>"),
        ("<think>never ends </thi", False, "never ends </thi", ""),
        ("<thi", False, "", "<thi"),
        ("", True, "", ""),
    ],
)
def test_reasoning_is_told_apart(written: str, inside: bool, reasoning: str, text: str) -> None:
    for pieces in ([written], list(written)):
        parser = ReasoningParser(REASONING_FORMS["think"], inside)
        events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
        got = ["".join(event.text for event in events if isinstance(event, Text) is plain) for plain in (False, True)]  # type: ignore[union-attr]
        assert got == [reasoning, text]
