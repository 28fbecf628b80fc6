"""The exception for a program that cannot be compiled."""

from __future__ import annotations

from inlaid.engine.refusal import Refusal, Refused


class ProgramError(Refused):
    """A program that cannot run; `param` of its refusal names the node at fault."""

    def __init__(self, message: str, node: str | None = None) -> None:
        super().__init__(Refusal(message, param=node))
