"""`inlaid quantize` and `inlaid task add | remove | list`: arguments, a progress bar, and errors in one sentence. The
exit status is 2 for what cannot be done as it was typed, said before anything runs, and 1 for what fails later.
"""

from __future__ import annotations

import argparse
import errno
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from inlaid.checkpoint import BITS
from inlaid.convert.folder import SUFFIX, converted
from inlaid.model.spec import read_spec
from inlaid.progress import Bar
from inlaid.quant import remote
from inlaid.quant.aggregate import AGGREGATIONS, LOSS_ROUNDS, MINIMAX_LOSS
from inlaid.quant.bank import PRECISIONS, bank_path
from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.grid import GROUP_SIZES, Grid, choose_group_size
from inlaid.quant.quantize import add_task, quantize, remove_task
from inlaid.quant.record import Record
from inlaid.quant.settings import DTYPES, EXACT, SHARED, WARM, Gate, Place, Settings, Shortcuts, TaskSource

Progress = Callable[[str, int, int], None]


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `inlaid quantize`."""
    settings = Settings()
    parser.add_argument(
        "base", type=Path, help="folder of the 16-bit base model, or a .gguf file, which is dequantized"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to write: new, empty, or made by `inlaid quantize` before; it is replaced at the end",
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME=ADAPTER:DATA",
        help="a task: its PEFT folder (or 'none' for the base alone) and a .jsonl file of prompts and completions",
    )
    _add_grid_arguments(parser.add_argument_group("The grid of the codes"), Grid())
    _add_calibration_arguments(parser.add_argument_group("Calibration"), CalibrationSettings())
    group = parser.add_argument_group("How the tasks share the base")
    group.add_argument(
        "--aggregation",
        choices=AGGREGATIONS,
        default=settings.aggregation,
        help=f"how the tasks' Hessians become one; {MINIMAX_LOSS} (the default) solves up to {LOSS_ROUNDS} "
        "times, until no task has lost much, and measures every task each time; the others solve once",
    )
    group.add_argument(
        "--sequential",
        action="store_true",
        help="calibrate on quantized predecessors: every forward pass twice, nothing is banked, and adding or removing "
        "a task runs all of them again",
    )
    group.add_argument(
        "--bank-precision", choices=PRECISIONS, default=settings.bank_precision, help="of the Hessians on disk"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default=None, help="compute type; default: float32, float16 on a GPU"
    )
    _add_place_arguments(parser)


def _add_grid_arguments(parser: argparse._ArgumentGroup, grid: Grid) -> None:
    parser.add_argument("--bits", type=int, choices=BITS, default=grid.bits, help="width of a code")
    sizes = ", ".join(map(str, GROUP_SIZES))
    parser.add_argument(
        "--group-size",
        type=int,
        default=None,
        help=f"inputs that share a scale; -1: all; default: the first of {sizes} that divides every linear's inputs",
    )
    parser.add_argument(
        "--symmetric", action=argparse.BooleanOptionalAction, default=grid.symmetric, help="grids without zero points"
    )
    parser.add_argument(
        "--act-order",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="groups gather inputs that are alike; serving then permutes the inputs; default: at 3 and 2 bits",
    )
    parser.add_argument("--static-groups", action="store_true", help="with --act-order: groups stay in place")
    parser.add_argument(
        "--clip", action=argparse.BooleanOptionalAction, default=grid.clip, help="search each group's range"
    )
    parser.add_argument("--damping", type=float, default=grid.damping, help="share of the Hessian's mean diagonal")
    parser.add_argument(
        "--refine",
        type=int,
        default=grid.refine,
        metavar="ROUNDS",
        help="rounds of fitting steps and choosing codes again",
    )


def _add_calibration_arguments(parser: argparse._ArgumentGroup, calibration: CalibrationSettings) -> None:
    parser.add_argument(
        "--highlight",
        type=float,
        default=calibration.highlight,
        help="weight of a token of an answer; a prompt's has 1",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=calibration.max_tokens, help="calibration tokens for each task"
    )
    parser.add_argument("--max-length", type=int, default=calibration.max_length, help="most tokens of one example")
    parser.add_argument("--held-out", type=float, default=calibration.held_out, help="share of examples for the gate")
    parser.add_argument("--seed", type=int, default=calibration.seed, help="which examples are drawn")


def run_quantize(args: argparse.Namespace) -> int:
    """Run `inlaid quantize`; returns the exit status."""

    def job(progress: Progress) -> Record:
        place = _place(args, progress)
        base = converted(args.base) if args.base.suffix == SUFFIX else args.base
        dtype = args.dtype or ("float16" if place.device.startswith("cuda") else "float32")
        grid = _grid(args, args.group_size or choose_group_size(read_spec(base), place.note))
        calibration = CalibrationSettings(args.max_tokens, args.max_length, args.held_out, args.highlight, args.seed)
        settings = Settings(grid, calibration, args.aggregation, args.sequential, args.bank_precision, dtype)
        sources = [TaskSource.parse(text) for text in args.task]
        return quantize(base, sources, settings, args.out, place, Gate(args.tolerance, args.force))

    return _attempt(job)


def _grid(args: argparse.Namespace, group_size: int) -> Grid:
    grid = Grid.of_width(args.bits, group_size)
    return replace(
        grid,
        symmetric=args.symmetric,
        act_order=grid.act_order if args.act_order is None else args.act_order,
        static_groups=args.static_groups,
        clip=args.clip,
        damping=args.damping,
        refine=args.refine,
    )


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs of `inlaid task`."""
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="VERB", help="add, remove or list; with --server switch and rollback too"
    )
    add = verbs.add_parser("add", help="take one more task into a quantized base; only its own data are run")
    add.add_argument("folder", type=Path, nargs="?", help="made by `inlaid quantize`; not with --server")
    add.add_argument("task", metavar="NAME=ADAPTER:DATA", help="name, PEFT folder and .jsonl file of the task")
    remove = verbs.add_parser("remove", help="take a task out; the others are solved again from the bank")
    remove.add_argument("folder", type=Path, nargs="?", help="made by `inlaid quantize`; not with --server")
    remove.add_argument("name", help="name of the task")
    listing = verbs.add_parser("list", help="tasks, hashes, losses and when they were last checked")
    listing.add_argument("folder", type=Path, nargs="?", help="made by `inlaid quantize`; not with --server")
    listing.add_argument("--json", action="store_true", help="the whole record as JSON")
    switch = verbs.add_parser("switch", help="with --server: serve the version that a job has made")
    switch.add_argument("name", help="name of the task")
    rollback = verbs.add_parser("rollback", help="with --server: serve the version before again")
    _add_place_arguments(add)
    _add_place_arguments(remove)
    _add_shortcut_arguments(add)
    _add_shortcut_arguments(remove)
    add.add_argument("--no-switch", action="store_true", help="with --server: leave the old base serving")
    for verb in (add, remove, listing, switch, rollback):
        verb.add_argument("--server", metavar="URL", help="a server with --online-tasks does it, while it serves")
        verb.add_argument("--admin-key", help="with --server: its admin key; also from INLAID_ADMIN_KEY")


def run_task(args: argparse.Namespace) -> int:
    """Run `inlaid task`; returns the exit status."""
    if (args.server is None) == (getattr(args, "folder", None) is None):
        print("inlaid: give a folder made by `inlaid quantize`, or the --server that is to do it", file=sys.stderr)
        return 2
    if args.server is not None:
        return _attempt(lambda progress: remote.run(args, progress))
    if args.verb == "list":
        return _attempt(lambda progress: Record.read(args.folder), as_json=args.json)

    def job(progress: Progress) -> Record:
        place, gate = _place(args, progress), Gate(args.tolerance, args.force)
        shortcuts = Shortcuts(args.solve, args.check, args.threshold)
        if args.verb == "add":
            return add_task(args.folder, TaskSource.parse(args.task), place, gate, shortcuts=shortcuts)
        return remove_task(args.folder, args.name, place, gate, shortcuts=shortcuts)

    return _attempt(job)


def _add_shortcut_arguments(parser: argparse.ArgumentParser) -> None:
    shortcuts = Shortcuts()
    parser.add_argument(
        "--solve",
        choices=(EXACT, WARM),
        default=shortcuts.solve,
        help="exact (default): the bits of quantizing for all tasks at once; warm: start from the stored solution, "
        "which is quicker and not the same bits",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=shortcuts.threshold,
        help="with warm: sites whose Hessian has moved by a smaller share of its norm stay as they are",
    )
    parser.add_argument(
        "--check",
        choices=(EXACT, SHARED),
        default=shortcuts.check,
        help="exact (default): each task in forward passes of its own; shared: several in one, losses differ in their "
        "last digits",
    )


def _add_place_arguments(parser: argparse.ArgumentParser) -> None:
    gate = Gate()
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--offload", action="store_true", help="keep hidden states in host memory")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=gate.tolerance,
        help="largest loss that an old task may gain, in nats a token; above 1 nat a share of its loss. Two standard "
        "errors come on top",
    )
    parser.add_argument("--force", action="store_true", help="write even what the gate refuses")


def _place(args: argparse.Namespace, progress: Progress) -> Place:
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    known = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if known is None:
        raise ValueError(f"--device {device}: give auto, cpu, cuda or cuda:N")
    if device != "cpu" and int(known[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return Place(device, args.offload, progress, lambda sentence: print(f"inlaid: {sentence}", file=sys.stderr))


class _Bar:
    """A progress bar with layer, task and the time that is left. It begins when the job's input has been checked."""

    def __init__(self) -> None:
        self._bar: Bar | None = None

    @property
    def begun(self) -> bool:
        return self._bar is not None

    def show(self, step: str, done: int, total: int) -> None:
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
        bar = self._bar = self._bar or Bar(total=total, desc="quantizing", bar_format=form, lines=10)
        bar.total = total
        bar.set_postfix_str(step, refresh=False)
        bar.update(done - bar.n)
        bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _attempt(job: Callable[[Progress], Record | str], as_json: bool = False) -> int:
    """Run a job and print its record or its words, or the reason why it failed, in one sentence."""
    bar = _Bar()
    try:
        record = job(bar.show)
    except (ValueError, OSError) as error:
        bar.close()
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        hint = "; free some space and run the same command, it goes on from there" if full else ""
        print(f"inlaid: {error}{hint}", file=sys.stderr)
        return 1 if bar.begun else 2
    bar.close()
    if isinstance(record, str):
        print(record)
    else:
        print(json.dumps(record.values(), indent=1) if as_json else _table(record))
    return 0


def _table(record: Record) -> str:
    grid, settings = record.settings.grid, record.settings
    lines = [
        f"{record.out}: {grid.bits} bits, groups of {grid.group_size}, {settings.aggregation}, "
        f"{'sequential' if settings.sequential else 'independent'}; base {record.base['fingerprint'][:12]}; "
        f"bank {bank_path(record.out)}",
        f"{'task':24} {'adapter':12} {'data':12} {'tokens':>8} {'loss 16-bit':>12} {'quantized':>10}  last check",
    ]
    for name, task in sorted(record.tasks.items()):
        hashes = f"{task['adapter_hash'][:12]:12} {task['data_hash'][:12]:12}"
        losses = f"{task['loss_full']:>12.5f} {task['loss_quantized']:>10.5f}"
        lines.append(f"{name:24} {hashes} {task['tokens']:>8} {losses}  {task['checked']}")
    if record.seconds:
        parts = ", ".join(f"{part} {spent:.1f}" for part, spent in record.seconds.items())
        lines.append(f"the last job took {sum(record.seconds.values()):.1f} s: {parts}")
    return "\n".join(lines)
