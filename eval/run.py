"""`python -m eval.run`: is a base, quantized in several ways, still good at every task? Writes a report that people
read and the server's gate checks. Killed at any moment and started again, it goes on from the last few hundred answers.

    python -m eval.run                                           the bundled demo, every variant at 4, 3 and 2 bits
    python -m eval.run --base BASE --adapter maths=PATH --tasks gsm8k:maths --variants fp16,rtn,gptq-mixed --bits 4
    python -m eval.run --variants fp16,mine=path/to/quantized    a checkpoint made elsewhere
    python -m eval.run --backend server --url http://host:8000   what a live server answers
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eval import figures, judge, provenance, report, task
from eval.backend import BackendError, OpenBackend
from eval.cache import Cache
from eval.grid import Asked, Base, Cell, Grid
from eval.task import ROOT, TaskError
from eval.variants import DEFAULT, GENERIC, Source, VariantError, Variants
from inlaid.adapters.gate import Record as GateRecord
from inlaid.adapters.gate import why_not
from inlaid.checkpoint import BITS, CheckpointError
from inlaid.quant.calibration import CalibrationError, CalibrationSettings
from inlaid.quant.settings import QuantizeError
from inlaid.report.plots import PlotsMissing

BACKENDS = ("engine", "server", "oracle")
_TASKS_HELP = (
    "names or .toml files, comma-separated; :ADAPTER where the adapter has another name than the task (:none for the "
    "base alone); `demo` is every task whose data and adapter come with the repository (default: %(default)s)"
)
USER_ERRORS = (
    TaskError,
    BackendError,
    VariantError,
    CheckpointError,
    QuantizeError,
    CalibrationError,
    PlotsMissing,
)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m eval.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--base", type=Path, default=ROOT / "models/demo/base", help="the full-precision base (default: the demo's)")
    add("--adapter", action="append", default=[], metavar="NAME=PATH", help="an adapter; default: what the tasks name")
    add("--tasks", default="demo", metavar="NAME[:ADAPTER],...", help=_TASKS_HELP)
    add("--variants", default=",".join(DEFAULT), help="how to quantize; NAME=PATH is a folder as it is (%(default)s)")
    add("--bits", default="4,3,2", help="widths (default: %(default)s)")
    add("--group-size", type=int, default=128, help="inputs that share a scale (default: %(default)s)")
    add("--generic", type=Path, default=GENERIC, help="JSON lines that belong to no task, for the variant gptq")
    add(
        "--calibration-tokens",
        type=int,
        help="most tokens of each task that quantizing reads (default: the quantizer's)",
    )
    add("--examples", type=_count, default=64, help="examples of each task; 0 for all (default: %(default)s)")
    add("--backend", choices=BACKENDS, default="engine", help="who answers (default: %(default)s)")
    add("--compare", choices=("oracle", "engine"), help="ask this backend too and report where the two differ")
    add("--url", help="of the server, for --backend server")
    add("--workers", type=int, default=1, help="processes that answer while this one quantizes; 0: one after the other")
    add("--no-draft", dest="draft", action="store_false", help="decode every token even where the reference is right")
    add("--no-alone", dest="alone", action="store_false", help="do not ask the base without adapters for comparison")
    add("--max-drop", type=float, help="exit with 1 if the gate would refuse an adapter at so many points")
    add("--out", type=Path, default=ROOT / ".inlaid/eval/report", help="path of the report without its ending")
    add("--no-figures", dest="figures", action="store_false")
    add("--cache", type=Path, default=ROOT / ".inlaid/eval", help="folder of answers and quantized bases")
    return made


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        made = evaluate(arguments)
    except USER_ERRORS as error:
        print(f"eval: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"eval: {where}{error.strerror}; what is in {arguments.cache} is kept", file=sys.stderr)
        return 2
    print(f"report: {arguments.out}.json and .md")
    for row in made["summary"]:
        worst = "" if row["worst_drop"] is None else f", worst {row['worst_task']} {row['worst_drop']:.2f}"
        drop = "" if row["average_drop"] is None else f", drops {row['average_drop']:.2f} on average{worst}"
        print(f"{row['variant']:>18} {row['bits']:>2}-bit: {row['average_score']:6.2f}{drop}")
    refusals = [] if arguments.max_drop is None else _refusals(made["records"], arguments.max_drop)
    for refusal in refusals:
        print(f"refused: {refusal}", file=sys.stderr)
    return 1 if refusals else 0


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole run: answers, records, report."""
    started = time.monotonic()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)  # or say at once that it cannot be
    asked, adapter_of = _tasks(arguments)
    adapters = _adapters(arguments, asked, set(adapter_of.values()))
    bases = _bases(arguments, asked, adapters, adapter_of)
    grid = _grid(arguments, arguments.backend, asked, adapters, adapter_of)
    cells = _run(grid, bases, arguments, arguments.backend)
    examples = {one.task.name: one.examples for one in asked}
    found = judge.records(cells, examples)
    made = {
        "name": arguments.out.name,
        "provenance": provenance.provenance(time.monotonic() - started),
        "base": _place(arguments.base),
        "backend": dict(zip(("name", "setting"), grid.backend_key)),
        "examples_per_task": max(len(one.examples) for one in asked),
        "tasks": {one.task.name: {"licence": one.task.licence, "fingerprint": one.fingerprint} for one in asked},
        "summary": judge.summary(found),
        "records": found,
    }
    if arguments.compare:
        other = _grid(arguments, arguments.compare, asked, adapters, adapter_of)
        others = _run(other, bases, arguments, arguments.compare)
        rows = judge.differences(cells, others, examples)
        made["differences"] = [{"other": arguments.compare, **row} for row in rows]
    report.write_json(arguments.out.with_name(arguments.out.name + ".json"), made)
    drawn = figures.draw(arguments.out, found, made["summary"]) if arguments.figures else []
    report.write_markdown(arguments.out.with_name(arguments.out.name + ".md"), made, drawn)
    return made


def _place(path: Path) -> str:
    """From the repository's root where it lies below it."""
    whole = path.resolve()
    return str(whole.relative_to(ROOT)) if whole.is_relative_to(ROOT) else str(path)


def _run(grid: Grid, bases: Sequence[Callable[[], Base]], arguments: argparse.Namespace, title: str) -> list[Cell]:
    """Every base's cells, in order. Workers answer for bases that are ready while this process makes the next."""
    made: list[Callable[[], list[Cell]]] = []
    with tqdm(total=2 * len(bases), desc=title, unit="step") as progress, _pool(arguments.workers) as pool:
        for index, make in enumerate(bases):
            base = make()
            progress.set_postfix_str(f"{base.variant} {base.bits}-bit is there")
            progress.update()
            made.append(_start(pool, grid, base, alone=arguments.alone and index == 0))
        cells = []
        for wait in made:
            cells += wait()
            progress.update()
    return cells


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    if workers == 0:
        yield None
        return
    threads = max(1, (os.cpu_count() or 1) // (workers + 1))
    torch.set_num_threads(threads)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(threads,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(threads: int) -> None:
    """A worker ends with the run, however that ends: what it has answered is kept."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    torch.set_num_threads(threads)


def _start(pool: ProcessPoolExecutor | None, grid: Grid, base: Base, alone: bool) -> Callable[[], list[Cell]]:
    if pool is None:
        cells = grid.run(base, alone)
        return lambda: cells
    return pool.submit(grid.run, base, alone).result


def _tasks(arguments: argparse.Namespace) -> tuple[list[Asked], dict[str, str | None]]:
    """Tasks with their examples, and which adapter answers which."""
    given = [name.partition("=")[0] for name in arguments.adapter]
    asked, adapter_of = [], {}
    for text in _demo_tasks() if arguments.tasks == "demo" else arguments.tasks.split(","):
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
    return asked, adapter_of


def _demo_tasks() -> list[str]:
    loaded = [task.load(name) for name in task.names()]
    return [one.name for one in loaded if one.data.file and one.adapter]


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
    """What to evaluate, full precision first: everything is compared with it. Quantized when its turn comes."""
    sources = {
        one.task.name: Source(adapters[adapter], ROOT / one.task.calibration)
        for one in asked
        if (adapter := adapter_of[one.task.name]) is not None and one.task.calibration
    }
    tokens = arguments.calibration_tokens
    calibration = CalibrationSettings(max_tokens=tokens) if tokens else CalibrationSettings()
    variants = Variants(
        arguments.base, sources, arguments.group_size, arguments.cache / "bases", arguments.generic, calibration
    )
    try:
        widths = [int(bits) for bits in arguments.bits.split(",")]
    except ValueError as error:
        raise VariantError(f"--bits {arguments.bits}: write whole numbers with commas between") from error
    if unknown := [bits for bits in widths if bits not in BITS]:
        raise VariantError(f"{unknown[0]} bits: only {', '.join(map(str, BITS))} are supported")
    if arguments.backend == "server":
        if not arguments.url:
            raise BackendError("--backend server needs --url")
        return [lambda: Base("served", 0, arguments.base)]
    return variants.bases(arguments.variants.split(","), widths)


def _grid(
    arguments: argparse.Namespace,
    backend: str,
    asked: Sequence[Asked],
    adapters: Mapping[str, Path],
    adapter_of: Mapping[str, str | None],
) -> Grid:
    opened, setting = _backend(backend, arguments.url)
    cache = Cache(arguments.cache / "answers")
    return Grid(asked, adapters, adapter_of, opened, (backend, setting), cache, arguments.draft)


def _backend(name: str, url: str | None) -> tuple[OpenBackend, str]:
    """How to open a backend (picklable, for the workers), and what of it decides its numbers."""
    if name == "oracle":
        from eval import oracle

        return oracle.Oracle, oracle.setting()
    if name == "server":
        from eval import server

        assert url is not None
        return functools.partial(server.Server, url), server.setting(url)
    from eval import engine

    return engine.Engine, engine.setting()


def _refusals(found: Sequence[dict[str, Any]], max_drop: float) -> list[str]:
    fields = GateRecord.__struct_fields__
    gate = [(r, GateRecord(**{name: r[name] for name in fields if name in r})) for r in found if r["adapter"] != "none"]
    return [f"{r['variant']} {r['bits']}-bit: {reason}" for r, one in gate if (reason := why_not(one, max_drop))]


if __name__ == "__main__":
    sys.exit(main())
