"""Which quantizer is best for all tasks? `python -m eval.quant_table` measures them on the demo and writes a table.

For each calibration seed and bit width: the eval metric of every task for the 16-bit model, rounding, GPTQ on generic
data, GPTQ on the tasks' data without adapters ("mixed"), AWQ-style scaling, multi-task GPTQ with each aggregation, and
the bound that nobody can share: a base quantized for each task alone. What counts is the average and the worst task.

An answer is right if greedy decoding gives it. One forward pass over prompt and reference tells: if every token of the
reference is the likeliest after those before it, greedy decoding writes just that. Where a task accepts other answers
too (programs, final numbers), those that fail are generated and judged by the task's own metric.

Weights are swapped in memory; what `inlaid quantize` writes dequantizes to the same numbers (tests hold it to that).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import scoring
from inlaid.checkpoint import Checkpoint
from inlaid.quant.adapter import NO_ADAPTER, Adapter, read_adapter
from inlaid.quant.aggregate import AGGREGATIONS, LOSS_ROUNDS, MINIMAX_LOSS, TaskHessian, raised, solve_together
from inlaid.quant.baselines import scaled_weight
from inlaid.quant.blocks import BlockModel
from inlaid.quant.calibration import CalibrationSettings, Sequence, batches, encode, load_calibration
from inlaid.quant.hessian import block_hessians
from inlaid.quant.solver import Grid, round_to_nearest, solve

Hessians = dict[str, Tensor]  # site -> E[x xᵀ]
Weights = dict[str, Tensor]  # linear -> [N, K]
EXACT = "exact_match"


@dataclass(frozen=True)
class Options:
    """What one run measures."""

    base: str = "models/demo/base"
    tasks: str = "data/tasks.json"
    bits: tuple[int, ...] = (4, 3, 2)
    seeds: tuple[int, ...] = (0, 1, 2)
    examples: int = 256
    calibration_examples: int = 64
    group_sizes: tuple[int, ...] = (128, 128, 32)
    symmetric: bool = False
    act_order: bool = False
    clip: bool = True
    highlights: tuple[float, ...] = (1.0,)
    aggregations: tuple[str, ...] = AGGREGATIONS
    device: str = "cpu"

    def grid(self, bits: int) -> Grid:
        group_size = self.group_sizes[self.bits.index(bits)]
        return Grid(bits, group_size, self.symmetric, self.act_order, self.act_order, self.clip)


@dataclass(frozen=True, eq=False)
class EvalTask:
    """A task with what judging it needs."""

    name: str
    metric: str
    max_tokens: int
    adapter: Adapter
    examples: list[dict[str, Any]]
    encoded: list[Sequence]


@dataclass(frozen=True)
class Cell:
    """One seed at one bit width: points from 0 to 100 by variant and task."""

    seed: int
    bits: int
    points: dict[str, dict[str, float]]
    seconds: float


class Bench:
    """The model that weights are swapped into, and the tasks that it is judged by."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.base, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
        self.model = model.to(options.device).eval()
        self.linears = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        }
        self.original = {name: linear.weight.detach().clone() for name, linear in self.linears.items()}
        self.stops = {self.tokenizer.eos_token_id}
        described = json.loads(Path(options.tasks).read_text())
        self.tasks = [self._task(name, about) for name, about in described.items()]
        self.calibration_files = {name: Path(about["splits"]["calibration"]) for name, about in described.items()}

    def _task(self, name: str, about: dict[str, Any]) -> EvalTask:
        lines = Path(about["splits"]["eval"]).read_text().splitlines()[: self.options.examples]
        examples = [json.loads(line) for line in lines]
        encoded = [encode(example, self.tokenizer, 4096) for example in examples]
        adapter = read_adapter(Path(about["adapter"]))
        return EvalTask(name, about["metric"], about["max_tokens"], adapter, examples, encoded)

    @torch.no_grad()
    def answer_losses(self, weights: Weights, drawn: dict[str, tuple[Sequence, ...]]) -> Tensor:
        """Nats an answer of each task, names sorted, on some of its calibration data."""
        self._swap(weights)
        found = []
        for task in sorted(self.tasks, key=lambda task: task.name):
            total = 0.0
            with task.adapter.attached(self.model, ""):
                for batch in batches(drawn[task.name], max_tokens=16384):
                    ids_BS, wanted_BS = batch.ids_BS.to(self.model.device), batch.answer_BS[:, 1:].to(self.model.device)
                    logits_TV = self.model(input_ids=ids_BS, use_cache=False).logits[:, :-1][wanted_BS]
                    total += float(
                        torch.nn.functional.cross_entropy(logits_TV, ids_BS[:, 1:][wanted_BS], reduction="sum")
                    )
            found.append(total / len(drawn[task.name]))
        return torch.tensor(found, dtype=torch.float64)

    def _swap(self, weights: Weights) -> None:
        for name, linear in self.linears.items():
            linear.weight.data = weights.get(name, self.original[name]).to(linear.weight)

    @torch.no_grad()
    def points(self, weights: Weights, names: set[str] | None = None) -> dict[str, float]:
        """The metric of each task with these weights in place of the base's."""
        self._swap(weights)
        return {task.name: self._points(task) for task in self.tasks if names is None or task.name in names}

    def _points(self, task: EvalTask) -> float:
        with task.adapter.attached(self.model, ""):
            right = self._greedy_matches(task.encoded)
            judged = [float(one) for one in right]
            wrong = [i for i, one in enumerate(right) if not one]
            if task.metric != EXACT and wrong:
                answers = self._generate([task.encoded[i] for i in wrong], task.max_tokens)
                judge = scoring.METRICS[task.metric]
                for i, answer in zip(wrong, answers, strict=True):
                    judged[i] = judge(answer, task.examples[i])
        return 100 * sum(judged) / len(judged)

    def _greedy_matches(self, encoded: list[Sequence]) -> list[bool]:
        matches: dict[tuple[int, ...], bool] = {}
        for batch in batches(tuple(encoded), max_tokens=16384):
            ids_BS = batch.ids_BS.to(self.model.device)
            likeliest_BS = self.model(input_ids=ids_BS, use_cache=False).logits[:, :-1].argmax(-1)
            wanted_BS = batch.answer_BS[:, 1:].to(self.model.device)
            right_B = ((likeliest_BS == ids_BS[:, 1:]) | ~wanted_BS).all(1).tolist()
            lengths = (batch.weight_BS > 0).sum(1).tolist()
            for row, length, right in zip(batch.ids_BS.tolist(), lengths, right_B, strict=True):
                matches[tuple(row[:length])] = right
        return [matches[sequence.ids] for sequence in encoded]

    def _generate(self, encoded: list[Sequence], max_tokens: int) -> list[str]:
        """Greedy answers, prompts padded on the left."""
        prompts = [list(sequence.ids[: sequence.answer]) for sequence in encoded]
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        device = self.model.device
        out = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        return self.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)


@dataclass(frozen=True, eq=False)
class Moments:
    """All Hessians of one seed, by layer."""

    members: dict[str, list[str]]  # site -> linears
    of_task: dict[float, dict[str, Hessians]]  # highlight -> task -> site -> H, adapter attached
    tokens: dict[float, dict[str, float]]
    mixed: Hessians  # all tasks' data, no adapter
    generic: Hessians  # chat and running text, no adapter
    drawn: dict[str, tuple[Sequence, ...]]


def collect(options: Options, bench: Bench, seed: int) -> Moments:
    """Run every task's calibration data through the 16-bit base, block by block."""
    model = BlockModel(Checkpoint(options.base), options.device)
    settings = CalibrationSettings(seed=seed)
    drawn = {
        task.name: load_calibration(bench.calibration_files[task.name], bench.tokenizer, settings).fitting
        for task in bench.tasks
    }
    drawn = {name: sequences[: options.calibration_examples] for name, sequences in drawn.items()}
    members: dict[str, list[str]] = {}

    def run(adapter: Adapter, sequences: tuple[Sequence, ...], highlight: float) -> tuple[Hessians, float]:
        streams = model.start(batches(sequences, highlight))
        found: Hessians = {}
        total = 0.0
        for index in range(model.num_blocks):
            with model.loaded(index) as block:
                sites = block_hessians(model, block, index, adapter, streams, advance=True)
            found |= {site: hessian.cpu() for site, hessian in sites.hessians().items()}
            members.update(sites.members)
            total = sites.total
        return found, total

    of_task: dict[float, dict[str, Hessians]] = {}
    tokens: dict[float, dict[str, float]] = {}
    for highlight in options.highlights:
        both = {task.name: run(task.adapter, drawn[task.name], highlight) for task in bench.tasks}
        of_task[highlight] = {name: hessians for name, (hessians, _) in both.items()}
        tokens[highlight] = {name: total for name, (_, total) in both.items()}
    mixed, _ = run(NO_ADAPTER, tuple(itertools.chain.from_iterable(drawn.values())), 1.0)
    generic, _ = run(
        NO_ADAPTER, generic_sequences(bench.tokenizer, len(bench.tasks) * options.calibration_examples, seed), 1.0
    )
    return Moments(members, of_task, tokens, mixed, generic, drawn)


def generic_sequences(tokenizer: Any, count: int, seed: int) -> tuple[Sequence, ...]:
    """What the demo's base saw besides the tasks: plain chat and running English."""
    from models.corpus import plain_chat, plain_english

    rng = random.Random(f"generic/{seed}")
    documents = [(plain_chat if rng.random() < 0.6 else plain_english)(rng) for _ in range(count)]
    texts = [document.heard + document.said for document in documents]
    return tuple(Sequence(tuple(ids), 0) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])


def solve_all(bench: Bench, moments: Moments, solve_site: Callable[[Tensor, str], Tensor]) -> Weights:
    """Quantize every site by a function of its weight [K, N] and its name that returns the quantized one."""
    weights: Weights = {}
    for site, names in moments.members.items():
        together_KN = torch.cat([bench.original[name].T.cpu() for name in names], dim=1)
        quantized_KN = solve_site(together_KN, site)
        sizes = [bench.original[name].shape[0] for name in names]
        for name, part_KN in zip(names, quantized_KN.split(sizes, dim=1), strict=True):
            weights[name] = part_KN.T.contiguous()
    return weights


def variants(options: Options, moments: Moments, bits: int) -> dict[str, Callable[[Tensor, str], Tensor]]:
    """Every quantizer as a function of one site."""
    grid = options.grid(bits)

    def shared(aggregation: str, highlight: float) -> Callable[[Tensor, str], Tensor]:
        of_task, tokens = moments.of_task[highlight], moments.tokens[highlight]

        def run(weight_KN: Tensor, site: str) -> Tensor:
            tasks = [_held(of_task[name][site], tokens[name]) for name in sorted(of_task)]
            return solve_together(aggregation, weight_KN, tasks, grid).weight_KN()

        return run

    found: dict[str, Callable[[Tensor, str], Tensor]] = {
        "rtn": lambda weight_KN, site: round_to_nearest(weight_KN, grid).weight_KN(),
        "gptq-generic": partial(_solved, moments.generic, grid),
        "gptq-mixed": partial(_solved, moments.mixed, grid),
        "awq": lambda weight_KN, site: scaled_weight(weight_KN, moments.mixed[site], grid),
    }
    for aggregation in options.aggregations:
        if aggregation == MINIMAX_LOSS:
            continue
        for highlight in options.highlights:
            mark = "" if highlight == 1.0 else f" +highlight {highlight:g}"
            found[f"mlgptq-{aggregation}{mark}"] = shared(aggregation, highlight)
    return found


def measure(options: Options, seed: int, bits: int) -> Cell:
    """Every variant at one seed and bit width."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    bench = Bench(options)
    moments = collect(options, bench, seed)
    points = {"16-bit": bench.points({})}
    for name, solve_site in variants(options, moments, bits).items():
        points[name] = bench.points(solve_all(bench, moments, solve_site))
    if MINIMAX_LOSS in options.aggregations:
        for highlight in options.highlights:
            mark = "" if highlight == 1.0 else f" +highlight {highlight:g}"
            points[f"mlgptq-{MINIMAX_LOSS}{mark}"] = bench.points(
                minimax_loss(options, bench, moments, bits, highlight)
            )
    grid, alone = options.grid(bits), moments.of_task[options.highlights[0]]
    bound: dict[str, float] = {}
    for task in bench.tasks:
        weights = solve_all(bench, moments, partial(_solved, alone[task.name], grid))
        bound |= bench.points(weights, {task.name})
    points["per-task (bound)"] = bound
    return Cell(seed, bits, points, time.perf_counter() - start)


def minimax_loss(options: Options, bench: Bench, moments: Moments, bits: int, highlight: float) -> Weights:
    """The rounds of that aggregation, in memory."""
    of_task = moments.of_task[highlight]
    names = sorted(of_task)
    full = bench.answer_losses({}, moments.drawn)
    shares = torch.ones(len(names), dtype=torch.float64) / len(names)
    best: tuple[float, Weights] | None = None
    for _ in range(LOSS_ROUNDS):
        with_shares = list(zip(names, shares.tolist(), strict=True))

        def solve_site(weight_KN: Tensor, site: str, with_shares: list[tuple[str, float]] = with_shares) -> Tensor:
            tasks = [_held(of_task[name][site], 1.0, share) for name, share in with_shares]
            return solve_together(MINIMAX_LOSS, weight_KN, tasks, options.grid(bits)).weight_KN()

        weights = solve_all(bench, moments, solve_site)
        excess = (bench.answer_losses(weights, moments.drawn) - full).clamp(min=0)
        if best is None or float(excess.max()) < best[0]:
            best = float(excess.max()), weights
        shares = raised(shares, excess)
    assert best is not None
    return best[1]


def _solved(hessians: Hessians, grid: Grid, weight_KN: Tensor, site: str) -> Tensor:
    return solve(weight_KN, hessians[site], grid).weight_KN()


def _held(hessian_KK: Tensor, tokens: float, share: float = 1.0) -> TaskHessian:
    return TaskHessian(lambda: hessian_KK, tokens, share)


def table(options: Options, cells: list[Cell]) -> str:
    """Points lost against 16 bits, average and worst task: mean over seeds, and the range between them."""
    lines = []
    for bits in options.bits:
        of_bits = [cell for cell in cells if cell.bits == bits]
        if not of_bits:
            continue
        full = of_bits[0].points["16-bit"]
        lines += [
            f"\n## {bits} bits\n",
            f"Points lost (16-bit average {sum(full.values()) / len(full):.2f}); {len(of_bits)} calibration seed(s).\n",
            "| quantizer | average | range | worst task | range | which task |",
            "|---|---|---|---|---|---|",
        ]
        for name in of_bits[0].points:
            if name == "16-bit":
                continue
            average, worst, which = zip(*(losses(cell, name) for cell in of_bits), strict=True)
            lines.append(
                f"| {name} | {_mean(average):.2f} | {min(average):.2f}..{max(average):.2f} "
                f"| {_mean(worst):.2f} | {min(worst):.2f}..{max(worst):.2f} | {', '.join(sorted(set(which)))} |"
            )
    return "\n".join(lines) + "\n"


def losses(cell: Cell, variant: str) -> tuple[float, float, str]:
    """Average loss, worst loss and the task that has it."""
    full, points = cell.points["16-bit"], cell.points[variant]
    lost = {name: full[name] - points[name] for name in full}
    worst = max(lost, key=lambda name: lost[name])
    return _mean(tuple(lost.values())), lost[worst], worst


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def parse() -> tuple[Options, Path, int]:
    default = Options()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default=default.base)
    parser.add_argument("--tasks", default=default.tasks)
    parser.add_argument("--bits", type=int, nargs="+", default=default.bits)
    parser.add_argument("--seeds", type=int, nargs="+", default=default.seeds)
    parser.add_argument("--examples", type=int, default=default.examples, help="eval examples of each task")
    parser.add_argument("--calibration-examples", type=int, default=default.calibration_examples)
    parser.add_argument(
        "--group-sizes", type=int, nargs="+", default=default.group_sizes, help="one for each of --bits"
    )
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=default.symmetric)
    parser.add_argument("--act-order", action=argparse.BooleanOptionalAction, default=default.act_order)
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, default=default.clip)
    parser.add_argument("--highlights", type=float, nargs="+", default=default.highlights)
    parser.add_argument("--aggregations", nargs="+", choices=AGGREGATIONS, default=default.aggregations)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes; each takes one seed at one bit width")
    parser.add_argument("--out", type=Path, default=Path("eval/results/quant-demo"), help="without its ending")
    args = vars(parser.parse_args())
    out, workers = args.pop("out"), args.pop("workers")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    return Options(**values), out, workers


def main() -> None:
    options, out, workers = parse()
    jobs = [(options, seed, bits) for bits in options.bits for seed in options.seeds]
    cells: list[Cell] = []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for cell in tqdm(pool.imap_unordered(_measure, jobs), total=len(jobs), desc="seed x bits"):
            cells.append(cell)
            write(options, sorted(cells, key=lambda cell: (-cell.bits, cell.seed)), out)
    print(out.with_suffix(".md").read_text())


def write(options: Options, cells: list[Cell], out: Path) -> None:
    """The figures and the table, as far as they are known: a run cut short keeps what it had."""
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "options": asdict(options),
        "commit": _commit(),
        "base": Checkpoint(options.base).fingerprint(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
    }
    out.with_suffix(".json").write_text(
        json.dumps(about | {"cells": [asdict(cell) for cell in cells]}, indent=1) + "\n"
    )
    head = f"# Quantizers on the demo's twelve tasks\n\n{__doc__}\nOptions: `{asdict(options)}`\n"
    out.with_suffix(".md").write_text(head + table(options, cells))


def _measure(job: tuple[Options, int, int]) -> Cell:
    return measure(*job)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
