"""Calls that a request demands: a JSON schema that only allows calls of its tools, with arguments that fit."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from inlaid.engine.refusal import Refusal, Refused

MOST_CALLS = 8  # in one answer: a model that never ends must not be asked to go on for ever


# JSON on one line, with a blank after colons and commas: calls are told apart from text by how they begin.
ONE_LINE: Mapping[str, Any] = MappingProxyType(
    {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
)


def calls_schema(tools: Mapping[str, Mapping[str, Any] | None], most: int = 0) -> dict[str, Any]:
    """Return the schema of a list of calls of these tools, each with the schema of its arguments: one to `most` calls,
    of which 0 is as many as are ever allowed."""
    definitions = {
        f"tool{index}": _moved(dict(schema or {"type": "object"}), f"#/$defs/tool{index}")
        for index, schema in enumerate(tools.values())
    }
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/tool{index}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for index, name in enumerate(tools)
    ]
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most or MOST_CALLS, "$defs": definitions}


def _moved(schema: Any, place: str, closed: bool = True) -> Any:
    """Return a schema whose references to itself are right at another place of a document. An object that lists its
    properties has no others: a model that is unsure must not go on inventing them."""
    if isinstance(schema, list):
        return [_moved(item, place, closed) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str):
            made[key] = place + value[1:] if value.startswith("#") else value
        elif key not in ("$schema", "$id"):
            made[key] = _moved(value, place, closed and key != "allOf")
    listed = schema.get("type") == "object" and isinstance(schema.get("properties"), dict)
    if closed and listed and not {"allOf", "patternProperties"} & schema.keys():
        made.setdefault("additionalProperties", False)
    return made


def answer_or_calls_schema(tools: Mapping[str, Mapping[str, Any] | None], most: int, answer: str) -> dict[str, Any]:
    """Return the schema of an answer that fits its own schema, given as text, or else is a list of calls."""
    calls = calls_schema(tools, most)
    definitions = {**calls.pop("$defs"), "answer": _moved(_read(answer), "#/$defs/answer")}
    return {"anyOf": [{"$ref": "#/$defs/answer"}, calls], "$defs": definitions}


def _read(schema: str) -> Any:
    try:
        decoded = msgspec.json.decode(schema)
    except msgspec.DecodeError as error:
        raise Refused(Refusal(f"the schema is not valid JSON: {error}")) from error
    if isinstance(decoded, dict):
        decoded.pop("x-guidance", None)
    return decoded
