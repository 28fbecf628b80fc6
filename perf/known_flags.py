"""Whether `inlaid serve` would take a point's arguments, found out without starting it. Used by `perf.runner`.

The flags are the fields of `inlaid.config`; this and `perf.random_adapters` aside, nothing here knows inlaid.
"""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from inlaid.config import EngineConfig, ServerConfig
from inlaid.engine.policy import parse_policy
from perf.launch import ServerCommand


def flag_names(config: type[Any]) -> set[str]:
    """Every field's name, inner configs' too."""
    hints, names = get_type_hints(config), set()
    for field in fields(config):
        kind = hints[field.name]
        inner = isinstance(kind, type) and is_dataclass(kind)
        names |= flag_names(kind) if inner else {field.name}
    return names


def why_not(server: ServerCommand) -> str:
    """Empty when the arguments and the policy exist, else which does not."""
    if server.kind != "inlaid":
        return ""
    known = flag_names(EngineConfig) | flag_names(ServerConfig)
    for argument in server.arguments:
        name = argument.replace("-", "_").removeprefix("no_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {close[0].replace('_', '-')}?" if close else ""
            return f"inlaid serve has no argument --{argument}{hint}"
    try:
        parse_policy(server.policy or "fcfs")
    except ValueError as error:
        return str(error)
    return ""
