"""Explain the queue: who stands where, behind whom, and why, in the words of the policy. The console shows it."""

from __future__ import annotations

import heapq
from typing import Any

from inlaid.engine.request import Status
from inlaid.engine.scheduler import Scheduler


def queue(scheduler: Scheduler, most: int, now: float) -> list[dict[str, Any]]:
    """Return the first `most` requests that wait, in the policy's order.

    Each names its tenant and adapter, the seconds that it has waited, the tenant that it stands behind, the policy's
    reason for that, and what the first of all waits for.
    """
    state = scheduler.state
    state.view.now = max(state.view.now, now)
    waiting = (p.request for p in state.progress.values() if p.request.status is Status.WAITING)
    first = heapq.nsmallest(most, waiting, key=state.standing)
    aside = {progress.request.id for group in state.working_set.aside.values() for progress in group}
    listed = []
    for place, request in enumerate(first):
        before = first[place - 1] if place else None
        reason = _held_by(scheduler) if before is None else scheduler.policy.reason(before, request, state.view)
        listed.append(
            {
                "tenant": request.tenant,
                "adapter": request.adapter_name,
                "waited": now - request.arrival,
                "behind": None if before is None else before.tenant,
                "reason": "its adapter is being loaded" if request.id in aside else reason,
            }
        )
    return listed


def _held_by(scheduler: Scheduler) -> str:
    """Say what the first of the queue waits for."""
    state = scheduler.state
    if not scheduler.admitting:
        return "running requests drain before the base is switched"
    if len(state.running) >= scheduler.config.max_num_seqs:
        return f"all {scheduler.config.max_num_seqs} seats are taken (--max-num-seqs)"
    if state.working_set.full:
        return f"the batch holds {state.working_set.limit} adapters, the most allowed"
    if state.nothing_fits is not None:
        return "no KV blocks are free for it yet"
    return "next to start"


def service_history(scheduler: Scheduler, seconds: float, pace: float, now: float) -> dict[str, Any]:
    """Return the service per tenant in pieces of `pace` seconds, oldest first, as far back as `seconds`."""
    count = max(1, int(seconds / pace))
    tenants: dict[str, list[float]] = {}
    for when, served in reversed(scheduler.ledger.history):
        place = count - 1 - int((now - when) / pace)
        if place < 0:
            break
        for tenant, amount in served.items():
            tenants.setdefault(tenant, [0.0] * count)[min(place, count - 1)] += amount
    return {"pace": pace, "tenants": tenants}
