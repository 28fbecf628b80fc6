"""Steps that check guesses, on a GPU: their time by requests and guesses, whether answers stay what they are, and what
guesses bring that are right as often as on the demo's texts. A stage of bench.py.

Random weights make no text that repeats itself. So first the guesses are the answers that plain decoding gave, all
right or with every third one wrong. Then the demo's recorded trace (`perf/speculation.py`) says at each place of an
answer what guesses there are and how many of them are right; the runner's results are changed to say so. All else is
what a server does: lengths, steps, host code, the clock.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import mean, median
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

from inlaid.config import SpeculationConfig
from inlaid.engine.request import Batch, NewRequest, Request, Sampled, SamplingParams, StepResult, Work
from inlaid.engine.speculation import Draft, Speculation
from inlaid.sim.traced import Acceptances, TracedDrafter
from inlaid.worker.build import Loaded
from perf.gpu import Keep, offline
from perf.speculation_model import TRACE

ADAPTERS: Mapping[str, int] = MappingProxyType({"7b": 32, "8b": 32, "tiny": 2})
CONCURRENCIES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"7b": (1, 4, 16, 64), "8b": (1, 4, 16, 64), "tiny": (1, 2)}
)
GUESSES = (1, 3, 7)
WRONG = 3  # every so many tokens of an answer, in the turn with wrong guesses
OUTPUT: Mapping[str, int] = MappingProxyType({"7b": 128, "8b": 128, "tiny": 6})
REQUESTS: Mapping[str, int] = MappingProxyType({"7b": 24, "8b": 24, "tiny": 2})  # by the trace, at least
MOST = 8  # guesses in the turns by the trace
WORD = 7  # what the trace's guesses are


class Remembered:
    """Guesses known answers, every `wrong`-th token of them wrong; 0: none."""

    def __init__(self, answers: Mapping[str, list[int]], guesses: int, wrong: int) -> None:
        self._answers, self._guesses, self._wrong = answers, guesses, wrong

    def draft(self, request: Request, most: int) -> Draft | None:
        first = request.num_outputs
        known = self._answers[request.id.partition(":")[2]][first:][: min(most, self._guesses)]
        tokens = tuple(t ^ 1 if self._wrong and (first + i) % self._wrong == 0 else t for i, t in enumerate(known))
        return Draft(tokens, match=4) if tokens else None

    def end(self, request: Request) -> None:
        """Do nothing: there is nothing to learn."""


class Told(TracedDrafter):
    """Guesses as the trace has them, and makes the runner's results say which of them are right."""

    def draft(self, request: Request, most: int) -> Draft | None:
        place = self.at(request)
        tokens = (WORD,) * min(place.guesses, most)
        return Draft(tokens, place.source, place.match) if tokens else None

    def told(self, work: Work, sampled: Sampled) -> Sampled:
        """Return what a work with a draft brings by the trace."""
        right = min(self.at(work.request).right, len(work.draft))
        made = [Sampled(token) for token in (*work.draft[:right], max(sampled.token, 0))]
        return Sampled(made[0].token, None, tuple(made[1:]))

    @contextmanager
    def over(self, runner: Any) -> Iterator[None]:
        """Change what the runner's steps bring while the body runs."""
        submit, collect = runner.submit, runner.collect
        batches: dict[int, Batch] = {}

        def noted(batch: Batch) -> Any:
            ticket = submit(batch)
            batches[id(ticket)] = batch
            return ticket

        def changed(ticket: Any) -> StepResult:
            works = [work for work in batches.pop(id(ticket)).works if work.samples]
            result = collect(ticket)
            sampled = [self.told(w, one) if w.draft else one for w, one in zip(works, result.sampled, strict=True)]
            return StepResult(sampled, result.prompt_logprobs, result.not_finite)

        with patch.object(runner, "submit", noted), patch.object(runner, "collect", changed):
            yield


class HostTime:
    """Medians of what the host's calls of a step take, in milliseconds."""

    def __init__(self, loaded: Loaded) -> None:
        engine = loaded.engine
        self._calls = ((engine.scheduler, "schedule"), (engine.runner, "submit"), (engine.runner, "collect"),
                       (engine.scheduler, "commit"))  # fmt: skip
        self._taken: dict[str, list[float]] = {name: [] for _, name in self._calls}

    @contextmanager
    def measured(self) -> Iterator[None]:
        inners = [(owner, name, getattr(owner, name)) for owner, name in self._calls]
        for owner, name, inner in inners:
            setattr(owner, name, self._timed(inner, self._taken[name]))
        try:
            yield
        finally:
            for owner, name, _ in inners:
                delattr(owner, name)

    @staticmethod
    def _timed(inner: Any, taken: list[float]) -> Any:
        def call(*given: Any) -> Any:
            begin = time.perf_counter()
            made = inner(*given)
            if made is not None:
                taken.append((time.perf_counter() - begin) * 1e3)
            return made

        return call

    def medians(self) -> dict[str, float]:
        return {name: round(median(taken), 4) for name, taken in self._taken.items() if taken}


def serve(loaded: Loaded, prompts: Mapping[str, list[int]], names: list[str], output: int, turn: str) -> dict[str, Any]:
    """Answer all prompts side by side; return the answers, and the time of the steps that had no prompts."""
    engine, host = loaded.engine, HostTime(loaded)
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    for i, (name, prompt) in enumerate(prompts.items()):
        engine.add(NewRequest(id=f"{turn}:{name}", prompt=prompt, params=params, adapter=names[i % len(names)]))
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    started: set[str] = set()
    steps: list[float] = []
    made, last, begin = 0, 0.0, 0.0
    with host.measured():
        while engine.has_work:
            whole = len(started) == len(prompts)
            outputs = engine.step()
            now = time.perf_counter()
            for output_ in outputs:
                assert output_.refusal is None, output_.refusal
                name = output_.id.partition(":")[2]
                answers[name] += output_.tokens
                started.add(name)
            if outputs and whole:
                made += sum(len(output_.tokens) for output_ in outputs)
                steps.append(now - last)
            elif outputs:
                begin = now
            last = now if outputs else last
    seconds = last - begin
    return {
        "answers": answers,
        "tokens_per_second": made / seconds,
        "ms_per_token": seconds / made * len(prompts) * 1e3,
        "median_step_ms": median(steps) * 1e3,
        "host_ms": host.medians(),
    }


def grid(loaded: Loaded, shape: str, vocab_size: int, report: dict[str, Any], keep: Keep) -> None:
    """Measure plain decoding, then steps of every number of guesses, at several concurrencies."""
    scheduler, generator = loaded.engine.scheduler, random.Random(5)
    names = [f"a{i}" for i in range(ADAPTERS[shape])]
    for concurrency in CONCURRENCIES[shape]:
        size = 16 if shape == "tiny" else offline.PROMPT
        prompts = {
            f"{concurrency}-{i}": [generator.randrange(3, vocab_size) for _ in range(size)] for i in range(concurrency)
        }
        scheduler.state.speculation = None
        serve(loaded, prompts, names, 2, "warm")
        plain = serve(loaded, prompts, names, OUTPUT[shape], "plain")
        for guesses, wrong in [*((guesses, 0) for guesses in GUESSES), (GUESSES[1], WRONG)]:
            config = settings("fixed")
            speculation = Speculation(config, Remembered(plain["answers"], guesses, wrong))
            scheduler.state.speculation = speculation
            fast = serve(loaded, prompts, names, OUTPUT[shape], f"{guesses}-{wrong}")
            row = {
                "concurrency": concurrency,
                "guesses": guesses,
                "wrong": f"every {wrong}rd" if wrong else "none",
                "accepted": speculation.total.accepted / max(1, speculation.total.guesses),
                "equal_answers": sum(fast["answers"][name] == plain["answers"][name] for name in prompts),
                "times_faster": fast["tokens_per_second"] / plain["tokens_per_second"],
                "plain": {key: value for key, value in plain.items() if key != "answers"},
                **{key: value for key, value in fast.items() if key != "answers"},
            }
            report["rows"].append(row)
            keep(report)
            print(row, flush=True)
        scheduler.state.speculation = None


def settings(length: str) -> SpeculationConfig:
    return SpeculationConfig(speculation="suffix", num_speculative_tokens=MOST, speculation_length=length)


class Traced:
    """Answers as long as the trace's, so many at a time, each task on an adapter of its own."""

    def __init__(self, loaded: Loaded, trace: Acceptances, shape: str, vocab_size: int) -> None:
        self._loaded, self._trace = loaded, trace
        self._adapters = {f"a{i}": task for i, task in enumerate(sorted(trace.by_adapter)) if i < ADAPTERS[shape]}
        self._size = 16 if shape == "tiny" else offline.PROMPT
        self._vocab_size, self._most = vocab_size, OUTPUT[shape]

    def serve(self, concurrency: int, total: int, speculation: Speculation | None, turn: str) -> dict[str, Any]:
        """Answer `total` requests; the same ones in each call of as many."""
        engine, generator = self._loaded.engine, random.Random(total)
        engine.scheduler.state.speculation = speculation
        drafter = Told(self._trace) if speculation is None else speculation.drafter
        assert isinstance(drafter, Told)
        times: dict[str, list[float]] = {}
        task_of: dict[str, str] = {}
        names, added, running, tokens = list(self._adapters), 0, 0, 0
        begin = time.perf_counter()
        with drafter.over(engine.runner):
            while added < total or running:
                while added < total and running < concurrency:
                    name = names[added % len(names)]
                    answer = self._trace.answer(self._adapters[name], added)[: self._most]
                    prompt = [generator.randrange(3, self._vocab_size) for _ in range(self._size)]
                    params = SamplingParams(max_tokens=len(answer), temperature=0.0, ignore_eos=True)
                    request_id = f"{turn}-{concurrency}-{added}"
                    engine.add(NewRequest(id=request_id, prompt=prompt, params=params, adapter=name))
                    drafter.assign(request_id, answer)
                    times[request_id], task_of[request_id] = [], self._adapters[name]
                    added, running = added + 1, running + 1
                outputs = engine.step()
                now = time.perf_counter()
                for output in outputs:
                    assert output.refusal is None, output.refusal
                    tokens += len(output.tokens)
                    times[output.id] += [now] * len(output.tokens)
                    running -= output.finish_reason is not None
        engine.scheduler.state.speculation = None
        by_task: dict[str, list[float]] = {}
        for request_id, each in times.items():
            if len(each) > 1:
                by_task.setdefault(task_of[request_id], []).append((each[-1] - each[0]) / (len(each) - 1) * 1e3)
        return {
            "tokens_per_second": tokens / (time.perf_counter() - begin),
            "ms_per_token": mean(one for each in by_task.values() for one in each),
            "ms_per_token_by_task": {task: mean(each) for task, each in sorted(by_task.items())},
        }


def by_trace(loaded: Loaded, shape: str, vocab_size: int, report: dict[str, Any], keep: Keep) -> None:
    """Serve the demo's acceptance, without guesses, with as many as pay, and with all, at several concurrencies."""
    trace = Acceptances.load(TRACE)
    traced = Traced(loaded, trace, shape, vocab_size)
    report["tokens_a_step_with_all_guesses"] = trace.tokens_a_step()
    drafter = Told(trace)
    sides = {
        "off": None,
        "auto": Speculation(settings("auto"), drafter),
        "fixed": Speculation(settings("fixed"), drafter),
    }
    for concurrency in CONCURRENCIES[shape]:
        total = max(REQUESTS[shape], 2 * concurrency)
        for turn in range(2):  # in the second one lengths are known
            found = {name: traced.serve(concurrency, total, side, f"{name}{turn}") for name, side in sides.items()}
            off = found["off"]
            tasks = off["ms_per_token_by_task"]
            row = {
                "concurrency": concurrency,
                "turn": turn,
                "requests": total,
                **{
                    f"times_faster_{name}": {
                        "tokens_per_second": one["tokens_per_second"] / off["tokens_per_second"],
                        "ms_per_token": off["ms_per_token"] / one["ms_per_token"],
                        "mean_over_tasks": mean(tasks[t] / each for t, each in one["ms_per_token_by_task"].items()),
                    }
                    for name, one in found.items()
                    if name != "off"
                },
                **found,
            }
            report["traced"].append(row)
            keep(report)
            print({key: value for key, value in row.items() if key not in found}, flush=True)
            print({name: round(one["ms_per_token"], 3) for name, one in found.items()}, flush=True)


def run(name: str, keep: Keep) -> dict[str, Any]:
    """Measure the trace, then the grid of guesses, on a shape; SHAPE-layers: with a kernel for each operation."""
    begin = time.perf_counter()
    shape, _, kernel = name.partition("-")
    changes = {"decode_kernel": kernel} if kernel else {}
    loaded, spec = offline.load(shape, ADAPTERS[shape], speculation=settings("fixed"), **changes)
    report: dict[str, Any] = {
        "shape": shape, "decode_kernel": kernel or "auto", "adapters": ADAPTERS[shape],
        "start_s": time.perf_counter() - begin, "rows": [], "traced": [],
    }  # fmt: skip
    print(f"start: {report['start_s']:.0f} s", flush=True)
    by_trace(loaded, shape, spec.vocab_size, report, keep)
    grid(loaded, shape, spec.vocab_size, report, keep)
    return report
