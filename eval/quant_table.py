"""Which quantizer is best for all tasks? `python -m eval.quant_table` measures them on the demo and writes a table.

For each calibration seed and bit width: the eval metric of every task for the 16-bit model, rounding, GPTQ on generic
data, GPTQ on the tasks' data without adapters ("mixed"), AWQ-style scaling, multi-task GPTQ with each aggregation, and
the bound that nobody can share: a base quantized for each task alone. What counts is the average and the worst task.

An answer is right if greedy decoding gives it. One forward pass over prompt and reference tells: if every token of the
reference is the likeliest after those before it, greedy decoding writes just that. Where a task accepts other answers
too (programs, final numbers), those that fail are generated and judged by the task's own metric (`--no-generate` counts
them as wrong, which is stricter and quicker). The loss of a whole answer, in nats, tells quantizers apart where few
answers change.

All quantizers but rounding and AWQ-style scaling have the same grids, act-order and refinement; these two keep groups
in place, and AWQ's scales have no place in a GPTQ file. Rounding searches each group's range too, which is kinder to it
than plain rounding.

Weights are swapped in memory; what `inlaid quantize` writes dequantizes to the same numbers (tests hold it to that).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import scoring
from inlaid.checkpoint import Checkpoint
from inlaid.files import hash_file
from inlaid.quant.adapter import NO_ADAPTER, Adapter, read_adapter
from inlaid.quant.aggregate import AGGREGATIONS, LOSS_ROUNDS, MINIMAX_LOSS, TaskHessian, raised, solve_together
from inlaid.quant.baselines import scaled_weight
from inlaid.quant.blocks import BlockModel
from inlaid.quant.calibration import CalibrationSettings, Sequence, batches, encode, load_calibration
from inlaid.quant.grid import Grid
from inlaid.quant.hessian import block_hessians
from inlaid.quant.settings import Settings
from inlaid.quant.solver import round_to_nearest, solve

Hessians = dict[str, Tensor]  # site -> E[x xᵀ]
Weights = dict[str, Tensor]  # linear -> [N, K]
Judged = dict[str, tuple[float, float]]  # task -> points, nats an answer
EXACT = "exact_match"
BOUND = "per-task (bound)"
FULL = "16-bit"


@dataclass(frozen=True)
class Options:
    """What one run measures."""

    base: str = "models/demo/base"
    tasks: str = "data/tasks.json"
    bits: tuple[int, ...] = (4, 3, 2)
    seeds: tuple[int, ...] = (0, 1, 2)
    examples: int = 256
    generate: bool = True
    calibration_examples: int = 96  # all that `inlaid quantize` does not hold out
    weighing: int = 24  # of them, what minimax-loss measures
    group_sizes: tuple[int, ...] = (128, 128, 32)
    symmetric: bool = False
    act_order: bool | None = None  # None: as `inlaid quantize` does at that width
    clip: bool = True
    refine: int = Grid().refine
    highlights: tuple[float, ...] = (1.0,)
    aggregations: tuple[str, ...] = AGGREGATIONS
    device: str = "cpu"

    def grid(self, bits: int) -> Grid:
        grid = Grid.of_width(bits, self.group_sizes[self.bits.index(bits)])
        act_order = grid.act_order if self.act_order is None else self.act_order
        return replace(grid, symmetric=self.symmetric, act_order=act_order, clip=self.clip, refine=self.refine)


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
    """One seed at one bit width: points from 0 to 100, and nats an answer, by variant and task."""

    seed: int
    bits: int
    points: dict[str, dict[str, float]]
    losses: dict[str, dict[str, float]]

    def note(self, variant: str, judged: Judged) -> None:
        self.points.setdefault(variant, {}).update({task: points for task, (points, _) in judged.items()})
        self.losses.setdefault(variant, {}).update({task: loss for task, (_, loss) in judged.items()})


@dataclass(frozen=True)
class Job:
    """One base to be solved and judged: by a variant for all tasks, or (the bound) for one task alone. One that is
    weighed is measured on calibration data instead, for the next round of minimax-loss."""

    seed: int
    bits: int
    variant: str
    task: str = ""
    shares: tuple[float, ...] = ()
    weighed: bool = False


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
        self.batch_tokens = 65_536 if options.device.startswith("cuda") else 1_536
        described = json.loads(Path(options.tasks).read_text())
        self.tasks = [self._task(name, about) for name, about in described.items()]
        self.calibration_files = {name: Path(about["splits"]["calibration"]) for name, about in described.items()}

    def _task(self, name: str, about: dict[str, Any]) -> EvalTask:
        lines = Path(about["splits"]["eval"]).read_text().splitlines()[: self.options.examples]
        examples = [json.loads(line) for line in lines]
        encoded = [encode(example, self.tokenizer, 4096) for example in examples]
        adapter = read_adapter(Path(about["adapter"]))
        return EvalTask(name, about["metric"], about["max_tokens"], adapter, examples, encoded)

    def calibration(self, seed: int) -> dict[str, tuple[Sequence, ...]]:
        """What `inlaid quantize` would fit each task on."""
        settings, count = CalibrationSettings(seed=seed), self.options.calibration_examples
        return {
            name: load_calibration(file, self.tokenizer, settings).fitting[:count]
            for name, file in self.calibration_files.items()
        }

    @torch.no_grad()
    def weigh(self, weights: Weights, seed: int) -> Judged:
        """Nats an answer of each task on some of its calibration data."""
        self._swap(weights)
        found = {}
        drawn = self.calibration(seed)
        for task in self.tasks:
            with task.adapter.attached(self.model, ""):
                right, loss = self._greedy_matches(list(drawn[task.name][: self.options.weighing]))
            found[task.name] = 100 * sum(right) / len(right), loss
        return found

    def _swap(self, weights: Weights) -> None:
        for name, linear in self.linears.items():
            linear.weight.data = weights.get(name, self.original[name]).to(linear.weight)

    @torch.no_grad()
    def judge(self, weights: Weights, task_name: str = "") -> Judged:
        """The metric and the loss of each task (or of one) with these weights in place of the base's."""
        self._swap(weights)
        return {task.name: self._judge(task) for task in self.tasks if task_name in ("", task.name)}

    def _judge(self, task: EvalTask) -> tuple[float, float]:
        with task.adapter.attached(self.model, ""):
            right, loss = self._greedy_matches(task.encoded)
            judged = [float(one) for one in right]
            wrong = [i for i, one in enumerate(right) if not one]
            if task.metric != EXACT and wrong and self.options.generate:
                answers = self._generate([task.encoded[i] for i in wrong], task.max_tokens)
                judge = scoring.METRICS[task.metric]
                for i, answer in zip(wrong, answers, strict=True):
                    judged[i] = judge(answer, task.examples[i])
        return 100 * sum(judged) / len(judged), loss

    def _greedy_matches(self, encoded: list[Sequence]) -> tuple[list[bool], float]:
        """Which references greedy decoding writes, and the mean loss of a whole answer."""
        matches: dict[tuple[int, ...], bool] = {}
        total = 0.0
        for batch in batches(tuple(encoded), max_tokens=self.batch_tokens):
            ids_BS, wanted_BS = batch.ids_BS.to(self.model.device), batch.answer_BS[:, 1:].to(self.model.device)
            logits_BSV = self.model(input_ids=ids_BS, use_cache=False).logits[:, :-1]
            losses_T = torch.nn.functional.cross_entropy(
                logits_BSV[wanted_BS], ids_BS[:, 1:][wanted_BS], reduction="sum"
            )
            total += float(losses_T)
            right_B = ((logits_BSV.argmax(-1) == ids_BS[:, 1:]) | ~wanted_BS).all(1).tolist()
            lengths = (batch.weight_BS > 0).sum(1).tolist()
            for row, length, right in zip(batch.ids_BS.tolist(), lengths, right_B, strict=True):
                matches[tuple(row[:length])] = right
        return [matches[sequence.ids] for sequence in encoded], total / len(encoded)

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
    """All Hessians of one seed, and the weights that they are for: what a worker needs to solve."""

    original: Weights
    members: dict[str, list[str]]  # site -> linears
    of_task: dict[float, dict[str, Hessians]]  # highlight -> task -> site -> H, adapter attached
    tokens: dict[float, dict[str, float]]
    mixed: Hessians  # all tasks' data, no adapter
    generic: Hessians  # chat and running text, no adapter


def collect(folder: str, options: Options, seed: int) -> int:
    """Run every task's calibration data through the 16-bit base, block by block, unless that was done before."""
    if Path(_file(folder, seed)).exists():
        return seed
    bench = _bench(options)
    model = BlockModel(Checkpoint(options.base), options.device)
    drawn = bench.calibration(seed)
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
    original = {name: weight.cpu() for name, weight in bench.original.items()}
    moments = Moments(original, members, of_task, tokens, mixed, generic)
    save_moments(moments, f"{_file(folder, seed)}.partial")
    os.replace(f"{_file(folder, seed)}.partial", _file(folder, seed))
    return seed


def _file(folder: str, seed: int) -> str:
    return f"{folder}/{seed}.safetensors"


def _kept(options: Options, keep: Path | None, temporary: str) -> str:
    """Where Hessians lie: a folder whose name holds a hash of all that they depend on, or one for this run alone."""
    if keep is None:
        return temporary
    tasks = json.loads(Path(options.tasks).read_text()).values()
    parts = [[read_adapter(Path(a["adapter"])).identity, hash_file(Path(a["splits"]["calibration"]))] for a in tasks]
    facts = [Checkpoint(options.base).fingerprint(), options.calibration_examples, options.highlights, parts]
    folder = keep / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


@cache
def _bench(options: Options) -> Bench:
    """A worker makes it once."""
    torch.set_num_threads(1)
    return Bench(options)


def generic_sequences(tokenizer: Any, count: int, seed: int) -> tuple[Sequence, ...]:
    """What the demo's base saw besides the tasks: plain chat and running English."""
    from models.corpus import plain_chat, plain_english

    rng = random.Random(f"generic/{seed}")
    documents = [(plain_chat if rng.random() < 0.6 else plain_english)(rng) for _ in range(count)]
    texts = [document.heard + document.said for document in documents]
    return tuple(Sequence(tuple(ids), 0) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])


def work(folder: str, options: Options, job: Job) -> tuple[Job, Judged]:
    """Solve a base and judge it. Runs in a worker."""
    bench = _bench(options)
    weights = {} if job.variant == FULL else solve_base(options, _moments(_file(folder, job.seed)), job)
    return job, bench.weigh(weights, job.seed) if job.weighed else bench.judge(weights, job.task)


def solve_base(options: Options, moments: Moments, job: Job) -> Weights:
    """Every site as a job asks."""
    weights: Weights = {}
    for site, names in moments.members.items():
        together_KN = torch.cat([moments.original[name].T for name in names], dim=1)
        quantized_KN = solve_site(options, moments, job, together_KN, site)
        sizes = [moments.original[name].shape[0] for name in names]
        for name, part_KN in zip(names, quantized_KN.split(sizes, dim=1), strict=True):
            weights[name] = part_KN.T.contiguous()
    return weights


def save_moments(moments: Moments, path: str) -> None:
    """To one safetensors file, for the workers."""
    tensors = {f"original/{name}": weight for name, weight in moments.original.items()}
    for highlight, of_task in moments.of_task.items():
        for task, hessians in of_task.items():
            tensors |= {f"task {highlight!r} {task}/{site}": hessian for site, hessian in hessians.items()}
    tensors |= {f"mixed/{site}": hessian for site, hessian in moments.mixed.items()}
    tensors |= {f"generic/{site}": hessian for site, hessian in moments.generic.items()}
    tokens = {repr(highlight): counts for highlight, counts in moments.tokens.items()}
    save_file(tensors, path, {"members": json.dumps(moments.members), "tokens": json.dumps(tokens)})


@cache
def _moments(path: str) -> Moments:
    """A worker reads each seed once."""
    parts: dict[str, Hessians] = {}
    for name, tensor in load_file(path).items():
        part, key = name.split("/", 1)
        parts.setdefault(part, {})[key] = tensor
    with safe_open(path, framework="pt") as file:
        about = {name: json.loads(text) for name, text in file.metadata().items()}
    tokens = {float(highlight): counts for highlight, counts in about["tokens"].items()}
    of_task = {h: {task: parts[f"task {h!r} {task}"] for task in counts} for h, counts in tokens.items()}
    return Moments(parts["original"], about["members"], of_task, tokens, parts["mixed"], parts["generic"])


def solve_site(options: Options, moments: Moments, job: Job, weight_KN: Tensor, site: str) -> Tensor:
    """One site by one quantizer."""
    grid = options.grid(job.bits)
    in_place = replace(grid, act_order=False)
    if job.variant == "rtn":
        return round_to_nearest(weight_KN, in_place).weight_KN()
    if job.variant == "awq":
        return scaled_weight(weight_KN, moments.mixed[site], in_place)
    alone = {"gptq-generic": moments.generic, "gptq-mixed": moments.mixed}
    if job.task:
        alone[BOUND] = moments.of_task[options.highlights[0]][job.task]
    if job.variant in alone:
        return solve(weight_KN, alone[job.variant][site], grid).weight_KN()
    aggregation, highlight = _parts(job.variant)
    of_task, tokens = moments.of_task[highlight], moments.tokens[highlight]
    names = sorted(of_task)
    shares = job.shares or (1 / len(names),) * len(names)
    tasks = [_held(of_task[name][site], tokens[name], share) for name, share in zip(names, shares, strict=True)]
    return solve_together(aggregation, weight_KN, tasks, grid).weight_KN()


def variants(options: Options) -> list[str]:
    """The quantizers that are shared by all tasks."""
    found = ["rtn", "gptq-generic", "gptq-mixed", "awq"]
    for aggregation in options.aggregations:
        found += [_name(aggregation, highlight) for highlight in options.highlights]
    return found


def _name(aggregation: str, highlight: float) -> str:
    return f"mlgptq {aggregation}" + ("" if highlight == 1.0 else f" highlight {highlight:g}")


def _parts(variant: str) -> tuple[str, float]:
    words = variant.split()
    return words[1], float(words[3]) if len(words) > 2 else 1.0


class Run:
    """The workers, and what is known so far."""

    def __init__(self, options: Options, folder: str, pool: Any, out: Path) -> None:
        self.options, self.folder, self.pool, self.out = options, folder, pool, out
        self.start = time.perf_counter()
        self.cells = {(seed, bits): Cell(seed, bits, {}, {}) for bits in options.bits for seed in options.seeds}
        self.tasks = sorted(json.loads(Path(options.tasks).read_text()))

    def measure(self) -> None:
        options = self.options
        collected = self.pool.imap_unordered(partial(collect, self.folder, options), options.seeds)
        list(tqdm(collected, total=len(options.seeds), desc="Hessians of a seed"))
        shared = [name for name in variants(options) if name != "rtn" and MINIMAX_LOSS not in name]
        jobs = [Job(options.seeds[0], 16, FULL)]
        jobs += [Job(options.seeds[0], bits, "rtn") for bits in options.bits]  # no data, so no seed either
        jobs += [Job(*key, name) for key in self.cells for name in shared]
        jobs += [Job(*key, BOUND, task) for key in self.cells for task in self.tasks]
        self._judge(jobs, "solving and judging")
        if MINIMAX_LOSS in options.aggregations:
            for highlight in options.highlights:
                self._minimax_loss(_name(MINIMAX_LOSS, highlight))

    def _judge(self, jobs: list[Job], title: str) -> None:
        for job, judged in self._done(jobs, title):
            for cell in self.cells.values():
                if (job.variant == FULL or cell.bits == job.bits) and (
                    job.variant in (FULL, "rtn") or cell.seed == job.seed
                ):
                    cell.note(job.variant, judged)
            self.write()

    def _minimax_loss(self, variant: str) -> None:
        """Its rounds, for every seed and bit width at once; the best of each is solved once more, to be judged."""
        weighed = self._done([Job(seed, 16, FULL, weighed=True) for seed in self.options.seeds], "weighing 16 bits")
        full = {job.seed: self._losses(judged) for job, judged in weighed}
        shares = {key: torch.ones(len(self.tasks), dtype=torch.float64) / len(self.tasks) for key in self.cells}
        best: dict[tuple[int, int], tuple[float, Job]] = {}
        for number in range(LOSS_ROUNDS):
            jobs = [Job(*key, variant, shares=tuple(shares[key].tolist()), weighed=True) for key in self.cells]
            for job, judged in self._done(jobs, f"{variant}, round {number + 1}"):
                key = job.seed, job.bits
                excess = (self._losses(judged) - full[job.seed]).clamp(min=0)
                if key not in best or float(excess.max()) < best[key][0]:
                    best[key] = float(excess.max()), replace(job, weighed=False)
                shares[key] = raised(shares[key], excess)
        self._judge([job for _, job in best.values()], f"{variant}, judging")

    def _losses(self, judged: Judged) -> Tensor:
        return torch.tensor([judged[name][1] for name in self.tasks], dtype=torch.float64)

    def _done(self, jobs: list[Job], title: str) -> Iterator[tuple[Job, Judged]]:
        done = self.pool.imap_unordered(partial(work, self.folder, self.options), jobs)
        return iter(tqdm(done, total=len(jobs), desc=title))

    def write(self) -> None:
        """The figures and the table, as far as they are known: a run cut short keeps what it had."""
        cells = [cell for cell in self.cells.values() if FULL in cell.points and len(cell.points) > 1]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "options": asdict(self.options),
            "command": f"python -m eval.quant_table {' '.join(sys.argv[1:])}",
            "commit": _commit(),
            "base": Checkpoint(self.options.base).fingerprint(),
            "device": torch.cuda.get_device_name() if self.options.device.startswith("cuda") else "cpu",
            "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "seconds": round(time.perf_counter() - self.start),
        }
        figures = about | {"cells": [asdict(cell) for cell in cells]}
        self.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
        made = (
            f"`{about['command']}` at commit {str(about['commit'])[:12]}, {about['cpu']}, {about['device']}, "
            f"torch {about['torch']}, {about['seconds']} s; base {str(about['base'])[:12]}; "
            f"{self.options.examples} eval examples a task."
        )
        head = f"# Quantizers on the demo's twelve tasks\n\n{__doc__}\nMade by {made}\n"
        self.out.with_suffix(".md").write_text(head + verdict(self.options, cells) + table(self.options, cells))


def _held(hessian_KK: Tensor, tokens: float, share: float = 1.0) -> TaskHessian:
    return TaskHessian(lambda: hessian_KK, tokens, share)


def verdict(options: Options, cells: list[Cell]) -> str:
    """Who wins on the worst task at each width, and where the default stands between mixed data and the bound."""
    default = _name(Settings().aggregation, options.highlights[0])
    lines = [
        "\n## The worst task\n",
        "Mean over seeds (range) of what the worst task loses; the default is "
        f"`{Settings().aggregation}`. The last columns say whether its worst seed is better than mixed data's best "
        "seed, and how much of the way from mixed data to the per-task bound it covers.\n",
        "| bits | in | best aggregation | default | gptq-mixed | bound | better at every seed | of the way |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for bits in options.bits:
        of_bits = [cell for cell in cells if cell.bits == bits]
        for unit, digits in (("points", 2), ("nats", 3)):
            worst = {name: _worst(of_bits, name, unit) for name in [*variants(options), BOUND]}
            if not all(len(worst[name]) == len(options.seeds) for name in (default, "gptq-mixed", BOUND)):
                continue
            means = {name: _mean(seeds) for name, seeds in worst.items() if name.startswith("mlgptq") and seeds}
            best = min(means, key=means.__getitem__)
            mixed, ours, bound = worst["gptq-mixed"], worst[default], worst[BOUND]
            way = f"{(_mean(mixed) - _mean(ours)) / (_mean(mixed) - _mean(bound)):.0%}" if mixed != bound else "no way"
            columns = [f"{best.removeprefix('mlgptq ')} {_spread(worst[best], digits)}"]
            columns += [_spread(one, digits) for one in (ours, mixed, bound)]
            columns += ["yes" if max(ours) < min(mixed) else "no", way]
            lines.append(f"| {bits} | {unit} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def _worst(cells: list[Cell], name: str, unit: str) -> list[float]:
    """What the worst task loses under a variant, at each seed that has been judged whole."""
    done = [cell for cell in cells if len(cell.points.get(name, {})) == len(cell.points[FULL])]
    if unit == "points":
        return [_lost(cell.points[FULL], cell.points[name])[1] for cell in done]
    return [_lost(cell.losses[name], cell.losses[FULL])[1] for cell in done]


def table(options: Options, cells: list[Cell]) -> str:
    """Points lost against 16 bits and nats gained an answer, average and worst task: mean over seeds, and range."""
    lines = []
    for bits in options.bits:
        of_bits = [cell for cell in cells if cell.bits == bits]
        if not of_bits:
            continue
        full = of_bits[0].points[FULL]
        lines += [
            f"\n## {bits} bits\n",
            f"16-bit average {_mean(full.values()):.2f}; {len(of_bits)} calibration seed(s); mean over them (range).\n",
            "| quantizer | points lost | worst task | which | nats gained an answer | worst task | which |",
            "|---|---|---|---|---|---|---|",
        ]
        names = [name for name in of_bits[0].points if name != FULL]
        for name in names:
            done = [cell for cell in of_bits if len(cell.points.get(name, {})) == len(full)]
            if done:
                points = [_lost(cell.points[FULL], cell.points[name]) for cell in done]
                nats = [_lost(cell.losses[name], cell.losses[FULL]) for cell in done]
                lines.append(f"| {name} | {_columns(points, 2)} | {_columns(nats, 3)} |")
    return "\n".join(lines) + "\n"


def _lost(more: dict[str, float], less: dict[str, float]) -> tuple[float, float, str]:
    """Average difference, the worst one and the task that has it."""
    lost = {name: more[name] - less[name] for name in more}
    worst = max(lost, key=lambda name: lost[name])
    return _mean(lost.values()), lost[worst], worst if lost[worst] > 0 else "none"


def _columns(found: list[tuple[float, float, str]], digits: int) -> str:
    averages, worsts = [one[0] for one in found], [one[1] for one in found]
    which = ", ".join(sorted({one[2] for one in found}))
    return " | ".join([_spread(averages, digits), _spread(worsts, digits), which])


def _spread(values: list[float], digits: int) -> str:
    spread = f" ({min(values):.{digits}f}..{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{_mean(values):.{digits}f}{spread}"


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def parse() -> tuple[Options, Path, int, Path | None]:
    default = Options()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default=default.base)
    parser.add_argument("--tasks", default=default.tasks)
    parser.add_argument("--bits", type=int, nargs="+", default=default.bits)
    parser.add_argument("--seeds", type=int, nargs="+", default=default.seeds)
    parser.add_argument("--examples", type=int, default=default.examples, help="eval examples of each task")
    parser.add_argument(
        "--generate",
        action=argparse.BooleanOptionalAction,
        default=default.generate,
        help="judge programs and final numbers by generating; without, they must equal the reference",
    )
    parser.add_argument("--calibration-examples", type=int, default=default.calibration_examples)
    parser.add_argument("--weighing", type=int, default=default.weighing, help="sequences a task for minimax-loss")
    parser.add_argument("--refine", type=int, default=default.refine, help="rounds of refinement")
    parser.add_argument(
        "--group-sizes", type=int, nargs="+", default=default.group_sizes, help="one for each of --bits"
    )
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=default.symmetric)
    parser.add_argument("--act-order", action=argparse.BooleanOptionalAction, default=default.act_order)
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, default=default.clip)
    parser.add_argument("--highlights", type=float, nargs="+", default=default.highlights)
    parser.add_argument("--aggregations", nargs="+", choices=AGGREGATIONS, default=default.aggregations)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes that solve and judge")
    parser.add_argument("--keep", type=Path, help="folder that Hessians are kept in, and found in by the next run")
    parser.add_argument("--out", type=Path, default=Path("eval/results/quant-demo"), help="without its ending")
    args = vars(parser.parse_args())
    out, workers, keep = args.pop("out"), args.pop("workers"), args.pop("keep")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    return Options(**values), out, workers, keep


def main() -> None:
    options, out, workers, keep = parse()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(workers) as pool:
        Run(options, _kept(options, keep, folder), pool, out).measure()
    print(out.with_suffix(".md").read_text())


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
