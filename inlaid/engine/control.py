"""View and change the scheduler while it runs: the content of GET and PUT /v1/scheduler and of GET /v1/fairness.

Plain dicts go in and out, as they cross a socket and become JSON.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import msgspec

from inlaid.engine.limits import MAX_LIMIT, TenantLimits
from inlaid.engine.policy import POLICIES, Policy, make_policy, parse_policy
from inlaid.engine.request import Status
from inlaid.engine.scheduler import Scheduler

SETTINGS = ("policy", "options", "weights", "limits", "max_num_waiting")


def describe(scheduler: Scheduler) -> dict[str, Any]:
    """Return the settings in force, in the form that `change` takes, and the names of the policies."""
    return {
        "policy": scheduler.policy.name,
        "options": asdict(scheduler.policy),
        "weights": scheduler.ledger.weights,
        "limits": msgspec.to_builtins(scheduler.limits.tenants),
        "max_num_waiting": scheduler.limits.max_waiting,
        "policies": sorted(POLICIES),
    }


def change(scheduler: Scheduler, changes: dict[str, Any]) -> None:
    """Replace the settings named, all or none: raise ValueError first if one is unknown or impossible."""
    unknown = sorted(set(changes) - set(SETTINGS))
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}; known: {', '.join(SETTINGS)}")
    policy = _new_policy(scheduler, changes)
    weights = _convert(changes, "weights", dict[str, float])
    limits = _convert(changes, "limits", dict[str, TenantLimits])
    max_waiting = _convert(changes, "max_num_waiting", int)
    if max_waiting is not None and not 1 <= max_waiting <= MAX_LIMIT:
        raise ValueError(f"max_num_waiting is {max_waiting}; it must be at least 1 and at most {MAX_LIMIT}")
    for tenant, limit in (limits or {}).items():
        limit.check(tenant)
    if weights is not None:
        scheduler.ledger.set_weights(weights)
    if limits is not None:
        scheduler.limits.set_tenants(limits)
    if max_waiting is not None:
        scheduler.limits.max_waiting = max_waiting
    scheduler.set_policy(policy)


def _new_policy(scheduler: Scheduler, changes: dict[str, Any]) -> Policy:
    name = changes.get("policy", scheduler.policy.name)
    if not isinstance(name, str):
        raise ValueError(f"policy must be a string, not {name!r}")
    if ":" in name:
        named = parse_policy(name)
        name, kept = named.name, asdict(named)
    else:
        kept = asdict(scheduler.policy) if name == scheduler.policy.name else {}
    options = _convert(changes, "options", dict[str, Any]) or {}
    return make_policy(name, {**kept, **options})


def _convert(changes: dict[str, Any], name: str, kind: Any) -> Any:
    if name not in changes:
        return None
    try:
        return msgspec.convert(changes[name], kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}: {error}") from error


def fairness(scheduler: Scheduler, window: float, now: float) -> dict[str, Any]:
    """Return each tenant's service in the last `window` seconds, and the largest gap between tenants that wait."""
    if not 0 < window < float("inf"):
        raise ValueError(f"window is {window}; it must be a positive number of seconds")
    ledger = scheduler.ledger
    served = ledger.served(now, window)
    ahead = _predicted_waits(scheduler)
    tenants = {
        account.tenant: {
            "service": served.get(account.tenant, 0.0),
            "service_total": account.service,
            "weight": account.weight,
            "counter": account.counter,
            "prompt_tokens": account.prompt_tokens,
            "cached_tokens": account.cached_tokens,
            "output_tokens": account.output_tokens,
            "requests": account.num_requests,
            "waiting": account.num_waiting,
            "running": account.num_running,
            "predicted_wait": ahead.get(account.tenant),
        }
        for account in ledger.accounts.values()
        if account.tenant in served or account.num_waiting or account.num_running
    }
    shares = [served.get(a.tenant, 0.0) / a.weight for a in ledger.accounts.values() if a.num_waiting]
    return {
        "window": window,
        "policy": scheduler.policy.name,
        "service": sum(served.values()),
        "largest_gap": max(shares) - min(shares) if shares else 0.0,
        "waiting": scheduler.num_waiting,
        "running": scheduler.num_running,
        "tenants": tenants,
    }


def _predicted_waits(scheduler: Scheduler) -> dict[str, float]:
    """Estimate the seconds until each waiting tenant's next request starts, by the policy's order and the pace."""
    waits: dict[str, float] = {}
    waiting = [r for r in scheduler.requests.values() if r.status is Status.WAITING]
    for place, request in enumerate(sorted(waiting, key=scheduler.state.standing)):
        waits.setdefault(request.tenant, scheduler.limits.expected_wait(place + 1))
    return waits
