"""Rounds of a validation as a file, so that a machine fitted later is compared with the engine without that engine.

    python -m perf.rounds .inlaid/sched-rounds.json --machine h200

The file has, for each policy and load, the requests of each round with the times at which the real engine answered
them, and the engine's limits and memory. `perf.validate` and the GPU stage `sched` write it.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from inlaid.engine.request import NewRequest, SamplingParams
from inlaid.flags import Parser
from inlaid.sim.cost import CostModel, load_cost
from inlaid.sim.request_log import Arrival, RequestRecord
from inlaid.sim.simulate import Setup, simulate

FIGURES = ("throughput", "mean_ttft", "mean_latency")


class Facts(msgspec.Struct, frozen=True):
    """The facts about an engine that the simulator needs beside the cost of its steps. All adapters are resident."""

    ranks: dict[str, int]
    num_tokens: int
    block_size: int
    max_model_len: int
    overlap: bool
    scheduler: dict[str, Any]

    def simulate(self, trace: Sequence[Arrival], cost: CostModel, policy: str) -> tuple[list[RequestRecord], float]:
        """Serve a trace on the simulator; return the records and the time of the last end."""
        names = {arrival.request.adapter for arrival in trace if arrival.request.adapter is not None}
        setup = Setup(
            cost=cost,
            policy=policy,
            resident=tuple(sorted(names)),
            ranks=self.ranks,
            num_tokens=self.num_tokens,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            scheduler=self.scheduler,
            overlap=self.overlap,
        )
        outcome = simulate(trace, setup)
        return outcome.records, outcome.end


class Round(msgspec.Struct, frozen=True):
    """Requests that the engine has served, and the seconds until the last had ended."""

    records: list[RequestRecord]
    seconds: float

    def trace(self) -> list[Arrival]:
        """Return the same requests for the simulator, which looks at no token."""
        return [
            Arrival(
                each.arrival,
                NewRequest(
                    id=each.id,
                    prompt=[0] * each.prompt_len,
                    params=SamplingParams(max_tokens=each.output_len, ignore_eos=True, temperature=0.0, seed=0),
                    adapter=each.adapter,
                    tenant=each.tenant,
                    true_output_len=each.output_len,
                ),
            )
            for each in self.records
        ]


class Row(msgspec.Struct, frozen=True):
    """The rounds of one policy and load."""

    policy: str
    load: float
    rounds: list[Round]

    def compare(self, facts: Facts, cost: CostModel) -> dict[str, Any]:
        """Compare engine and simulator over all rounds."""
        made = [facts.simulate(each.trace(), cost, self.policy) for each in self.rounds]
        real = summary([r for each in self.rounds for r in each.records], sum(each.seconds for each in self.rounds))
        sim = summary([r for records, _ in made for r in records], sum(end for _, end in made))
        errors = {f"{name.removeprefix('mean_')}_error": sim[name] / real[name] - 1.0 for name in FIGURES}
        return {"policy": self.policy, "load": self.load, "engine": real, "simulator": sim, **errors}


class Rounds(msgspec.Struct):
    """The file: what the engine is, and its rows."""

    facts: Facts
    rows: list[Row]


def summary(records: Sequence[RequestRecord], seconds: float) -> dict[str, float]:
    """Return throughput, mean time to first token and mean latency of the requests that have ended."""
    finished = [record for record in records if record.finish is not None]
    return {
        "requests": len(finished),
        "seconds": seconds,
        "throughput": sum(record.output_len for record in finished) / seconds,
        "mean_ttft": statistics.fmean(record.ttft for record in finished if record.ttft is not None),
        "mean_latency": statistics.fmean(record.latency for record in finished if record.latency is not None),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate recorded rounds on a machine and print how far it is off, a row for each policy and load."""
    parser = Parser(description=__doc__)
    parser.add_argument("rounds", type=Path, metavar="ROUNDS.json")
    parser.add_argument("--machine", required=True, help="a machine of the simulator, or a file from inlaid.sim.fit")
    args = parser.parse_args(arguments)
    try:
        rounds = msgspec.json.decode(args.rounds.read_bytes(), type=Rounds)
        cost = load_cost(args.machine)
    except (OSError, ValueError, msgspec.DecodeError) as error:
        print(f"rounds: {error}", file=sys.stderr)
        return 2
    print(json.dumps([row.compare(rounds.facts, cost) for row in rounds.rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
