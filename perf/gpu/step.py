"""Take one decode step from a running engine and replay it: its time, kernel by kernel beside the floor, its time under
other choices of kernels, and whether it gives the same bits every time. Used by stages of bench.py; the model is loaded
once and each choice costs a second.

The engine serves random prompts until all of them decode; the last step's metadata stays on the device, so that the
step can be run again and again on the same input.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import Any

import torch

from inlaid.engine.engine import Engine
from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.kernels import attention_triton, early
from inlaid.kernels.auto import AutoLinear
from inlaid.kernels.humming import HummingLinear
from inlaid.kernels.measure import Ceiling, weight_bytes
from inlaid.layers import linear
from inlaid.model.spec import ModelSpec
from inlaid.runner.cuda_runner import CudaRunner
from inlaid.runner.layout import Layout


@dataclass(frozen=True)
class Step:
    """A step that can be run again: its layout, which linears have adapters, and the tokens it starts from."""

    layout: Layout
    level: int
    last: torch.Tensor
    adapters: int
    context: int


def runner_of(engine: Engine) -> CudaRunner:
    assert isinstance(engine.runner, CudaRunner)
    return engine.runner


def decoding(engine: Engine, names: Sequence[str | None], context: int, vocab: int, seed: int = 0) -> Step:
    """Serve a prompt of `context` tokens for each name until all of them decode; return the last step submitted."""
    runner, generator = runner_of(engine), random.Random(seed)
    for i, name in enumerate(names):
        prompt = [generator.randrange(3, vocab) for _ in range(context)]
        params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
        engine.add(NewRequest(id=f"step{seed}-{i}", prompt=prompt, params=params, adapter=name))
    submitted: list[tuple[int, int, Layout, int]] = []
    compute = runner._compute

    def noted(step: Any, stage: int) -> Any:
        submitted.append((len(step.singles), len(step.prompts), step.layout, step.adapters))
        return compute(step, stage)

    runner._compute = noted  # type: ignore[method-assign]
    try:
        while not submitted or submitted[-1][:2] != (len(names), 0):
            for output in engine.step():
                assert output.refusal is None, output.refusal
    finally:
        runner._compute = compute  # type: ignore[method-assign]
    _, _, layout, level = submitted[-1]
    return Step(layout, level, runner.step.newest.clone(), len({name for name in names if name}), context)


def leave(engine: Engine, count: int, seed: int = 0) -> None:
    """Abort the requests of `decoding`."""
    for i in range(count):
        engine.abort(f"step{seed}-{i}")
    while engine.has_work:
        engine.step()


def replayable(runner: CudaRunner, step: Step) -> Callable[[], None]:
    """Capture the step as a graph and return its replay; without a GPU, run its kernels one by one."""
    with torch.inference_mode():
        runner.step.run(step.layout, step.level)  # compiles what is new
        if runner.device.type != "cuda":
            return lambda: runner.step.run(step.layout, step.level)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            runner.step.run(step.layout, step.level)
    return graph.replay


def run_once(runner: CudaRunner, step: Step, replay: Callable[[], None]) -> torch.Tensor:
    """Run the step on its own input and return its logits."""
    with torch.inference_mode():
        runner.step.newest.copy_(step.last)
        replay()
    return runner.step.logits(step.layout.samples)


def time_step(runner: CudaRunner, replay: Callable[[], None], replays: int = 30) -> float:
    """Return the median microseconds of a replay."""
    times = []
    for _ in range(replays + 3):
        if runner.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        else:
            started = time.perf_counter()
            replay()
            times.append((time.perf_counter() - started) * 1e6)
    return float(median(times[3:]))


def repeats(runner: CudaRunner, step: Step, replay: Callable[[], None], times: int) -> int:
    """Return how many of `times` further runs give the bits of the first."""
    first = run_once(runner, step, replay).clone()
    return sum(torch.equal(first, run_once(runner, step, replay)) for _ in range(times))


# Choices.


@dataclass(frozen=True)
class Variant:
    """A choice of kernels: constants of the engine with other values, and sums of humming in a fixed order or not."""

    name: str
    changes: tuple[tuple[Any, str, Any], ...] = ()
    ordered: bool = True

    @contextmanager
    def applied(self, engine: Engine) -> Iterator[None]:
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in self.changes]
        was_early = early.EARLY
        for owner, name, value in self.changes:
            setattr(owner, name, value)
        rebuilt = self._rebuild(engine, self.ordered, was_early != early.EARLY)
        try:
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)
            if rebuilt:
                self._rebuild(engine, True, True)

    @staticmethod
    def _rebuild(engine: Engine, ordered: bool, always: bool) -> bool:
        """Compile other kernels for the weights as they lie, where that is needed; tell whether it was."""
        found = False
        for backend in humming_of(engine):
            if always or backend.ordered != ordered:
                found = True
                backend.recompile(ordered, runner_of(engine).device)
        return found


def humming_of(engine: Engine) -> list[HummingLinear]:
    backends: list[Any] = []
    for backend in runner_of(engine).model.kernels.quantized:
        backends += backend.candidates if isinstance(backend, AutoLinear) else [backend]
    return [backend for backend in backends if isinstance(backend, HummingLinear)]


def variants(grouped: bool) -> list[Variant]:
    """Return the choices to measure, the largest predicted gain first (perf/gpu/README.md)."""
    return [
        Variant("as shipped"),
        Variant("sums by arrival", ordered=False),
        Variant("whole products before norms", ((linear, "PARTS_ROWS", 0),)),
        Variant("launches as usual", ((early, "EARLY", False),)),
        Variant("expansions of their own", ((linear, "PENDING_ROWS", 0),)),
        *([Variant("attention with more splits", ((attention_triton, "TARGET_PROGRAMS", 1000),))] if grouped else []),
        Variant("as shipped, again"),
    ]


def compare(engine: Engine, step: Step, choices: Sequence[Variant], times: int = 20) -> Iterator[dict[str, Any]]:
    """Yield each choice's time, its distance from the first choice's logits, and how many repetitions were equal."""
    runner = runner_of(engine)
    expected: torch.Tensor | None = None
    for variant in choices:
        record: dict[str, Any] = {"rows": step.layout.decodes, "adapters": step.adapters, "variant": variant.name}
        try:
            with variant.applied(engine):
                replay = replayable(runner, step)
                logits = run_once(runner, step, replay).float()
                expected = logits if expected is None else expected
                record["error"] = float((logits - expected).norm() / expected.norm())
                record["same_tokens"] = int((logits.argmax(-1) == expected.argmax(-1)).sum())
                record["same_bits"] = f"{repeats(runner, step, replay, times)} of {times}"
                record["us"] = time_step(runner, replay)
        except Exception as error:  # noqa: BLE001 - an error of one choice must not hide the others
            record["failed"] = f"{type(error).__name__}: {error}"[:300]
        yield record


# Where the time goes.

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType({  # groups of kernels, by parts of their names
    "attention": ("_decode_", "_merge_"), "adapters": ("_shrink_", "_expand_"), "linears": ("humming", "exllama"),
    "head": ("nvjet", "gemm", "cutlass"),
    "norm, rope, activation": ("_add_norm", "_rope_store", "_silu_mul", "_embed_norm"),
})  # fmt: skip


def group_of(kernel: str) -> str:
    return next((group for group, marks in GROUPS.items() if any(mark in kernel for mark in marks)), "rest")


def profile(runner: CudaRunner, replay: Callable[[], None], replays: int = 8) -> list[dict[str, Any]]:
    """Return the microseconds of each kernel in a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(replays):
            replay()
        torch.cuda.synchronize()
    events = [e for e in profiler.key_averages() if e.device_time_total > 0]
    rows = [
        {
            "kernel": e.key[:110], "group": group_of(e.key), "us_per_step": round(e.device_time_total / replays, 2),
            "calls_per_step": e.count / replays,
        }
        for e in events
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["us_per_step"])


def floors(spec: ModelSpec, quant: Any, step: Step, rank: float, ceiling: Ceiling) -> dict[str, float]:
    """Return the least microseconds of each group: its bytes over the bandwidth or its operations over the matrix rate.

    `rank` is the adapters' mean rank; they are on the attention's linears."""
    rows, width, kv = step.layout.decodes, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes = [
        (spec.hidden_size, width + 2 * kv), (width, spec.hidden_size),
        (spec.hidden_size, 2 * spec.intermediate_size), (spec.intermediate_size, spec.hidden_size),
    ]  # fmt: skip
    linears = sum(
        ceiling.microseconds(weight_bytes(inputs, outputs, quant), 2.0 * rows * inputs * outputs)
        for inputs, outputs in shapes
    )
    adapted = 2 * step.adapters * rank * (3 * spec.hidden_size + width + 2 * kv + width + spec.hidden_size)
    return {
        "linears": spec.num_layers * linears,
        "attention": spec.num_layers * ceiling.microseconds(2 * 2 * rows * (step.context + 1) * kv),
        "adapters": spec.num_layers * ceiling.microseconds(adapted),
        "head": ceiling.microseconds(2 * spec.hidden_size * spec.vocab_size),
    }


def by_group(kernels: Sequence[dict[str, Any]], floor: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return the microseconds of a step beside its floor, by group."""
    total: dict[str, dict[str, float]] = {}
    for row in kernels:
        entry = total.setdefault(row["group"], {"us": 0.0, "floor": round(floor.get(row["group"], 0.0), 1)})
        entry["us"] = round(entry["us"] + row["us_per_step"], 1)
    return total
