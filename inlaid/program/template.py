"""Templates: text with named holes. `{draft}` is the value of the node or input `draft`, `{item.title}` a field of an
object, and `{{` and `}}` are braces. Nothing in a template is evaluated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from inlaid.program.refused import ProgramError

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_PATH = re.compile(rf"{NAME}(\.{NAME})*")
_PIECE = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]")


@dataclass(frozen=True)
class Reference:
    """A value by its name, or a field of an object, by the names that lead to it."""

    name: str
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join((self.name, *self.fields))


@dataclass(frozen=True)
class Template:
    """The parts of a template in order: literal texts and holes."""

    parts: tuple[str | Reference, ...]

    @property
    def holes(self) -> tuple[Reference, ...]:
        """The references in order."""
        return tuple(part for part in self.parts if isinstance(part, Reference))

    @property
    def literals(self) -> tuple[str, ...]:
        """The texts between the holes."""
        return tuple(part for part in self.parts if isinstance(part, str))


@lru_cache(maxsize=1024)
def parse_reference(text: str) -> Reference:
    """Parse `name` or `name.field.field`."""
    if not _PATH.fullmatch(text):
        raise ProgramError(f"{text!r} is not a reference: write name or name.field, of letters, digits and _")
    name, *fields = text.split(".")
    return Reference(name, tuple(fields))


@lru_cache(maxsize=1024)
def parse_template(text: str) -> Template:
    """Parse a template."""
    parts: list[str | Reference] = []
    literal, at = "", 0
    for found in _PIECE.finditer(text):
        literal += text[at : found.start()]
        at = found.end()
        piece = found.group()
        if piece in ("{{", "}}"):
            literal += piece[0]
        elif len(piece) == 1:
            raise ProgramError(f"the template has a single {piece!r} at character {found.start()}; write it twice")
        else:
            if literal:
                parts.append(literal)
            parts.append(parse_reference(piece[1:-1].strip()))
            literal = ""
    literal += text[at:]
    return Template((*parts, literal) if literal else tuple(parts))
