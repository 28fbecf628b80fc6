"""A bound on how deep JSON may be nested, checked before recursive code meets it."""

from __future__ import annotations

from typing import Any

from inlaid.engine.refusal import Refusal, Refused

MAX_DEPTH = 64


def check_depth(field: str, value: Any) -> None:
    """Refuse JSON that is nested deeper than anything sensible."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise Refused(Refusal(f"{field} is nested more than {MAX_DEPTH} levels deep", param=field))
        level = [inner for item in level for inner in _inner(item)]


def _inner(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return list(item.values())
    return item if isinstance(item, list) else []
