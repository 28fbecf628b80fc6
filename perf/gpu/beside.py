"""Prompts beside decodes: a step of decodes and one of prompts on multiprocessors of their own, at the same time,
against one after the other. One stage of bench.py.

Green contexts divide the device; kernels that stay on it (humming's) are launched with as many blocks as their part
has room for. What is reported is how many decode steps end while the prompts are computed.
"""

from __future__ import annotations

import ctypes
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from inlaid.engine.engine import Engine
from inlaid.kernels import lora_triton
from inlaid.runner.cuda_forward import ATTENTION_ADAPTERS, NO_ADAPTERS, QUERY_TILE, Forward, Layout
from perf.gpu import step as step_module
from perf.gpu.offline import CONTEXT, load
from perf.gpu.serving import Keep

PROMPTS, LENGTH = 8, 256
CASES = ((64, 0), (64, 32), (256, 0))
PARTS = (32, 40, 48, 56, 64)


class Driver:
    """The few calls that torch does not offer."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *args: Any) -> None:
        code = getattr(self.cuda, name)(*args)
        if code:
            raise RuntimeError(f"{name} answered {code}")

    def split(self, count: int) -> list[tuple[int, list[Any]]]:
        """Two parts of the device, the first of `count` multiprocessors: how many each has, and two streams."""
        whole, first, rest = (ctypes.create_string_buffer(144) for _ in range(3))
        device, groups = ctypes.c_int(0), ctypes.c_uint(1)
        self.call("cuDeviceGet", ctypes.byref(device), torch.cuda.current_device())
        self.call("cuDeviceGetDevResource", device, whole, 1)
        self.call("cuDevSmResourceSplitByCount", first, ctypes.byref(groups), whole, rest, 0, ctypes.c_uint(count))
        return [self._part(resource, device) for resource in (first, rest)]

    def _part(self, resource: Any, device: Any) -> tuple[int, list[Any]]:
        described, context = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuDevResourceGenerateDesc", ctypes.byref(described), resource, 1)
        self.call("cuGreenCtxCreate", ctypes.byref(context), described, device, 1)
        streams = []
        for _ in range(2):
            stream = ctypes.c_void_p()
            self.call("cuGreenCtxStreamCreate", ctypes.byref(stream), context, 1, 0)
            streams.append(torch.cuda.ExternalStream(stream.value))
        return int.from_bytes(resource.raw[96:100], "little"), streams


@dataclass
class Lane:
    """A step on a part of the device."""

    forward: Forward
    layout: Layout
    level: int
    streams: list[Any]
    sms: int
    graph: Any = None

    def capture(self, engine: Engine, locks: torch.Tensor) -> None:
        with held_to(engine, self.sms, locks), torch.inference_mode():
            self.forward.run(self.layout, self.level)  # on fewer multiprocessors products have other numbers of parts
            side, self.forward._side = self.forward._side, self.streams[1]
            try:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.streams[0]):
                    self.forward.run(self.layout, self.level)
            finally:
                self.forward._side = side

    def replay(self) -> torch.cuda.Event:
        with torch.cuda.stream(self.streams[0]):
            self.graph.replay()
            done = torch.cuda.Event(enable_timing=True)
            done.record()
        return done


@contextmanager
def held_to(engine: Engine, sms: int, locks: torch.Tensor) -> Iterator[None]:
    """humming's kernels on so many multiprocessors, with counters of their own."""
    backends = step_module.humming_of(engine)
    before = [(backend, dict(backend._kernels), backend._locks) for backend in backends]
    for backend in backends:
        for kind in list(backend.configs):
            table = backend._kernels_of(kind).clone()
            rows = table.view(-1, 4)
            rows[:, 3] = torch.where(rows[:, 3] == 0, torch.full_like(rows[:, 3], sms), rows[:, 3].clamp(max=sms))
            backend._kernels[kind] = table
        backend._locks = locks
    try:
        yield
    finally:
        for backend, kernels, old in before:
            backend._kernels, backend._locks = kernels, old


def prompts_of(runner: Any, adapters: int, vocab: int) -> tuple[Forward, Layout, int]:
    """PROMPTS prompts at the far end of the KV cache, in a forward of their own."""
    tokens = PROMPTS * LENGTH
    layout = runner._exact_layout(tokens, 0, PROMPTS, PROMPTS, tokens // QUERY_TILE)
    forward = Forward(
        runner.model, runner.adapters.pages, tokens, PROMPTS, runner.max_blocks, runner.forward.max_rank,
        runner.device, runner.dtype, layout.size,
    )  # fmt: skip
    forward.cache = runner.cache
    host = np.array(runner._template(layout))

    def put(name: str, values: Any) -> None:
        begin = layout.pieces[name][0]
        host[begin : begin + len(values)] = values

    size, generator = runner.block_size, np.random.default_rng(5)
    each = LENGTH // size
    blocks = runner.num_blocks - 1 - np.arange(PROMPTS * each).reshape(PROMPTS, each)
    put("ids", generator.integers(3, vocab, tokens))
    put("positions", np.tile(np.arange(LENGTH), PROMPTS))
    put("slots", (blocks[:, :, None] * size + np.arange(size)).ravel())
    put("lengths", [LENGTH] * PROMPTS)
    put("table_rows", range(PROMPTS))
    put("starts", [i * LENGTH for i in range(PROMPTS + 1)])
    tiles = [(i, at) for i in range(PROMPTS) for at in range(0, LENGTH, QUERY_TILE)]
    put("tiles", [i for i, _ in tiles] + [at for _, at in tiles])
    put("logit_rows", [(i + 1) * LENGTH - 1 for i in range(PROMPTS)])
    put("rows", range(PROMPTS))
    slots = np.repeat([i % adapters + 1 if adapters else 0 for i in range(PROMPTS)], LENGTH).astype(np.int32)
    if adapters:
        segments, order = layout.view(host, "segments"), layout.view(host, "order")
        lora_triton.write_segments(slots, segments, order, layout.block_rows)
        put("adapters", slots)
    forward.meta.copy_(torch.from_numpy(host))
    forward.tables[:PROMPTS, :each].copy_(torch.from_numpy(blocks.astype(np.int32)))
    return forward, layout, ATTENTION_ADAPTERS if adapters else NO_ADAPTERS


def seconds(lane: Lane, times: int = 12) -> float:
    """Milliseconds of a step alone."""
    spent = []
    for _ in range(times):
        with torch.cuda.stream(lane.streams[0]):
            begin = torch.cuda.Event(enable_timing=True)
            begin.record()
        end = lane.replay()
        end.synchronize()
        spent.append(begin.elapsed_time(end))
    return median(spent[2:])


def together(decodes: Lane, prompts: Lane, count: int) -> tuple[float, list[float]]:
    """When the prompts end, and each of the decode steps that begin with them."""
    torch.cuda.synchronize()
    with torch.cuda.stream(decodes.streams[0]):
        begin = torch.cuda.Event(enable_timing=True)
        begin.record()
    prompts.streams[0].wait_event(begin)
    last = prompts.replay()
    ends = [decodes.replay() for _ in range(count)]
    torch.cuda.synchronize()
    return begin.elapsed_time(last), [begin.elapsed_time(end) for end in ends]


def steps_by(ends: list[float], when: float) -> float:
    """How many decode steps were over by then, the one under way in part."""
    before = [end for end in ends if end <= when]
    if len(before) == len(ends):
        return float("nan")
    start = before[-1] if before else 0.0
    return len(before) + (when - start) / (ends[len(before)] - start)


def logits_of(runner: Any, step: Any, lane: Lane) -> torch.Tensor:
    with torch.inference_mode():
        runner.forward.last.copy_(step.last)
        torch.cuda.synchronize()
        lane.replay().synchronize()
        return runner.forward.logits[: step.layout.samples].clone()


def one_way(engine: Engine, decodes: Lane, prompts: Lane, whole: tuple[float, float]) -> dict[str, Any]:
    """Both lanes captured, alone and together."""
    locks = [torch.zeros(4096, dtype=torch.int32, device="cuda") for _ in range(2)]
    decodes.capture(engine, locks[0])
    prompts.capture(engine, locks[1])
    alone = seconds(decodes), seconds(prompts, 6)
    count = math.ceil(alone[1] / alone[0] * 1.6) + 4
    found = []
    for _ in range(5):
        when, ends = together(decodes, prompts, count)
        done = steps_by(ends, when)
        found.append((when, done, (done * whole[0] + whole[1]) / when))
    when, done, gain = sorted(found)[2]
    return {
        "decode_sms": decodes.sms, "prompt_sms": prompts.sms, "decode_alone_ms": alone[0], "prompts_alone_ms": alone[1],
        "prompts_ms": when, "decode_steps_meanwhile": done, "decode_ms": when / done, "times_as_fast": gain,
    }  # fmt: skip


def lanes(both: tuple[Any, Any], first: tuple[int, list[Any]], second: tuple[int, list[Any]]) -> tuple[Lane, Lane]:
    """A step of decodes and one of prompts, each on so many multiprocessors and on streams of theirs."""
    (one, two), ((rest, here), (few, there)) = both, (first, second)
    return Lane(one[0], one[1], one[2], here, rest), Lane(two[0], two[1], two[2], there, few)


def run(shape: str, keep: Keep) -> dict[str, Any]:
    """All cases, each undivided first."""
    loaded, spec = load(shape, 32, enforce_eager=True)
    engine, runner = loaded.engine, step_module.runner_of(loaded.engine)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    driver = Driver()
    report: dict[str, Any] = {"shape": shape, "sms": sms, "cases": []}
    parts = {}
    for count in PARTS:
        parts[count] = driver.split(count)
        print("parts", [part for part, _ in parts[count]], flush=True)
    for seed, (rows, adapters) in enumerate(CASES):
        names = [f"a{i % adapters}" if adapters else None for i in range(rows)]
        step = step_module.decoding(engine, names, CONTEXT, spec.vocab_size, seed)
        runner.forward.last.copy_(step.last)
        forward, layout, level = prompts_of(runner, adapters, spec.vocab_size)
        with torch.inference_mode():
            forward.run(layout, level)
        case: dict[str, Any] = {"rows": rows, "adapters": adapters, "ways": []}
        report["cases"].append(case)

        both = (runner.forward, step.layout, step.level), (forward, layout, level)
        plain = [torch.cuda.Stream() for _ in range(4)]
        decodes, prompts = lanes(both, (sms, plain[:2]), (sms, plain[2:]))
        locks = torch.zeros(4096, dtype=torch.int32, device="cuda")
        decodes.capture(engine, locks)
        prompts.capture(engine, locks)
        whole = seconds(decodes), seconds(prompts, 6)
        case["decode_ms"], case["prompts_ms"] = whole
        print(rows, adapters, whole, flush=True)
        expected = logits_of(runner, step, decodes)
        ways: list[tuple[str, tuple[Lane, Lane]]] = []
        for count in PARTS:
            (few, second), (rest, first) = parts[count]
            ways.append((f"divided at {few}", lanes(both, (rest, first), (few, second))))
        for priority in (0, -5):
            streams = [torch.cuda.Stream(priority=priority) for _ in range(2)]
            ways.append((f"undivided, prompts {priority}", lanes(both, (sms - 48, plain[:2]), (48, streams))))
        for name, (decodes, prompts) in ways:
            try:
                record = {"way": name} | one_way(engine, decodes, prompts, whole)
                logits = logits_of(runner, step, decodes)
                record["error"] = float((logits - expected).float().norm() / expected.float().norm())
            except Exception as error:  # noqa: BLE001 - one way's fault must not hide the others
                traceback.print_exc()
                record = {"way": name, "failed": f"{type(error).__name__}: {error}"[:300]}
            case["ways"].append(record)
            keep(report)
            print(record, flush=True)
        step_module.leave(engine, rows, seed)
    return report
