"""`python -m perf.in_process`: serve a workload on an engine in this process, without HTTP, and measure it.

The requests are those that `inlaid sim` simulates and `perf.client` sends, at the same times; records and summary have
the client's form, so that `perf.report` shows the runs side by side. An answer whose length is hidden from the
scheduler is ended at that length, as a stop string would end it.

    python -m perf.in_process --workload overload --rate 20 --out a.json

Exit codes: 0 done, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from inlaid.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig
from inlaid.engine.request import Output
from inlaid.files import write_atomically
from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.report.provenance import now, provenance
from inlaid.sim.request_log import as_arrivals
from inlaid.worker.build import Loaded, build_engine
from inlaid.workload.plan import PlannedRequest, plan, rescale_rate
from inlaid.workload.prompts import PromptMaker, TokenizerFile
from inlaid.workload.spec import EngineSizes, Workload
from inlaid.workload.suites import load_workload
from perf.launch import find_adapters
from perf.process import ROOT
from perf.records import Record, write_records
from perf.replay import BusyClock, Replay, WallClock, replay
from perf.summary import DEFAULT_PERCENTILES, as_table, options_for, summarize

DEMO = ROOT / "models" / "demo"
BLOCK_SIZE = CacheConfig().block_size


class TokenTimes:
    """Times at which each request's tokens came, for the records."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.counts: dict[str, int] = {}

    def note(self, outputs: Sequence[Output], now: float) -> None:
        for output in outputs:
            if output.tokens:
                self.times.setdefault(output.id, []).append(now)
                self.counts[output.id] = self.counts.get(output.id, 0) + len(output.tokens)


def make_config(model: str, sizes: EngineSizes, policy: str, device: str) -> EngineConfig:
    """Configure the engine for the sizes that the workload is made for."""
    usual, loras = SchedulerConfig(), AdapterConfig()
    blocks = 0 if sizes.kv_tokens is None else -(-sizes.kv_tokens // BLOCK_SIZE)
    return EngineConfig(
        model=model,
        device=device,
        scheduler=SchedulerConfig(policy=policy, max_num_seqs=sizes.max_num_seqs or usual.max_num_seqs),
        cache=CacheConfig(num_blocks=blocks),
        adapters=AdapterConfig(max_loras=sizes.max_loras or loras.max_loras),
    )


def serve(
    loaded: Loaded, planned: Sequence[PlannedRequest], served: Sequence[str], processor_time: bool
) -> list[Record]:
    """Serve the plan and return a record of each request, in the plan's order."""
    clock = BusyClock() if processor_time else WallClock()
    loaded.engine.clock = clock
    tokens, hidden = TokenTimes(), any(request.max_tokens is not None for request in planned)
    with Bar(total=len(planned), unit="req", delay=1, leave=False) as bar:
        done = replay(
            loaded.engine,
            as_arrivals(planned, served, real=True),
            clock,
            bar.update,
            cut=hidden,
            on_outputs=tokens.note,
        )
    return _records(planned, done, tokens)


def _records(planned: Sequence[PlannedRequest], done: Replay, tokens: TokenTimes) -> list[Record]:
    known = {record.id: record for record in done.records}
    records = []
    for request in planned:
        record, times = known[str(request.index)], tokens.times.get(str(request.index), [])
        finished = record.finish if record.finish is not None else record.arrival
        records.append(
            Record(
                index=request.index,
                adapter=request.adapter,
                tenant=request.tenant,
                service_class=request.service_class,
                due=round(request.at, 6),
                sent=round(record.arrival, 6),
                finished=round(finished, 6),
                status="refused" if record.refused else "ok",
                input_len=record.prompt_len,
                output_len=tokens.counts.get(record.id, 0),
                planned_output_len=request.output_len,
                ttft=None if not times else round(times[0] - record.arrival, 6),
                itls=[round(after - before, 6) for before, after in itertools.pairwise(times)],
            )
        )
    return records


def heading(workload: Workload, planned: Sequence[PlannedRequest], arguments: argparse.Namespace) -> dict[str, Any]:
    """Describe the run, with the field names of the client's summary."""
    made = provenance(workload.seed)
    return {
        "date": now(),
        "backend": "in-process",
        "label": arguments.label or (Path(arguments.out).stem if arguments.out else workload.name),
        "model_id": arguments.model,
        "num_prompts": len(planned),
        "num_adapters": len({request.adapter for request in planned if request.adapter}),
        "command": made["command"].split(" "),
        "seed": workload.seed,
        "interrupted": False,
    }


def run(arguments: argparse.Namespace) -> int:
    """Plan, load, serve and write; return the exit code."""
    workload = load_workload(arguments.workload)
    if arguments.rate is not None:
        workload = rescale_rate(workload, arguments.rate)
    adapters = dict(find_adapters(arguments.adapters or [str(DEMO / "adapters" / "*")]))
    served = workload.adapters_among(list(adapters))
    maker = PromptMaker("ids", TokenizerFile(arguments.model), workload.seed)
    planned = plan(workload, served, maker, shown=True)
    config = make_config(arguments.model, workload.engine, arguments.policy, arguments.device)
    used = {request.adapter for request in planned}
    loaded = build_engine(config, {name: adapters[name] for name in served if name in used})
    loaded.engine.scheduler.ledger.set_weights(workload.weights)
    records = serve(loaded, planned, [name for name in served if name in used], arguments.clock == "processor")
    options = options_for(workload, DEFAULT_PERCENTILES, detailed=False)
    summary = heading(workload, planned, arguments) | summarize(records, options)
    if arguments.out:
        out = Path(arguments.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_records(out.with_suffix(".jsonl"), records)
        write_atomically(out, msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    print(as_table(summary))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run it."""
    parser = Parser(prog="perf.in_process", description="Serve a workload on an engine in process.")
    parser.add_argument("--workload", required=True, help="a suite's name, or a workload file")
    parser.add_argument("--model", default=str(DEMO / "base"), help="folder (default: the bundled demo)")
    parser.add_argument("--adapters", nargs="*", help="NAME=PATH, folders, or quoted globs (default: the demo's)")
    parser.add_argument("--policy", default="fcfs")
    parser.add_argument("--rate", type=float, help="requests a second, instead of the workload's own")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall", help="processor: this process's own time, for one CPU"
    )
    parser.add_argument("--out", help="summary file; records go beside it as .jsonl")
    parser.add_argument("--label", default="", help="name of this run in reports")
    arguments = parser.parse_args(argv)
    try:
        return run(arguments)
    except (ValueError, OSError) as error:
        print(f"perf.in_process: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
