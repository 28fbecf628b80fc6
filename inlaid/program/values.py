"""Values of nodes: JSON values, and failures in their place. Reading, writing and comparing them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from inlaid.engine.refusal import Refusal, RefusalKind
from inlaid.program.nodes import Condition
from inlaid.program.template import Reference, Template

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Failure:
    """The value of a node that failed, or that needs one that did. `where` is the node that failed first."""

    where: str
    message: str
    kind: RefusalKind = RefusalKind.INVALID
    retry_after: float | None = None

    @classmethod
    def of(cls, where: str, refusal: Refusal) -> Failure:
        """Return the failure of a call that was refused."""
        return cls(where, refusal.message, refusal.kind, refusal.retry_after)

    @property
    def refusal(self) -> Refusal:
        """The reason as a refusal."""
        return Refusal(f"{self.where}: {self.message}", self.kind, retry_after=self.retry_after)


class BadValue(ValueError):
    """A value that a node cannot use."""


def field(value: Any, reference: Reference) -> Any:
    """Return the part of a value that a reference names."""
    for name in reference.fields:
        if isinstance(value, Failure):
            return value
        if not isinstance(value, dict) or name not in value:
            raise BadValue(f"{reference} does not exist: {_kind(value)} has no field {name!r}")
        value = value[name]
    return value


def failure_in(value: Any) -> Failure | None:
    """Return the first failure in a value, elements of lists included."""
    return next(_failures(value), None)


def _failures(value: Any) -> Iterator[Failure]:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, Failure):
            yield item
        elif isinstance(item, list):
            left += reversed(item)


def text_of(value: Any) -> str:
    """Return a value as text: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def fill(template: Template, values: dict[str, Any], most: int) -> str:
    """Return a template's text; `values` are by the names of its holes. BadValue: it has more than `most` characters,
    which is found before the text is made."""
    texts = {hole: text_of(field(values[hole.name], hole)) for hole in set(template.holes)}
    parts = [part if isinstance(part, str) else texts[part] for part in template.parts]
    size = sum(map(len, parts))
    if size > most:
        raise BadValue(f"its text would have {size} characters; at most {most} are allowed")
    return "".join(parts)


def number_of(value: Any) -> float | None:
    """Return a number, or the first number in a text; None: there is none."""
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, (int, float)):
        return float(value) if math.isfinite(value) else None
    found = _NUMBER.search(value) if isinstance(value, str) else None
    return None if found is None else float(found.group())


def holds(condition: Condition, value: Any) -> bool:
    """Apply a condition to a value."""
    return _test(condition, value) != condition.negated


def _test(condition: Condition, value: Any) -> bool:
    against = condition.against
    match condition.test:
        case "failed":
            return isinstance(value, Failure)
        case "empty":
            return value in (None, "", []) or (isinstance(value, str) and not value.strip())
        case "equals":
            if isinstance(value, str) and isinstance(against, str):
                return value.strip() == against.strip()
            return (type(value) is type(against) and bool(value == against)) or _both_numbers(value, against)
        case "less" | "greater":
            left, right = number_of(value), number_of(against)
            if left is None or right is None:
                raise BadValue(f"{condition.value} is {_kind(value)} without a number, which {condition.test} needs")
            return left < right if condition.test == "less" else left > right
    text = text_of(value).strip()
    assert isinstance(against, str)
    if condition.test == "contains":
        return against in text
    return text.startswith(against) if condition.test == "starts_with" else text.endswith(against)


def _both_numbers(value: Any, against: Any) -> bool:
    numbers = not isinstance(value, bool) and not isinstance(against, bool)
    return numbers and isinstance(value, (int, float)) and isinstance(against, (int, float)) and value == against


def best(of: Any, by: Any) -> Any:
    """Return the element of a list whose number in another is the largest."""
    if not isinstance(of, list) or not isinstance(by, list) or len(of) != len(by):
        raise BadValue(f"best needs two lists of one length, not {_kind(of)} and {_kind(by)}")
    numbers = [None if isinstance(item, Failure) else number_of(mark) for item, mark in zip(of, by)]
    known = [(number, -index) for index, number in enumerate(numbers) if number is not None]
    if not known:
        raise BadValue(f"none of {len(of)} elements has a number to choose by")
    return of[-max(known)[1]]


def list_of(value: Any, what: str) -> list[Any]:
    """Return a value that must be a list."""
    if not isinstance(value, list):
        raise BadValue(f"{what} needs a list, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    names = {str: "a text", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
