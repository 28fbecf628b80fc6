"""A suite run under several policies: the bound it must keep, the clients that ask for little, and the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from inlaid.sim.cost import CostModel, load_cost
from inlaid.sim.journal import Arrival
from inlaid.sim.metrics import isolation, service_of, summarize
from inlaid.sim.simulate import Outcome, Setup, simulate
from inlaid.sim.suites import Suite, generate


@dataclass(frozen=True)
class Experiment:
    """A suite, its trace, and where it runs."""

    suite: Suite
    trace: list[Arrival]
    setup: Setup


def prepare(
    suite: Suite, seed: int = 42, machine: str = "", num_tokens: int = 0, trace: list[Arrival] | None = None
) -> Experiment:
    """A suite ready to run, on its own machine unless another is named."""
    cost: CostModel = load_cost(machine or suite.machine)
    ranks = {f"task-{task:04d}": suite.ranks[task % len(suite.ranks)] for task in range(suite.num_tasks)}
    setup = Setup(
        cost=cost,
        num_tokens=num_tokens or suite.num_tokens,
        slots=suite.slots,
        ranks=ranks,
        weights=dict(suite.weights),
        scheduler=dict(suite.scheduler),
        seed=seed,
    )
    return Experiment(suite, trace if trace is not None else generate(suite, seed), setup)


def bound(experiment: Experiment) -> float:
    """VTC's: two backlogged tenants differ by at most 2 max(wp Lin, wq M), over the smallest weight. Lin is the
    longest prompt, M the most tokens that running requests hold together."""
    longest = max((len(arrival.request.prompt) for arrival in experiment.trace), default=0)
    return 2.0 * max(longest, 2.0 * experiment.setup.num_tokens) / min([1.0, *experiment.setup.weights.values()])


def run(
    experiment: Experiment, policy: str, lengths: str = "history", on_progress: Callable[[int], None] | None = None
) -> Outcome:
    setup = replace(experiment.setup, policy=policy, lengths=lengths)
    return simulate(experiment.trace, setup, on_progress)


def table(experiment: Experiment, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per policy, isolation computed by serving each modest client alone."""
    suite = experiment.suite
    limit = bound(experiment) if suite.fair else None
    rows = [summarize(outcome, suite.duration, limit, suite.weights) for outcome in outcomes]
    capacity = max((sum(outcome.service.values()) / outcome.end for outcome in outcomes if outcome.end), default=0.0)
    modest = modest_clients(experiment, capacity) if suite.fair else []
    alone = {tenant: _alone(experiment, tenant) for tenant in modest}
    for row in rows:
        row["suite"] = suite.name
        row["isolation"], row["isolation_ratio"] = isolation(row, alone, modest)
    return rows


def modest_clients(experiment: Experiment, capacity: float) -> list[str]:
    """Who asks, in every minute, for no more than an equal share of what the machine delivers; nobody where all
    together ask for less than 90% of that: there is no company to be protected from."""
    asked: dict[str, dict[int, float]] = {}
    for arrival in experiment.trace:
        request = arrival.request
        cost = len(request.prompt) + 2.0 * (request.true_output_len or request.params.max_tokens)
        minutes = asked.setdefault(request.tenant, {})
        minute = int(arrival.time // 60)
        minutes[minute] = minutes.get(minute, 0.0) + cost
    if sum(sum(minutes.values()) for minutes in asked.values()) < 0.9 * capacity * experiment.suite.duration:
        return []
    share = 60.0 * capacity / len(asked)
    return sorted(tenant for tenant, minutes in asked.items() if max(minutes.values()) <= share)


def _alone(experiment: Experiment, tenant: str) -> float:
    own = [arrival for arrival in experiment.trace if arrival.request.tenant == tenant]
    outcome = simulate(own, replace(experiment.setup, policy="fcfs", lengths="none"))
    ttfts = [record.ttft for record in outcome.records if record.ttft is not None]
    return sum(ttfts) / len(ttfts) if ttfts else 0.0


def total_service(outcome: Outcome) -> float:
    """What was delivered, from the records: the same as the ledger's sum when nobody was refused half-way."""
    return sum(service_of(record) for record in outcome.records if record.finish is not None)
