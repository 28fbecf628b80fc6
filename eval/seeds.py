"""Tables over calibration seeds: what each variant loses on average and on the worst task, as mean and range.

Two units: points of the task's metric against full precision, and nats that a whole reference answer has become less
likely by, which tells variants apart where few answers change.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from eval.variants import BOUND, FULL, MIXED
from inlaid.quant.settings import Settings
from inlaid.report import tables

Row = dict[str, Any]
UNITS = (("points", "drop", 2), ("nats", "nats_gained", 3))  # title, field of a record, digits


@dataclass(frozen=True)
class Loss:
    """The loss of one variant at one seed: on average, and on the task that loses most."""

    average: float
    worst: float
    which: str


def seeds_of(records: Sequence[Row]) -> list[int]:
    """Return the calibration seeds of a report, sorted."""
    return sorted({record["seed"] for record in records})


def merged(records: Sequence[Row]) -> list[Row]:
    """Return one record for each variant, width and task, with means over seeds: what figures and tables show."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for record in records:
        groups.setdefault((record["variant"], record["bits"], record["task"], record["adapter"]), []).append(record)
    return [_mean_record(group) for group in groups.values()]


def _mean_record(group: Sequence[Row]) -> Row:
    if len(group) == 1:
        return group[0]
    made = {**group[0], "score": fmean(record["score"] for record in group)}
    made["drop"] = None if any(r["drop"] is None for r in group) else fmean(r["drop"] for r in group)
    made["faults"] = list(dict.fromkeys(fault for record in group for fault in record["faults"]))
    made.pop("p_holm", None)  # of one seed only
    also = [record.get("also", {}) for record in group]
    made["also"] = {
        name: None if any(one.get(name) is None for one in also) else fmean(one[name] for one in also)
        for name in also[0]
    }
    return made


def worst_task(records: Sequence[Row]) -> str:
    """Return the table of what the worst task loses, if the default, mixed data and the bound were all evaluated."""
    default = f"mlgptq-{Settings().aggregation}"
    rows = []
    for bits in _widths(records):
        losses = _losses(records, bits)
        for title, field, digits in UNITS:
            worst = {name: [loss.worst for loss in by_unit[field]] for name, by_unit in losses.items()}
            shared = {name: fmean(found) for name, found in worst.items() if name.startswith("mlgptq-") and found}
            if not all(worst.get(name) for name in (default, MIXED, BOUND)):
                continue
            best = min(shared, key=shared.__getitem__)
            mixed, ours, bound = worst[MIXED], worst[default], worst[BOUND]
            gap = fmean(mixed) - fmean(bound)
            way = f"{(fmean(mixed) - fmean(ours)) / gap:.0%}" if gap else "no way"
            spreads = [_spread(values, digits) for values in (worst[best], ours, mixed, bound)]
            better = "yes" if max(ours) < min(mixed) else "no"
            rows.append([bits, title, f"{best.removeprefix('mlgptq-')} {spreads[0]}", *spreads[1:], better, way])
    if not rows:
        return ""
    head = ("bits", "in", "best aggregation", "default", MIXED, "bound", "better at every seed", "of the way")
    return (
        f"Mean over seeds (range) of what the worst task loses; the default is `{default}`. The last columns say "
        "whether its worst seed is better than mixed data's best seed, and how much of the way from mixed data to the "
        f"bound, a base for each task alone, it covers.\n\n{tables.markdown(head, rows, 'l')}"
    )


def average_and_worst(records: Sequence[Row]) -> str:
    """Return, for each width, points lost and nats gained on average and by the worst task: mean over seeds (range)."""
    parts = []
    head = ("variant", "points lost", "worst task", "which", "nats gained an answer", "worst task", "which")
    full = [record["score"] for record in records if record["variant"] == FULL]
    for bits in _widths(records):
        rows = []
        for name, by_unit in _losses(records, bits).items():
            if all(by_unit[field] for _, field, _ in UNITS):
                rows.append([name, *(cell for _, field, digits in UNITS for cell in _cells(by_unit[field], digits))])
        about = f"16-bit average {fmean(full):.2f}; mean over seeds (range).\n\n" if full else ""
        parts.append(f"### {bits} bits\n\n{about}{tables.markdown(head, rows, 'l')}")
    return "\n\n".join(parts)


def _widths(records: Sequence[Row]) -> list[int]:
    return list(dict.fromkeys(record["bits"] for record in records if record["variant"] != FULL))


def _losses(records: Sequence[Row], bits: int) -> dict[str, dict[str, list[Loss]]]:
    """Return variant -> field -> loss at each seed, of the seeds at which every task has the field."""
    tasks = {record["task"] for record in records}
    groups: dict[str, dict[int, list[Row]]] = {}
    for record in records:
        if record["variant"] != FULL and record["bits"] == bits:
            groups.setdefault(record["variant"], {}).setdefault(record["seed"], []).append(record)
    return {
        name: {
            field: [_loss(group, field) for group in by_seed.values() if _is_whole(group, field, tasks)]
            for _, field, _ in UNITS
        }
        for name, by_seed in groups.items()
    }


def _is_whole(group: Sequence[Row], field: str, tasks: Collection[str]) -> bool:
    return {record["task"] for record in group if record.get(field) is not None} == tasks


def _loss(group: Sequence[Row], field: str) -> Loss:
    worst = max(group, key=lambda record: record[field])
    return Loss(fmean(record[field] for record in group), worst[field], worst["task"] if worst[field] > 0 else "none")


def _cells(found: Sequence[Loss], digits: int) -> list[str]:
    which = ", ".join(sorted({loss.which for loss in found}))
    return [_spread([loss.average for loss in found], digits), _spread([loss.worst for loss in found], digits), which]


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ({min(values):.{digits}f}..{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"
