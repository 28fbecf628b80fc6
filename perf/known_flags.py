"""Check of a point's arguments against `inlaid serve` and the request generator, without starting them.

Used by `perf.runner`.
"""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from inlaid import cli
from inlaid.config import EngineConfig, ServerConfig
from inlaid.engine.policy import parse_policy
from perf.instance import Instance
from perf.launch import ServerCommand
from perf.options import build_parser


def flag_names(config: type[Any]) -> set[str]:
    """List the names of all fields, those of inner configs too."""
    hints, names = get_type_hints(config), set()
    for field in fields(config):
        kind = hints[field.name]
        inner = isinstance(kind, type) and is_dataclass(kind)
        names |= flag_names(kind) if inner else {field.name}
    return names


def why_not(server: ServerCommand) -> str:
    """Say which argument or policy does not exist, or nothing."""
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
    return _refusal(cli.parse, server.argv(0)[3:])


def why_no_client(instance: Instance) -> str:
    """Say why the generator would not take its arguments, or nothing."""
    return _refusal(build_parser().parse_args, instance.client_argv(0, Path("workload"), Path("out"))[3:])


def _refusal(parse: Callable[[Sequence[str]], Any], arguments: Sequence[str]) -> str:
    """Return the last line of what a parser says when it gives up, or nothing."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse(arguments)
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1]
    return ""
