"""Workload files, and the suites: the named workloads that ship with inlaid."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import msgspec

from inlaid.workload.spec import Workload
from inlaid.workload.toml import load_toml

SUITES = Path(__file__).parent / "suites"


def suite_names() -> list[str]:
    """Names of all suites."""
    return sorted(path.stem for path in SUITES.glob("*.toml"))


def load_workload(source: str) -> Workload:
    """Read a suite by name, or a workload file, TOML or JSON.

    A file may say `extends = "NAME"` (a suite, or a file beside it): it then has all of that workload, except for what
    it says itself; tables are merged key by key. What `each` says holds for every stream that does not say otherwise.
    """
    return _convert(_find(source, Path()), source)


def load_suite(source: str) -> Workload:
    """Read a suite by name or a file, as `load_workload`; refuse an unknown name and list the known ones."""
    names = suite_names()
    if source not in names and not source.endswith((".toml", ".json")):
        close = difflib.get_close_matches(source, names, n=1)
        raise ValueError(f"unknown suite {source!r}{f': did you mean {close[0]}?' if close else ';'} {known_suites()}")
    return load_workload(source)


def known_suites() -> str:
    """List the suites for an error or a help text."""
    return f"known: {', '.join(suite_names())}; or a workload file (.toml, .json)"


def _find(source: str, folder: Path) -> Path:
    path = SUITES / f"{source}.toml" if source in suite_names() else folder / source
    if not path.is_file():
        raise FileNotFoundError(f"workload {path} does not exist: name a file or a suite")
    return path


def _convert(path: Path, source: str) -> Workload:
    data = {"name": path.stem, **_read(path, ())}
    each = data.pop("each", {})
    if each:
        data["streams"] = [_merged(each, stream) for stream in data.get("streams", [])]
    try:
        return msgspec.convert(data, Workload)
    except msgspec.ValidationError as error:
        raise ValueError(f"{source}: {error}") from error


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    if path in readers:
        raise ValueError(f"{path}: extends itself, over {' and '.join(str(reader) for reader in readers)}")
    data: dict[str, Any] = load_toml(path) if path.suffix == ".toml" else msgspec.json.decode(path.read_bytes())
    base = data.pop("extends", None)
    if base is None:
        return data
    return _merged(_read(_find(base, path.parent), (*readers, path)), data)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
