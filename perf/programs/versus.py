"""Prompt programs against the same calls over HTTP, and what each of their short-cuts is worth.

    python -m perf.programs.versus                     # the bundled demo on a CPU -> perf/results/programs-cpu.json
    python -m perf.gpu.bench --out DIR --stages programs-8b

Why it matters: agents and judges are chains of calls over several adapters. One after another, a chain waits for each
call; a thread pool over HTTP shares batches, but neither prefixes that are being computed nor equal calls.

Chains of draft, verdict and revision (chains.py) over 64 inputs, with random adapters: distinct (one for each input),
uniform (draws from the square root of as many), identical (one), of one rank or of mixed ranks. The KV cache is emptied
before each run. The ways take turns in `--repeats` rounds, and the median counts. Before the rounds each way runs once.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from inlaid.config import AdapterConfig, EngineConfig
from inlaid.engine.request import SamplingParams
from inlaid.files import write_atomically
from inlaid.flags import Parser
from inlaid.llm import LLM
from inlaid.program import Options
from inlaid.report.plots import COLOURS, is_wide, legend, new_figure, save
from inlaid.report.provenance import gpu, now, provenance
from inlaid.report.tables import markdown
from perf.process import child_environment, free_port
from perf.programs.chains import (
    KINDS,
    Chains,
    Words,
    as_program_by_http,
    by_pool,
    in_sequence,
    make_chains,
    plain_words,
)
from perf.random_adapters import RandomAdapters, make_adapters
from perf.target import wait_until_ready

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo" / "base"
RESULTS = ROOT / "perf" / "results"
INPUTS = 64
SEQUENTIAL = 8  # chains that run one after another; their time counts for all
POOLS = (8, 64)  # threads
RANKS: Mapping[str, tuple[int, ...]] = MappingProxyType({"equal": (16,), "mixed": (8, 16, 32, 64)})
OURS = "program in process"
PARTS = ("ways", "switches")
SWITCHES = ("fuse_decode", "merge_equal", "drop_dead", "keep_kv", "share_prefixes")

Way = Callable[[], tuple[float, list[str]]]  # seconds and answers
Clock = Callable[[], float]


class Rounds:
    """Each way's seconds, by the clock and in processor time of the engine's process, and its last answers.

    Processor time counts on a machine that others use too: an engine on one core cannot be quicker.
    """

    def __init__(self, ways: dict[str, Way], repeats: int, clock: Clock, total: int) -> None:
        """Run each way once, then in turns. A way that answers fewer than `total` inputs counts as many times."""
        self.seconds: dict[str, list[float]] = {name: [] for name in ways}
        self.processor: dict[str, list[float]] = {name: [] for name in ways}
        self.answers: dict[str, list[str]] = {}
        for number in range(repeats + 1):
            for name, way in ways.items():
                before = clock()
                spent, answers = way()
                processor, scale = clock() - before, total / len(answers)
                self.answers[name] = answers
                if number or not repeats:
                    self.seconds[name].append(scale * spent)
                    self.processor[name].append(scale * processor)

    def row(self) -> dict[str, Any]:
        """Return the figures with their medians."""
        return {
            "seconds": self.seconds,
            "processor_seconds": self.processor,
            "median": medians(self.seconds),
            "processor_median": medians(self.processor),
        }


def medians(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in values.items()}


def engine_clock(server: int) -> Clock:
    """Return a clock of the processor seconds of a server's engine process."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    ticks = os.sysconf("SC_CLK_TCK")

    def read() -> float:
        total = 0
        for child in children:
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / ticks

    return read


def over_http(url: str, chains: Chains) -> dict[str, Way]:
    """Return the ways that go over HTTP."""
    ways: dict[str, Way] = {"program by HTTP": lambda: as_program_by_http(url, chains)}
    for threads in POOLS:
        ways[f"pool of {threads} threads"] = lambda threads=threads: by_pool(url, chains, threads)  # type: ignore[misc]
    ways["one after another"] = lambda: in_sequence(url, chains, min(SEQUENTIAL, len(chains.texts)))
    return ways


def in_process(llm: LLM, chains: Chains, options: Options) -> tuple[float, list[str]]:
    """Run the chains as one program in this process, with an empty KV cache."""
    empty(llm)
    begun = time.perf_counter()
    found = chains.program().compile(llm, options).execute(chains.inputs())
    return time.perf_counter() - begun, [found[f"shown{number}"] for number in range(len(chains.texts))]


def same(ours: list[str], theirs: list[str]) -> str:
    """Say how many answers are equal."""
    return f"{sum(a == b for a, b in zip(ours, theirs))} of {len(theirs)}"


def empty(llm: LLM) -> None:
    """Drop all KV."""
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.scheduler.pool.clear()


def without_each_switch(llm: LLM, chains: Chains) -> dict[str, Way]:
    """Return the program with all short-cuts, without each of them, without all, and call by call."""
    off = dict.fromkeys(SWITCHES, False)
    options = {"all": Options(), **{f"without {name}": Options(**{name: False}) for name in SWITCHES}}
    options |= {"without any": Options(**off), "one call at a time": Options(**off, max_in_flight=1)}
    return {name: lambda chosen=chosen: in_process(llm, chains, chosen) for name, chosen in options.items()}  # type: ignore[misc]


def overhead(llm: LLM, repeats: int, words: Words, clock: Clock) -> dict[str, float]:
    """Return the milliseconds that a program of one call takes beyond the same call by LLM.generate."""
    from inlaid.program import Program

    params = SamplingParams(max_tokens=1, temperature=0)
    program = Program()
    program.input("text")
    program.generate("one", "{text}", params=params)
    plan = program.compile(llm)
    generator = random.Random(1)
    as_program: list[float] = []
    as_call: list[float] = []
    for _ in range(repeats):
        prompt = words(generator, 12)
        for spent, run in (
            (as_program, lambda prompt=prompt: plan.execute({"text": prompt})),
            (as_call, lambda prompt=prompt: llm.generate(prompt, params, progress=False)),
        ):
            empty(llm)
            begun = clock()
            run()
            spent.append(1e3 * (clock() - begun))
    found = {"program_ms": statistics.median(as_program), "call_ms": statistics.median(as_call)}
    differences = [one - other for one, other in zip(as_program, as_call)]
    return {**found, "overhead_ms": statistics.median(differences)}


@contextmanager
def serving(model: Path, paths: dict[str, str], flags: Sequence[str], log: Path) -> Iterator[tuple[str, Clock]]:
    """Run a server on these adapters; yield its address and the clock of its engine."""
    port = free_port()
    command = [sys.executable, "-m", "inlaid", "serve", str(model), "--port", str(port), *flags]
    command += ["--no-log-requests", "--adapter", *(f"{name}={path}" for name, path in paths.items())]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=child_environment({}), stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready([url], 240)
        yield url, engine_clock(process.pid)
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True)
class Subject:
    """A model to measure, its adapters by their ranks' label, and how prompts are written."""

    model: Path
    names: dict[str, list[str]]
    paths: dict[str, str]
    max_rank: int
    settings: dict[str, Any]
    words: Words
    revised_if: str
    count: int = INPUTS

    @property
    def on_gpu(self) -> bool:
        return bool(self.settings["device"] == "cuda")

    def loads(self, kinds: Sequence[str]) -> Iterator[tuple[str, str, Chains]]:
        """Iterate over the loads: ranks, kind, chains."""
        judge = next(iter(self.names.values()))[0]
        for ranks, adapters in self.names.items():
            for kind in kinds:
                yield ranks, kind, make_chains(adapters, judge, kind, self.count, self.words, self.revised_if)

    @cached_property
    def engine(self) -> LLM:
        """Load the model and all adapters into this process."""
        adapters = AdapterConfig(max_loras=len(self.paths), max_lora_rank=self.max_rank)
        config = EngineConfig(model=str(self.model), adapters=adapters, **self.settings)
        return LLM(str(self.model), self.paths, config=config)


def measure_ways(
    subject: Subject, kinds: Sequence[str], repeats: int, folder: Path, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Measure all loads: first on a server, then in this process, which then has the device for itself."""
    all_loads = list(subject.loads(kinds))
    served: list[dict[str, list[str]]] = []
    result: dict[str, Any] = {"inputs": subject.count, "calls": 3 * subject.count, "rows": []}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in subject.settings.items()]
    flags += [f"--max-loras={len(subject.paths)}", f"--max-lora-rank={subject.max_rank}"]
    with serving(subject.model, subject.paths, flags, folder / "server.log") as (url, clock):
        for label, kind, chains in all_loads:
            found = Rounds(over_http(url, chains), repeats, clock, subject.count)
            row = {"ranks": label, "kind": kind, "adapters": len(set(chains.adapters)), **found.row()}
            served.append(found.answers)
            result["rows"].append(row)
            keep(result)
            print({name: round(spent, 3) for name, spent in row["median"].items()}, flush=True)
    llm = subject.engine
    for row, answers, (_, _, chains) in zip(result["rows"], served, all_loads, strict=True):
        here: dict[str, Way] = {OURS: partial(in_process, llm, chains, Options())}
        found = Rounds(here, repeats, time.process_time, subject.count)
        for name, values in found.row().items():
            row[name] |= values
        row["equal_answers"] = {name: same(found.answers[OURS], theirs) for name, theirs in answers.items()}
        row["times_faster"] = ratios(row["median"])
        row["times_faster_in_processor_time"] = ratios(row["processor_median"])
        keep(result)
    clock = time.perf_counter if subject.on_gpu else time.process_time
    result["one_call"] = overhead(llm, 30, subject.words, clock)
    keep(result)
    return result


def measure_switches(
    subject: Subject, kinds: Sequence[str], repeats: int, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Measure what each short-cut is worth in the loads of the last ranks, in this process."""
    result: dict[str, Any] = {"inputs": subject.count, "switches": []}
    llm, last = subject.engine, list(subject.names)[-1]
    for label, kind, chains in subject.loads(kinds):
        if label != last:
            continue
        found = Rounds(without_each_switch(llm, chains), repeats, time.process_time, subject.count)
        result["switches"].append({
            "ranks": label,
            "kind": kind,
            **found.row(),
            "equal_answers": {name: same(found.answers["all"], theirs) for name, theirs in found.answers.items()},
            "times_slower": ratios(medians(found.seconds if subject.on_gpu else found.processor), "all"),
        })  # fmt: skip
        keep(result)
        print(kind, result["switches"][-1]["times_slower"], flush=True)
    return result


def ratios(values: dict[str, float], to: str = OURS) -> dict[str, float]:
    """Return each value over one of them."""
    return {name: round(value / values[to], 3) for name, value in values.items()}


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    ways = list(result["rows"][0]["median"])
    rows = [
        [row["kind"], row["ranks"], row["adapters"], part, *(f"{row[key][way]:.2f}" for way in ways)]
        for row in result["rows"]
        for part, key in (("clock", "median"), ("engine's processor", "processor_median"))
    ]
    worth = [each["times_slower"] for each in result["switches"]]
    switches = [[name, *(f"{times[name]:.2f}" for times in worth)] for name in worth[0]]
    one = result["one_call"]
    return "\n\n".join(
        (
            f"Seconds for {result['inputs']} chains of draft, verdict and revision:",
            markdown(["kind", "ranks", "adapters", "seconds", *ways], rows, "llrlr"),
            f"Time without short-cuts, as a multiple of that with all ({result['switches'][0]['ranks']} ranks):",
            markdown(["program", *(each["kind"] for each in result["switches"])], switches),
            f"One call: {one['call_ms']:.2f} ms; as a program {one['overhead_ms']:.2f} ms more.",
        )
    )


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw the seconds of each way, load by load, and what the switches are worth."""
    figure, [[left, right]] = new_figure((12, 4.5), columns=2)
    ways = list(result["rows"][0]["median"])
    for index, way in enumerate(ways):
        places = [number + 0.8 * index / len(ways) for number in range(len(result["rows"]))]
        left.bar(
            places, [row["median"][way] for row in result["rows"]], 0.8 / len(ways), label=way, color=COLOURS[index]
        )
    if is_wide(value for row in result["rows"] for value in row["median"].values()):
        left.set_yscale("log")
    left.set_ylabel("seconds")
    left.set_xticks(
        [number + 0.4 for number in range(len(result["rows"]))],
        [f"{row['kind']}\n{row['ranks']} ranks" for row in result["rows"]],
        fontsize=8,
    )
    for index, each in enumerate(result["switches"]):
        times, high = each["times_slower"], 0.8 / len(result["switches"])
        places = [number + (index + 0.5) * high - 0.4 for number in range(len(times))]
        right.barh(places, list(times.values()), high, label=each["kind"], color=COLOURS[len(ways) + index])
    right.set_yticks(range(len(times)), list(times))
    if is_wide(value for each in result["switches"] for value in each["times_slower"].values()):
        right.set_xscale("log")
    legend(figure, [left, right], columns=8)
    right.invert_yaxis()
    right.set_xlabel("time, as a multiple of that with all short-cuts")
    save(figure, file)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="perf.programs.versus", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="how adapters are spread")
    parser.add_argument("--ranks", nargs="+", choices=list(RANKS), default=list(RANKS), help="equal or mixed ranks")
    parser.add_argument("--inputs", type=int, default=INPUTS, help="chains of one load")
    parser.add_argument("--only", choices=PARTS, help="measure this part, keep the rest of the file")
    parser.add_argument("--out", type=Path, default=RESULTS / "programs-cpu.json", help="file of the results")
    args = parser.parse_args(argv)
    known: dict[str, Any] = json.loads(args.out.read_text()) if args.only and args.out.exists() else {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths: dict[str, str] = {}
        names: dict[str, list[str]] = {}
        for label, ranks in ((label, RANKS[label]) for label in args.ranks):
            spec = RandomAdapters(args.inputs, ranks, seed=len(names))
            made = make_adapters(DEMO, spec, folder / label, progress=False)
            named = {f"{label}{number}": path for number, (_, path) in enumerate(made)}
            paths |= named
            names[label] = list(named)
        most = max(map(max, RANKS.values()))
        subject = Subject(DEMO, names, paths, most, {"device": "cpu"}, plain_words, "e", args.inputs)
        if args.only != "switches":
            found |= measure_ways(subject, args.kinds, args.repeats, folder, lambda part: None)
        if args.only != "ways":
            found |= measure_switches(subject, args.kinds, 1, lambda part: None)
    about = {**provenance(seed=0, packages=("torch",)), "date": now(), "gpu": gpu() or "none"}
    where = {part: about for part in PARTS if args.only in (None, part)}
    result = {**known, **found, "provenance": {**known.get("provenance", {}), **where}}
    text = json.dumps(result, indent=1) + "\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, text.encode())
    if {"rows", "switches"} <= set(result):
        write_atomically(args.out.with_suffix(".md"), (table(result) + "\n").encode())
        draw(result, args.out)
        print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
