"""/openapi.json, made from the routes and the structs that they decode into and encode from, so that it cannot differ
from what is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from inlaid import __version__
from inlaid.server.errors import ErrorResponse
from inlaid.server.route import Guard, Route

_REF = "#/components/schemas/{name}"


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """Return the description of these routes."""
    types = [ErrorResponse, *(t for route in routes for t in (route.body, *route.answers) if t is not None)]
    unique = list(dict.fromkeys(types))
    schemas, components = msgspec.json.schema_components(unique, ref_template=_REF)
    schema_of = dict(zip(unique, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(plain_path(route), {})[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "inlaid", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def plain_path(route: Route) -> str:
    """Return the path with only the names of its parameters."""
    return re.sub(r"{(\w+):[^}]*}", r"{\1}", route.path)


def _operation(route: Route, schema_of: dict[Any, Any]) -> dict[str, Any]:
    error = {"description": "an error", "content": _json(schema_of[ErrorResponse])}
    content: dict[str, Any] = {}
    if route.answers:
        content = _json(schema_of[route.answers[0]])
    if len(route.answers) > 1:
        content["text/event-stream"] = {"schema": schema_of[route.answers[1]]}
    if route.text:
        content = {"text/plain": {"schema": {"type": "string"}}}
    made: dict[str, Any] = {
        "summary": (route.handler.__doc__ or "").strip().split("\n")[0],
        "responses": {"200": {"description": "done", "content": content}, "default": error},
    }
    names = re.findall(r"{(\w+)}", plain_path(route))
    if names or route.query:
        made["parameters"] = [
            *({"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names),
            *({"name": n, "in": "query", "schema": {"type": kind}} for n, kind in route.query),
        ]
    if route.body is not None:
        made["requestBody"] = {"required": True, "content": _json(schema_of[route.body])}
    if route.guard is not Guard.OPEN:
        made["security"] = [{"key": []}]
    return made


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
