"""A workload simulated under several policies: the bound it must keep, the clients that ask for little, the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from inlaid.kv_format import AUTO, kv_format
from inlaid.sim.cost import HEAD, CostModel, load_cost
from inlaid.sim.metrics import isolation, service_of, summarize
from inlaid.sim.request_log import Arrival, as_arrivals
from inlaid.sim.simulate import Outcome, Setup, simulate
from inlaid.workload.plan import plan
from inlaid.workload.prompts import LengthsOnly
from inlaid.workload.spec import Workload

NUM_TOKENS = 10_000  # of KV memory, for workloads that do not say


@dataclass(frozen=True)
class Experiment:
    """A workload, its requests in order of time, and the simulated engine that serves them."""

    workload: Workload
    trace: list[Arrival]
    setup: Setup

    @property
    def duration(self) -> float:
        """Seconds in which requests arrive."""
        if self.workload.duration_s is not None:
            return self.workload.duration_s
        return max((arrival.time for arrival in self.trace), default=0.0) or 1.0


def draw_trace(workload: Workload) -> list[Arrival]:
    """Draw a workload's requests for the simulator."""
    served = workload.adapter_names
    return as_arrivals(plan(workload, served, LengthsOnly()), served)


def prepare(
    workload: Workload,
    seed: int | None = None,
    machine: str = "",
    num_tokens: int = 0,
    trace: list[Arrival] | None = None,
    kv: str = AUTO.name,
    members: int = 1,
    exchanges: float = 0.0,
) -> Experiment:
    """Prepare an experiment with the workload's own seed, machine and memory unless others are named.

    In another form of keys and values, `kv`, the same memory holds more tokens, and they are read in less time. Several
    `members` serve one model together, with the memory for tokens of all; a step's sums take `exchanges` seconds.
    """
    if seed is not None:
        workload = msgspec.structs.replace(workload, seed=seed)
    form = kv_format(kv)
    cost: CostModel = (
        load_cost(machine or workload.simulator.machine).with_keys_and_values(form).divided(members, exchanges)
    )
    sizes = workload.engine
    tokens = (
        (num_tokens or sizes.kv_tokens or NUM_TOKENS) * members * AUTO.head_bytes(HEAD, 2) // form.head_bytes(HEAD, 2)
    )
    setup = Setup(
        cost=cost,
        num_tokens=tokens,
        slots=sizes.max_loras or Setup.slots,
        ranks=workload.adapter_ranks,
        weights=dict(workload.weights),
        scheduler={} if sizes.max_num_seqs is None else {"max_num_seqs": sizes.max_num_seqs},
        seed=workload.seed,
    )
    return Experiment(workload, draw_trace(workload) if trace is None else trace, setup)


def bound(experiment: Experiment) -> float:
    """Return VTC's bound: two backlogged tenants differ by at most 2 max(wp Lin, wq M), over the smallest weight.

    Lin is the longest prompt, M the most tokens that running requests hold together.
    """
    longest = max((len(arrival.request.prompt) for arrival in experiment.trace), default=0)
    return 2.0 * max(longest, 2.0 * experiment.setup.num_tokens) / min([1.0, *experiment.setup.weights.values()])


def run(
    experiment: Experiment, policy: str, lengths: str = "history", on_progress: Callable[[int], None] | None = None
) -> Outcome:
    """Simulate the experiment under one policy."""
    setup = replace(experiment.setup, policy=policy, lengths=lengths)
    return simulate(experiment.trace, setup, on_progress)


def table(experiment: Experiment, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Summarize each policy in a row; isolation is computed by serving each modest client alone."""
    workload, fairness = experiment.workload, experiment.workload.simulator.fairness
    limit = bound(experiment) if fairness else None
    rows = [summarize(outcome, experiment.duration, limit, workload.weights) for outcome in outcomes]
    capacity = max((sum(outcome.service.values()) / outcome.end for outcome in outcomes if outcome.end), default=0.0)
    modest = modest_clients(experiment, capacity) if fairness else []
    alone = {tenant: _alone(experiment, tenant) for tenant in modest}
    for row in rows:
        row["suite"] = workload.name
        row["isolation"], row["isolation_ratio"] = isolation(row, alone, modest)
    return rows


def modest_clients(experiment: Experiment, capacity: float) -> list[str]:
    """List the clients that ask, in every minute, for no more than an equal share of what the machine delivers.

    There are none where all clients together ask for less than 90% of that: nothing is contended.
    """
    asked: dict[str, dict[int, float]] = {}
    for arrival in experiment.trace:
        request = arrival.request
        cost = len(request.prompt) + 2.0 * (request.true_output_len or request.params.max_tokens)
        minutes = asked.setdefault(request.tenant, {})
        minute = int(arrival.time // 60)
        minutes[minute] = minutes.get(minute, 0.0) + cost
    if sum(sum(minutes.values()) for minutes in asked.values()) < 0.9 * capacity * experiment.duration:
        return []
    share = 60.0 * capacity / len(asked)
    return sorted(tenant for tenant, minutes in asked.items() if max(minutes.values()) <= share)


def _alone(experiment: Experiment, tenant: str) -> float:
    own = [arrival for arrival in experiment.trace if arrival.request.tenant == tenant]
    outcome = simulate(own, replace(experiment.setup, policy="fcfs", lengths="none"))
    ttfts = [record.ttft for record in outcome.records if record.ttft is not None]
    return sum(ttfts) / len(ttfts) if ttfts else 0.0


def total_service(outcome: Outcome) -> float:
    """Sum the delivered service from the records; it equals the ledger's sum if no request was ended half-way."""
    return sum(service_of(record) for record in outcome.records if record.finish is not None)
