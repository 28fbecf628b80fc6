"""The simulator against the real engine: the same trace on both, throughput and mean time to first token compared.

    python -m inlaid.sim.validate --out perf/results/sim-validation-cpu.json

The engine serves bursts, to which this machine's cost model is fitted, and in turns with them other traces, which the
simulator then serves too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from inlaid.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig
from inlaid.engine.engine import Engine, make_engine
from inlaid.engine.process import Loaded, build_engine
from inlaid.sim.cost import CostModel
from inlaid.sim.fit import errors, fit, write_cost, write_steps
from inlaid.sim.provenance import provenance
from inlaid.sim.replay import BusyClock, Clock, Replay, Step, WallClock, mixed_trace, replay
from inlaid.sim.simulate import Arrival, Record, Setup, simulate

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


def load(model: Path, max_num_seqs: int, num_blocks: int, device: str = "auto", dtype: str = "auto") -> Loaded:
    """The model with every adapter that lies beside it, prefix caching off as the traces are random tokens."""
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
    """An engine that remembers nothing, on the loaded runner."""
    old = loaded.engine.scheduler
    config = EngineConfig(scheduler=replace(old.config, policy=policy), cache=old.cache)
    return make_engine(
        config,
        loaded.engine.runner,
        clock,
        num_blocks=old.pool.num_blocks,
        max_model_len=old.max_model_len,
        adapters=old.adapters,
        eos_ids=old.eos_ids,
    )


def ranks_of(loaded: Loaded, names: Sequence[str]) -> dict[str, int]:
    directory = loaded.engine.scheduler.adapters
    identities = [directory.resolve(name) for name in names]
    ranks = {identity: directory.rank(identity) for identity in identities}
    for identity in identities:
        directory.release(identity)
    return ranks


def summary(records: Sequence[Record], seconds: float) -> dict[str, float]:
    finished = [record for record in records if record.finish is not None]
    return {
        "requests": len(finished),
        "seconds": seconds,
        "throughput": sum(record.output_len for record in finished) / seconds,
        "mean_ttft": statistics.fmean(record.ttft for record in finished if record.ttft is not None),
        "mean_latency": statistics.fmean(record.latency for record in finished if record.latency is not None),
    }


def simulated(trace: Sequence[Arrival], loaded: Loaded, cost: CostModel, policy: str) -> tuple[list[Record], float]:
    """The same trace, scheduler settings and memory on the simulator. Adapters are all resident, as on the engine."""
    old = loaded.engine.scheduler
    limits = {
        "max_num_seqs": old.config.max_num_seqs,
        "max_num_batched_tokens": old.config.max_num_batched_tokens,
        "admission_margin": old.config.admission_margin,
        "reserve": old.config.reserve,
    }
    setup = Setup(
        cost=cost,
        policy=policy,
        resident=tuple({arrival.request.adapter or "" for arrival in trace}),
        num_tokens=old.pool.capacity * old.pool.block_size,
        block_size=old.pool.block_size,
        max_model_len=old.max_model_len,
        scheduler=limits,
    )
    outcome = simulate(trace, setup)
    return outcome.records, outcome.end


def measure(loaded: Loaded, trace: Sequence[Arrival], policy: str) -> Replay:
    """The trace on the real engine; on a processor by processor time, so that other work there does not disturb."""
    clock = BusyClock() if loaded.model.device == "cpu" else WallClock()
    names = [info.name for info in loaded.adapters.list()]
    with tqdm(total=len(trace), desc=f"engine, {policy}", unit=" requests", leave=False, delay=1) as bar:
        return replay(fresh_engine(loaded, policy, clock), trace, ranks_of(loaded, names), clock, bar.update)


def find_rate(loaded: Loaded, names: Sequence[str], vocabulary: int, count: float) -> float:
    """Requests per second when the engine is never idle: from so many at once."""
    trace = [Arrival(0.0, a.request) for a in mixed_trace(names, vocabulary, count / 20.0, 20.0, 7)]
    done = measure(loaded, trace, "fcfs")
    return len(done.records) / done.seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--cost", type=Path, help="also write the fitted cost model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    loaded = load(args.model, args.max_num_seqs, args.num_blocks, args.device, args.dtype)
    record = validate(loaded, args)
    text = json.dumps(record, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 0


def validate(loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of bursts, to which the cost model is fitted, take turns with rounds of the compared traces, which it
    never sees: a machine whose speed drifts drifts under both."""
    names = [info.name for info in loaded.adapters.list()]
    vocabulary = loaded.model.vocab_size
    rate = find_rate(loaded, names, vocabulary, count=args.max_num_seqs)
    rows: list[dict[str, Any]] = []
    steps: list[Step] = []
    seconds = args.seconds / args.rounds
    for share in map(float, args.loads.split(",")):
        for policy in args.policy.split(","):
            fitted, seen, rounds = [], [], []
            for number in range(args.rounds):
                seed = 1000 * len(rows) + number
                bursts = mixed_trace(names, vocabulary, seconds, rate, seed=seed, bursts=True)
                fitted += measure(loaded, bursts, "fcfs").steps
                trace = mixed_trace(names, vocabulary, seconds, rate * share, seed=seed + 500)
                real = measure(loaded, trace, policy)
                seen += real.steps
                rounds.append((trace, real))
            cost = fit(fitted, loaded.model.device, f"fitted on {provenance()['processor']}")
            rows.append({"policy": policy, "load": share, **compare(rounds, loaded, cost, policy)})
            rows[-1]["fit_on_unseen_steps"] = errors(cost, seen)
            steps += fitted
    if args.steps is not None:
        write_steps(args.steps, steps)
    if args.cost is not None:
        write_cost(
            args.cost, fit(steps, loaded.model.device, "fitted to measured steps"), errors(cost, seen), provenance()
        )
    return {**provenance(seed=0), "device": loaded.model.device, "rate": rate, "rows": rows}


def compare(
    rounds: Sequence[tuple[list[Arrival], Replay]], loaded: Loaded, cost: CostModel, policy: str
) -> dict[str, Any]:
    """Engine and simulator over all rounds of one row."""
    made = [simulated(trace, loaded, cost, policy) for trace, _ in rounds]
    real = summary([r for _, done in rounds for r in done.records], sum(done.seconds for _, done in rounds))
    sim = summary([r for records, _ in made for r in records], sum(end for _, end in made))
    return {
        "engine": real,
        "simulator": sim,
        "throughput_error": sim["throughput"] / real["throughput"] - 1.0,
        "ttft_error": sim["mean_ttft"] / real["mean_ttft"] - 1.0,
        "latency_error": sim["mean_latency"] / real["mean_latency"] - 1.0,
    }


if __name__ == "__main__":
    sys.exit(main())
