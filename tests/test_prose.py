"""Docstrings open with a verb or a name (CONTRIBUTING.md). Ruff's D401 checks verbs; here is what it lets pass."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPENING = re.compile(r"(What|Whether|Of|As|How|Who|Whose|Where|Which|That|Why|When|Those|With|By|From|In|So|There)\b")


def forbidden_openings(path: Path) -> list[str]:
    """List the docstrings of a file that open with a question word or a preposition."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, documented)]
    found = [(getattr(node, "lineno", 1), ast.get_docstring(node) or "") for node in nodes]
    return [f"{path.name}:{line}: {text.splitlines()[0]}" for line, text in found if OPENING.match(text)]


def test_docstrings_open_with_a_verb_or_a_name() -> None:
    houses = ("inlaid", "eval", "perf", "data", "models", "tests", "docs")
    paths = [path for house in houses for path in (ROOT / house).rglob("*.py")]
    assert [line for path in sorted(paths) for line in forbidden_openings(path)] == []


def test_the_rule_bites(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '"""Whether."""\n\nclass A:\n    """Where it is."""\n\n    def f(self):\n        """Return."""\n'
    )
    assert forbidden_openings(tmp_path / "a.py") == ["a.py:1: Whether.", "a.py:3: Where it is."]
