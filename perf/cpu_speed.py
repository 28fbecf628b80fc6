"""inlaid against transformers + peft on a CPU: the demo's twelve adapters, 48 requests of 64 tokens each, in one run.

peft answers adapter by adapter; it is given every way of doing so that we know (batches of one, two and four; adapters
merged into the base first), with its key-value cache, in inference mode, and its best is what counts. Its mixed-batch
mode (`adapter_names`) is measured beside it. The sides take turns, so that a busy machine is unfair to neither; medians
are compared, by the clock and in processor time, and so are the tokens. The last line is JSON, also written to
perf/results/cpu-speed.json.

    python -m perf.cpu_speed [--repeats 5] [--threads 1]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from inlaid.adapters.peft import read_adapter
from inlaid.config import EngineConfig
from inlaid.engine.engine import Engine, make_engine
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.report.provenance import provenance
from inlaid.worker.loading import LoadedModel, load_model

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "models" / "demo"
MAX_TOKENS = 64
PER_ADAPTER = 4

BY_ADAPTER, MIXED = "peft, adapter by adapter", "peft, all adapters in one batch"

Answers = dict[str, list[int]]


@dataclass(frozen=True)
class Ask:
    """One request of the workload."""

    id: str
    adapter: str
    prompt: list[int]


def workload(adapters: list[str], tokenizer: Any) -> list[Ask]:
    """Read the first prompts of each adapter's own eval split, in its chat template; adapters take turns."""
    asks = []
    for index in range(PER_ADAPTER):
        for adapter in adapters:
            line = (ROOT / "data" / adapter / "eval.jsonl").read_text(encoding="utf-8").splitlines()[index]
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": json.loads(line)["prompt"]}], tokenize=False, add_generation_prompt=True
            )
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            asks.append(Ask(f"{adapter}-{index}", adapter, prompt))
    return asks


class Inlaid:
    """The engine, in this process."""

    def __init__(self, adapters: dict[str, Path]) -> None:
        config = EngineConfig(model=str(DEMO / "base"), device="cpu", dtype="float32")
        self.loaded: LoadedModel = load_model(config, progress=False)
        for name, folder in adapters.items():
            self.loaded.adapters.add(name, read_adapter(folder, self.loaded.spec, self.loaded.dtype))
        self.config = config

    def answer(self, asks: list[Ask]) -> Answers:
        """Answer on a fresh engine, so that no prompt is found in the prefix cache."""
        engine = self._engine()
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
        for ask in asks:
            engine.add(NewRequest(id=ask.id, prompt=ask.prompt, adapter=ask.adapter, params=params))
        answers: Answers = {ask.id: [] for ask in asks}
        while engine.has_work:
            for output in engine.step():
                answers[output.id] += output.tokens
        return answers

    def _engine(self) -> Engine:
        return make_engine(
            self.config,
            self.loaded.runner,
            time.monotonic,
            num_blocks=self.loaded.num_blocks,
            max_model_len=self.loaded.max_model_len,
            adapters=self.loaded.adapters,
            eos_ids=self.loaded.spec.eos_token_ids,
            base_version=self.loaded.base_version,
        )


class Peft:
    """transformers + peft, adapter by adapter."""

    def __init__(self, adapters: dict[str, Path], tokenizer: Any) -> None:
        base = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
        names = list(adapters)
        self.model = PeftModel.from_pretrained(base, adapters[names[0]], adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(adapters[name], name)
        self.model.eval()
        self.pad = tokenizer.pad_token_id
        self.model.generation_config.eos_token_id = None

    def by_adapter(self, asks: list[Ask], batch: int, merged: bool = False) -> Answers:
        answers: Answers = {}
        for adapter in dict.fromkeys(ask.adapter for ask in asks):
            self.model.set_adapter(adapter)
            if merged:
                self.model.merge_adapter([adapter])
            mine = [ask for ask in asks if ask.adapter == adapter]
            for start in range(0, len(mine), batch):
                answers |= self._generate(mine[start : start + batch])
            if merged:
                self.model.unmerge_adapter()
        return answers

    def mixed(self, asks: list[Ask]) -> Answers:
        return self._generate(asks, adapter_names=[ask.adapter for ask in asks])

    @torch.inference_mode()
    def _generate(self, asks: list[Ask], **options: Any) -> Answers:
        longest = max(len(ask.prompt) for ask in asks)
        ids = torch.tensor([[self.pad] * (longest - len(ask.prompt)) + ask.prompt for ask in asks])
        mask = torch.tensor([[0] * (longest - len(ask.prompt)) + [1] * len(ask.prompt) for ask in asks])
        made = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.pad,
            **options,
        )
        return {ask.id: row[longest:].tolist() for ask, row in zip(asks, made, strict=True)}


@dataclass
class Timing:
    """Seconds of one side, by the clock and in processor time, round by round."""

    wall: list[float]
    processor: list[float]


def measure(sides: dict[str, Callable[[], Answers]], repeats: int) -> tuple[dict[str, Timing], dict[str, Answers]]:
    """Time the sides in turns.

    The first round is not counted, except for sides that took more than 1.5 times as long as the best of peft: they are
    not run again and keep that one time.
    """
    timings: dict[str, Timing] = {}
    answers: dict[str, Answers] = {}
    with Bar(total=(repeats + 1) * len(sides), desc="measuring", file=sys.stderr) as bar:
        for name, side in sides.items():
            timings[name], answers[name] = _time(side)
            bar.update()
        best = min(timings[name].processor[0] for name in sides if name.startswith(BY_ADAPTER))
        racing = [name for name in sides if timings[name].processor[0] <= 1.5 * best]
        bar.total = len(sides) + repeats * len(racing)
        for name in racing:
            timings[name] = Timing([], [])
        for _ in range(repeats):
            for name in racing:
                timing, answers[name] = _time(sides[name])
                timings[name].wall += timing.wall
                timings[name].processor += timing.processor
                bar.update()
    return timings, answers


def _time(side: Callable[[], Answers]) -> tuple[Timing, Answers]:
    wall, processor = time.perf_counter(), time.process_time()
    answers = side()
    return Timing([time.perf_counter() - wall], [time.process_time() - processor]), answers


def matmul_rate(rows: int) -> float:
    """Measure GFLOP/s of this machine's fp32 matmul at a decode step's shape."""
    x, w = torch.randn(rows, 256), torch.randn(256, 1536)
    out = torch.empty(rows, 1536)
    for _ in range(20):
        torch.mm(x, w, out=out)
    start = time.perf_counter()
    for _ in range(300):
        torch.mm(x, w, out=out)
    return 300 * 2 * rows * 256 * 1536 / (time.perf_counter() - start) / 1e9


def base_flops_per_token(loaded: LoadedModel) -> int:
    """Count the operations of the base's matmuls alone; adapters, attention and prompts come on top."""
    spec = loaded.spec
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    per_layer = sum(n * k for n, k in map(spec.module_shape, modules))
    return 2 * (spec.num_layers * per_layer + spec.vocab_size * spec.hidden_size)


def report(repeats: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    folders = {folder.name: folder for folder in sorted((DEMO / "adapters").iterdir()) if folder.is_dir()}
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    asks = workload(list(folders), tokenizer)
    ours, theirs = Inlaid(folders), Peft(folders, tokenizer)
    sides: dict[str, Callable[[], Answers]] = {
        "inlaid": lambda: ours.answer(asks),
        f"{BY_ADAPTER}, batches of 4": lambda: theirs.by_adapter(asks, 4),
        f"{BY_ADAPTER}, batches of 2": lambda: theirs.by_adapter(asks, 2),
        f"{BY_ADAPTER}, batches of 1": lambda: theirs.by_adapter(asks, 1),
        f"{BY_ADAPTER}, merged, batches of 4": lambda: theirs.by_adapter(asks, 4, merged=True),
        MIXED: lambda: theirs.mixed(asks),
    }
    timings, answers = measure(sides, repeats)
    wall = {name: statistics.median(timing.wall) for name, timing in timings.items()}
    processor = {name: statistics.median(timing.processor) for name, timing in timings.items()}
    tokens = MAX_TOKENS * len(asks)
    best = min((name for name in sides if name.startswith(BY_ADAPTER)), key=lambda name: processor[name])
    same = sum(answers["inlaid"][ask.id] == answers[best][ask.id] for ask in asks)
    rate = matmul_rate(len(asks))
    return {
        "what": f"{len(folders)} adapters, {len(asks)} requests, {MAX_TOKENS} tokens each, fp32, greedy",
        "prompt_tokens": sum(len(ask.prompt) for ask in asks),
        "tokens_per_second": {name: round(tokens / median, 1) for name, median in wall.items()},
        "tokens_per_processor_second": {name: round(tokens / median, 1) for name, median in processor.items()},
        "seconds": {name: [round(value, 3) for value in timing.wall] for name, timing in timings.items()},
        "processor_seconds": {
            name: [round(value, 3) for value in timing.processor] for name, timing in timings.items()
        },
        "best_of_peft_adapter_by_adapter": best,
        "times_faster": round(wall[best] / wall["inlaid"], 2),
        "times_faster_in_processor_time": round(processor[best] / processor["inlaid"], 2),
        "times_faster_than_mixed_peft": round(wall[MIXED] / wall["inlaid"], 2),
        "requests_with_equal_tokens": f"{same} of {len(asks)}",
        "ceiling": {
            "matmul_gflops_at_48_rows": round(rate, 1),
            "base_matmuls_alone_tokens_per_second": round(rate * 1e9 / base_flops_per_token(ours.loaded), 1),
        },
        "provenance": {
            **provenance(packages=("torch", "transformers", "peft")),
            "load_average": os.getloadavg()[0],
            "threads": threads,
            "seed": "none: greedy, prompts are the first of each eval split",
        },
    }


def main() -> None:
    parser = Parser(description="inlaid against transformers + peft on a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="threads for matmuls, both sides; default: torch's own",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "cpu-speed.json")
    arguments = parser.parse_args()
    result = report(arguments.repeats, arguments.threads)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
