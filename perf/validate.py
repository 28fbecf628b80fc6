"""The simulator against the real engine: the same trace on both, throughput and mean time to first token compared.

    python -m perf.validate --out perf/results/sim-validation-cpu.json

The engine serves bursts and quieter and busier traffic, to which this machine's cost model is fitted, and in turns with
them other traces, which the simulator then serves too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from inlaid.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig
from inlaid.engine.engine import Engine, make_engine
from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.report.provenance import provenance
from inlaid.sim.cost import Step
from inlaid.sim.fit import errors, fit, write_cost, write_steps
from inlaid.sim.request_log import Arrival, as_arrivals
from inlaid.worker.build import Loaded, build_engine
from inlaid.workload.arrivals import Arrivals
from inlaid.workload.lengths import Lengths
from inlaid.workload.plan import plan
from inlaid.workload.popularity import AdapterChoice
from inlaid.workload.prompts import RandomTokens
from inlaid.workload.spec import Stream, Workload
from perf.replay import BusyClock, Clock, Replay, WallClock, replay
from perf.rounds import Facts, Round, Rounds, Row

OTHER_LOADS = (0.3, 0.9)  # shares of what the engine can do
DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"
BURST_S = 0.5  # seconds of quiet, then of burst, in traffic with bursts


def load(model: Path, max_num_seqs: int, num_blocks: int, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a model with every adapter that lies beside it, without prefix caching, as the traces are random tokens."""
    config = EngineConfig(
        model=str(model / "base" if (model / "base").is_dir() else model),
        device=device,
        dtype=dtype,
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=512),
        cache=CacheConfig(num_blocks=num_blocks, enable_prefix_caching=False),
        adapters=AdapterConfig(max_loras=32),
    )
    folder = model / "adapters"
    adapters = {path.name: str(path) for path in sorted(folder.iterdir())} if folder.is_dir() else {}
    return build_engine(config, adapters)


def fresh_engine(loaded: Loaded, policy: str, clock: Clock) -> Engine:
    """Make an engine without history on the loaded runner."""
    old = loaded.engine.scheduler
    config = EngineConfig(scheduler=replace(old.config, policy=policy), cache=old.cache)
    engine = make_engine(
        config,
        loaded.engine.runner,
        clock,
        num_blocks=old.pool.num_blocks,
        max_model_len=old.max_model_len,
        adapters=old.adapters,
        eos_ids=old.eos_ids,
    )
    engine.scheduler.endings.released += old.endings.take_released()
    return engine


def ranks_of(engine: Engine, names: Iterable[str]) -> dict[str, int]:
    """Map each adapter's identity and name to its rank; the simulator knows adapters by name."""
    directory = engine.scheduler.adapters
    ranks: dict[str, int] = {}
    for name in names:
        identity = directory.resolve(name)
        ranks[name] = ranks[identity] = directory.rank(identity)
        directory.release(identity)
    return ranks


def mixed_trace(
    adapters: Sequence[str],
    vocabulary: int,
    duration: float,
    rate: float,
    seed: int,
    prompt: tuple[int, int] = (8, 160),
    output: tuple[int, int] = (4, 96),
    bursts: bool = False,
) -> list[Arrival]:
    """Draw Poisson requests of random tokens, lengths in [low, high), for the base and every adapter alike.

    With `bursts` the rate swings between a third and twice itself every half second, so that batches of all sizes are
    seen.
    """
    inputs = Lengths("uniform", low=prompt[0], high=prompt[1] - 1)
    outputs = Lengths("uniform", low=output[0], high=output[1] - 1)
    patterns = [(0.0, Arrivals("poisson", rate=rate))]
    if bursts:
        swing = Arrivals("on-off", rate=1.7 * rate, within="poisson", on_s=BURST_S, off_s=BURST_S)
        patterns = [(0.0, Arrivals("poisson", rate=0.3 * rate)), (BURST_S, swing)]
    streams = []
    for start, arrival in patterns:
        for choice, count in ((AdapterChoice("none"), 1), (AdapterChoice("uniform"), len(adapters))):
            own = msgspec.structs.replace(arrival, rate=arrival.rate * count / (len(adapters) + 1))
            if count:
                streams.append(Stream(own, choice, inputs, outputs, start, duration - start))
    planned = plan(Workload(streams, seed), list(adapters), RandomTokens(vocabulary, seed))
    return as_arrivals(planned, adapters, real=True)


def facts_of(engine: Engine, names: Iterable[str]) -> Facts:
    """Return what the simulator needs to know of an engine that serves these adapters."""
    old = engine.scheduler
    fields = ("max_num_seqs", "max_num_batched_tokens", "max_step_ms", "admission_margin", "reserve")
    return Facts(
        ranks=ranks_of(engine, names),
        num_tokens=old.pool.capacity * old.pool.block_size,
        block_size=old.pool.block_size,
        max_model_len=old.max_model_len,
        overlap=engine.runner.overlap,
        scheduler={name: getattr(old.config, name) for name in fields},
    )


def serve(
    loaded: Loaded,
    trace: Sequence[Arrival],
    policy: str,
    on_progress: Callable[[int], None] | None = None,
    cut: bool = False,
) -> Replay:
    """Serve the trace on the real engine; on a CPU by processor time, so that other work does not count."""
    clock = BusyClock() if loaded.model.device == "cpu" else WallClock()
    engine = fresh_engine(loaded, policy, clock)
    done = replay(engine, trace, clock, on_progress, cut)
    loaded.engine.scheduler.endings.released += (
        engine.scheduler.endings.released
    )  # the runner still keeps something of theirs
    return done


def measure(loaded: Loaded, trace: Sequence[Arrival], policy: str) -> Replay:
    with Bar(total=len(trace), desc=f"engine, {policy}", unit=" requests", leave=False, delay=1) as bar:
        return serve(loaded, trace, policy, bar.update)


@dataclass(frozen=True)
class Plan:
    """Policies and loads to compare; a load is a rate as a share of what the engine can do.

    The `seconds` of traffic are divided over the rounds; lengths of prompts and outputs are in [low, high).
    """

    policies: tuple[str, ...] = ("fcfs", "vtc")
    loads: tuple[float, ...] = (0.5, 0.8)
    seconds: float = 30.0
    rounds: int = 6
    prompt: tuple[int, int] = (8, 160)
    output: tuple[int, int] = (4, 96)


@dataclass
class Comparison:
    """Result of a validation: a row per policy and load, the steps that the models were fitted to, and unseen ones."""

    rate: float
    rounds: Rounds
    rows: list[dict[str, Any]]
    fitted: list[Step]
    unseen: list[Step]


def validate(loaded: Loaded, plan: Plan, on_row: Callable[[Comparison], None] = lambda found: None) -> Comparison:
    """Compare engine and simulator, a row for each load and policy.

    Rounds of bursts and of other loads, to which the cost model is fitted, take turns with rounds of the compared
    traces, which it never sees: a machine whose speed drifts does so under both. Bursts show batches of all sizes, the
    other loads how a step with a single prompt differs from one with many.
    """
    names = [info.name for info in loaded.adapters.list()]
    draw = partial(mixed_trace, names, loaded.model.vocab_size, prompt=plan.prompt, output=plan.output)
    rate = find_rate(loaded, draw)
    found = Comparison(rate, Rounds(facts_of(loaded.engine, names), []), [], [], [])
    seconds = plan.seconds / plan.rounds
    for load in plan.loads:
        for policy in plan.policies:
            fitted, unseen, rounds = list[Step](), list[Step](), list[Round]()
            for number in range(plan.rounds):
                seed = 1000 * len(found.rows) + number
                fitted += measure(loaded, draw(seconds, rate, seed, bursts=True), "fcfs").steps
                other = rate * OTHER_LOADS[number % len(OTHER_LOADS)]
                fitted += measure(loaded, draw(seconds, other, seed + 250), "fcfs").steps
                trace = draw(seconds, rate * load, seed + 500)
                real = measure(loaded, trace, policy)
                unseen += real.steps
                rounds.append(Round(real.records, real.seconds))
            cost = fit(fitted, loaded.model.device, f"fitted on {provenance()['processor']}")
            found.rounds.rows.append(Row(policy, load, rounds))
            row = found.rounds.rows[-1].compare(found.rounds.facts, cost)
            found.rows.append({**row, "fit_on_unseen_steps": errors(cost, unseen)})
            found.fitted += fitted
            found.unseen += unseen
            on_row(found)
    return found


def find_rate(loaded: Loaded, draw: Callable[..., list[Arrival]]) -> float:
    """Measure requests per second when the engine is never idle: serve as many at once as it runs together."""
    count = loaded.engine.scheduler.config.max_num_seqs
    trace = [Arrival(0.0, arrival.request) for arrival in draw(count / 20.0, 20.0, 7)]
    done = measure(loaded, trace, "fcfs")
    return len(done.records) / done.seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO, help="a folder with base/ and adapters/")
    parser.add_argument("--policy", default="fcfs,vtc", help="comma-separated")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of traffic in each comparison, all rounds together"
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--loads", default="0.5,0.8", help="rates, as shares of what the engine can do")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--num-blocks", type=int, default=400)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=Path, help="also write the measured steps, for inlaid.sim.fit")
    parser.add_argument("--rounds-out", type=Path, help="also write the compared requests, for perf.rounds")
    parser.add_argument("--cost", type=Path, help="also write the fitted cost model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    loads = tuple(map(float, args.loads.split(",")))
    plan = Plan(tuple(args.policy.split(",")), loads, args.seconds, args.rounds)
    loaded = load(args.model, args.max_num_seqs, args.num_blocks, args.device, args.dtype)
    found, device = validate(loaded, plan), loaded.model.device
    if args.steps is not None:
        write_steps(args.steps, found.fitted)
    if args.rounds_out is not None:
        args.rounds_out.write_bytes(msgspec.json.encode(found.rounds))
    if args.cost is not None:
        cost = fit(found.fitted, device, "fitted to measured steps")
        write_cost(args.cost, cost, errors(cost, found.unseen), provenance())
    record = {**provenance(seed=0), "device": device, "rate": found.rate, "rows": found.rows}
    text = json.dumps(record, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
