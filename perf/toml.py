"""Reads TOML on every Python we support. Called by whatever reads a template or a workload."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_toml(path: Path) -> dict[str, Any]:
    """The file as a dict; a syntax error names file, line and column, and a number that is none its key."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    endless = next(_endless(data), None)
    if endless is not None:
        raise ValueError(f"{path}: {endless} must be a finite number")
    return data


def _endless(value: Any, key: str = "") -> Iterator[str]:
    """Keys of numbers that are infinite or none: no time, rate or size is, and JSON cannot keep them."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _endless(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _endless(inner, key)
