"""Runs a small, safe subset of Python expressions over one list `x`: the judge of the code task.

Used by `families` to make the expected outputs and by `scoring` to check an answer on inputs that the prompt
never showed. Anything outside the subset raises `UnsafeProgram`; the work one program may do is bounded.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

MAX_SOURCE_CHARS = 2000
MAX_STEPS = 20_000
MAX_LIST = 1000
MAX_NUMBER = 10**12

_BINARY: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = MappingProxyType(
    {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Mod: operator.mod,
        ast.FloorDiv: operator.floordiv,
    }
)
_COMPARE: Mapping[type[ast.AST], Callable[[Any, Any], bool]] = MappingProxyType(
    {
        ast.Eq: operator.eq,
        ast.NotEq: operator.ne,
        ast.Lt: operator.lt,
        ast.Gt: operator.gt,
        ast.LtE: operator.le,
        ast.GtE: operator.ge,
    }
)
_CALLS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "sum": sum,
        "max": max,
        "min": min,
        "len": len,
        "sorted": sorted,
        "abs": abs,
    }
)

Value = int | bool | list[int]


class UnsafeProgram(ValueError):
    """The program is not in the subset, breaks a bound, or fails while running."""


def run(source: str, x: list[int]) -> Value:
    """Return the value of the expression `source` with the list `x` bound to the name x."""
    if len(source) > MAX_SOURCE_CHARS:
        raise UnsafeProgram(f"program longer than {MAX_SOURCE_CHARS} characters")
    try:
        tree = ast.parse(source.strip(), mode="eval")
        found: int | bool | list[int] = _Run().value(tree.body, {"x": list(x)})
        return found
    except UnsafeProgram:
        raise
    except (
        SyntaxError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        RecursionError,
        MemoryError,
    ) as error:
        raise UnsafeProgram(f"program fails: {error}") from error


class _Run:
    """One evaluation: a recursive walk that counts its steps."""

    def __init__(self) -> None:
        self.steps = 0

    def value(self, node: ast.AST, names: dict[str, Any]) -> Any:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise UnsafeProgram(f"more than {MAX_STEPS} steps")
        visit = getattr(self, f"_{type(node).__name__}", None)
        if visit is None:
            raise UnsafeProgram(f"{type(node).__name__} is not allowed")
        return _bounded(visit(node, names))

    def _Constant(self, node: ast.Constant, names: dict[str, Any]) -> Any:
        if not isinstance(node.value, int):
            raise UnsafeProgram("only whole numbers and True/False are allowed")
        return node.value

    def _Name(self, node: ast.Name, names: dict[str, Any]) -> Any:
        if node.id not in names:
            raise UnsafeProgram(f"unknown name {node.id}")
        return names[node.id]

    def _UnaryOp(self, node: ast.UnaryOp, names: dict[str, Any]) -> Any:
        if not isinstance(node.op, ast.USub):
            raise UnsafeProgram("only the minus sign is allowed before a value")
        return -self._number(node.operand, names)

    def _BinOp(self, node: ast.BinOp, names: dict[str, Any]) -> Any:
        if type(node.op) not in _BINARY:
            raise UnsafeProgram(f"{type(node.op).__name__} is not allowed")
        return _BINARY[type(node.op)](self._number(node.left, names), self._number(node.right, names))

    def _Compare(self, node: ast.Compare, names: dict[str, Any]) -> bool:
        if len(node.ops) != 1 or type(node.ops[0]) not in _COMPARE:
            raise UnsafeProgram("only single comparisons are allowed")
        return _COMPARE[type(node.ops[0])](self._number(node.left, names), self._number(node.comparators[0], names))

    def _Subscript(self, node: ast.Subscript, names: dict[str, Any]) -> Any:
        items = self.value(node.value, names)
        if not isinstance(node.slice, ast.Slice):
            return items[self._number(node.slice, names)]
        bounds = (node.slice.lower, node.slice.upper, node.slice.step)
        return items[slice(*(None if bound is None else self._number(bound, names) for bound in bounds))]

    def _ListComp(self, node: ast.ListComp, names: dict[str, Any]) -> list[Any]:
        loop = node.generators[0]
        if len(node.generators) != 1 or loop.is_async or not isinstance(loop.target, ast.Name):
            raise UnsafeProgram("only 'for name in list' is allowed")
        chosen = []
        for item in self.value(loop.iter, names):
            inner = {**names, loop.target.id: item}
            if all(self.value(test, inner) for test in loop.ifs):
                chosen.append(self.value(node.elt, inner))
        return chosen

    def _Call(self, node: ast.Call, names: dict[str, Any]) -> Any:
        if not isinstance(node.func, ast.Name) or node.func.id not in _CALLS:
            raise UnsafeProgram("only sum, max, min, len, sorted and abs may be called")
        keywords = {str(word.arg): self.value(word.value, names) for word in node.keywords}
        if set(keywords) - {"reverse"} or len(node.args) != 1:
            raise UnsafeProgram("calls take one list and, for sorted, reverse=True")
        return _CALLS[node.func.id](self.value(node.args[0], names), **keywords)

    def _number(self, node: ast.AST, names: dict[str, Any]) -> int:
        value = self.value(node, names)
        if not isinstance(value, int):
            raise UnsafeProgram("arithmetic is on whole numbers only")
        return value


def _bounded(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_LIST:
        raise UnsafeProgram(f"list longer than {MAX_LIST}")
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise UnsafeProgram(f"number beyond {MAX_NUMBER}")
    return value
