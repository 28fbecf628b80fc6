"""`python -m eval.run`: is a base, quantized in several ways, still good at every task? Writes a report that people
read and the server's gate checks. Killed at any moment and started again, it goes on from the last few hundred answers.

    python -m eval.run                                           the bundled demo, every variant at 4, 3 and 2 bits
    python -m eval.run --base BASE --adapter maths=PATH --tasks gsm8k:maths --variants fp16,rtn,gptq-mixed --bits 4
    python -m eval.run --variants fp16,mine=path/to/quantized    a checkpoint made elsewhere
    python -m eval.run --variants all --seeds 0,1,2 --forward-only     every variant over three calibration seeds
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from eval import figures, judge, page, provenance, report, seeds
from eval.backend import BackendError, OpenBackend
from eval.cache import Cache
from eval.grid import Base, Cell, Grid
from eval.options import Plan, parser, plan
from eval.task import ROOT, TaskError
from eval.variants import VariantError
from inlaid.adapters.gate import Record as GateRecord
from inlaid.adapters.gate import why_not
from inlaid.progress import Bar
from inlaid.quant.examples import CalibrationError
from inlaid.quant.grid import SolverError
from inlaid.quant.settings import QuantizeError
from inlaid.report.plots import PlotsMissing, new_figure
from inlaid.tensorfiles import CheckpointError

USER_ERRORS = (
    TaskError,
    BackendError,
    VariantError,
    CheckpointError,
    QuantizeError,
    CalibrationError,
    SolverError,
    PlotsMissing,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print a summary, and return the exit status."""
    arguments = parser(__doc__).parse_args(argv)
    try:
        made = evaluate(arguments)
    except USER_ERRORS as error:
        print(f"eval: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"eval: {where}{error.strerror}; what is in {arguments.cache} is kept", file=sys.stderr)
        return 2
    print(f"report: {arguments.out}.json, .md and .html")
    several = len(seeds.seeds_of(made["records"])) > 1
    for row in made["summary"]:
        worst = "" if row["worst_drop"] is None else f", worst {row['worst_task']} {row['worst_drop']:.2f}"
        drop = "" if row["average_drop"] is None else f", drops {row['average_drop']:.2f} on average{worst}"
        seed = f" seed {row['seed']}" if several else ""
        print(f"{row['variant']:>18} {row['bits']:>2}-bit{seed}: {row['average_score']:6.2f}{drop}")
    refusals = [] if arguments.max_drop is None else _refusals(made["records"], arguments.max_drop)
    for refusal in refusals:
        print(f"refused: {refusal}", file=sys.stderr)
    return 1 if refusals else 0


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything: answers, records, report."""
    started = time.monotonic()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)  # or say at once that it cannot be
    planned = plan(arguments)
    if arguments.figures:
        new_figure((1.0, 1.0))  # or say now, not after the answers, that matplotlib is missing
    grid = _grid(arguments, arguments.backend, planned)
    cells = _run(grid, planned.bases, arguments, arguments.backend)
    examples = {one.task.name: one.examples for one in planned.asked}
    found = judge.records(cells, examples)
    made = {
        "name": arguments.out.name,
        "provenance": provenance.report_head(time.monotonic() - started),
        "base": _place(arguments.base),
        "backend": dict(zip(("name", "setting"), grid.backend_key)),
        "examples_per_task": max(len(one.examples) for one in planned.asked),
        "tasks": {
            one.task.name: {"licence": one.task.licence, "fingerprint": one.fingerprint} for one in planned.asked
        },
        "summary": judge.summary(found),
        "records": found,
    }
    if arguments.compare:
        other = _grid(arguments, arguments.compare, planned)
        others = _run(other, planned.bases, arguments, arguments.compare)
        rows = judge.differences(cells, others, examples)
        made["differences"] = [{"other": arguments.compare, **row} for row in rows]
    write(arguments.out, made, arguments.figures)
    return made


def write(out: Path, made: dict[str, Any], with_figures: bool) -> None:
    """Write a report as JSON, Markdown and a page, with its figures."""
    report.write_json(out.with_name(out.name + ".json"), made)
    shown = seeds.merged(made["records"])
    drawn = figures.draw(out, shown, judge.summary(shown)) if with_figures else []
    report.write_markdown(out.with_name(out.name + ".md"), made, drawn)
    page.write_page(out.with_name(out.name + ".html"), made)


def _place(path: Path) -> str:
    """Return a path from the repository's root where it lies below it."""
    whole = path.resolve()
    return str(whole.relative_to(ROOT)) if whole.is_relative_to(ROOT) else str(path)


def _run(grid: Grid, bases: Sequence[Callable[[], Base]], arguments: argparse.Namespace, title: str) -> list[Cell]:
    """Return every base's cells, in order. Workers answer for bases that are made while this process makes the next."""
    made: list[Callable[[], list[Cell]]] = []
    with Bar(total=2 * len(bases), desc=title, unit="step") as progress, _pool(arguments.workers) as pool:
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
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(
        ["eval.engine", "eval.blocks", "eval.seeds", "eval.variants"]
    )  # imports take seconds: once, not in each worker
    with ProcessPoolExecutor(workers, mp_context=forked, initializer=_start_worker, initargs=(threads,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(threads: int) -> None:
    """Let a worker end with the run, however that ends: what it has answered is kept."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    torch.set_num_threads(threads)


def _start(pool: ProcessPoolExecutor | None, grid: Grid, base: Base, alone: bool) -> Callable[[], list[Cell]]:
    if pool is None:
        cells = grid.run(base, alone)
        return lambda: cells
    return pool.submit(grid.run, base, alone).result


def _grid(arguments: argparse.Namespace, backend: str, planned: Plan) -> Grid:
    opened, setting = _backend(backend, arguments.url, arguments.device)
    cache = Cache(arguments.cache / "answers")
    key = backend, setting
    return Grid(planned.asked, planned.adapters, planned.adapter_of, opened, key, cache, planned.decoding)


def _backend(name: str, url: str | None, device: str) -> tuple[OpenBackend, str]:
    """Return how to open a backend (picklable, for the workers), and what of it decides its numbers."""
    if name == "oracle":
        from eval import oracle

        return oracle.OracleBackend, oracle.setting()
    if name == "server":
        from eval import server

        assert url is not None
        return functools.partial(server.ServerBackend, url), server.setting(url)
    if name == "blocks":
        from eval import blocks

        return functools.partial(blocks.BlocksBackend, device), blocks.setting(device)
    from eval import engine

    return engine.EngineBackend, engine.setting()


def _refusals(found: Sequence[dict[str, Any]], max_drop: float) -> list[str]:
    fields = GateRecord.__struct_fields__
    gate = [(r, GateRecord(**{name: r[name] for name in fields if name in r})) for r in found if r["adapter"] != "none"]
    return [f"{r['variant']} {r['bits']}-bit: {reason}" for r, one in gate if (reason := why_not(one, max_drop))]


if __name__ == "__main__":
    sys.exit(main())
