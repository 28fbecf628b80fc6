"""Speculation on the demo's twelve tasks: tokens a step and time beside plain decoding, at several concurrencies.

    python -m perf.speculation --out perf/results/speculation-cpu.json

First each task's answers to some prompts are made and learned, as a server that has run for a while would have. Then
the next prompts are answered with speculation and without, in turns, in a closed loop; answers are compared token for
token. Times are of the processor, as the machine may be shared, and the clock's beside them. The acceptance of each
step is kept as a trace, which the simulator serves at the step times that were measured of a 7B on an H200 (README).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import torch

from inlaid.config import AdapterConfig, CacheConfig, EngineConfig, SpeculationConfig
from inlaid.engine.account import Account
from inlaid.engine.engine import Engine, make_engine
from inlaid.engine.request import NewRequest, Request, SamplingParams, Work
from inlaid.engine.speculation import Speculation
from inlaid.flags import Parser
from inlaid.report.provenance import provenance
from inlaid.report.tables import markdown
from inlaid.sim.cost import CostModel
from inlaid.sim.request_log import Arrival
from inlaid.sim.simulate import Setup, simulate
from inlaid.sim.traced import Acceptances
from inlaid.text.encoder import RequestEncoder
from inlaid.text.tokenizer import Tokenizer
from inlaid.worker.build import Loaded, build_engine

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "models" / "demo"
CONCURRENCIES = (1, 4, 16, 64)
MAX_TOKENS = 120
GUESSES = 8
SIMULATED = 480  # tokens of a simulated answer: ten of the demo's, so that what is learned first counts as it should
# Median milliseconds of a step of a 7B with 32 adapters by rows, `perf/results/h200-ac6fdf2.json`, stage offline-7b.
H200_7B: Mapping[int, float] = MappingProxyType({1: 2.713, 16: 3.699, 64: 6.756})
H200_HOST = 0.6  # milliseconds of host work that a step with drafts no longer hides; an upper guess, not measured


@dataclass
class Side:
    """One way of decoding: its engine, and what the closed loops on it took."""

    engine: Engine
    processor: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    yields: dict[str, list[int]] = field(default_factory=dict)  # tokens of each decode, by task


Ask = tuple[str, list[int]]  # a task and a prompt


class Prompts:
    """Prompts of each task's eval split, in its chat template, task after task in turn."""

    def __init__(self, loaded: Loaded, tasks: Sequence[str]) -> None:
        model = loaded.model
        self._encoder = RequestEncoder(Tokenizer(model.folder), model.vocab_size, model.max_model_len)
        self._lines = {task: (ROOT / "data" / task / "eval.jsonl").read_text().splitlines() for task in tasks}

    def take(self, first: int, count: int) -> list[Ask]:
        """Return prompts number `first` to `first + count` of every task, with the task's name."""
        return [
            (task, self._encoder.conversation([{"role": "user", "content": json.loads(lines[at])["prompt"]}]))
            for at in range(first, first + count)
            for task, lines in self._lines.items()
        ]


def config(speculation: str, length: str = "auto") -> EngineConfig:
    return EngineConfig(
        model=str(DEMO / "base"),
        device="cpu",
        dtype="float32",
        cache=CacheConfig(enable_prefix_caching=False),
        adapters=AdapterConfig(max_loras=12),
        speculation=SpeculationConfig(
            speculation=speculation, num_speculative_tokens=GUESSES, speculation_length=length
        ),
    )


def engine_on(loaded: Loaded, speculation: str, length: str = "auto") -> Engine:
    """Return a fresh engine on the runner that is loaded."""
    return make_engine(
        config(speculation, length),
        loaded.engine.runner,
        time.monotonic,
        num_blocks=loaded.model.num_blocks,
        max_model_len=loaded.model.max_model_len,
        adapters=loaded.engine.scheduler.adapters,
        eos_ids=loaded.model.eos_ids,
        base_version=loaded.model.base_version,
    )


def closed_loop(side: Side, asks: Sequence[Ask], concurrency: int, name: str) -> dict[str, list[int]]:
    """Answer the prompts, at most `concurrency` at a time; return the answers by request."""
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    answers: dict[str, list[int]] = {}
    waiting = list(reversed(asks))
    tasks: dict[str, str] = {}
    running = 0
    clock, processor = time.perf_counter(), time.process_time()
    while waiting or running:
        while waiting and running < concurrency:
            task, prompt = waiting.pop()
            request_id = f"{name}-{len(tasks)}"
            tasks[request_id], answers[request_id] = task, []
            side.engine.add(NewRequest(id=request_id, prompt=prompt, params=params, adapter=task, tenant="demo"))
            running += 1
        for output in side.engine.step():
            assert output.refusal is None, output.refusal
            if answers[output.id]:
                side.yields.setdefault(tasks[output.id], []).append(len(output.tokens))
            answers[output.id] += output.tokens
            running -= output.finish_reason is not None
    side.clock.append(time.perf_counter() - clock)
    side.processor.append(time.process_time() - processor)
    return answers


def compared(plain: Side, fast: Side, asked: Sequence[list[Ask]], concurrency: int) -> dict[str, Any]:
    """Compare both sides at one concurrency, in rounds of prompts."""
    speculation = fast.engine.scheduler.state.speculation
    assert speculation is not None
    before = replace(speculation.total)
    for side in (plain, fast):
        side.yields, side.clock, side.processor = {}, [], []
    same = total = 0
    for turn, asks in enumerate(asked):
        name = f"c{concurrency}-{turn}"
        one = closed_loop(plain, asks, concurrency, name + "-off")
        other = closed_loop(fast, asks, concurrency, name + "-on")
        same += sum(a == b for a, b in zip(one.values(), other.values(), strict=True))
        total += len(asks)
    by_task = {task: round(statistics.mean(each), 3) for task, each in sorted(fast.yields.items())}
    drafts, guesses = speculation.total.drafts - before.drafts, speculation.total.guesses - before.guesses
    return {
        "concurrency": concurrency,
        "answers": total,
        "equal_answers": same,
        "tokens_a_step": round(statistics.mean(by_task.values()), 3),
        "tokens_a_step_by_task": by_task,
        "guesses_a_draft": round(guesses / max(1, drafts), 2),
        "accepted": round((speculation.total.accepted - before.accepted) / max(1, guesses), 3),
        "times_faster_in_processor_time": round(sum(plain.processor) / sum(fast.processor), 3),
        "times_faster_by_the_clock": round(sum(plain.clock) / sum(fast.clock), 3),
        "processor_seconds": {
            "off": [round(s, 3) for s in plain.processor],
            "on": [round(s, 3) for s in fast.processor],
        },
    }


def traced(loaded: Loaded, prompts: Prompts, learned: int, asked: int) -> Acceptances:
    """Return, by task, the guesses and how many were right of each decode, with every guess taken."""
    side = Side(engine_on(loaded, "suffix", "fixed"))
    closed_loop(side, prompts.take(0, learned), 64, "learn-trace")
    found: dict[str, list[tuple[int, int]]] = {}
    scheduler = side.engine.scheduler
    commit = scheduler.commit

    def noted(batch: Any, result: Any, now: float) -> Any:
        sampled = iter(result.sampled)
        for work in batch.works:
            if work.samples:
                one = next(sampled)
                if work.is_decode:
                    found.setdefault(work.request.adapter_name, []).append((len(work.draft), len(one.following)))
        return commit(batch, result, now)

    scheduler.commit = noted  # type: ignore[method-assign]
    closed_loop(side, prompts.take(learned, asked), 16, "trace")
    return Acceptances(found)


def h200() -> CostModel:
    """Return the measured steps of a 7B on an H200 as a cost model: a line through 1 and 64 rows."""
    slope = (H200_7B[64] - H200_7B[1]) / 63
    return CostModel(name="h200-7b", source="median steps of h200-ac6fdf2.json", step=(H200_7B[1] - slope) / 1e3,
                     decodes=slope / 1e3, prefill_tokens=2e-5)  # fmt: skip


def simulated(acceptances: Acceptances, concurrency: int) -> dict[str, Any]:
    """Serve answers side by side in the simulator at a 7B's step times, with the trace's drafts and without; each task
    is first once."""
    tasks = sorted(acceptances.by_adapter)
    cost = replace(h200(), drafts=H200_HOST / 1e3)
    seconds = {}
    for name, trace in (("off", None), ("on", acceptances)):
        setup = Setup(
            cost, num_tokens=400_000, acceptances=trace, num_guesses=GUESSES, scheduler={"max_num_seqs": 256},
            ranks=dict.fromkeys(tasks, 16), resident=tuple(tasks),
        )  # fmt: skip
        params = SamplingParams(max_tokens=2 * SIMULATED, temperature=0.0)
        seconds[name] = sum(
            simulate([
                Arrival(0.0, NewRequest(
                    id=str(i), prompt=[3] * 60, adapter=tasks[(first + i) % len(tasks)], true_output_len=SIMULATED,
                    params=params,
                ))
                for i in range(concurrency)
            ], setup).end
            for first in range(len(tasks))
        )  # fmt: skip
    return {"concurrency": concurrency, "times_faster": round(seconds["off"] / seconds["on"], 3)}


def host_cost(num_requests: int = 64, steps: int = 200) -> dict[str, float]:
    """Return the microseconds of choosing drafts, for a request in a step: of texts that repeat, and that do not."""
    found = {}
    for kind, size in (("repeating", 40), ("never repeating", 100_000)):
        generator = Random(0)
        speculation = Speculation(SpeculationConfig(speculation="suffix", speculation_length="auto"))
        asked = []
        for i in range(num_requests):
            prompt = [generator.randrange(size) for _ in range(500)]
            asked.append(
                Request(
                    id=str(i),
                    prompt=prompt,
                    params=SamplingParams(),
                    adapter=f"a{i % 12}",
                    adapter_name=f"a{i % 12}",
                    account=Account("t", 0),
                    arrival=0.0,
                    tokens=list(prompt),
                    limit=4000,
                )
            )
            speculation.drafter.book.learn(asked[-1], "".join(map(chr, prompt)))  # type: ignore[attr-defined]
        taken: list[float] = []
        for _ in range(steps):
            for one in asked:
                one.tokens.append(generator.randrange(size))
            works = [Work(one, len(one.tokens) - 1, 1, True) for one in asked]
            speculation._now.pause = 0  # every step looks: the dearest case
            started = time.perf_counter()
            speculation.choose(works, 2048)
            taken.append(time.perf_counter() - started)
        found[kind] = round(statistics.median(taken) / num_requests * 1e6, 2)
    return found


def report(learned: int, asked: int, rounds: int, concurrencies: Sequence[int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    folders = {folder.name: str(folder) for folder in sorted((DEMO / "adapters").iterdir()) if folder.is_dir()}
    loaded = build_engine(config("off"), folders)
    prompts = Prompts(loaded, list(folders))
    result: dict[str, Any] = {
        "what": f"the demo's {len(folders)} tasks, float32, greedy, up to {MAX_TOKENS} tokens, after {learned} answers "
        f"of each task; at most {GUESSES} guesses; prefix cache off",
        "host_microseconds_a_request_a_step_at_64": host_cost(),
        "cpu": [],
    }
    plain, fast = Side(engine_on(loaded, "off")), Side(engine_on(loaded, "suffix"))
    closed_loop(fast, prompts.take(0, learned), 64, "learn")
    first = learned
    for concurrency in concurrencies:
        count = max(asked, -(-concurrency // len(folders)))  # of each task, so that there are as many requests
        asks = [prompts.take(first + turn * count, count) for turn in range(rounds)]
        first += rounds * count
        row = compared(plain, fast, asks, concurrency)
        result["cpu"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    acceptances = traced(loaded, prompts, learned, rounds * asked)
    result["trace"] = acceptances.summary()
    result["simulated_7b_on_h200"] = {
        "what": f"the trace's drafts at the measured step times {dict(H200_7B)} ms by rows (32 adapters), a guess "
        f"priced as a row, and {H200_HOST} ms of host work a step that drafts no longer hide; attention to several "
        "queries not measured",
        "rows": [simulated(acceptances, concurrency) for concurrency in concurrencies],
    }
    return result | {"provenance": provenance(packages=("torch",)) | {"threads": 1, "seed": "none: greedy"}}


def as_markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of a result."""
    rows = [
        (
            row["concurrency"], row["tokens_a_step"], row["times_faster_in_processor_time"],
            row["times_faster_by_the_clock"], row["accepted"], f"{row['equal_answers']} of {row['answers']}",
            simulated["times_faster"],
        )
        for row, simulated in zip(result["cpu"], result["simulated_7b_on_h200"]["rows"], strict=True)
    ]  # fmt: skip
    head = (
        "requests",
        "tokens a step",
        "times faster",
        "by the clock",
        "guesses right",
        "equal answers",
        "7B, simulated",
    )
    by_task = result["cpu"][0]["tokens_a_step_by_task"]
    rates = result["host_microseconds_a_request_a_step_at_64"]
    return "\n\n".join(
        [
            "# Speculation on a CPU",
            f"{result['what']}. `python -m perf.speculation`; commit {result['provenance'].get('commit', '')}.",
            markdown(head, rows, "r"),
            "Times faster: processor seconds without speculation over those with it. 7B, simulated: "
            + result["simulated_7b_on_h200"]["what"] + ".",
            f"Tokens a step by task, at {result['cpu'][0]['concurrency']} request(s):",
            markdown(("task", "tokens a step"), list(by_task.items())),
            "Host code, microseconds a request a step at 64 requests: "
            + ", ".join(f"{value} ({kind} text)" for kind, value in rates.items()) + ".",
        ]
    ) + "\n"  # fmt: skip


def main() -> None:
    parser = Parser(description="speculation on the demo's tasks")
    parser.add_argument("--learned", type=int, default=24, help="answers of each task that are learned first")
    parser.add_argument("--asked", type=int, default=4, help="prompts of each task in a round")
    parser.add_argument("--rounds", type=int, default=2, help="rounds, each side in turn")
    parser.add_argument("--concurrencies", type=int, nargs="+", default=list(CONCURRENCIES), help="requests at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "speculation-cpu.json")
    arguments = parser.parse_args()
    result = report(arguments.learned, arguments.asked, arguments.rounds, arguments.concurrencies)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(as_markdown(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
