"""Options of `python -m eval.run`, and the plan that they describe: tasks, adapters and variants, checked."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from eval import metrics, own, task
from eval.answer import Decoding
from eval.backend import BackendError
from eval.grid import Asked, Base
from eval.task import ROOT, TaskError
from eval.variants import DEFAULT, GENERIC, Source, VariantError, Variants
from inlaid.checkpoint import BITS
from inlaid.flags import Parser
from inlaid.model.spec import read_spec
from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.grid import Grid, choose_group_size

BACKENDS = ("engine", "blocks", "server", "oracle")
BASES = MappingProxyType({"demo": ROOT / "models/demo/base", "smollm2": ROOT / "models/cache/smollm2"})
_TASKS_HELP = (
    "names or .toml files, comma-separated; :ADAPTER where the adapter has another name than the task (:none for the "
    "base alone); `demo` and `smollm2` are the twelve tasks of these bases (the default without --task)"
)
_OWN_HELP = (
    "a task of your own: lines with prompt and answer, judged by a metric or by a Python function MODULE.NAME; an "
    "--adapter of its name answers it, or else the base alone"
)


@dataclass(frozen=True)
class Plan:
    """The tasks, adapters and bases of a run: bases are made when they are called, full precision first."""

    asked: Sequence[Asked]
    adapters: Mapping[str, Path]
    adapter_of: Mapping[str, str | None]  # task -> adapter; None: the base alone
    bases: Sequence[Callable[[], Base]]
    decoding: Decoding


def parser(description: str | None) -> Parser:
    """Return the parser of the command line."""
    made = Parser(prog="python -m eval.run", description=description)
    add = made.add_argument
    add("--base", default="demo", help="the full-precision base: a folder, or demo or smollm2 (default: %(default)s)")
    add("--adapter", action="append", default=[], metavar="NAME=PATH", help="an adapter; default: what the tasks name")
    add("--tasks", metavar="NAME[:ADAPTER],...", help=_TASKS_HELP)
    add("--task", action="append", default=[], metavar="NAME=FILE.jsonl:METRIC", help=_OWN_HELP)
    add("--examples", type=_count, default=64, help="examples of each task; 0 for all (default: %(default)s)")
    add("--backend", choices=BACKENDS, default="engine", help="who answers (default: %(default)s)")
    add("--compare", choices=("oracle", "engine"), help="ask this backend too and report where the two differ")
    add("--url", help="of the server, for --backend server")
    add("--device", default="auto", help="where to quantize, and to answer with --backend blocks: auto, cpu or cuda")
    add("--workers", type=int, default=1, help="processes that answer while this one quantizes; 0: one after the other")
    add("--no-draft", dest="draft", action="store_false", help="decode every token even where the reference is right")
    add("--forward-only", action="store_true", help="judge by one forward pass: right is what repeats the reference")
    add("--no-alone", dest="alone", action="store_false", help="do not ask the base without adapters for comparison")
    add("--max-drop", type=float, help="exit with 1 if the gate would refuse an adapter at so many points")
    add("--out", type=Path, default=ROOT / ".inlaid/eval/report", help="path of the report without its ending")
    add("--no-figures", dest="figures", action="store_false", help="write tables alone")
    add("--cache", type=Path, default=ROOT / ".inlaid/eval", help="folder of answers and quantized bases")
    _add_variants(made.add_argument_group("variants"))
    return made


def _add_variants(group: argparse._ArgumentGroup) -> None:
    add, switch = group.add_argument, argparse.BooleanOptionalAction
    add("--variants", default=",".join(DEFAULT), help="`all`, or names; NAME=PATH is a folder as it is (%(default)s)")
    add("--bits", default="4,3,2", help="widths (default: %(default)s)")
    add("--group-size", help="inputs that share a scale: a number, or one for each of --bits (quantizer's default)")
    add("--seeds", default="0", help="seeds that draw calibration data, comma-separated (default: %(default)s)")
    add("--generic", type=Path, default=GENERIC, help="JSON lines that belong to no task, for the variant gptq")
    add("--calibration-tokens", type=int, help="most tokens of each task that quantizing reads (quantizer's default)")
    add("--highlight", type=float, default=1.0, help="what a token of an answer counts in calibration (%(default)s)")
    add("--symmetric", action=switch, default=None, help="grids without zero points")
    add("--act-order", action=switch, default=None, help="let groups gather inputs that are alike (default: by width)")
    add("--clip", action=switch, default=None, help="search the ranges of groups")
    add("--refine", type=_count, help="rounds of refinement after GPTQ's own pass")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def plan(arguments: argparse.Namespace) -> Plan:
    """Return what the arguments ask for; everything that can be refused is refused here."""
    _resolve(arguments)
    asked, adapter_of = _tasks(arguments)
    adapters = _adapters(arguments, asked, set(adapter_of.values()))
    bases = _bases(arguments, asked, adapters, adapter_of)
    if arguments.forward_only and not arguments.draft:
        raise TaskError("--forward-only decodes nothing: leave --no-draft out")
    if arguments.backend == "blocks" and not arguments.forward_only:
        raise TaskError("--backend blocks decodes nothing: give --forward-only")
    decoding: Decoding = "forward" if arguments.forward_only else "draft" if arguments.draft else "plain"
    return Plan(asked, adapters, adapter_of, bases, decoding)


def _resolve(arguments: argparse.Namespace) -> None:
    """Put a folder in the place of a base's name, its tasks where none are named, and a device in that of auto."""
    name, arguments.base = arguments.base, BASES.get(arguments.base, Path(arguments.base))
    if not (arguments.base / "config.json").exists():
        fetch = "; fetch it: bash models/download.sh smollm2" if name == "smollm2" else ""
        raise VariantError(f"--base {name}: {arguments.base} holds no model{fetch}")
    if arguments.tasks is None and not arguments.task:
        arguments.tasks = name if name in BASES else "demo"
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"


def _tasks(arguments: argparse.Namespace) -> tuple[list[Asked], dict[str, str | None]]:
    """Return the tasks with their examples, and which adapter answers which."""
    given = [name.partition("=")[0] for name in arguments.adapter]
    asked, adapter_of = [], {}
    named = arguments.tasks or ""
    for text in _tasks_of(named) if named in BASES else filter(None, named.split(",")):
        name, _, adapter = text.partition(":")
        one = Asked.load(name, arguments.examples or None)
        chosen = adapter or one.task.name
        if not adapter and given and chosen not in given:
            raise TaskError(
                f"task {name} has no adapter of its name; write {name}:none, or {name}: and one of {', '.join(given)}"
            )
        if one.task.name in adapter_of:
            raise TaskError(f"task {one.task.name} is named twice")
        asked.append(one)
        adapter_of[one.task.name] = None if chosen == "none" else chosen
    for text in arguments.task:
        mine, examples = own.load(text, arguments.examples or None)
        if mine.name in adapter_of:
            raise TaskError(f"task {mine.name} is named twice")
        asked.append(Asked.of(mine, examples))
        adapter_of[mine.name] = mine.name if mine.name in given else None
    metrics.check_packages({name for one in asked for name in (one.task.metric.primary, *one.task.metric.also)})
    return asked, adapter_of


def _tasks_of(base: str) -> list[str]:
    """List the tasks of a base that comes with the repository."""
    loaded = [task.load(name) for name in task.names()]
    return [one.name for one in loaded if one.data.file and one.adapter and one.base == base]


def _adapters(arguments: argparse.Namespace, asked: Sequence[Asked], used: set[str | None]) -> dict[str, Path]:
    adapters: dict[str, Path] = {}
    for text in arguments.adapter:
        name, equals, path = text.partition("=")
        if not equals:
            raise TaskError(f"--adapter {text}: write NAME=PATH")
        adapters[name] = Path(path)
    for one in asked:
        if not arguments.adapter and one.task.adapter:
            adapters[one.task.name] = ROOT / one.task.adapter
    for name in sorted(used - {None} - set(adapters), key=str):
        raise TaskError(f"adapter {name} is not given: --adapter {name}=PATH")
    for name, path in adapters.items():
        if not (path / "adapter_config.json").exists():
            raise TaskError(f"adapter {name}: {path} has no adapter_config.json")
    return {name: path for name, path in adapters.items() if name in used}


def _bases(
    arguments: argparse.Namespace,
    asked: Sequence[Asked],
    adapters: Mapping[str, Path],
    adapter_of: Mapping[str, str | None],
) -> list[Callable[[], Base]]:
    """Return what to evaluate, full precision first: everything is compared with it."""
    sources = {
        one.task.name: Source(adapters[adapter], ROOT / one.task.calibration)
        for one in asked
        if (adapter := adapter_of[one.task.name]) is not None and one.task.calibration
    }
    calibration = CalibrationSettings(highlight=arguments.highlight)
    if arguments.calibration_tokens:
        calibration = replace(calibration, max_tokens=arguments.calibration_tokens)
    folder = arguments.cache / "bases"
    grids = _grids(arguments)
    variants = Variants(arguments.base, sources, grids, folder, arguments.generic, calibration, arguments.device)
    if arguments.backend == "server":
        if not arguments.url:
            raise BackendError("--backend server needs --url")
        return [lambda: Base("served", 0, arguments.base)]
    return variants.bases(arguments.variants.split(","), _numbers("--seeds", arguments.seeds))


def _grids(arguments: argparse.Namespace) -> dict[int, Grid]:
    """Return the quantizer's grid for each width."""
    widths = _numbers("--bits", arguments.bits)
    if unknown := [bits for bits in widths if bits not in BITS]:
        raise VariantError(f"{unknown[0]} bits: only {', '.join(map(str, BITS))} are supported")
    size = arguments.group_size or str(choose_group_size(read_spec(arguments.base), print))
    sizes = _numbers("--group-size", size)
    if len(sizes) not in (1, len(widths)):
        raise VariantError(f"--group-size {size}: give one number, or {len(widths)}, one for each width")
    chosen = {name: getattr(arguments, name) for name in ("symmetric", "act_order", "clip", "refine")}
    changes = {name: value for name, value in chosen.items() if value is not None}
    sizes = sizes * len(widths) if len(sizes) == 1 else sizes
    return {bits: replace(Grid.of_width(bits, size), **changes) for bits, size in zip(widths, sizes, strict=True)}


def _numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise VariantError(f"{flag} {text}: write whole numbers with commas between") from error
