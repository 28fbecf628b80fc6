"""How long does quantizing a 7-billion-parameter base for one task take on one GPU, and where does the time go?

A quantization run is offline, but adding a task while serving waits for it, so its parts matter: the forward passes,
the Hessians and the solving. Weights are random (GPTQ's work does not depend on their values) and are made on the
device block by block; everything else is the code that `inlaid quantize` runs with its defaults (one task is solved
once), down to the packed file of each block. What it does around that is not in it: Hessians kept in the bank on disk,
and the gate. "solve" is GPTQ's own pass (order, factorization, grids, codes), "refine" the rounds after it.

It also shows that Hessians summed by tensor cores are as good as exact ones: their error against float64, and the loss
of the weights solved with them, measured under the float64 Hessian.

    python -m perf.gpu.quant_speed --out perf/results/h200-quant.json        last line of output: JSON
    python -m perf.gpu.bench --stages quant --out FOLDER                     the same, in FOLDER/quant.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from inlaid.checkpoint import Checkpoint, to_tensors
from inlaid.quant import hessian, solver
from inlaid.quant.adapter import Adapter, LowRank
from inlaid.quant.aggregate import TaskHessian, solve_together
from inlaid.quant.blocks import BlockModel, Stream
from inlaid.quant.calibration import Sequence, batches
from inlaid.quant.grid import Grid
from inlaid.quant.solver import Solution, reconstruction_error, solve

Keep = Callable[[dict[str, Any]], None]
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1000},
}  # fmt: skip


class RandomCheckpoint:
    """Stands in for a folder: any tensor, drawn on the device when asked for, outputs of about unit variance."""

    def __init__(self, path: Path, shape: dict[str, int], device: str, seed: int) -> None:
        self.path, self.device = path, device
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            **shape,
        }
        (path / "config.json").write_text(json.dumps(config))
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.shapes: dict[str, torch.Size] = {}

    def __contains__(self, name: str) -> bool:
        return True

    def tensor(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self.device)
        scale = 1.0 if "embed" in name else shape[1] ** -0.5
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float16) * scale


class Clock:
    """Seconds of the device by part."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def of(self, part: str, work: Callable[[], Any]) -> Any:
        self._wait()
        start = time.perf_counter()
        result = work()
        self._wait()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
        return result

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def random_adapter(model: BlockModel, rank: int) -> Adapter:
    """An adapter on every linear, small against the base, as trained ones are."""
    parts = {}
    for name, (outputs, inputs) in model.shapes().items():
        a_RK = torch.randn(rank, inputs, device=model.device, dtype=model.dtype) * inputs**-0.5
        b_NR = torch.randn(outputs, rank, device=model.device, dtype=model.dtype) * 0.05
        parts[name] = LowRank(a_RK, b_NR, 1.0)
    return Adapter("random", parts)


def run(args: argparse.Namespace, folder: Path, keep: Keep) -> dict[str, Any]:
    """The whole job, timed by part; `keep` is given what there is after each block."""
    clock, shape = Clock(args.device), SHAPES[args.shape]
    checkpoint = RandomCheckpoint(folder, shape, args.device, args.seed)
    model = BlockModel(cast(Checkpoint, checkpoint), args.device, torch.float16)
    checkpoint.shapes = {name: tensor.shape for name, tensor in model.model.state_dict().items()}
    adapter = random_adapter(model, 16)
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(0, shape["vocab_size"], (args.samples, args.length), generator=generator).tolist()
    start = time.perf_counter()
    streams = clock.of("forward", lambda: model.start(batches(tuple(Sequence(tuple(row), 0) for row in ids))))
    grid = replace(Grid.of_width(args.bits, 128), clip=args.clip, refine=args.refine)
    block_of = Block(model, adapter, streams, grid, clock, folder)
    second_moment, refine = hessian.second_moment, solver.refine
    hessian.second_moment = lambda x_TK: clock.of("hessian", lambda: second_moment(x_TK))
    solver.refine = lambda *given: clock.of("refine", lambda: refine(*given))
    blocks = model.num_blocks if args.layers is None else args.layers
    flops = 2 * args.samples * args.length * (3 * shape["hidden_size"] ** 2 + shape["intermediate_size"] ** 2)
    report: dict[str, Any] = {"grid": asdict(grid), "of_blocks": model.num_blocks, "loss_sum": 0.0}
    for index in tqdm(range(blocks), desc="blocks"):
        report["loss_sum"] += block_of.quantize(index)
        parts = dict(clock.seconds)
        parts["forward"] -= parts["hessian"]
        parts["solve"] -= parts.get("refine", 0.0)
        report |= {"blocks": index + 1, "seconds": time.perf_counter() - start, "parts": parts}
        report["hessian_tflops"] = flops * (index + 1) / parts["hessian"] / 1e12
        report["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if args.device.startswith("cuda") else None
        keep(report)
    hessian.second_moment, solver.refine = second_moment, refine
    return report


@dataclass(frozen=True, eq=False)
class Block:
    """What is done to each block, timed."""

    model: BlockModel
    adapter: Adapter
    streams: list[Stream]
    grid: Grid
    clock: Clock
    folder: Path

    def quantize(self, index: int) -> float:
        with ExitStack() as stack:
            block = self.clock.of("draw weights", lambda: stack.enter_context(self.model.loaded(index)))
            sites = self.clock.of("forward", lambda: self._forward(block, index))
            tensors: dict[str, Tensor] = {}
            loss = 0.0
            for site, moment_KK in sites.hessians().items():
                solution = self.clock.of("solve", partial(self._solve, index, sites.members[site], moment_KK))
                pack = partial(self._pack, index, sites.members[site], solution)
                tensors |= self.clock.of("pack and write", pack)
                loss += solution.loss
        file = self.folder / f"block-{index}.safetensors"
        self.clock.of("pack and write", lambda: save_file(tensors, file))
        file.unlink()
        return loss

    def _forward(self, block: torch.nn.Module, index: int) -> hessian.Sites:
        return hessian.block_hessians(self.model, block, index, self.adapter, self.streams, advance=True)

    def _solve(self, index: int, names: list[str], moment_KK: Tensor) -> Solution:
        linears = self.model.linears(index)
        weight_KN = torch.cat([linears[name].weight.detach().T.float() for name in names], dim=1)
        return solve_together("mean", weight_KN, [TaskHessian(lambda: moment_KK, 1.0)], self.grid)

    def _pack(self, index: int, names: list[str], solution: Solution) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        start = 0
        for name in names:
            stop = start + self.model.linears(index)[name].out_features
            tensors |= to_tensors(name, solution.columns(start, stop).packed(self.grid))
            start = stop
        return tensors


def differing_codes(device: str) -> dict[str, float]:
    """The share of codes that differ from the host's, and whether replaying graphs changes any of the device's."""
    generator = torch.Generator().manual_seed(0)
    x_TK = torch.randn(4096, 1024, generator=generator, dtype=torch.float64)
    weight_KN = torch.randn(1024, 256, generator=generator, dtype=torch.float64)
    moment_KK = x_TK.T @ x_TK / len(x_TK)
    grid = Grid(4, 128)
    there = solve(weight_KN.to(device), moment_KK.to(device), grid).codes_KN.cpu()
    rounder = solver.rounder
    solver.rounder = lambda like_BN, max_code, num_blocks: rounder(like_BN, max_code, 0)
    launched = solve(weight_KN.to(device), moment_KK.to(device), grid).codes_KN.cpu()
    solver.rounder = rounder
    here = solve(weight_KN, moment_KK, grid).codes_KN
    return {
        "device against host": float((there != here).double().mean()),
        "replayed against launched": float((there != launched).double().mean()),
    }


def accuracy(device: str, inputs: int, tokens: int, seed: int) -> dict[str, dict[str, float]]:
    """Three ways of summing a Hessian against float64, on activations with loud channels."""
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


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="only the first so many; default: all")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, default=Grid().clip)
    parser.add_argument("--refine", type=int, default=Grid().refine)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def measure(args: argparse.Namespace, keep: Keep = lambda part: None) -> dict[str, Any]:
    """Everything that the file says."""
    torch.manual_seed(args.seed)
    what = f"{args.shape}, one task, {args.samples} x {args.length} tokens, {args.bits} bits, groups of 128"
    with tempfile.TemporaryDirectory() as folder:
        timed = run(args, Path(folder), lambda part: keep({"what": what, **part}))
    wide = 4096 if args.shape == "7b" else 512
    return {
        "what": what,
        **timed,
        "share_of_codes_that_differ": differing_codes(args.device),
        "accuracy": accuracy(args.device, wide, 65536 if args.shape == "7b" else 8192, args.seed),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "command": " ".join(sys.argv),
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
