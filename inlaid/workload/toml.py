"""TOML on every supported Python, for workloads and for the templates of experiments."""

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
    """Read a file as a dict; a syntax error names file, line and column, and a number that is not finite its key."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    endless = next(_endless(data), None)
    if endless is not None:
        raise ValueError(f"{path}: {endless} must be a finite number")
    return data


def _endless(value: Any, key: str = "") -> Iterator[str]:
    """Find keys of numbers that are infinite or NaN: no time, rate or size is, and JSON cannot keep them."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _endless(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _endless(inner, key)
