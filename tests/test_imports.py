"""The laws of docs/architecture.md, applied to this repository, and broken one by one on made-up trees."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import pytest

from inlaid.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    SchedulerConfig,
    ServerConfig,
    SpeculationConfig,
    TaskConfig,
)
from tests import laws

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
HOUSES = ("inlaid", "eval", "perf", "data", "models")

# A part (a folder or file right below inlaid/) may import the parts listed here, itself and the ground.
GROUND = {"config", "checkpoint", "files", "flags", "kv_format", "progress", "tensorfiles"}
DEVICE = {"runner", "adapters", "model", "layers", "kernels"}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"engine", "llm", "program"},
    "__main__": {"cli"},
    "cli": {"engine", "llm", "server", "text", "worker"},
    "config": set(),
    "checkpoint": set(),
    "files": set(),
    "flags": set(),
    "kv_format": set(),
    "progress": set(),
    "tensorfiles": set(),
    "convert": set(),
    "kernels": set(),
    "layers": {"kernels"},
    "model": {"convert", "layers", "kernels"},
    "adapters": {"model", "layers", "kernels"},
    "engine": set(),
    "text": {"engine"},
    "runner": {"engine", "text"} | DEVICE,
    "worker": {"engine", "text"} | DEVICE,
    "llm": {"engine", "text", "worker"},
    "program": {"engine", "text"},
    "quant": {
        "convert.folder",
        "adapters.adapter",
        "adapters.gate",
        "adapters.peft",
        "kernels.rounding_triton",
        "model.spec",
        "text.tokenizer_files",
    },
    "report": set(),
    "workload": set(),
    "console": {"engine", "sim"},
    "sim": {
        "engine",
        "report",
        "workload",
        "adapters.eviction",
        "adapters.modes",
        "cluster.view",
        "cluster.placement",
        "cluster.planner",
        "cluster.shares",
    },
    "cluster": {"engine", "worker", "text", "server", "cli", "workload.toml", "sim.cost", "sim.fit"},
    "server": {
        "engine",
        "text",
        "worker",
        "adapters",
        "program",
        "console",
        "quant.online_jobs",
        "quant.online_versions",
    },
}
MAY_USE = {
    "inlaid": set[str](),
    "eval": {"inlaid"},
    "data": {"inlaid", "eval"},  # the one list of tasks is eval's
    "models": {"inlaid", "data"},
    "perf": {"inlaid"},
}
WITHOUT_TORCH = ("engine", "program", "sim", "report", "workload", "console")
PURE = ("view", "placement", "planner", "shares")  # of the cluster: they run in the simulator

# What the package of an extra is called when it is imported, where that is not its own name.
MODULES = {
    "humming-kernels": "humming",
    "rouge-score": "rouge_score",
    "opentelemetry-sdk": "opentelemetry",
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry",
}


def extras() -> dict[str, list[str]]:
    """Return the packages of each extra that users may install, by the name under which they are imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {extra: [laws.package_name(line) for line in lines] for extra, lines in project.items() if extra != "dev"}
    return {extra: [MODULES.get(name, name) for name in packages] for extra, packages in names.items()}


def test_imports_point_one_way_and_every_part_is_named() -> None:
    assert laws.broken_imports(ROOT, MAY_IMPORT, GROUND) == []
    assert laws.broken_houses(ROOT, MAY_USE) == []
    assert laws.missing_modules(ROOT, *HOUSES) == []


@pytest.mark.parametrize("part", WITHOUT_TORCH)
def test_host_parts_never_reach_torch(part: str) -> None:
    paths = laws.sources(ROOT / "inlaid", part)
    assert [way for path in paths for way in laws.reaching(ROOT, path)] == []


@pytest.mark.parametrize("start", ["cli", "server/serving", "text/confined", "text/renderer", "text/tokenizer"])
def test_a_server_and_its_templates_start_without_torch_and_transformers(start: str) -> None:
    path = ROOT / "inlaid" / f"{start}.py"
    assert [way for package in ("torch", "transformers") for way in laws.reaching(ROOT, path, package)] == []


def test_an_engine_starts_without_transformers() -> None:
    for start in ("process", "build", "loading", "bases"):
        assert laws.reaching(ROOT, ROOT / "inlaid" / "worker" / f"{start}.py", "transformers") == []


@pytest.mark.parametrize("name", PURE)
def test_placement_and_planner_never_reach_torch_or_ray(name: str) -> None:
    path = ROOT / "inlaid" / "cluster" / f"{name}.py"
    assert [way for package in ("torch", "ray") for way in laws.reaching(ROOT, path, package)] == []


@pytest.mark.parametrize("part", ["cli", "llm", "worker", "server", "program", "quant", "sim"])
def test_what_a_cpu_runs_never_reaches_triton(part: str) -> None:
    """A machine without a GPU has no Triton, and CI has it, so only this shows that the server starts there."""
    paths = [ROOT / "inlaid" / f"{part}.py"] if part in ("cli", "llm") else laws.sources(ROOT / "inlaid", part)
    found = [way for path in paths for way in laws.reaching(ROOT, path, "triton")]
    found += laws.reaching(ROOT, ROOT / "inlaid" / "kernels" / "command.py", "triton")
    assert found == []


def test_no_module_holds_mutable_state() -> None:
    paths = laws.sources(ROOT, *HOUSES)
    assert [place for path in paths for place in laws.mutable_state(ROOT, path)] == []


def test_every_extra_has_an_importer_and_every_optional_package_one_file_in_a_house() -> None:
    for extra, packages in extras().items():
        assert [name for name in packages if not laws.mentions(ROOT, name, *HOUSES)] == [], f"{extra}: nobody imports"
    packages = {name for names in extras().values() for name in names} | {"llguidance", "matplotlib"}
    assert laws.spread_packages(ROOT, packages, *HOUSES) == []


@pytest.mark.parametrize(
    "config",
    [SchedulerConfig, CacheConfig, AdapterConfig, SpeculationConfig, EngineConfig, ServerConfig, TaskConfig],
)
def test_every_option_is_read_and_every_choice_is_known_to_its_reader(config: type) -> None:
    """The default may be what is left when no other choice is meant, so its word need not occur."""
    words = laws.words(ROOT, {"inlaid/config.py"}, "inlaid")
    for each in fields(config):
        needed = {each.name, *(each.metadata.get("choices") or ())} - {each.default}
        assert needed - words == set(), f"{config.__name__}.{each.name}: nothing in inlaid/ reads it"


# The laws bite: each is broken once on a tree of a few files.


def tree(root: Path, **texts: str) -> Path:
    for name, text in texts.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("texts", "law", "broken"),
    [
        ({"inlaid__a__x": "", "inlaid__new": ""}, {"a": set()}, "inlaid/new is not named by the law"),
        ({"inlaid__a__x": ""}, {"a": set(), "gone": set()}, "the law names inlaid/gone, which does not exist"),
        ({"inlaid__a__x": ""}, {"a": {"gone"}}, "the law lets a import gone, which does not exist"),
        ({"inlaid__a__x": "def f():\n  from inlaid import b", "inlaid__b": ""}, {"a": set(), "b": set()}, "a/x.py"),
        ({"inlaid__a__x": "from ..b.y import z", "inlaid__b__y": ""}, {"a": set(), "b": set()}, "a/x.py"),
        ({"inlaid__a__x": "import inlaid.b.y", "inlaid__b__y": ""}, {"a": {"b.x"}, "b": set()}, "a/x.py"),
        ({"inlaid__a__x": "import perf.y"}, {"a": set()}, "imports none of its harnesses"),
    ],
)
def test_the_import_law_bites(tmp_path: Path, texts: dict[str, str], law: dict[str, set[str]], broken: str) -> None:
    assert any(broken in line for line in laws.broken_imports(tree(tmp_path, **texts), law, set()))


def test_the_import_law_lets_pass_what_it_allows(tmp_path: Path) -> None:
    files = {"inlaid__a__x": "from inlaid import b\nimport inlaid.c", "inlaid__b__y": "", "inlaid__c": ""}
    assert laws.broken_imports(tree(tmp_path, **files), {"a": {"b"}, "b": set(), "c": set()}, {"c"}) == []


def test_the_laws_between_houses_and_of_named_modules_bite(tmp_path: Path) -> None:
    root = tree(tmp_path, data__x="import perf.y", perf__y="run('inlaid.a')", inlaid__b="")
    assert laws.broken_houses(root, {"data": set(), "perf": set()}) != []
    assert laws.missing_modules(root, "perf") == ["perf/y.py:1 names inlaid.a, which does not exist"]


@pytest.mark.parametrize(
    "mention", ["import torch", "try:\n  import torch.nn\nfinally: ...", "class A:\n  import torch"]
)
def test_the_law_of_torch_bites_through_others(tmp_path: Path, mention: str) -> None:
    root = tree(tmp_path, inlaid__a__x="from inlaid.b import y", inlaid__b__y="import inlaid.c", inlaid__c=mention)
    way = "inlaid/a/x.py > inlaid/b/y.py > inlaid/c.py imports torch"
    assert laws.reaching(root, root / "inlaid" / "a" / "x.py") == [way]


def test_the_law_of_torch_bites_inside_functions_and_spares_annotations(tmp_path: Path) -> None:
    spared = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from inlaid import b"
    root = tree(tmp_path, inlaid__a="def f():\n  import torch", inlaid__b="import torch", inlaid__c=spared)
    assert laws.reaching(root, root / "inlaid" / "a.py") == ["inlaid/a.py imports torch"]
    assert laws.reaching(root, root / "inlaid" / "c.py") == []


STATE = (
    "_cache = {}",
    "TABLE = [1]",
    "A: dict = dict(a=1)",
    "A = deque()",
    "A = (1, [2])",
    "A = {1} | B",
    "A = [x for x in B]",
    "A = itertools.count()",
    "A = threading.local()",
    "A = MappingProxyType({1: []})",
    "if B:\n  A = []",
    "class A:\n  seen = set()",
    "class A:\n  B: ClassVar = {}",
    "def f():\n  global A",
    "@functools.cache\ndef f(x): ...",
)
CONSTANTS = (
    "A = (1, 2)",
    "A = frozenset({1})",
    "A = tuple([1])",
    "A = MappingProxyType({1: 2})",
    "class A(Struct):\n  b: list = []",
    "def f():\n  x = []",
    "@cache\ndef f(): ...",
    "@lru_cache(maxsize=9)\ndef f(x): ...",
)


@pytest.mark.parametrize("state", STATE)
def test_the_law_of_state_bites(tmp_path: Path, state: str) -> None:
    assert len(laws.mutable_state(tmp_path, tree(tmp_path, a=state) / "a.py")) == 1


@pytest.mark.parametrize("constant", CONSTANTS)
def test_the_law_of_state_lets_constants_pass(tmp_path: Path, constant: str) -> None:
    assert laws.mutable_state(tmp_path, tree(tmp_path, a=constant) / "a.py") == []


def test_the_laws_of_extras_and_options_bite(tmp_path: Path) -> None:
    root = tree(
        tmp_path, eval__a="import ray", eval__b="def f():\n  from ray import serve", inlaid__c="x.seed = 'auto'"
    )
    assert laws.spread_packages(root, {"ray"}, "eval") == ["ray is imported by eval/a.py, eval/b.py"]
    assert not laws.mentions(root, "flashinfer", "eval")
    assert laws.words(root, {"inlaid/d.py"}, "inlaid") >= {"seed", "auto"}
    assert "flashinfer" not in laws.words(root, set(), "inlaid")
