"""The laws of docs/architecture.md as functions: each reads the sources below a root and returns what breaks it.

`tests/test_imports.py` applies them to this repository and shows on made-up trees that each of them bites.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Set
from functools import lru_cache
from pathlib import Path

Law = Mapping[str, Set[str]]

# Calls whose result can be changed in place. A module that holds one shares state between all who import it.
MUTABLE = frozenset(
    {"list", "dict", "set", "bytearray", "deque", "defaultdict", "OrderedDict", "Counter", "count", "local"}
    | {"ContextVar", "WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "SimpleNamespace"}
)
DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def sources(root: Path, *houses: str) -> list[Path]:
    """List the Python files of the houses, in order."""
    return sorted(path for house in houses for path in (root / house).rglob("*.py"))


def broken_imports(root: Path, law: Law, ground: Set[str]) -> list[str]:
    """List imports inside `inlaid/` that the law does not allow, parts that it does not name, and names without a part.

    The law maps a part (a folder or file right below `inlaid/`) to what it may import beside itself and the ground:
    a part, or one module of a part ("adapters.peft").
    """
    package = root / "inlaid"
    parts = {path.stem for path in package.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    broken = [f"inlaid/{name} is not named by the law" for name in sorted(parts - law.keys())]
    broken += [f"the law names inlaid/{name}, which does not exist" for name in sorted(law.keys() - parts)]
    for part, allowed in law.items():
        broken += [f"the law lets {part} import {name}, which does not exist" for name in sorted(allowed)
                   if not _file_of(root, f"inlaid.{name}")]  # fmt: skip
    for path in sources(root, "inlaid"):
        here = path.relative_to(package).parts[0].removesuffix(".py")
        for module in imports(root, path):
            house, _, target = module.partition(".")
            if house in {"eval", "perf", "data", "models", "tests"}:
                broken.append(f"{name_of(root, path)} imports {module}: inlaid imports none of its harnesses")
            elif house == "inlaid" and target and not _allowed(target, {here} | ground | law.get(here, set())):
                broken.append(f"{name_of(root, path)} imports {module}, which the law does not allow to {here}")
    return broken


def _allowed(target: str, allowed: Set[str]) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in allowed)


def broken_houses(root: Path, law: Law) -> list[str]:
    """List imports between the top folders (inlaid, eval, perf, …) that the law does not allow."""
    return [
        f"{name_of(root, path)} imports {module}, which the law does not allow to {house}"
        for house, allowed in law.items()
        for path in sources(root, house)
        for module in imports(root, path)
        if module.partition(".")[0] in (law.keys() | {"tests"}) - allowed - {house}
    ]


def reaching(root: Path, start: Path, forbidden: str = "torch") -> list[str]:
    """List the ways by which importing `start` imports the forbidden package, and its own imports inside functions."""
    found = [f"{name_of(root, start)} imports {forbidden}" for module in imports(root, start)
             if module.partition(".")[0] == forbidden]  # fmt: skip
    seen: set[Path] = set()
    queue = [(start, name_of(root, start))]
    while queue:
        path, way = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imports(root, path, only_when_imported=True):
            if module.partition(".")[0] == forbidden and path != start:
                found.append(f"{way} imports {forbidden}")
            queue += [(file, f"{way} > {name_of(root, file)}") for file in _files_of(root, module)]
    return found


def mutable_state(root: Path, path: Path) -> list[str]:
    """List names at the level of a module or a class that hold something mutable; `global`; caches without a bound.

    A bounded `lru_cache` on a pure function is no state: nobody can tell whether an entry is there. An unbounded one
    grows with use, except on a function without parameters, which is a constant computed at its first use.
    """
    tree = _parsed(path)
    at = name_of(root, path)
    found = [f"{at}:{node.lineno} uses `global`" for node in ast.walk(tree) if isinstance(node, ast.Global)]
    fields = {id(node) for each in ast.walk(tree) if isinstance(each, ast.ClassDef) for node in each.body
              if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)}  # fmt: skip
    for node in _outside_functions(tree):
        if id(node) in fields:
            continue  # a default: msgspec copies it for each instance, and dataclasses refuse what can be changed
        value = getattr(node, "value", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and value is not None and _is_mutable(value):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found.append(f"{at}:{node.lineno} {ast.unparse(target)} can be changed in place")
        if isinstance(node, FUNCTIONS[:2]) and _unbounded_cache(node):
            found.append(f"{at}:{node.lineno} {node.name} has a cache without a bound")
    return found


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Tuple):
        return any(map(_is_mutable, value.elts))
    if isinstance(value, ast.BinOp):
        return _is_mutable(value.left) or _is_mutable(value.right)
    if isinstance(value, ast.IfExp):
        return _is_mutable(value.body) or _is_mutable(value.orelse)
    if isinstance(value, ast.Call):
        name = _last_name(value.func)
        if name == "MappingProxyType" and value.args and isinstance(value.args[0], ast.Dict):
            return any(map(_is_mutable, value.args[0].values))
        return name in MUTABLE
    return isinstance(value, DISPLAYS)


def _last_name(value: ast.expr) -> str:
    return value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""


def _unbounded_cache(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    decorators = {ast.unparse(each).removeprefix("functools.") for each in function.decorator_list}
    has_parameters = bool(ast.unparse(function.args))
    return has_parameters and bool(decorators & {"cache", "lru_cache(maxsize=None)", "lru_cache(None)"})


def spread_packages(root: Path, packages: Set[str], *houses: str) -> list[str]:
    """List optional packages that more than one file of a house imports."""
    places: dict[tuple[str, str], set[str]] = {}
    for house in houses:
        for path in sources(root, house):
            for name in {module.partition(".")[0] for module in imports(root, path)} & packages:
                places.setdefault((house, name), set()).add(name_of(root, path))
    return [
        f"{name} is imported by {', '.join(sorted(files))}" for (_, name), files in places.items() if len(files) > 1
    ]


def mentions(root: Path, name: str, *houses: str) -> bool:
    """Tell whether a file of the houses imports the package, or looks it up by its name in a string."""
    for path in sources(root, *houses):
        if any(module.partition(".")[0] == name for module in imports(root, path)):
            return True
        if any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(_parsed(path))):
            return True
    return False


def words(root: Path, without: Set[str], *houses: str) -> set[str]:
    """Collect the attributes and strings in the houses' files, apart from the files in `without`."""
    found: set[str] = set()
    for path in sources(root, *houses):
        for node in ast.walk(_parsed(path)) if name_of(root, path) not in without else ():
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def package_name(requirement: str) -> str:
    """Return the name at the front of a requirement such as "matplotlib>=3.9"."""
    return re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]


def missing_modules(root: Path, *houses: str) -> list[str]:
    """List strings such as "inlaid.sim.command" that name a module which does not exist."""
    return [
        f"{name_of(root, path)}:{node.lineno} names {node.value}, which does not exist"
        for path in sources(root, *houses)
        for node in ast.walk(_parsed(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"inlaid(\.\w+)*\.(?!json|toml|log)\w+", node.value) and not _file_of(root, node.value)
    ]


@lru_cache(maxsize=2000)
def imports(root: Path, path: Path, only_when_imported: bool = False) -> tuple[str, ...]:
    """Return the modules that a file imports, by full name; with `only_when_imported`, those of its import alone."""
    return tuple(_imports(root, path, only_when_imported))


def _imports(root: Path, path: Path, only_when_imported: bool) -> Iterator[str]:
    tree = _parsed(path)
    for node in _outside_functions(tree, checking=False) if only_when_imported else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = path.parents[node.level - 1].relative_to(root).parts
                base = ".".join([*folder, *([base] if base else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if _file_of(root, whole) else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {
            "import_module",
            "__import__",
        }:
            yield from (each.value for each in node.args[:1] if isinstance(each, ast.Constant))


def _outside_functions(tree: ast.AST, checking: bool = True) -> Iterator[ast.AST]:
    """Yield the nodes that run when the module is imported; those below `if TYPE_CHECKING` only with `checking`."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If) and not checking and "TYPE_CHECKING" in ast.unparse(node.test):
            for each in node.orelse:
                yield each
                yield from _outside_functions(each, checking)
        elif not isinstance(node, FUNCTIONS):
            yield from _outside_functions(node, checking)


@lru_cache(maxsize=10_000)
def _file_of(root: Path, module: str) -> Path | None:
    path = root.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py", path):
        if candidate.is_file() or (candidate == path and path.is_dir() and any(path.glob("*.py"))):
            return candidate
    return None


def _files_of(root: Path, module: str) -> list[Path]:
    """List the files that run when a module of this repository is imported: its packages' and its own."""
    names = module.split(".")
    found = (_file_of(root, ".".join(names[: i + 1])) for i in range(len(names)))
    return [file for file in found if file and file.is_file()]


@lru_cache(maxsize=2000)
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(root: Path, path: Path) -> str:
    """Return the path below the root, with slashes."""
    return path.relative_to(root).as_posix()
