"""The inside of the sandbox: runs one untrusted program and prints its results. Started by `sandbox` as a process of
its own with `python -I -S -B -W ignore`; it imports nothing of ours.

Four walls, each enough for most escapes alone:
1. language: the program's syntax tree may hold only listed nodes; names and attributes come from lists, so nothing that
   starts with an underscore, no `format`, no frame, no class and no real import can be spelled;
2. builtins: only the listed ones exist; an allowed `import` binds a namespace of listed functions;
3. audit: once the program runs, any event that Python audits (open, socket, exec of other code, fork, ctypes ...) ends
   the process at once, and no Python code can take the hook off. An import by an allowed function of the standard
   library is no escape: what is known to be imported late is loaded before, and anything else fails as an error;
4. limits of the operating system: no file descriptor can be opened, no process forked, memory and CPU time are bounded,
   and root becomes nobody first.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import os
import resource
import sys
from types import MappingProxyType

TYPE_CHECKING = False  # as type checkers read it; `typing` itself would cost each start ten milliseconds
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType
    from typing import Any

MAX_SOURCE_CHARS = 20_000
MAX_RESULT_CHARS = 200_000
NOBODY = 65534

NODES = tuple(
    getattr(ast, name)
    for name in """
    Module Expression Expr Assign AugAssign AnnAssign FunctionDef Lambda Return arguments arg keyword
    If IfExp For While Break Continue Pass Assert Raise Try ExceptHandler Import ImportFrom alias
    ListComp SetComp DictComp GeneratorExp comprehension Yield
    Constant Name Attribute Subscript Slice Starred Call List Tuple Set Dict JoinedStr FormattedValue NamedExpr
    BoolOp BinOp UnaryOp Compare expr_context boolop operator unaryop cmpop
    """.split()
)
BUILTINS = """
    abs all any bin bool chr dict divmod enumerate filter float frozenset hash hex int isinstance iter len list map max
    min next oct ord pow range repr reversed round set slice sorted str sum tuple zip
    ArithmeticError AssertionError Exception IndexError KeyError LookupError OverflowError StopIteration TypeError
    ValueError ZeroDivisionError
    """.split()
MODULES = MappingProxyType(
    {
        "bisect": "bisect bisect_left bisect_right insort".split(),
        "collections": "Counter OrderedDict defaultdict deque".split(),
        "functools": "cache lru_cache partial reduce".split(),
        "heapq": "heapify heappop heappush heappushpop heapreplace merge nlargest nsmallest".split(),
        "itertools": """accumulate chain combinations combinations_with_replacement count cycle dropwhile groupby islice
                    permutations product repeat starmap takewhile tee zip_longest""".split(),
        "math": """ceil comb copysign cos degrees dist e exp fabs factorial floor fmod fsum gcd hypot inf isclose
               isfinite isinf isnan isqrt lcm log log10 log2 modf nan perm pi pow prod radians sin sqrt tan tau
               trunc""".split(),
        "re": "IGNORECASE compile findall finditer fullmatch match search split sub".split(),
        "string": "ascii_letters ascii_lowercase ascii_uppercase digits hexdigits punctuation whitespace".split(),
        "typing": "Any Callable Dict Iterable Iterator List Optional Sequence Set Tuple Union".split(),
    }
)
LATE = ("heapq", "warnings")  # what allowed functions import when they are called (Counter.most_common)
ATTRIBUTES = frozenset(
    name
    for kind in (str, list, dict, set, frozenset, tuple, int, float)
    for name in dir(kind)
    if not name.startswith("_") and name not in ("format", "format_map")
).union(
    *MODULES.values(),
    "appendleft popleft extendleft rotate maxlen most_common elements subtract total move_to_end".split(),
    "group groups groupdict span start end from_iterable".split(),
)


class Refused(Exception):
    """The program is not in the language."""


class Namespace:
    """The namespace that an allowed import binds."""


def parse(source: str, mode: str) -> Any:
    """Return the checked syntax tree."""
    if len(source) > MAX_SOURCE_CHARS:
        raise Refused(f"program longer than {MAX_SOURCE_CHARS} characters")
    tree = ast.parse(source, mode=mode)
    for node in ast.walk(tree):
        check(node)
    return tree


def check(node: Any) -> None:
    if not isinstance(node, NODES):
        raise Refused(f"{type(node).__name__} is not allowed")
    if isinstance(node, ast.Attribute) and node.attr not in ATTRIBUTES:
        raise Refused(f"attribute {node.attr!r} is not allowed")
    for field in ("id", "arg", "name", "asname"):
        name = getattr(node, field, None)
        if isinstance(name, str) and name.startswith("_") and name != "_":
            raise Refused(f"name {name!r} is not allowed")
    if isinstance(node, ast.FunctionDef) and node.decorator_list:
        raise Refused("decorators are not allowed")
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        list(bound(node))


def bound(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, Any]]:
    """Yield what an import would bind: (name, value) pairs."""
    for alias in node.names:
        module = alias.name if isinstance(node, ast.Import) else "." * node.level + str(node.module)
        if module not in MODULES:
            raise Refused(f"import of {module!r} is not allowed")
        if isinstance(node, ast.Import):
            yield alias.asname or module, namespace(module)
        elif alias.name in MODULES[module]:
            yield alias.asname or alias.name, getattr(importlib.import_module(module), alias.name)
        else:
            raise Refused(f"import of {module}.{alias.name} is not allowed")


def namespace(module: str) -> Namespace:
    real, here = importlib.import_module(module), Namespace()
    for name in MODULES[module]:
        setattr(here, name, getattr(real, name))
    return here


class BindImports(ast.NodeTransformer):
    """Turn imports into assignments from values that were fetched before the walls closed."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> Any:
        return [self.assignment(node, name, value) for name, value in bound(node)]

    visit_ImportFrom = visit_Import

    def assignment(self, node: ast.AST, name: str, value: Any) -> ast.Assign:
        hidden = f"__import_{len(self.values)}"
        self.values[hidden] = value
        target, source = ast.Name(name, ast.Store()), ast.Name(hidden, ast.Load())
        return ast.fix_missing_locations(ast.copy_location(ast.Assign([target], source), node))


def close_the_walls(memory_bytes: int, cpu_seconds: int, codes: tuple[CodeType, ...]) -> None:
    """Let nothing but `codes` be executed and nothing be opened from here on."""
    if os.getuid() == 0:
        with contextlib.suppress(PermissionError):  # some containers forbid it; the other walls stand without it
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_FSIZE: MAX_RESULT_CHARS * 4,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    # Held here, since the hook must not look up what a program could have changed.
    leave, denied, frame_at = os._exit, ImportError, sys._getframe
    library = (os.path.dirname(os.__file__), "<frozen ")  # where the code of the standard library says that it is from
    looking = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal looking
        if looking:  # asking for a frame is an event too; no code of the program runs meanwhile
            return
        if event == "import":
            looking = True
            importer = frame_at(1).f_code.co_filename
            looking = False
            if importer.startswith(library):
                raise denied("nothing can be imported once the program runs")
        if event != "exec" or arguments[0] not in codes:
            leave(99)

    sys.addaudithook(hook)


def prepare(task: dict[str, Any]) -> tuple[tuple[CodeType, ...], dict[str, Any]]:
    """Parse and import everything before the walls close; return the code and its names."""
    for module in LATE:
        importlib.import_module(module)
    names: dict[str, Any] = {"__builtins__": {name: getattr(builtins, name) for name in BUILTINS}}
    names["__builtins__"]["print"] = lambda *values, **options: None
    if task["kind"] == "expression":
        return (compile(parse(task["source"].strip(), "eval"), "<program>", "eval"),), names
    binder = BindImports()
    parts = [binder.visit(parse(task[part], "exec")) for part in ("source", "tests")]
    names.update(binder.values)
    return tuple(compile(part, "<program>", "exec") for part in parts), names


def run(task: dict[str, Any], codes: tuple[CodeType, ...], names: dict[str, Any]) -> Any:
    if task["kind"] == "expression":
        return [plain(eval(codes[0], {**names, "x": x})) for x in task["inputs"]]
    for code in codes:
        exec(code, names)
    return True


def plain(value: Any) -> Any:
    """Return the value if JSON can tell it from every other: no tuple that would come back as a list."""
    if type(value) in (int, bool, float, str, type(None)):
        return value
    if type(value) is list:
        return [plain(item) for item in value]
    raise Refused(f"a result of type {type(value).__name__}")


def main() -> None:
    task = json.loads(sys.stdin.read())
    sys.stdin.close()
    try:
        codes, names = prepare(task)
        close_the_walls(task["memory_bytes"], task["cpu_seconds"], codes)
        reply = json.dumps({"value": run(task, codes, names)})
    except BaseException as error:  # noqa: BLE001 - whatever the program did, it failed; the parent is told how
        reply = json.dumps({"failure": f"{type(error).__name__}: {str(error)[:200]}"})
    os.write(1, (reply if len(reply) <= MAX_RESULT_CHARS else '{"failure": "result too long"}').encode())
    os._exit(0)


if __name__ == "__main__":
    main()
