"""Time `inlaid quantize` of a 7-billion-parameter base and one task on one GPU, as a whole and by part.

A random 16-bit base, an adapter on every linear and prompts are written to disk; then the command itself is run, as a
user types it, with its defaults: 128 sequences of 2,048 tokens for the Hessians, a third as many held out for the
accuracy gate, Hessians kept in the bank. The command prints its seconds by part ("checking" is the gate, its forward
passes included); the whole, imports too, is timed from outside. GPTQ's work does not depend on the values of weights.
--force, because the gate would refuse a task that no adapter was trained for; it measures all the same.

The stage also holds Hessians summed by tensor cores against exact ones: their error against float64, and the loss of
the weights solved with them, measured under the float64 Hessian.

    python -m perf.gpu.quant_speed --out FILE                       last line of output: JSON
    python -m perf.gpu.bench --stages quant --out FOLDER            the same, in FOLDER/quant.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from inlaid.flags import Parser
from inlaid.quant import hessian, rounding, solver
from inlaid.quant.calibration import CalibrationSettings
from inlaid.quant.grid import Grid
from inlaid.quant.record import Record
from inlaid.quant.solver import reconstruction_error, solve
from perf.gpu import ROOT, Keep
from perf.gpu.random_model import EVERY_LINEAR, SHAPES, spec_of, write_adapter, write_dense, write_prompts

# The command `inlaid`, and the most memory that it held on the device.
PROGRAM = """
import sys, torch
from inlaid.cli import main
code = main(sys.argv[1:])
print("peak", torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
sys.exit(code)
"""


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the command, timed from outside; return its seconds, by part too, and sizes."""
    begin = time.perf_counter()
    base, adapter, data, out = (folder / name for name in ("base", "adapter", "prompts.jsonl", "out"))
    spec = write_dense(base, args.shape)
    write_adapter(adapter, spec, 16, EVERY_LINEAR, args.seed)
    held_out = CalibrationSettings().held_out
    write_prompts(data, round(args.samples / (1 - held_out)), args.length, spec.vocab_size, args.seed)
    start = time.perf_counter()
    command = [sys.executable, "-c", PROGRAM, "quantize", str(base), "--out", str(out), "--force"]
    command += ["--device", args.device, "--task", f"random={adapter}:{data}"]
    command += ["--max-tokens", str(args.samples * args.length)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.perf_counter() - start
    print(said, flush=True)
    parts = Record.read(out).seconds
    hidden, wide, layers = spec.hidden_size, spec.intermediate_size, spec.num_layers
    flops = 2 * args.samples * args.length * (3 * hidden**2 + wide**2) * layers
    kept = Path(f"{out}.bank").rglob("*.safetensors")
    return {
        "write_s": start - begin,
        "seconds": seconds,
        "parts": parts,
        "tokens": Record.read(out).tasks["random"]["tokens"],
        "hessian_tflops": flops / parts["Hessians"] / 1e12,
        "peak_gib": int(said.split("peak ")[1].split()[0]) / 2**30,
        "bank_gib": sum(file.stat().st_size for file in kept) / 2**30,
        "base_gib": sum(file.stat().st_size for file in base.glob("*.safetensors")) / 2**30,
    }


def differing_codes(device: str, inputs: int) -> dict[str, float]:
    """Return the share of codes that differ between device and host in double precision, and in single precision
    between one kernel a block and operations launched one by one."""
    generator = torch.Generator().manual_seed(0)
    x_TK = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64)
    weight_KN = torch.randn(inputs, 256, generator=generator, dtype=torch.float64)
    moment_KK = x_TK.T @ x_TK / len(x_TK)
    grid = Grid(4, 128)
    there = solve(weight_KN.to(device), moment_KK.to(device), grid).codes_KN.cpu()
    single_KN, single_KK = weight_KN.float().to(device), moment_KK.float().to(device)
    fused = solve(single_KN, single_KK, grid).codes_KN
    rounder = solver.rounder
    solver.rounder = lambda like_BN, max_code: partial(rounding.round_block, max_code=max_code)
    launched = solve(single_KN, single_KK, grid).codes_KN
    solver.rounder = rounder
    here = solve(weight_KN, moment_KK, grid).codes_KN
    return {
        "device against host": float((there != here).double().mean()),
        "one kernel against launched": float((fused != launched).double().mean()),
    }


def accuracy(device: str, inputs: int, tokens: int, seed: int) -> dict[str, dict[str, float]]:
    """Compare ways of summing a Hessian with float64, on activations with loud channels."""
    generator = torch.Generator(device=device).manual_seed(seed)
    mix = torch.randn(inputs, inputs // 4, generator=generator, device=device) / inputs**0.5
    exact_KK = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
    sums = {name: torch.zeros(inputs, inputs, device=device) for name in ("tensor cores, single sums", "half sums")}
    for _ in range(tokens // 8192):
        x_TK = torch.randn(8192, inputs // 4, generator=generator, device=device) @ mix.T
        x_TK += 0.05 * torch.randn(8192, inputs, generator=generator, device=device)
        x_TK[:, ::97] *= 30
        half_TK = x_TK.half()
        exact_KK += half_TK.double().T @ half_TK.double()
        sums["tensor cores, single sums"] += hessian.second_moment(half_TK)
        sums["half sums"] += ((half_TK / 64).T @ (half_TK / 64)).float() * 4096
    weight_KN = torch.randn(inputs, 1024, generator=generator, device=device) * inputs**-0.5
    exact_KK /= tokens
    grid = Grid(4, 128)
    reference = solve(weight_KN, exact_KK, grid)
    best = float(reconstruction_error(weight_KN.double(), reference.weight_KN().double(), exact_KK))
    result = {}
    for name, total_KK in sums.items():
        moment_KK = total_KK.double() / tokens
        solution = solve(weight_KN, moment_KK.float(), grid)
        loss = float(reconstruction_error(weight_KN.double(), solution.weight_KN().double(), exact_KK))
        error = float((moment_KK - exact_KK).norm() / exact_KK.norm())
        result[name] = {"relative_error": error, "loss_over_float64": loss / best}
    return result


def options() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def measure(args: argparse.Namespace, keep: Keep = lambda part: None) -> dict[str, Any]:
    """Run all parts of the stage."""
    torch.manual_seed(args.seed)
    what = f"inlaid quantize: {args.shape}, one task, {args.samples} x {args.length} tokens, defaults"
    ROOT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        keep(timed := {"what": what, **run(args, Path(folder))})
    wide = spec_of(args.shape).hidden_size
    return {
        **timed,
        "share_of_codes_that_differ": differing_codes(args.device, min(wide, 1024)),
        "accuracy": accuracy(args.device, wide, 65536 if args.shape == "7b" else 8192, args.seed),
        "seed": args.seed,
    }


def main() -> None:
    parser = options()
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
