"""/openapi.json, made from the routes and the structs that they decode into and encode from, and from the bounds that
requests are checked against, so that it says what is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from inlaid import __version__
from inlaid.engine.ledger import MAX_WEIGHT, MIN_WEIGHT
from inlaid.engine.limits import MAX_LIMIT
from inlaid.server.errors import ErrorResponse
from inlaid.server.route import Guard, Route
from inlaid.text.params import MAX_PRIORITY, MAX_STOP_CHARS, MAX_STOPS, POSITIVE, RANGES

_REF = "#/components/schemas/{name}"
_SAME: Mapping[str, str] = MappingProxyType(  # fields that are checked under another name
    {
        "max_completion_tokens": "max_tokens",
        "max_new_tokens": "max_tokens",
        "min_new_tokens": "min_tokens",
        "sampling_seed": "seed",
        "top_logprobs": "logprobs",
        "top_logprobs_num": "logprobs",
    }
)
_STOPS = frozenset({"stop", "stop_sequences"})
_TOKENS = frozenset({"tokens", "stop_token_ids", "allowed_token_ids"})  # lists of token ids


@dataclass(frozen=True)
class Facts:
    """The facts about a server that decide what it accepts."""

    vocab_size: int
    max_answers: int  # of one request
    guards: frozenset[Guard]  # that ask for a key
    strict: bool  # unknown fields are refused everywhere


def document(routes: Sequence[Route], facts: Facts) -> dict[str, Any]:
    """Return the description of these routes."""
    types = [ErrorResponse, *(t for route in routes for t in (route.body, *route.answers) if t is not None)]
    unique = list(dict.fromkeys(types))
    schemas, components = msgspec.json.schema_components(unique, ref_template=_REF)
    for schema in components.values():
        for name, field in schema.get("properties", {}).items():
            _bound(name, field, facts)
    _write_prompts(components, facts)
    schema_of = dict(zip(unique, schemas, strict=True))
    if not facts.strict:
        _loosen([schema_of[route.body] for route in routes if route.body is not None and route.lenient], components)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        operation = _operation(route, schema_of, route.guard in facts.guards)
        paths.setdefault(plain_path(route), {})[route.method.lower()] = operation
    security = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if facts.guards else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "inlaid", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, **security},
    }


def plain_path(route: Route) -> str:
    """Return the path with only the names of its parameters."""
    return re.sub(r"{(\w+):[^}]*}", r"{\1}", route.path)


def _bound(name: str, field: dict[str, Any], facts: Facts) -> None:
    """Write the bounds of a field that requests are checked against into its schema."""
    for form in field.get("anyOf", [field]):
        kind, checked = form.get("type"), _SAME.get(name, name)
        if kind in ("integer", "number") and checked in RANGES:
            least, most = RANGES[checked]
            form["exclusiveMinimum" if checked in POSITIVE else "minimum"] = max(least, form.get("minimum", least))
            form["maximum"] = most
        elif kind == "integer" and name in ("n", "best_of"):
            form.update(minimum=1, maximum=facts.max_answers)
        elif kind == "integer" and name == "truncate_prompt_tokens":
            form["minimum"] = 1
        elif kind == "integer" and name == "priority":
            form.update(minimum=-MAX_PRIORITY, maximum=MAX_PRIORITY)
        elif kind == "integer" and name == "max_num_waiting":
            form.update(minimum=1, maximum=MAX_LIMIT)
        elif kind == "object" and name == "weights":
            form["additionalProperties"].update(minimum=MIN_WEIGHT, maximum=MAX_WEIGHT)
        elif kind == "number" and name == "deadline":
            form["exclusiveMinimum"] = 0
        elif kind == "array" and name in _TOKENS and form["items"].get("type") == "integer":
            form["items"].update(minimum=0, maximum=facts.vocab_size - 1)
        elif name in _STOPS and kind == "string":
            form.update(minLength=1, maxLength=MAX_STOP_CHARS)
        elif name in _STOPS and kind == "array":
            form.update(maxItems=MAX_STOPS)
            form["items"].update(minLength=1, maxLength=MAX_STOP_CHARS)
        elif name == "logit_bias" and kind == "object":
            form["propertyNames"] = {"pattern": "^(0|[1-9][0-9]{0,8})$"}
            form["additionalProperties"].update(minimum=-100, maximum=100)


def _tokens(facts: Facts) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": facts.vocab_size - 1}, "minItems": 1}


def _write_prompts(components: dict[str, Any], facts: Facts) -> None:
    """Write the forms of prompts, which are decoded by hand."""
    tokens = _tokens(facts)
    bounds = {"minItems": 1, "maxItems": facts.max_answers}
    several = [{"type": "array", "items": form, **bounds} for form in ({"type": "string", "minLength": 1}, tokens)]
    prompt = components["CompletionBody"]["properties"]["prompt"]
    prompt["anyOf"] = [{"type": "string", "minLength": 1}, tokens, *several]
    components["NativeBody"]["properties"]["input_ids"]["anyOf"] = [tokens, several[1], {"type": "null"}]


def _loosen(schemas: list[Any], components: dict[str, Any]) -> None:
    """Allow unknown fields, which are ignored, in these schemas and those that they refer to."""
    todo, seen = list(schemas), set[str]()
    while todo:
        for name in re.findall(r"#/components/schemas/(\w+)", str(todo.pop())):
            if name not in seen:
                seen.add(name)
                components[name].pop("additionalProperties", None)
                todo.append(components[name])


def _operation(route: Route, schema_of: dict[Any, Any], guarded: bool) -> dict[str, Any]:
    error = {"description": "an error", "content": _json(schema_of[ErrorResponse])}
    content: dict[str, Any] = {}
    if route.answers:
        content = _json(schema_of[route.answers[0]])
    if len(route.answers) > 1:
        events = {"contentMediaType": "application/json", "contentSchema": schema_of[route.answers[1]]}
        content["text/event-stream"] = {"schema": {"type": "string", "description": "events: data: JSON", **events}}
    if route.text:
        content = {route.text: {"schema": {"type": "string"}}}
    made: dict[str, Any] = {
        "summary": (route.handler.__doc__ or "").strip().split("\n")[0],
        "responses": {"200": {"description": "done", "content": content}, "default": error},
    }
    names = re.findall(r"{(\w+)}", plain_path(route))
    if names or route.query:
        path = {"in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        made["parameters"] = [
            *({"name": name, **path} for name in names),
            *({"name": name, "in": "query", "schema": dict(schema)} for name, schema in route.query),
        ]
    if route.body is not None:
        made["requestBody"] = {"required": True, "content": _json(schema_of[route.body])}
    if guarded:
        made["security"] = [{"key": []}]
    return made


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
