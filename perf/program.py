"""A program of generate calls, one a sequence, each with its adapter: built, compiled, executed and timed step by step.

    python -m perf.program --lora_ranks 8,16 --num_seqs_per_adapter 4,4 --batch_size 10 --measure_dest measure.txt

The flags are those of `main.py` of the Auto-Batching framework. Adapters are random, of the ranks asked for; the
sequences without one come first. The file of measurements has a labelled line for each step, and JSON lies beside it.
`--opt_config` is a JSON file: `engine`, `scheduler`, `cache` and `adapters` hold fields of inlaid/config.py, `program`
those of inlaid/program/options.py. The default keeps equal calls apart, as equal sequences shall be computed here.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from inlaid.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig, from_dict
from inlaid.files import write_atomically
from inlaid.flags import Parser
from inlaid.llm import LLM
from inlaid.program import Options, Program
from inlaid.program.local import LocalPlan
from inlaid.report.provenance import now, provenance
from perf.programs.steps import Step, StepTimes
from perf.random_adapters import RandomAdapters, make_adapters

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "models" / "demo" / "base"
KINDS = ("distinct", "uniform", "identical")
MAX_ADAPTERS = 1024


def which(kind: str, count: int, generator: random.Random) -> list[int]:
    """Return the number of the adapter of each of `count` sequences of one rank."""
    if kind == "distinct":
        return list(range(count))
    if kind == "identical":
        return [0] * count
    return sorted(generator.randrange(math.ceil(math.sqrt(count))) for _ in range(count))


def adapters_of(args: argparse.Namespace) -> list[tuple[int, int] | None]:
    """Return rank and number of each sequence's adapter; None: it has none. ValueError: the lists do not fit."""
    if len(args.lora_ranks) != len(args.num_seqs_per_adapter):
        raise ValueError("--lora_ranks and --num_seqs_per_adapter must have as many numbers as each other")
    count = sum(args.num_seqs_per_adapter)
    if count > args.batch_size:
        raise ValueError(f"--num_seqs_per_adapter has {count} sequences, --batch_size only {args.batch_size}")
    generator = random.Random(args.seed)
    chosen: list[tuple[int, int] | None] = [None] * (args.batch_size - count)
    for rank, sequences in zip(args.lora_ranks, args.num_seqs_per_adapter, strict=True):
        chosen += [(rank, number) for number in which(args.request_type, sequences, generator)]
    return chosen


def build(adapters: Sequence[tuple[int, int] | None], gen_len: int) -> Program:
    """Return the program: a call for each sequence."""
    program = Program()
    program.input("prompt")
    for number, adapter in enumerate(adapters):
        name = None if adapter is None else name_of(*adapter)
        program.generate(f"seq{number}", "{prompt}", name, max_tokens=gen_len, temperature=0, ignore_eos=True)
    return program


def name_of(rank: int, number: int) -> str:
    return f"r{rank}-{number}"


def load(args: argparse.Namespace, adapters: Sequence[tuple[int, int] | None], folder: Path) -> tuple[LLM, Options]:
    """Load the model with random adapters, as the file of options says."""
    given = json.loads(args.opt_config.read_text())
    unknown = set(given) - {"engine", "scheduler", "cache", "adapters", "program"}
    if unknown:
        raise ValueError(f"{args.opt_config}: unknown part {', '.join(sorted(unknown))}")
    paths: dict[str, str] = {}
    for rank in sorted({adapter[0] for adapter in adapters if adapter is not None}):
        count = 1 + max(adapter[1] for adapter in adapters if adapter is not None and adapter[0] == rank)
        made = make_adapters(args.model, RandomAdapters(count, (rank,)), folder / str(rank), progress=False)
        paths |= {name_of(rank, number): path for number, (_, path) in enumerate(made)}
    sizes = {"max_loras": max(1, len(paths)), **given.get("adapters", {})}
    engine = {
        "model": str(args.model),
        **given.get("engine", {}),
        "scheduler": from_dict(SchedulerConfig, given.get("scheduler", {})),
        "cache": from_dict(CacheConfig, given.get("cache", {})),
        "adapters": from_dict(AdapterConfig, sizes),
    }
    llm = LLM(str(args.model), paths, config=from_dict(EngineConfig, engine))
    return llm, msgspec.convert({**given.get("program", {}), "fuse_decode": args.fuse_decode}, Options)


def trial(llm: LLM, plan: LocalPlan, times: StepTimes, prompt: str) -> list[Step]:
    """Execute once, with nothing in the prefix cache."""
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.scheduler.pool.clear()
    times.take()
    results = plan.execute({"prompt": prompt})
    assert not results.failures, results.failures
    return times.take()


def report(trials: Sequence[Sequence[Step]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return a labelled line for each step, and the same as JSON."""
    lines, rows = [], []
    for number, steps in enumerate(trials):
        for index, step in enumerate(steps):
            lines.append(
                f"trial {number} step {index} {step.phase}: {step.ms:.3f} ms, {step.sequences} sequences, "
                f"{step.tokens} tokens, {step.adapters} adapters"
            )
        phases = {phase: [step.ms for step in steps if step.phase == phase] for phase in ("prefill", "decode")}
        rows.append(
            {
                "prefill_ms": sum(phases["prefill"]),
                "decode_ms": sum(phases["decode"]),
                "decode_steps": len(phases["decode"]),
                "decode_step_median_ms": statistics.median(phases["decode"]) if phases["decode"] else None,
                "steps": [asdict(step) for step in steps],
            }
        )
    return lines, rows


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1")


def parser() -> Parser:
    made = Parser(prog="perf.program", description=(__doc__ or "").split("\n")[0])
    here = Path(__file__).parent / "programs"
    made.add_argument("--opt_config", type=Path, default=here / "default.json", help="JSON file of options")
    made.add_argument("--gen_len", type=int, default=32, help="tokens of each answer")
    made.add_argument("--prompt", type=Path, default=here / "default.txt", help="text file with the prompt")
    made.add_argument("--lora_ranks", type=_numbers, default=[], help="ranks, separated by commas")
    made.add_argument("--batch_size", type=int, default=1, help="sequences")
    made.add_argument("--num_seqs_per_adapter", type=_numbers, default=[], help="sequences of each rank")
    made.add_argument("--request_type", choices=KINDS, default="uniform", help="adapters of the sequences of one rank")
    made.add_argument("--measure", type=_switch, default=False, nargs="?", const=True, help="write the times of steps")
    made.add_argument("--measure_dest", type=Path, default=Path("measure.txt"), help="file of the times")
    made.add_argument("--warmup_trials", type=int, default=3, help="executions before those that count")
    made.add_argument("--measure_trials", type=int, default=1, help="executions that count")
    made.add_argument("--fuse_decode", type=_switch, default=True, help="False: one adapter's sequences at a time")
    made.add_argument("--model", type=Path, default=DEMO, help="folder of the model")
    made.add_argument("--seed", type=int, default=0, help="seed of --request_type uniform")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    made = parser()
    args = made.parse_args(argv)
    try:
        adapters = adapters_of(args)
        with tempfile.TemporaryDirectory() as folder:
            llm, options = load(args, adapters, Path(folder))
    except (ValueError, OSError, msgspec.ValidationError) as error:
        print(f"perf.program: {error}", file=sys.stderr)
        return 2
    plan = build(adapters, args.gen_len).compile(llm, options)
    print(plan.show())
    prompt = args.prompt.read_text().strip()
    times = StepTimes(llm.engine)
    for _ in range(args.warmup_trials):
        trial(llm, plan, times, prompt)
    lines, rows = report([trial(llm, plan, times, prompt) for _ in range(args.measure_trials)])
    about = {**provenance(seed=args.seed, packages=("torch",)), "date": now(), "sequences": len(adapters)}
    for row in rows:
        print(json.dumps({name: value for name, value in row.items() if name != "steps"}))
    if args.measure:
        args.measure_dest.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.measure_dest, ("\n".join(lines) + "\n").encode())
        result = {**about, "fuse_decode": args.fuse_decode, "trials": rows}
        write_atomically(args.measure_dest.with_suffix(".json"), (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
