"""The command `inlaid kernels`: what this machine has, and its backends' times beside the floor of the hardware."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from inlaid.checkpoint import QuantSpec
from inlaid.kernels import auto
from inlaid.kernels.auto import TABLE, Measured, read_table
from inlaid.kernels.backend import LinearBackend
from inlaid.kernels.measure import Ceiling, time_linear, weight_bytes
from inlaid.kernels.packed import PackedLinear
from inlaid.progress import Bar

SHAPES = ("4096x12288", "4096x4096", "4096x22016", "11008x4096", "4096x6144", "4096x28672", "14336x4096")
ROWS = (1, 4, 16, 64, 256, 2048)
PACKAGES = ("torch", "triton", "humming-kernels", "exllamav2", "llguidance")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `inlaid kernels`."""
    parser.add_argument("--table", action="store_true", help="print all recorded times, of other devices too")
    parser.add_argument("--measure", action="store_true", help="time the backends on this GPU")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="inputs x outputs, such as 4096x12288")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="numbers of rows to time")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8), help="width of a code")
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale")
    parser.add_argument("--write", type=Path, help=f"write the measured times to this file (shipped: {TABLE.name})")


def run(args: argparse.Namespace) -> int:
    """Print what this machine has and the recorded times of its GPU; with --measure, time the backends here first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    spec = QuantSpec(args.bits, args.group, True, False)
    if args.measure and not name:
        print("there is no GPU to measure on: run this on a machine with one")
        return 1
    backends: tuple[LinearBackend, ...] = auto.backends(deterministic=False)
    if not name:
        backends = (PackedLinear(), *backends)
    print(about(name, spec, backends, device))
    if args.measure:
        shapes = [(int(k), int(n)) for k, n in (shape.split("x") for shape in args.shapes)]
        table = measure(backends, shapes, args.rows, spec, device)
        if args.write:
            args.write.write_text(dumps(table))
        print(f"\n{render(table)}")
        return 0
    recorded = list(read_table())
    mine = recorded if args.table else [row for row in recorded if row.device == name]
    if mine:
        print(f"\nRecorded times{'' if args.table else ' of this GPU'}:\n{render(mine)}")
    elif name:
        print("\nNo times of this GPU are recorded: `inlaid kernels --measure` takes them.")
    else:
        print("\n`inlaid kernels --table` prints the times recorded on GPUs.")
    return 0


def about(gpu: str, spec: QuantSpec, backends: tuple[LinearBackend, ...], device: torch.device) -> str:
    """Return the device, the packages that bring kernels, and what computes linears, attention and adapters here."""
    threads = f"{torch.get_num_threads()} threads of {platform.machine()}"
    where = gpu or f"CPU, {threads}, {torch.backends.cpu.get_cpu_capability()}; no GPU that torch sees"
    found = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    lines = [
        f"device     {where}",
        f"packages   {found}",
        f"linears    of {spec.bits} bits, groups of {spec.group_size}:",
    ]
    for backend in backends:
        lines.append(f"  {backend.name:10s} {backend.why_not(spec, device) or 'available'}")
    rest = "Triton" if gpu else "plain torch"
    return "\n".join([*lines, f"attention, adapters, norms, sampling: {rest}"])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def measure(
    backends: tuple[LinearBackend, ...],
    shapes: list[tuple[int, int]],
    rows: list[int],
    spec: QuantSpec,
    device: torch.device,
) -> list[Measured]:
    """Time every backend that serves the spec, at every shape and number of rows."""
    name = torch.cuda.get_device_name(device)
    ceiling = Ceiling.of(name)
    made = []
    for inputs, outputs in Bar(shapes, desc="measuring"):
        times = {
            b.name: time_linear(b, inputs, outputs, spec, rows, device)
            for b in backends
            if b.why_not(spec, device) is None
        }
        for count in rows:
            moved = weight_bytes(inputs, outputs, spec) + 2 * count * (inputs + outputs)
            floor = ceiling.microseconds(moved, 2.0 * count * inputs * outputs) if ceiling else float("nan")
            found = {backend: round(by_rows[count], 2) for backend, by_rows in times.items()}
            made.append(Measured(name, spec.bits, inputs, outputs, count, found, round(floor, 2)))
    return made


def dumps(table: list[Measured]) -> str:
    """Return the table in the form of linear_table.json, a row a line."""
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in table)
    return f'{{"unit": "microseconds", "rows": [\n{lines}\n]}}\n'


def render(table: list[Measured]) -> str:
    """Return the table as text: device, bits, shape, rows, backend, microseconds and the floor's share of them."""
    if not table:
        return "no times are known for this machine: run `inlaid kernels --measure` on it"
    lines = [f"{'device':14s} bits {'inputs x outputs':>18s} {'rows':>5s} {'backend':10s} {'us':>8s} of floor"]
    for m in table:
        for backend, time in sorted(m.microseconds.items(), key=lambda item: item[1]):
            lines.append(
                f"{m.device:14s} {m.bits:4d} {f'{m.inputs} x {m.outputs}':>18s} {m.rows:5d} {backend:10s} "
                f"{time:8.1f} {m.floor / time:8.0%}"
            )
    return "\n".join(lines)
