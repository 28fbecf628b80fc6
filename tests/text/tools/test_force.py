"""Schemas that force calls: references stay a tool's own, objects are closed."""

from __future__ import annotations

import json

from inlaid.text.tools.force import answer_or_calls_schema, calls_schema

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}}


def test_each_tool_keeps_its_definitions() -> None:
    made = calls_schema(
        {"a": {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": POINT}}, "b": None}, 3
    )
    assert made["$defs"]["tool0"]["properties"]["p"] == {"$ref": "#/$defs/tool0/$defs/P"}
    assert made["$defs"]["tool0"]["$defs"]["P"]["additionalProperties"] is False
    assert made["$defs"]["tool1"] == {"type": "object"}
    assert [one["properties"]["name"] for one in made["items"]["anyOf"]] == [{"const": "a"}, {"const": "b"}]
    assert made["maxItems"] == 3


def test_what_is_open_stays_open() -> None:
    open_ones = {
        "patterns": {"type": "object", "properties": {}, "patternProperties": {"^a": {}}},
        "any": {"type": "object", "additionalProperties": True, "properties": {}},
        "parts": {"allOf": [POINT, {"type": "object", "properties": {"y": {}}}]},
        "named": {"type": "object", "properties": {"properties": {"type": "object"}, "type": {"type": "string"}}},
    }
    made = calls_schema(open_ones)["$defs"]
    assert "additionalProperties" not in made["tool0"]
    assert made["tool1"]["additionalProperties"] is True
    assert made["tool2"] == open_ones["parts"]
    assert set(made["tool3"]["properties"]) == {"properties", "type"}


def test_an_answer_of_its_own_schema_or_calls() -> None:
    made = answer_or_calls_schema({"a": POINT}, 0, json.dumps({"$ref": "#/$defs/P", "$defs": {"P": POINT}}))
    assert made["anyOf"][0] == {"$ref": "#/$defs/answer"}
    assert made["$defs"]["answer"]["$ref"] == "#/$defs/answer/$defs/P"
    assert made["anyOf"][1]["items"]["properties"]["name"] == {"const": "a"}
