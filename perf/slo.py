"""Attainment of objectives: by class, by kind of limit, and goodput. Called by `perf.summary`."""

from __future__ import annotations

import msgspec

from inlaid.workload.spec import Objective
from perf.records import Record


class Attainment(msgspec.Struct, frozen=True):
    """Shares of all requests sent, so that a refused or failed request counts as a miss."""

    requests: int
    met: int
    attainment: float
    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None


def meets(record: Record, objective: Objective | None) -> bool:
    """Tell whether a request was answered within every limit of its objective."""
    if record.status != "ok":
        return False
    return objective is None or all(_parts(record, objective).values())


def _parts(record: Record, objective: Objective) -> dict[str, bool]:
    """Judge each kind of limit; a limit on what a record does not have (time per token of a single token) is met."""
    measured = {"ttft": record.ttft, "tpot": record.tpot, "e2el": record.e2el}
    limits = {"ttft": objective.ttft_ms, "tpot": objective.tpot_ms, "e2el": objective.e2el_ms}
    return {
        name: value is None or value * 1000 <= limit
        for name, value in measured.items()
        if (limit := limits[name]) is not None
    }


def attainment(records: list[Record], objectives: dict[str, Objective]) -> Attainment:
    """Compute one share over all records, and one for each kind of limit that any of their classes has."""
    if not records:
        return Attainment(0, 0, 0.0)
    met = sum(meets(record, objectives.get(record.service_class)) for record in records)
    return Attainment(
        requests=len(records),
        met=met,
        attainment=met / len(records),
        ttft=_share(records, objectives, "ttft"),
        tpot=_share(records, objectives, "tpot"),
        e2el=_share(records, objectives, "e2el"),
    )


def attainment_by_class(records: list[Record], objectives: dict[str, Objective]) -> dict[str, Attainment]:
    classes = sorted({record.service_class for record in records})
    return {name: attainment([r for r in records if r.service_class == name], objectives) for name in classes}


def _share(records: list[Record], objectives: dict[str, Objective], name: str) -> float | None:
    asked = met = 0
    for record in records:
        objective = objectives.get(record.service_class)
        if objective is not None and getattr(objective, f"{name}_ms") is not None:
            asked += 1
            met += record.status == "ok" and _parts(record, objective)[name]
    return met / asked if asked else None
