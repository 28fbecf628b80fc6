"""Command lines: flags made from the fields of `config.py`, and a parser whose help shows every default."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

_SIZES = MappingProxyType({"k": 1000, "m": 1000**2, "g": 1000**3, "K": 1024, "M": 1024**2, "G": 1024**3})
_KINDS = MappingProxyType({int: "NUMBER", float: "NUMBER", str: "TEXT"})
_DEFAULT_OF_ARGPARSE = " (default: %(default)s)"  # Python 3.10 to 3.12 add it to switches


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that ends the text of each flag with its default, unless the text tells it in words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").removesuffix(_DEFAULT_OF_ARGPARSE)
        if not action.option_strings or action.required or action.default is argparse.SUPPRESS or "default" in text:
            return text
        is_switch = isinstance(action, argparse.BooleanOptionalAction)
        shown = _shown(action.default if is_switch or action.nargs != 0 else False).replace("%", "%%")
        return f"{text} (default: {shown})".lstrip()


class Parser(argparse.ArgumentParser):
    """A parser whose help shows every default; its subcommands are parsers of this kind."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, **options})


def _shown(default: Any) -> str:
    """Return a default as help shows it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, (list, tuple)):
        return " ".join(map(str, default)) or "none"
    return "none" if default in (None, "") else str(default)


def add_config_arguments(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """Add a flag for each field of a configuration, in groups; what is not given is left out of the result.

    A group begins at a field with a section, and is called by it; the first group by the class's docstring.
    """
    hints = get_type_hints(config)
    group = None
    for each in fields(config):
        if is_dataclass(hints[each.name]) or each.name == "model":
            continue
        section = each.metadata.get("section")
        if group is None or section:
            group = parser.add_argument_group(section or (config.__doc__ or "").split("\n")[0].rstrip("."))
        _add_flag(group, each, hints[each.name])


def _add_flag(group: Any, each: Field[Any], hint: Any) -> None:
    flag = "--" + each.name.replace("_", "-")
    help = str(each.metadata.get("help", ""))
    choices = each.metadata.get("choices")
    if "default" not in help:
        help += f" (default: {_shown(each.default)})"
    common: dict[str, Any] = {"dest": each.name, "default": argparse.SUPPRESS, "help": help.replace("%", "%%")}
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    elif getattr(hint, "__origin__", None) is tuple:
        group.add_argument(flag, action="append", metavar="TEXT", **common)
    else:
        kind = next(kind for kind in (get_args(hint) or (hint,)) if kind is not type(None))
        parse: Callable[[str], Any] = size if kind is int else kind
        names = [flag, each.metadata["alias"]] if each.metadata.get("alias") else [flag]
        group.add_argument(*names, type=parse, choices=choices, metavar=None if choices else _KINDS[kind], **common)


def size(text: str) -> int:
    """Parse an integer with vLLM's suffixes: 1k is 1000, 1K is 1024."""
    scale = _SIZES.get(text[-1:], 1)
    number = text[:-1] if scale > 1 else text
    try:
        value = float(number) * scale if scale > 1 else int(number)
        if value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (4096, 4k and 4K are)")


def config_from(args: argparse.Namespace, config: type[Any], **more: Any) -> Any:
    """Make a configuration of the given flags; `more` wins over them."""
    given = {f.name: getattr(args, f.name) for f in fields(config) if hasattr(args, f.name) and f.name not in more}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return config(**values, **more)
