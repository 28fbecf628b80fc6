"""LoRA-Inlaid's headline on one GPU: a stage of bench.py that serves the same traffic in three ways and compares them.

inlaid        a 4-bit base, adapters at their own ranks, the policy `inlaid`
16 bits       the same with a 16-bit base
S-LoRA-style  this engine with its advantages switched off: a 16-bit base, every adapter at the largest rank, the
              policy `fcfs`. It is no measurement of S-LoRA's own code

All three have the same bytes for weights, adapters, keys and values (`Case.memory_gib`), as one card would give them.
Traffic is the suite tasks-100: answers of a length that depends on the task, Zipf popularity, ranks 8 to 64, lengths
hidden from the scheduler. Rates are multiples of what the S-LoRA-style engine makes of a burst. A request is in time if
its last token comes within three times the mean latency of the S-LoRA-style engine at a quarter of that rate.

All engines start side by side, each in a process of its own; then one after the other is measured.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import torch

from inlaid.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig
from inlaid.model.spec import ModelSpec
from inlaid.sim.request_log import Arrival, RequestRecord, as_arrivals
from inlaid.worker.build import Loaded, build_engine
from inlaid.workload.plan import plan
from inlaid.workload.prompts import RandomTokens
from inlaid.workload.suites import load_suite
from perf.gpu import ROOT, Keep
from perf.gpu.adapter_engine import counts, device, empty, make_adapters, percentile, store_of
from perf.gpu.random_model import ATTENTION, spec_of, write_dense, write_model
from perf.replay import WallClock, replay

BLOCK = 16
SUITE = "tasks-100"
BUFFERS_GIB = 1.5  # of a step, beside weights, adapters, keys and values
PLACES = 32  # adapters of the largest rank that the memory for adapters holds
START_LIMIT_S = 200.0
SLO_FACTOR, LIGHT = 3.0, 0.25
LEAST_REQUESTS = 10  # expected of a row


@dataclass(frozen=True)
class Case:
    """A shape's sizes and its traffic."""

    shape: str
    memory_gib: float
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    rates: tuple[float, ...] = (1.0, 2.0)  # of the S-LoRA-style engine's capacity, with `tasks` tasks
    tasks: int = 100
    others: tuple[int, ...] = (2, 1000)  # numbers of tasks, at its capacity
    burst: int = 200
    seconds: float = 4.0
    light_s: float = 2.0
    max_num_seqs: int = 256
    max_tokens: int = 512


CASES: Mapping[str, Case] = MappingProxyType(
    {
        "7b": Case("7b", 24.0),  # the paper's card has as much
        "13b": Case("13b", 40.0, others=()),
        "tiny": Case("tiny", 0.3, (2, 4), tasks=6, others=(2,), burst=6, seconds=0.5, light_s=0.5, max_num_seqs=4,
                     max_tokens=8),
    }
)  # fmt: skip


@dataclass(frozen=True)
class System:
    """One way to serve: bits of the base, whether adapters are padded, the policy."""

    name: str
    bits: int
    padded: bool
    policy: str


SLORA = System("S-LoRA-style", 16, True, "fcfs")
SYSTEMS = (SLORA, System("16 bits", 16, False, "inlaid"), System("inlaid", 4, False, "inlaid"))


# In a process of its own: an engine that is told what to serve.


def engine_process(connection: Connection, case: Case, bits: int) -> None:
    """Build an engine, say what memory it has, and answer each order with its figures until None comes."""
    try:
        loaded = _build(case, bits)
        clock = WallClock()
        loaded.engine.clock = clock
        connection.send({"kv_tokens": loaded.model.num_blocks * BLOCK, "vocab": loaded.model.vocab_size})
        while (order := connection.recv()) is not None:
            connection.send(_serve(loaded, clock, case, **order))
    except Exception as error:
        connection.send({"error": f"{type(error).__name__}: {error}"})
        raise


def _build(case: Case, bits: int) -> Loaded:
    on, spec = device(), spec_of(case.shape)
    folder = model_folder(case.shape, bits)
    width = 2 if on.type == "cuda" else 4
    adapters = PLACES * adapter_elements(spec, max(case.ranks)) * width
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    block = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * width * BLOCK
    room = (case.memory_gib - (BUFFERS_GIB if on.type == "cuda" else 0.0)) * 2**30 - weights - adapters
    if room < 0:
        raise ValueError(f"{case.memory_gib:g} GiB do not hold a {case.shape} of {bits} bits and its adapters")
    config = EngineConfig(
        model=str(folder),
        device=on.type,
        dtype="float16" if on.type == "cuda" else "float32",
        max_model_len=2048,
        cache=CacheConfig(block_size=BLOCK, num_blocks=int(room // block), enable_prefix_caching=False),
        adapters=AdapterConfig(
            max_loras=2 * PLACES, max_lora_rank=max(case.ranks), adapter_memory_gib=adapters / 2**30
        ),
        scheduler=SchedulerConfig(
            max_num_seqs=case.max_num_seqs, max_num_batched_tokens=2048, max_num_waiting=10**6
        ),
    )  # fmt: skip
    return build_engine(config, {})


def adapter_elements(spec: ModelSpec, rank: int) -> int:
    """Count the elements of an adapter on the attention's linears."""
    shapes = [spec.module_shape(module) for module in ATTENTION]
    return spec.num_layers * rank * sum(outputs + inputs for outputs, inputs in shapes)


def _serve(
    loaded: Loaded,
    clock: WallClock,
    case: Case,
    *,
    install: tuple[int, ...] = (),
    policy: str = "",
    tasks: int = 0,
    rate: float = 0.0,
    seconds: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Install adapters of these ranks, or serve the traffic of `tasks` tasks; a rate of 0 sends a burst at once."""
    if install:
        empty(loaded)
        store = store_of(loaded)
        names = load_tasks(max(case.tasks, *case.others, 1), 1.0, 1.0, 0, case).adapter_names
        for name, adapter in zip(names, make_adapters(spec_of(case.shape), len(names), install, ATTENTION)):
            store.add(name, adapter)
        return {"adapters": len(names)}
    trace = draw(case, tasks, rate, seconds, seed, loaded.model.vocab_size)
    loaded.engine.set_scheduler({"policy": policy})
    before, start = counts(loaded), clock()
    shifted = [Arrival(start + arrival.time, arrival.request) for arrival in trace]
    done = replay(loaded.engine, shifted, clock, cut=True)
    found = {key: value - before[key] for key, value in counts(loaded).items()}
    return {"records": [_brief(record, start) for record in done.records], "loads": found["loads"]}


def _brief(record: RequestRecord, start: float) -> tuple[str, float, float, float, int]:
    assert record.first_token is not None
    assert record.finish is not None
    times = (record.arrival - start, record.first_token - start, record.finish - start)
    return (record.adapter or "", *times, record.output_len)


def load_tasks(count: int, rate: float, seconds: float, seed: int, case: Case) -> Any:
    """Return the suite with so many tasks, at this rate."""
    suite = load_suite(SUITE)
    assert suite.tasks is not None
    tasks = msgspec.structs.replace(suite.tasks, count=count, rate=rate, max_tokens=case.max_tokens)
    return msgspec.structs.replace(suite, seed=seed, duration_s=seconds, classes={}, tasks=tasks)


def draw(case: Case, tasks: int, rate: float, seconds: float, seed: int, vocabulary: int) -> list[Arrival]:
    """Draw the traffic; with a rate of 0 `case.burst` requests that come at once."""
    burst = rate == 0.0
    workload = load_tasks(tasks, 1000.0 if burst else rate, 2.0 * case.burst / 1000 if burst else seconds, seed, case)
    names = workload.adapter_names
    trace = as_arrivals(plan(workload, names, RandomTokens(vocabulary, seed)), names, real=True)
    return [Arrival(0.0, arrival.request) for arrival in trace[: case.burst]] if burst else trace


# In the stage's process: the order of the measurements, and the figures.


@contextmanager
def engines(case: Case) -> Iterator[dict[int, Connection]]:
    """Start an engine for each number of bits, side by side; yield the pipes to those that are ready."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[int, Connection] = {}
    processes = []
    for bits in sorted({system.bits for system in SYSTEMS}):
        pipes[bits], theirs = context.Pipe()
        process = context.Process(target=engine_process, args=(theirs, case, bits))
        process.start()
        theirs.close()
        processes.append(process)
    try:
        yield pipes
    finally:
        for process, pipe in zip(processes, pipes.values()):
            if process.is_alive():
                pipe.send(None)
            process.join(10)
            process.kill()


def ask(pipe: Connection, order: dict[str, Any], limit: float = START_LIMIT_S) -> dict[str, Any]:
    """Give an engine an order and return its answer; an engine that fails, or is silent, raises RuntimeError."""
    pipe.send(order)
    return answer(pipe, limit)


def answer(pipe: Connection, limit: float = START_LIMIT_S) -> dict[str, Any]:
    if not pipe.poll(limit):
        raise RuntimeError(f"an engine was silent for {limit:.0f} s")
    found: dict[str, Any] = pipe.recv()
    if "error" in found:
        raise RuntimeError(found["error"])
    return found


def figures(records: Sequence[tuple[str, float, float, float, int]], slo: float | None) -> dict[str, Any]:
    """Summarize records of (adapter, arrival, first token, end, tokens)."""
    latencies = [end - came for _, came, _, end, _ in records]
    firsts = [(first - came) * 1e3 for _, came, first, _, _ in records]
    span = max(end for *_, end, _ in records) - min(came for _, came, *_ in records)
    tasks: dict[str, list[tuple[float, float]]] = {}
    for adapter, came, _, end, _ in records:
        tasks.setdefault(adapter, []).append((came, end))
    found = {
        "requests": len(records),
        "requests_per_second": len(records) / span,
        "output_tokens_per_second": sum(tokens for *_, tokens in records) / span,
        "mean_latency_s": statistics.fmean(latencies),
        "ms_per_token": statistics.fmean(1e3 * (end - came) / tokens for _, came, _, end, tokens in records),
        "ttft_ms": statistics.fmean(firsts),
        "ttft_p99_ms": percentile(firsts, 99),
        "jct_s": statistics.fmean(
            max(end for _, end in own) - min(came for came, _ in own) for own in tasks.values()
        ),
    }  # fmt: skip
    if slo is not None:
        found["slo_attainment"] = sum(latency <= slo for latency in latencies) / len(latencies)
    return found


def model_folder(shape: str, bits: int) -> Path:
    return ROOT / shape / ("model" if bits == 4 else "dense")


def write_models(shape: str) -> None:
    """Write the bases that do not exist yet."""
    for bits, write in ((16, write_dense), (4, write_model)):
        folder = model_folder(shape, bits)
        if not (folder / "tokenizer.json").exists():
            write(folder, shape)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Comparison:
    """The measurements of one shape, made in turn; `report` has what there is so far."""

    def __init__(self, case: Case, pipes: Mapping[int, Connection], keep: Keep) -> None:
        self.case, self._pipes, self._keep = case, pipes, keep
        self.report: dict[str, Any] = {"case": asdict(case), "rows": []}

    def run(self) -> None:
        """Measure the systems, the S-LoRA-style one first: rates and objective come from it."""
        started = time.monotonic()
        self.report["kv_tokens"] = {bits: answer(pipe)["kv_tokens"] for bits, pipe in self._pipes.items()}
        self.report["waited_s"] = time.monotonic() - started
        capacity = slo = 0.0
        for system in SYSTEMS:
            pipe, case = self._pipes[system.bits], self.case
            ask(pipe, {"install": (max(case.ranks),) if system.padded else case.ranks})
            burst = self._row(system, case.tasks, 0.0, 0.0, None)
            if system is SLORA:
                capacity = burst["requests_per_second"]
                slo = SLO_FACTOR * self._row(system, case.tasks, LIGHT * capacity, case.light_s, None)["mean_latency_s"]
                self.report |= {"capacity": capacity, "slo_s": slo}
            for rate in case.rates:
                self._row(system, case.tasks, rate * capacity, case.seconds, slo)
            for tasks in case.others:
                self._row(system, tasks, capacity, case.seconds, slo)

    def _row(self, system: System, tasks: int, rate: float, seconds: float, slo: float | None) -> dict[str, Any]:
        rate = max(rate, LEAST_REQUESTS / seconds) if seconds else 0.0
        order = {"policy": system.policy, "tasks": tasks, "rate": rate, "seconds": seconds}
        seed = 1000 * tasks + round(seconds * 10)  # the same requests for every system
        found = ask(self._pipes[system.bits], order | {"seed": seed}, 60.0)
        row = {"system": system.name, "tasks": tasks, "rate": rate, **figures(found["records"], slo)}
        row["loads"] = found["loads"]
        self.report["rows"].append(row)
        self._keep(self.report)
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        return row


def run(shapes: str, keep: Keep, cases: Mapping[str, Case] = CASES) -> dict[str, Any]:
    """Compare the systems at each of these shapes (with a - between them)."""
    began = time.monotonic()
    report: dict[str, Any] = {shape: {} for shape in shapes.split("-")}
    for shape in report:
        write_models(shape)
    report["write_s"] = time.monotonic() - began
    with ExitStack() as stack:
        started = {shape: stack.enter_context(engines(cases[shape])) for shape in shapes.split("-")}
        for shape, pipes in started.items():

            def kept(found: dict[str, Any], shape: str = shape) -> None:
                report[shape] = found
                keep(report)

            comparison = Comparison(cases[shape], pipes, kept)
            try:
                comparison.run()
            except (RuntimeError, EOFError, OSError) as error:
                comparison.report["error"] = report["error"] = f"{shape}: {type(error).__name__}: {error}"
                print(report["error"], flush=True)
            report[shape] = comparison.report
    report["seconds"] = time.monotonic() - began
    return report
