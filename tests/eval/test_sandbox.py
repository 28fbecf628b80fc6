"""Programs do what they say, and none of the obvious ways out leads out."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import evaluator
from eval import sandbox, sandbox_child
from eval.sandbox import Limits, ProgramFailed

ROOT = Path(__file__).parents[2]


def test_an_expression_is_evaluated_on_every_input() -> None:
    source = "sum([v * 9 for v in x[::-1] if v % 2 == 1])"
    assert sandbox.evaluate(source, [[1, 2, 3], [], [5]]) == [36, 0, 45]


def test_a_program_is_run_with_its_tests() -> None:
    program = "import math\nfrom collections import Counter\ndef f(n):\n    return math.isqrt(Counter('aab')['a'] * n)"
    sandbox.run_tests(program, "assert f(8) == 4")
    with pytest.raises(ProgramFailed, match="AssertionError"):
        sandbox.run_tests(program, "assert f(8) == 5")


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (
            "from collections import Counter\ndef f(s):\n    return Counter(s).most_common(1)",
            "assert f('aab') == [('a', 2)]",
        ),
        ("import re\ndef f(s):\n    return re.findall('[[]a]', s)", "assert f('[a]') == ['[a]']"),
        ("def f(s):\n    return str(s.encode('ascii'))", "assert f('a') == \"b'a'\""),
    ],
    ids=["an import inside an allowed call", "a warning inside an allowed call", "a codec"],
)
def test_what_the_standard_library_does_late_is_no_escape(program: str, tests: str) -> None:
    sandbox.run_tests(program, tests)


def test_an_import_that_was_not_foreseen_fails_like_any_error() -> None:
    """The program is told, may go on, and is not called an escape."""
    with pytest.raises(ProgramFailed, match="LookupError: unknown encoding"):
        sandbox.run_tests("", "'a'.encode('hz')")
    sandbox.run_tests("", "try:\n    'a'.encode('hz')\nexcept LookupError:\n    pass")


def test_every_late_import_of_an_allowed_function_is_loaded_before() -> None:
    """Read off the standard library's source: what allowed functions and the methods of allowed classes import."""
    for module, names in sandbox_child.MODULES.items():
        file = getattr(importlib.import_module(module), "__file__", None)
        for node in ast.parse(Path(file).read_text()).body if file and file.endswith(".py") else []:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names:
                found = {name.name for one in ast.walk(node) if isinstance(one, ast.Import) for name in one.names}
                found |= {str(one.module) for one in ast.walk(node) if isinstance(one, ast.ImportFrom)}
                assert found <= {*sandbox_child.LATE, *sys.builtin_module_names}, f"{module}.{node.name}"


def test_the_demo_evaluator_and_the_sandbox_agree() -> None:
    """On the demo's own references, and where they are broken."""
    lines = (ROOT / "data/code/eval.jsonl").read_text().splitlines()[:12]
    for line in map(json.loads, lines):
        inputs = [x for x, _ in line["cases"]]
        for source in (line["completion"], line["completion"].replace("x", "x[1:]"), line["completion"][:-1]):
            try:
                expected = [evaluator.run(source, x) for x in inputs]
            except evaluator.UnsafeProgram:
                with pytest.raises(ProgramFailed):
                    sandbox.evaluate(source, inputs)
            else:
                assert sandbox.evaluate(source, inputs) == expected


@pytest.mark.parametrize(
    "source",
    [
        "import os",
        "import subprocess",
        "from os import system",
        "import math.os",
        "from . import os",
        "from math import __loader__",
        "__import__('os')",
        "__builtins__",
        "open('/etc/passwd')",
        "eval('1')",
        "exec('1')",
        "compile('1', '', 'eval')",
        "getattr(1, 'real')",
        "type(1)",
        "vars()",
        "globals()",
        "input()",
        "breakpoint()",
        "().__class__.__base__.__subclasses__()",
        "'{0.__class__}'.format(1)",
        "'{a.__class__}'.format_map({'a': 1})",
        "(lambda: 0).__globals__",
        "(v for v in x).gi_frame",
        "def f():\n    yield 1\nf().gi_frame.f_globals",
        "try:\n    1 / 0\nexcept Exception as e:\n    e.__traceback__.tb_frame",
        "class C:\n    pass",
        "def f(): pass\nf.__code__",
        "import functools\nfunctools.wraps",
        "import re\nre.enum",
        "import collections\ncollections.abc",
        "import string\nstring.Formatter",
        "@print\ndef f(): pass",
        "with x: pass",
        "async def f(): pass",
        "global y",
        "match x:\n    case str(__class__=c): pass",
        "f'{x.__class__}'",
        "_import_0",
        "def f(__builtins__): pass",
        "import math as __builtins__",
        "1 +",
        "(" * 5000 + ")" * 5000,
        "x = 1" + " " * 30_000,
        "raise SystemExit",
        "quit()",
    ],
)
def test_what_could_lead_out_is_refused_before_or_while_it_runs(source: str) -> None:
    with pytest.raises(
        ProgramFailed, match=r"^(Refused|SyntaxError|MemoryError|RecursionError|NameError: name '\w*' is not)"
    ):
        sandbox.run_tests(source, "pass")


def test_an_endless_loop_ends() -> None:
    with pytest.raises(ProgramFailed, match="CPU time"):
        sandbox.run_tests("while True:\n    pass", "pass", Limits(cpu_seconds=1))


def test_swallowing_every_exception_does_not_outlive_the_limit() -> None:
    source = "while True:\n    try:\n        y = [0] * 10**6\n    except:\n        pass"
    with pytest.raises(ProgramFailed, match="CPU time"):
        sandbox.run_tests(source, "pass", Limits(cpu_seconds=1))


@pytest.mark.parametrize("source", ["x = [0] * 10**9", "x = 'a' * 10**10", "x = 1 << 10**11"])
def test_memory_is_bounded(source: str) -> None:
    with pytest.raises(ProgramFailed, match=r"MemoryError|OverflowError"):
        sandbox.run_tests(source, "pass")


def test_a_result_that_is_too_long_or_of_another_type_fails() -> None:
    with pytest.raises(ProgramFailed, match="too long"):
        sandbox.evaluate("'a' * 10**6", [[]])
    with pytest.raises(ProgramFailed, match="tuple"):
        sandbox.evaluate("(1, 2)", [[]])


def test_printing_does_not_reach_the_reply() -> None:
    sandbox.run_tests("print('{\"value\": 3}')", "pass")
    assert sandbox.evaluate("[print(x), 1][1]", [[]]) == [1]


@pytest.mark.parametrize(
    "way_out",
    [
        "open('/etc/passwd').read()",
        "open('/tmp/inlaid-escaped', 'w')",
        "__import__('socket').socket()",
        "[0][__import__('os').system('true')]",
        "__import__('os').fork()",
        "__import__('os').listdir('/')",
        "__import__('os').kill(1, 15)",
        "__import__('subprocess').Popen(['true'])",
        "__import__('ctypes').CDLL(None)",
    ],
)
@pytest.mark.parametrize("audited", [True, False])
def test_behind_the_language_stand_two_more_walls(way_out: str, audited: bool) -> None:
    """Put a hole into the language: with the audit hook the process ends, and without it the system refuses."""
    script = f"""
import os, sys
sys.path.insert(0, {str(sandbox.CHILD.parent)!r})
import sandbox_child
if not {audited}:
    sys.addaudithook = lambda hook: None
sandbox_child.close_the_walls({256 * 2**20}, 2, ())
try:
    {way_out}
except Exception:
    os._exit(7)
os._exit(0)
"""
    child = subprocess.run([sys.executable, "-I", "-S", "-B", "-c", script], timeout=60, check=False)
    assert child.returncode == (99 if audited else 7)


def test_every_name_offered_exists() -> None:
    for module in sandbox_child.MODULES:
        sandbox_child.namespace(module)


def test_types_are_told_apart() -> None:
    assert sandbox.same([1, [True]], [1, [True]])
    assert not sandbox.same(1, True)
    assert not sandbox.same([1.0], [1])
    assert not sandbox.same([1], [1, 1])
