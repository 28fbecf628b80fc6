"""A tool's parameters in words: the schema of JSON as pairs `KEY = VALUE` on one line, and the way back.

A property of an inner object has the outer key before its own, and a list writes its key again for each item:
`call order: goods name = pear, goods number = 2, goods name = egg, goods number = 6`. Every property is written, since
a model of this form is told names alone and cannot know which it may leave out. Lists in lists, bounds, patterns and
whatever else this file does not know have no form in words; such calls are demanded in JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

_Kind = TypeVar("_Kind", bound="dict[Any, Any] | list[Any]")
_NOTES = frozenset("title description default examples deprecated $schema $id $comment $defs definitions".split())
_PAIRS = re.compile(r"(?:^|, )(\w[\w ]*) = ")
_KEY = re.compile(r"\w[\w ]*")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,18})?|true|false|null")
_SPECIAL = re.compile(r"([\\.+*?()|\[\]{}^$#&~/-])")
_PATTERNS: Mapping[str, str] = MappingProxyType(
    {
        "integer": r"-?(0|[1-9][0-9]{0,9})",
        "number": r"-?(0|[1-9][0-9]{0,9})(\.[0-9]{1,9})?",
        "boolean": "(true|false)",
        "null": "null",
        "string": r"[^\s,=]([^\r\n,=]{0,198}[^\s,=])?",
    }
)
_MOST_ITEMS = 8
_DEEPEST = 6  # a schema may contain itself
_MOST_LEAVES = 256  # properties of plain values; definitions that name each other make a short schema of millions


class _Wordless(Exception):
    """A schema that has no form in words."""


@dataclass(frozen=True)
class _Leaf:
    """A property with a plain value. Under `path[: list_at]` lies a list whose items have the rest of the path."""

    path: tuple[str, ...]
    list_at: int | None
    constants: Mapping[str, Any]  # as they are written
    types: frozenset[str]

    def read(self, text: str) -> Any:
        """Return the value that is written so."""
        if text in self.constants:
            return self.constants[text]
        numbers = self.types & {"integer", "number"} and re.fullmatch(_PATTERNS["number"], text)
        if numbers or (text in ("true", "false") and "boolean" in self.types):
            return json.loads(text)
        return None if text == "null" and "null" in self.types else text

    def put(self, value: Any, into: dict[str, Any]) -> None:
        """Put a value where it belongs; an item of a list that has it already is over."""
        for number, name in enumerate(self.path[:-1], 1):
            if number == self.list_at:
                items = into.setdefault(name, [])
                if not items or self._is_in(items[-1]):
                    items.append({})
                into = items[-1]
            else:
                into = into.setdefault(name, {})
        if self.list_at == len(self.path):
            into.setdefault(self.path[-1], []).append(value)
        else:
            into[self.path[-1]] = value

    def _is_in(self, item: Any) -> bool:
        for name in self.path[self.list_at :]:
            if name not in item:
                return False
            item = item[name]
        return True


class WordSchema:
    """The parameters of one tool. `pattern` is a regular expression of all its pairs."""

    def __init__(self, schema: Mapping[str, Any] | None) -> None:
        self._root = dict(schema or {"type": "object", "properties": {}})
        self._leaves: dict[str, _Leaf] = {}
        self.pattern = self._of(self._root, (), None)

    @classmethod
    def of(cls, schema: Mapping[str, Any] | None) -> WordSchema | None:
        """Return the parameters in words; None: they have no such form."""
        try:
            return cls(schema)
        except _Wordless:
            return None

    def arguments(self, line: str) -> dict[str, Any]:
        """Return the arguments of a line of pairs; a key that the schema does not have is one of the outermost."""
        made: dict[str, Any] = {}
        for key, text in _pairs(line):
            if (leaf := self._leaves.get(key)) is not None:
                leaf.put(leaf.read(text), made)
            else:
                made[key.replace(" ", "_")] = _guessed(text)
        return made

    def _of(self, schema: Any, path: tuple[str, ...], list_at: int | None, depth: int = 0) -> str:
        schema = self._resolved(schema)
        if depth > _DEEPEST:
            raise _Wordless
        parts = schema.keys() - _NOTES
        if schema.get("type") == "object" and parts <= {"type", "properties", "required", "additionalProperties"}:
            properties, required = _is(dict, schema.get("properties")), _is(list, schema.get("required"))
            if (path and not properties) or any(name not in properties for name in map(_name, required)):
                raise _Wordless
            return ", ".join(self._of(each, (*path, name), list_at, depth + 1) for name, each in properties.items())
        if schema.get("type") == "array" and parts == {"type", "items"} and path and list_at is None:
            item = self._of(schema["items"], path, len(path), depth + 1)
            return f"{item}(, {item}){{0,{_MOST_ITEMS - 1}}}"
        return self._leaf(schema, path, list_at)

    def _leaf(self, schema: Mapping[str, Any], path: tuple[str, ...], list_at: int | None) -> str:
        key = " ".join(path).replace("_", " ")
        options = [self._resolved(each) for each in _is(list, schema.get("anyOf")) or (schema,)]
        if "anyOf" in schema and schema.keys() - _NOTES != {"anyOf"}:
            raise _Wordless
        constants, types = _constants(options), frozenset(_types(options))
        if not _KEY.fullmatch(key) or key in self._leaves or len(self._leaves) == _MOST_LEAVES:
            raise _Wordless
        self._leaves[key] = _Leaf(path, list_at, constants, types)
        values = [*map(_literal, constants), *(_PATTERNS[name] for name in sorted(types))]
        return f"{key} = ({'|'.join(values)})"

    def _resolved(self, schema: Any) -> Mapping[str, Any]:
        for _ in range(_DEEPEST):
            if not isinstance(schema, Mapping):
                raise _Wordless
            if "$ref" not in schema:
                return schema
            if schema.keys() - _NOTES != {"$ref"} or not str(schema["$ref"]).startswith("#/"):
                raise _Wordless
            found: Any = self._root
            for step in schema["$ref"][2:].split("/"):
                found = found.get(step) if isinstance(found, Mapping) else None
            schema = found
        raise _Wordless


def _is(kind: type[_Kind], value: Any) -> _Kind:
    """Return a part of a schema that should be of this kind, or an empty one where there is none."""
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise _Wordless
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise _Wordless
    return value


def _constants(options: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the values that schemas list, by how they are written."""
    found: dict[str, Any] = {}
    for option in options:
        listed = _is(list, option.get("enum")) or ([option["const"]] if "const" in option else [])
        for value in listed:
            text = value if isinstance(value, str) else json.dumps(value)
            if isinstance(value, (dict, list)) or not text or text != " ".join(text.split()) or "=" in text:
                raise _Wordless
            found[text] = value
    return found


def _types(options: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Yield the types of the schemas that list no values."""
    for option in options:
        parts = option.keys() - _NOTES
        if parts & {"enum", "const"}:
            if not parts <= {"enum", "const", "type"}:
                raise _Wordless
            continue
        named = option.get("type")
        names = [named] if isinstance(named, str) else _is(list, named)
        if parts != {"type"} or not names or any(name not in _PATTERNS for name in map(_name, names)):
            raise _Wordless
        yield from names


def calls_pattern(tools: Mapping[str, Mapping[str, Any] | None], most: int) -> str | None:
    """Return the regular expression of one to `most` calls of these tools, a line each; None: one has no such form."""
    calls = []
    for name, schema in tools.items():
        words = WordSchema.of(schema)
        if words is None:
            return None
        calls.append(f"call {_literal(name.replace('_', ' '))}:" + (words.pattern and f" {words.pattern}"))
    one = f"({'|'.join(calls)})"
    return one if most == 1 else f"{one}(\\n{one}){{0,{most - 1}}}"


def _literal(text: str) -> str:
    """Return the regular expression of this text alone."""
    return _SPECIAL.sub(r"\\\1", text)


def guessed_arguments(line: str) -> dict[str, Any]:
    """Return the arguments of a line of pairs without a schema: what looks like a number is one."""
    return {key.replace(" ", "_"): _guessed(text) for key, text in _pairs(line)}


def _pairs(line: str) -> Iterable[tuple[str, str]]:
    """Return the pairs of a line; a value may have commas in it."""
    _, *parts = _PAIRS.split(line)
    return zip(parts[::2], parts[1::2], strict=True)


def _guessed(text: str) -> Any:
    return json.loads(text) if _SCALAR.fullmatch(text) else text
