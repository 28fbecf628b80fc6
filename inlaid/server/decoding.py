"""Bodies decoded into structs. What a client sends beside the known fields is left out and reported, so that a client
written for another server works; a field whose name is nearly a known one is refused, as its author means that one.
"""

from __future__ import annotations

import difflib
from typing import Any

import msgspec
from msgspec import inspect

from inlaid.server.errors import BadRequest

_MOST = 64  # unknown fields in a request
_MAX_NAME = 64  # longer names resemble none of ours
_ALIKE = 0.8  # from 0, nothing in common, to 1


class BodyDecoder:
    """Decodes one kind of body. With `strict`, unknown fields and numbers written as text are refused."""

    def __init__(self, kind: type[Any], strict: bool) -> None:
        self._kind = kind
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(kind)
        self._shape = None if strict else inspect.type_info(kind)

    def decode(self, data: bytes) -> tuple[Any, list[str]]:
        """Return the body, and the names of the fields that were left out."""
        try:
            return self._decoder.decode(data), []
        except msgspec.ValidationError:
            if self._shape is None:
                raise
        ignored: dict[str, None] = {}
        known = _known(self._shape, msgspec.json.decode(data), "", ignored)
        return msgspec.convert(known, self._kind, strict=False, str_keys=True), list(ignored)


def _known(shape: inspect.Type, value: Any, place: str, ignored: dict[str, None]) -> Any:
    """Return a value without the fields that its shape does not know, whose places are added to `ignored`."""
    if isinstance(shape, inspect.UnionType):
        shape = next((one for one in shape.types if _holds(one, value)), shape)
    if isinstance(shape, inspect.ListType) and isinstance(value, list):
        return [_known(shape.item_type, item, place, ignored) for item in value]
    if not isinstance(shape, inspect.StructType) or not isinstance(value, dict):
        return value
    fields = {field.encode_name: field.type for field in shape.fields}
    made = {}
    for name, item in value.items():
        at = f"{place}.{name}" if place else name
        if name in fields:
            made[name] = _known(fields[name], item, at, ignored)
            continue
        _refuse_near(name, fields, place)
        ignored[at] = None
        if len(ignored) > _MOST:
            raise BadRequest(f"more than {_MOST} unknown fields; GET /openapi.json lists the known ones", name)
    return made


def _holds(shape: inspect.Type, value: Any) -> bool:
    """Tell whether a member of a union is the one for an object or a list."""
    return (isinstance(value, dict) and isinstance(shape, inspect.StructType)) or (
        isinstance(value, list) and isinstance(shape, inspect.ListType) and bool(value) and isinstance(value[0], dict)
    )  # fmt: skip


def _refuse_near(name: str, fields: dict[str, Any], place: str) -> None:
    near = difflib.get_close_matches(name, fields, 1, _ALIKE) if len(name) <= _MAX_NAME else []
    if near:
        where = f" in {place}" if place else ""
        raise BadRequest(f"unknown field {name!r}{where}; did you mean {near[0]!r}?", name, "unknown_field")


def warning(ignored: list[str]) -> str:
    """Return a warning that names the fields which were left out."""
    names = ", ".join(ignored).encode("ascii", "backslashreplace").decode().replace('"', "'")
    printable = "".join(char if char.isprintable() else "?" for char in names)
    return f"unknown fields ignored: {printable[:1000]}"
