"""Speculation on the demo's twelve tasks: tokens a step and time beside plain decoding, at several concurrencies.

    python -m perf.speculation --out perf/results/speculation-cpu.json

First each task's answers to some prompts are made and learned, as a server that has run for a while would have. Then
the next prompts are answered with speculation and without, in turns, in a closed loop; answers are compared token for
token. Times are of the processor, as the machine may be shared, and the clock's beside them.

What the drafter would guess at each place of recorded answers is kept as a trace (`speculation-trace.json`), which the
simulator serves at measured step times of this machine and of a 7B on an H200, and `perf/gpu/speculation.py` on a GPU.
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
from typing import Any

import torch

from inlaid.config import AdapterConfig, CacheConfig, EngineConfig, SpeculationConfig
from inlaid.engine.account import Account
from inlaid.engine.engine import Engine, make_engine
from inlaid.engine.request import FinishReason, NewRequest, Request, SamplingParams, Work
from inlaid.engine.speculation import Draft, Speculation
from inlaid.flags import Parser
from inlaid.report.provenance import provenance
from inlaid.report.tables import markdown
from inlaid.sim.traced import NONE, Acceptances, Guesses
from inlaid.text.encoder import RequestEncoder
from inlaid.text.tokenizer import Tokenizer
from inlaid.worker.build import Loaded, build_engine
from perf.speculation_model import CONCURRENCIES, GUESSES, TRACE, h200, simulations, this_machine

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "models" / "demo"
MAX_TOKENS = 120
TRACED = 8  # answers of each task in the trace


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

    @property
    def tasks(self) -> Sequence[str]:
        return list(self._lines)

    def take(self, first: int, count: int) -> list[Ask]:
        """Return prompts number `first` to `first + count` of every task, with the task's name."""
        return [
            (task, self._encoder.conversation([{"role": "user", "content": json.loads(lines[at])["prompt"]}]))
            for at in range(first, first + count)
            for task, lines in self._lines.items()
        ]


def config(speculation: str, length: str = "auto", guesses: int = GUESSES) -> EngineConfig:
    return EngineConfig(
        model=str(DEMO / "base"),
        device="cpu",
        dtype="float32",
        cache=CacheConfig(enable_prefix_caching=False),
        adapters=AdapterConfig(max_loras=12),
        speculation=SpeculationConfig(
            speculation=speculation, num_speculative_tokens=guesses, speculation_length=length
        ),
    )


def engine_on(loaded: Loaded, speculation: str, length: str = "auto", guesses: int = GUESSES) -> Engine:
    """Return a fresh engine on the runner that is loaded."""
    return make_engine(
        config(speculation, length, guesses),
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
    """Return, by task and answer, what the drafter guesses at each place, and how much of it is right. Answers are
    those of plain decoding, and each is learned when it is whole."""
    side = Side(engine_on(loaded, "off"))
    asks = prompts.take(0, learned + asked)
    answers = closed_loop(side, asks, 64, "trace")
    speculation = Speculation(config("suffix").speculation)
    found: dict[str, list[list[Guesses]]] = {}
    for number, ((task, prompt), answer) in enumerate(zip(asks, answers.values(), strict=True)):
        request = Request(
            id=str(number), prompt=prompt, params=SamplingParams(), adapter=task, adapter_name=task,
            account=Account("demo", 0), arrival=0.0, tokens=list(prompt), limit=len(prompt) + MAX_TOKENS,
            stop_ids=frozenset(loaded.model.eos_ids), finish_reason=FinishReason.STOP,
        )  # fmt: skip
        is_traced = number >= learned * len(prompts.tasks)
        places = [NONE]
        for known, token in enumerate(answer[:-1], 1):
            request.tokens.append(token)
            if is_traced:
                places.append(_guessed(speculation, request, answer[known:]))
        if is_traced:
            found.setdefault(task, []).append(places)
        request.tokens = [*prompt, *answer]
        speculation.end(request)
    return Acceptances(found)


def _guessed(speculation: Speculation, request: Request, rest: Sequence[int]) -> Guesses:
    """Return what is guessed where a request stands, given how its answer goes on."""
    draft = speculation._draft(request, GUESSES)
    if draft is None:
        return NONE
    right = next((at for at, (a, b) in enumerate(zip(draft.tokens, rest)) if a != b), min(len(draft.tokens), len(rest)))
    return Guesses(len(draft.tokens), right, draft.source, draft.match)


class _Wrong:
    """Guesses as many tokens as may be."""

    def draft(self, request: Request, most: int) -> Draft | None:
        return Draft((5,) * most) if most else None

    def end(self, request: Request) -> None:
        """Do nothing: there is nothing to learn."""


def step_times(loaded: Loaded, prompts: Prompts, tokens: int = 24) -> list[dict[str, float]]:
    """Return median processor milliseconds of a step by requests and guesses of each."""
    found = []
    for requests in CONCURRENCIES:
        asks = [prompts.take(100 + i // len(prompts.tasks), 1)[i % len(prompts.tasks)] for i in range(requests)]
        for guesses in (0, 1, GUESSES):
            engine = engine_on(loaded, "suffix", "fixed", max(1, guesses))
            scheduler = engine.scheduler
            if guesses:
                assert scheduler.state.speculation is not None
                scheduler.state.speculation.drafter = _Wrong()
            else:
                scheduler.state.speculation = None
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            for i, (task, prompt) in enumerate(asks):
                engine.add(NewRequest(id=f"t{requests}-{guesses}-{i}", prompt=prompt, params=params, adapter=task))
            taken = []
            while engine.has_work:
                begin = time.process_time()
                outputs = engine.step()
                if len(outputs) == requests:
                    taken.append(time.process_time() - begin)
            found.append({"requests": requests, "guesses": guesses, "ms": statistics.median(taken[2:-1]) * 1e3})
    return found


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
            speculation.begin(num_requests, None)
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
    trace = traced(loaded, prompts, learned, TRACED)
    trace.save(TRACE)
    times = step_times(loaded, prompts)
    result: dict[str, Any] = {
        "what": f"the demo's {len(folders)} tasks, float32, greedy, up to {MAX_TOKENS} tokens, after {learned} answers "
        f"of each task; at most {GUESSES} guesses; prefix cache off",
        "host_microseconds_a_request_a_step_at_64": host_cost(),
        "step_times": times,
        "tokens_a_step_with_all_guesses": {name: round(each, 3) for name, each in trace.tokens_a_step().items()},
        "simulated": {
            "7B on an H200": simulations(h200(), trace, CONCURRENCIES, overlap=True),
            "7B on an H200, one kernel": simulations(h200("auto"), trace, CONCURRENCIES, overlap=True),
            "the demo on this CPU": simulations(this_machine(times), trace, CONCURRENCIES, overlap=False),
        },
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
    return result | {"provenance": provenance(packages=("torch",)) | {"threads": 1, "seed": "none: greedy"}}


def as_markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of a result."""
    rows = [
        (
            row["concurrency"], row["tokens_a_step"], row["times_faster_in_processor_time"],
            row["times_faster_by_the_clock"], row["accepted"], f"{row['equal_answers']} of {row['answers']}",
        )
        for row in result["cpu"]
    ]  # fmt: skip
    head = ("requests", "tokens a step", "times faster", "by the clock", "guesses right", "equal answers")
    machines = result["simulated"]
    simulated_rows = [
        (row["concurrency"], machine, row["tokens_a_step"], row["times_faster"], row["times_faster_with_all_guesses"])
        for machine, found in machines.items()
        for row in found["rows"]
    ]
    everything = result["tokens_a_step_with_all_guesses"]
    by_task = [
        (task, value, *(found["times_faster_by_task_at_1"][task] for found in machines.values()))
        for task, value in everything.items()
    ]
    mean = ("mean", round(statistics.mean(everything.values()), 3),
            *(found["mean_over_tasks_at_1"] for found in machines.values()))  # fmt: skip
    rates = result["host_microseconds_a_request_a_step_at_64"]
    times = [(one["requests"], one["guesses"], round(one["ms"], 2)) for one in result["step_times"]]
    return "\n\n".join(
        [
            "# Speculation on the demo's texts",
            f"{result['what']}. `python -m perf.speculation`; commit {result['provenance'].get('commit', '')}.",
            "## Served on this CPU",
            markdown(head, rows, "r"),
            "Times faster: processor seconds without speculation over those with it.",
            "## Simulated",
            "Answers and drafts recorded on the demo (`speculation-trace.json`) at measured step times, on a virtual "
            "clock: times as fast as without drafts.",
            markdown(("requests", "machine", "tokens a step", "as many guesses as pay", "all guesses"), simulated_rows),
            "One request, by task:",
            markdown(("task", "tokens a step, all guesses", *machines), [*by_task, mean]),
            "Step times of this CPU, processor milliseconds:",
            markdown(("requests", "guesses of each", "ms"), times, "r"),
            "Host code, microseconds a request a step at 64 requests: "
            + ", ".join(f"{value} ({kind} text)" for kind, value in rates.items()) + ".",
        ]
    ) + "\n"  # fmt: skip


def main() -> None:
    parser = Parser(description="speculation on the demo's tasks")
    parser.add_argument("--learned", type=int, default=24, help="answers of each task that are learned first")
    parser.add_argument("--asked", type=int, default=4, help="prompts of each task in a round")
    parser.add_argument("--rounds", type=int, default=2, help="rounds, each side in turn")
    parser.add_argument("--concurrencies", type=int, nargs="*", default=list(CONCURRENCIES), help="requests at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "perf" / "results" / "speculation-cpu.json")
    arguments = parser.parse_args()
    result = report(arguments.learned, arguments.asked, arguments.rounds, arguments.concurrencies)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(as_markdown(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
