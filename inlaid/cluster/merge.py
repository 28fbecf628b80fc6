"""Answers of several replicas as one: sums of figures, the best tier of an adapter, each tenant's service over all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from inlaid.worker.messages import AdapterInfo

_TIERS = ("device", "host", "disk")
_TENANT_SUMS = ("service", "service_total", "prompt_tokens", "cached_tokens", "output_tokens", "requests")


def add_stats(all_stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Add up gauges and counters."""
    sums: dict[str, float] = {}
    for stats in all_stats:
        for key, value in stats.items():
            sums[key] = sums.get(key, 0) + value
    return sums


def merge_adapters(listed: Mapping[str, Sequence[AdapterInfo]]) -> list[AdapterInfo]:
    """Join the replicas' lists by name: the best tier, sums of counts, and the tier on each replica."""
    groups: dict[str, dict[str, AdapterInfo]] = {}
    for replica, infos in listed.items():
        for info in infos:
            groups.setdefault(info.name, {})[replica] = info
    return [merge_adapter(group) for group in groups.values()]


def merge_adapter(group: Mapping[str, AdapterInfo]) -> AdapterInfo:
    """Join what the replicas say of one adapter."""
    infos = list(group.values())
    return msgspec.structs.replace(
        infos[0],
        tier=min((info.tier for info in infos), key=_TIERS.index),
        on_host=any(info.on_host for info in infos),
        requests=sum(info.requests for info in infos),
        reads=sum(info.reads for info in infos),
        loads=sum(info.loads for info in infos),
        evictions=sum(info.evictions for info in infos),
        hits=sum(info.hits for info in infos),
        load_seconds=max(info.load_seconds for info in infos),
        check_seconds=max(info.check_seconds for info in infos),
        copy_seconds=max(info.copy_seconds for info in infos),
        pinned=all(info.pinned for info in infos),
        replicas={replica: info.tier for replica, info in group.items()},
    )


def merge_fairness(views: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up each tenant's service; the gap is that between tenants that wait anywhere."""
    tenants: dict[str, dict[str, Any]] = {}
    for view in views:
        for name, seen in view["tenants"].items():
            known = tenants.setdefault(name, {**seen, **dict.fromkeys(_TENANT_SUMS, 0), "waiting": 0, "running": 0})
            for key in (*_TENANT_SUMS, "waiting", "running"):
                known[key] += seen[key]
            known["counter"] = max(known["counter"], seen["counter"])
            waits = [each for each in (known["predicted_wait"], seen["predicted_wait"]) if each is not None]
            known["predicted_wait"] = min(waits, default=None)
    shares = [tenant["service"] / tenant["weight"] for tenant in tenants.values() if tenant["waiting"]]
    return {
        **views[0],
        "service": sum(view["service"] for view in views),
        "largest_gap": max(shares) - min(shares) if shares else 0.0,
        "waiting": sum(view["waiting"] for view in views),
        "running": sum(view["running"] for view in views),
        "tenants": tenants,
    }


def merge_queues(queues: Sequence[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """Join the fronts of the queues: those that have waited longest first."""
    return sorted((each for queue in queues for each in queue), key=lambda each: -each["waited"])


def merge_histories(histories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up each tenant's service, piece by piece."""
    tenants: dict[str, list[float]] = {}
    for history in histories:
        for name, row in history["tenants"].items():
            known = tenants.get(name, [0.0] * len(row))
            tenants[name] = [a + b for a, b in zip(known, row, strict=True)]
    return {**histories[0], "tenants": tenants}


# How the answers to a question are joined, by its name.
MERGED: Mapping[str, Callable[[Sequence[Any]], Any]] = MappingProxyType(
    {
        "stats": add_stats,
        "fairness": merge_fairness,
        "queue": merge_queues,
        "service_history": merge_histories,
        "steps": lambda answers: [step for answer in answers for step in answer],
        "step_split": add_stats,
        "step_floor": lambda answers: answers[0],
        "adapter_parts": lambda answers: answers[0],
    }
)
