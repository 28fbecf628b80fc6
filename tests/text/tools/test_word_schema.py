"""Demanded calls in words: what the pattern lets through fits the tool's schema, and nothing else has a pattern."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inlaid.text.tools.events import Arguments, Call
from inlaid.text.tools.word_schema import WordSchema, calls_pattern, guessed_arguments
from inlaid.text.tools.words import WordCalls

TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
WEATHER: dict[str, Any] = {  # as Pydantic writes it
    "title": "Weather", "type": "object", "required": ["city", "sunny"],
    "properties": {
        "city": {"enum": ["Oslo", "São Paulo (*)"], "title": "City", "type": "string"}, "sunny": {"type": "boolean"},
    },
}  # fmt: skip
ITERABLE: dict[str, Any] = {  # as Instructor asks for many
    "type": "object", "required": [], "$defs": {"Weather": WEATHER},
    "properties": {"tasks": {"type": "array", "items": {"$ref": "#/$defs/Weather"}, "description": "a list"}},
}  # fmt: skip
NESTED: dict[str, Any] = {
    "type": "object", "additionalProperties": False,
    "properties": {
        "to_whom": {"type": "object", "properties": {"first_name": TEXT, "age": {"type": ["number", "null"]}}},
        "tags": {"type": "array", "items": TEXT}, "kind": {"const": 3},
    },
}  # fmt: skip


def read(schema: dict[str, Any], line: str) -> Any:
    parser = WordCalls({"do_it": schema})
    call, arguments = [*parser.feed(f"call do it: {line}"), *parser.finish()]
    assert call == Call(0, "do_it")
    assert isinstance(arguments, Arguments)
    return json.loads(arguments.text)


@pytest.mark.parametrize(
    ("schema", "line", "arguments"),
    [
        (WEATHER, "city = São Paulo (*), sunny = true", {"city": "São Paulo (*)", "sunny": True}),
        (ITERABLE, "tasks city = Oslo, tasks sunny = true", {"tasks": [{"city": "Oslo", "sunny": True}]}),
        (ITERABLE, "tasks city = Oslo, tasks sunny = true, tasks city = Oslo, tasks sunny = false",
         {"tasks": [{"city": "Oslo", "sunny": True}, {"city": "Oslo", "sunny": False}]}),
        (NESTED, "to whom first name = 12, to whom age = 7.5, tags = a b, tags = null, kind = 3",
         {"to_whom": {"first_name": "12", "age": 7.5}, "tags": ["a b", "null"], "kind": 3}),
        ({"type": "object", "properties": {"a": {"anyOf": [NUMBER, TEXT]}, "b": {"enum": [None, 1]}}},
         "a = 5, b = null", {"a": 5, "b": None}),
        (NESTED, "to whom first name = true, to whom age = null, tags = x, kind = 3",
         {"to_whom": {"first_name": "true", "age": None}, "tags": ["x"], "kind": 3}),
    ],
)  # fmt: skip
def test_lines_are_demanded_and_read(schema: dict[str, Any], line: str, arguments: Any, accepts: Any) -> None:
    assert read(schema, line) == arguments
    assert accepts(schema, f"call do it: {line}")


@pytest.mark.parametrize(
    "line", ["", "city = Oslo", "city = Lima, sunny = true", "sunny = true, city = Oslo", "city = Oslo, sunny = 1"]
)
def test_other_lines_are_not_let_through(line: str, accepts: Any) -> None:
    assert not accepts(WEATHER, f"call do it: {line}")


@given(st.from_regex(r"\A[^\s,=]([^\r\n,=]{0,20}[^\s,=])?\Z"), st.integers(-(10**9), 10**9), st.booleans())
@settings(max_examples=20, deadline=None)
def test_values_keep_their_types(text: str, number: int, truth: bool) -> None:
    schema = {"type": "object", "properties": {"a_text": TEXT, "a_number": NUMBER, "truth": {"type": "boolean"}}}
    line = f"a text = {text}, a number = {number}, truth = {json.dumps(truth)}"
    assert read(schema, line) == {"a_text": text, "a_number": number, "truth": truth}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}},
        {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "array", "items": TEXT}}}},
        {"type": "object", "properties": {"a": {"type": "object"}}},
        {"type": "object", "properties": {"a_b": TEXT, "a": {"type": "object", "properties": {"b": TEXT}}}},
        {"type": "object", "properties": {"a=b": TEXT}},
        {"type": "object", "properties": {"a": {"enum": ["x", "two  blanks"]}}},
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        {"type": "object", "properties": {"a": TEXT}, "required": ["b"]},
        {"type": "object", "properties": {"a": {"anyOf": [TEXT, WEATHER]}}},
        {"type": "object", "properties": {"a": {"anyOf": [TEXT], "minLength": 1}}},
        {"type": "object", "properties": {"a": {"enum": [1], "minimum": 0}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}},
        {"anyOf": [WEATHER]},
    ],
)  # fmt: skip
def test_what_words_cannot_hold_is_left_to_json(schema: dict[str, Any]) -> None:
    assert WordSchema.of(schema) is None
    assert calls_pattern({"fine": WEATHER, "do_it": schema}, 1) is None


def test_several_calls_and_tools_without_parameters(accepts: Any) -> None:
    written = "call do it: city = Oslo, sunny = true\ncall stop:"
    assert accepts(WEATHER, written, stop=None, most=2)
    assert not accepts(WEATHER, written, stop=None, most=1)
    assert not accepts(WEATHER, f"{written}\ncall stop:", stop=None, most=2)


@pytest.fixture
def accepts() -> Any:
    """Return a function that tells whether the engine's grammar lets a whole text through."""
    llguidance = pytest.importorskip("llguidance")
    tokenizer = llguidance.LLTokenizer("byte")

    def whole(schema: dict[str, Any], text: str, most: int = 1, **others: Any) -> bool:
        pattern = calls_pattern({"do_it": schema, **others}, most)
        assert pattern is not None
        matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_regex(pattern))
        tokens = [*text.encode(), tokenizer.eos_token]
        return bool(matcher.validate_tokens(tokens) == len(tokens))

    return whole


def test_a_short_schema_that_stands_for_millions_of_properties_has_no_form_in_words() -> None:
    inner = {f"d{n}": {"type": "object", "properties": {f"p{m}": {"$ref": f"#/$defs/d{n + 1}"} for m in range(30)}}
             for n in range(5)}  # fmt: skip
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": inner | {"d5": TEXT}}
    assert WordSchema.of(schema) is None
    assert calls_pattern({"do_it": schema}, 1) is None


@pytest.mark.parametrize("text", ["007", "9" * 5000, "٣٤", "1.", "--1"])
def test_what_only_looks_like_a_number_stays_text(text: str) -> None:
    assert guessed_arguments(f"some code = {text}, other = -2.5") == {"some_code": text, "other": -2.5}
    assert read({"type": "object", "properties": {"a": NUMBER}}, f"a = {text}") == {"a": text}


_KEYS = ("type", "properties", "required", "items", "enum", "const", "anyOf", "$ref", "description", "p", "q")
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["object", "array", "string", "p", "#/p", "", "a=b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=5))
@example({"type": "object", "properties": "hello"})
@example({"type": "object", "properties": {}, "required": [[]]})
@example({"type": "object", "properties": {"p": {"type": [{}]}}})
@example({"type": "object", "properties": {"p": {"anyOf": 1}}})
@example({"type": "object", "properties": {"p": {"enum": 1}}})
def test_whatever_a_client_sends_as_a_schema_is_read_or_has_no_form_in_words(schema: dict[str, Any]) -> None:
    """A grammar refuses what is no schema, where one is made; without one nothing may fail."""
    words = WordSchema.of(schema)
    if words is not None:
        re.compile(words.pattern)
        words.arguments("p = 1, q = x")
