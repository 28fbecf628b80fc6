"""Tool calls written as a list of Python calls: [name(argument=value), …]."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection
from typing import Any

from inlaid.text.nesting import MAX_DEPTH
from inlaid.text.tools.events import Arguments, Call, Event, Text, joined

_MARKS = ("<|python_start|>", "<|python_end|>")
_BEGINS = re.compile(r"\s*\[\s*(?:[A-Za-z_][\w.]*\s*(?:\(|$)|$)")
_WORDS = {"true": True, "false": False, "null": None}.get


class PythonicCalls:
    """Reads one answer: calls are certain when their list is closed, and only of known tools."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._pending = ""
        self._text = False  # it is no list of calls
        self._over = False  # the list is closed
        self._seen = 0
        self._depth = 0
        self._quote = ""
        self._escaped = False

    def feed(self, text: str) -> list[Event]:
        """Return what is certain after this text."""
        self._pending += text
        if self._over:
            return []
        if not self._text:
            self._pending = self._pending.removeprefix(_MARKS[0])
            if self._pending and _MARKS[0].startswith(self._pending):
                return []
            begun = self._pending.strip()
            if not begun or (_BEGINS.match(self._pending) and not self._closed()):
                return []
            if self._over and (calls := self._calls()):
                return calls
            self._text, self._over = True, False
        given, self._pending = self._pending, ""
        return joined([Text(given)])

    def finish(self) -> list[Event]:
        """Return what was held back."""
        given, self._pending = self._pending, ""
        return joined([Text("" if self._over else given)])

    def _closed(self) -> bool:
        """Count brackets up to the end of the list; True when it is closed, or nested too deeply to be one."""
        for at in range(self._seen, len(self._pending)):
            char = self._pending[at]
            if self._escaped:
                self._escaped = False
            elif self._quote:
                self._escaped = char == "\\"
                self._quote = "" if char == self._quote else self._quote
            elif char in "'\"":
                self._quote = char
            elif char in "([{":
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    return True
            elif char in ")]}":
                self._depth -= 1
                if self._depth <= 0:
                    self._over = True
                    self._pending = self._pending[: at + 1]
                    return True
        self._seen = len(self._pending)
        return False

    def _calls(self) -> list[Event]:
        """Return the calls of the closed list; none if it is not one of calls of known tools."""
        try:
            tree = ast.parse(self._pending.strip(), mode="eval").body
            assert isinstance(tree, ast.List)
            made: list[Event] = []
            for index, node in enumerate(tree.elts):
                assert isinstance(node, ast.Call)
                assert not node.args
                name = ast.unparse(node.func)
                assert name in self._names
                values = {str(pair.arg): _value(pair.value) for pair in node.keywords}
                made += [Call(index, name), Arguments(index, json.dumps(values, ensure_ascii=False))]
            return made
        except (SyntaxError, ValueError, TypeError, AssertionError, RecursionError, MemoryError):
            return []


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        if node.id not in ("true", "false", "null"):
            raise ValueError(f"{node.id} is no value")
        return _WORDS(node.id)
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {str(ast.literal_eval(key)): _value(value) for key, value in zip(node.keys, node.values) if key}
    return ast.literal_eval(node)
