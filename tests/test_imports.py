"""The import laws of docs/architecture.md, read off the source: who may import whom, and what stays free of torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "inlaid"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A part may import the parts listed here and itself; `config`, `checkpoint`, `files` and `tensorfiles` are open to all.
MAY_IMPORT = {
    "kernels": set(),
    "layers": {"kernels"},
    "model": {"layers", "kernels"},
    "adapters": {"model", "layers", "kernels"},
    "engine": set(),
    "text": {"engine"},
    "runner": {"engine", "text", "adapters", "model", "layers", "kernels"},
    "worker": {"engine", "text", "runner", "adapters", "model", "layers", "kernels"},
    "llm": {"engine", "text", "worker"},
    "quant": set(),
    "sim": {"engine", "worker"},  # worker: for validate.py, which runs a real engine beside the simulator
    "server": {"engine", "text", "worker", "adapters"},
    "program": {"engine"},
    "cluster": {"engine"},
}
OPEN = {"config", "checkpoint", "files", "tensorfiles", ""}

HOST_ONLY = [
    "engine/request.py",
    "engine/policy.py",
    "engine/ledger.py",
    "engine/predictor.py",
    "engine/scheduler.py",
    "engine/kv_cache.py",
    "engine/engine.py",
    "cluster/planner.py",
    "cluster/placement.py",
]

OPTIONAL = {"exllamav2", "humming", "flashinfer", "ray", "datasets", "matplotlib", "llguidance", "xgrammar", "openai"}


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    nodes: Iterator[ast.AST] | list[ast.stmt] = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(module: str) -> str:
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else ""


def in_package(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=in_package)
def test_imports_point_one_way(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports(path):
        if module.split(".")[0] in {"eval", "perf", "tests"}:
            pytest.fail(f"{in_package(path)} imports {module}: inlaid never imports its harnesses")
        if module.split(".")[0] != "inlaid" or here not in MAY_IMPORT:
            continue
        target = part(module)
        is_part = (PACKAGE / target).is_dir() or (PACKAGE / f"{target}.py").exists()
        if is_part and target not in MAY_IMPORT[here] | OPEN | {here}:
            pytest.fail(f"{in_package(path)} ({here}) imports {module}")


@pytest.mark.parametrize("name", [name for name in HOST_ONLY if (PACKAGE / name).exists()])
def test_host_modules_never_reach_torch(name: str) -> None:
    """Followed through every inlaid module that is imported when the host module is."""
    seen: set[Path] = set()
    queue = [PACKAGE / name]
    while queue:
        path = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imports(path, top_level_only=True):
            assert module.split(".")[0] != "torch", f"{in_package(path)}, reached from {name}, imports torch"
            for candidate in (
                ROOT / (module.replace(".", "/") + ".py"),
                ROOT / module.replace(".", "/") / "__init__.py",
            ):
                if module.startswith("inlaid.") and candidate.exists():
                    queue.append(candidate)


def test_optional_packages_are_imported_in_one_file_each() -> None:
    places: dict[str, set[str]] = {}
    for path in [*SOURCES, *(ROOT / "eval").rglob("*.py"), *(ROOT / "perf").rglob("*.py")]:
        house = path.relative_to(ROOT).parts[0]
        for module in imports(path):
            name = module.split(".")[0]
            if name in OPTIONAL:
                places.setdefault(f"{name} in {house}/", set()).add(path.relative_to(ROOT).as_posix())
    spread = {name: sorted(files) for name, files in places.items() if len(files) > 1}
    assert not spread


@pytest.mark.parametrize("path", SOURCES, ids=in_package)
def test_no_module_level_mutable_state(path: Path) -> None:
    """A lower-case module variable holding a list, dict or set, or any `global` statement, is state."""
    tree = ast.parse(path.read_text())
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), f"{in_package(path)} uses `global`"
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = getattr(node, "value", None)
        for target in targets:
            if not isinstance(target, ast.Name) or target.id.isupper() or target.id.startswith("__"):
                continue
            constant = target.id.lstrip("_").isupper()
            assert constant or not isinstance(value, (ast.List, ast.Dict, ast.Set)), (
                f"{in_package(path)}: {target.id} is module-level state (a constant has a name in capitals)"
            )
