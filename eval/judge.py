"""Records from cells: scores with intervals, drops against full precision, and faults by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval import metrics, statistics
from eval.grid import Cell
from eval.statistics import Difference, finite
from eval.task import Example

REFERENCE = "fp16"


def records(cells: Sequence[Cell], examples: Mapping[str, Sequence[Example]]) -> list[dict[str, Any]]:
    """Return one record for each cell with an adapter, or of a task that needs none, in the order of the cells."""
    reference = {(c.task.name, c.adapter): c for c in cells if c.base.variant == REFERENCE}
    judged = [cell for cell in cells if not _is_comparison(cell, cells)]
    found = [_record(cell, reference, examples[cell.task.name]) for cell in judged]
    correct_p_values(found)
    return found


def _is_comparison(cell: Cell, cells: Sequence[Cell]) -> bool:
    """Tell whether the base was asked alone beside a task's adapter, only to see what the adapter adds."""
    return cell.adapter is None and any(c.task.name == cell.task.name and c.adapter is not None for c in cells)


def _record(cell: Cell, reference: Mapping[tuple[str, str | None], Cell], asked: Sequence[Example]) -> dict[str, Any]:
    task = cell.task
    facts: dict[str, Any] = {
        "variant": cell.base.variant,
        "bits": cell.base.bits,
        "seed": cell.base.seed,
        "kv_cache_dtype": cell.base.kv,
        "base_version": cell.base_version,
        "adapter": cell.adapter or "none",
        "adapter_identity": cell.adapter_identity,
        "task": task.name,
        "family": task.family,
        "metric": task.metric.primary,
        "examples": len(asked),
    }
    if cell.refusal:
        return {**facts, "score": 0.0, "drop": None, "faults": [f"the adapter cannot be loaded: {cell.refusal}"]}
    metric = metrics.find(task.metric.primary)
    score = statistics.estimate(metric, task, cell.answers, asked)
    full = reference.get((task.name, cell.adapter))
    against = (
        None if full is None or full.refusal else statistics.compare(metric, task, full.answers, cell.answers, asked)
    )
    nats, full_nats = _nats(cell), None if full is None or full.refusal else _nats(full)
    also = {name: finite(metrics.score(metrics.find(name), task, cell.answers, asked)) for name in task.metric.also}
    return {
        **facts,
        "score": score.value,
        "low": score.low,
        "high": score.high,
        **_against(against, None if full is None or full.refusal else full, metric, asked),
        "also": also,
        "nats": nats,
        "nats_gained": None if nats is None or full_nats is None else nats - full_nats,
        "faults": _faults(full or cell, reference.get((task.name, None)), asked),
    }


def _nats(cell: Cell) -> float | None:
    """Return the mean negative log likelihood of a whole reference answer, where every one was graded."""
    found = [answer.target_nll for answer in cell.answers]
    return None if None in found else finite(sum(nll for nll in found if nll is not None) / max(1, len(found)))


def _against(
    difference: Difference | None, full: Cell | None, metric: metrics.Metric, asked: Sequence[Example]
) -> dict[str, Any]:
    if difference is None or full is None:
        return {"reference": None, "drop": None}
    return {
        "reference": metrics.score(metric, full.task, full.answers, asked),
        "drop": finite(difference.drop),
        "drop_low": finite(difference.low),
        "drop_high": finite(difference.high),
        "p": difference.p,
    }


def _faults(cell: Cell, alone: Cell | None, asked: Sequence[Example]) -> list[str]:
    """Return what is wrong with adapter, base or data whatever the bits, judged in full precision if that was asked."""
    task, metric = cell.task, metrics.find(cell.task.metric.primary)
    found = []
    if cell.adapter is not None and alone is not None and alone is not cell:
        gain = statistics.compare(metric, task, alone.answers, cell.answers, asked)
        if not gain.high < 0:
            scores = [metrics.score(metric, task, c.answers, asked) for c in (cell, alone)]
            found.append(f"does no better than the base alone ({scores[0]:.2f} against {scores[1]:.2f})")
    if task.expected is not None:
        score = statistics.estimate(metric, task, cell.answers, asked)
        best = score.high if metric.higher_is_better else -score.low
        if best < (task.expected if metric.higher_is_better else -task.expected):
            found.append(f"reaches {score.value:.2f} where {task.expected:g} is expected")
    return found


def correct_p_values(found: Sequence[dict[str, Any]]) -> None:
    """Add Holm's correction over the tasks of each base: `p` is of one look, `p_holm` of having looked at them all."""
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for record in found:
        if record.get("p") is not None:
            groups.setdefault((record["variant"], record["bits"], record["seed"]), []).append(record)
    for group in groups.values():
        for record, corrected in zip(group, statistics.holm([r["p"] for r in group])):
            record["p_holm"] = corrected


def summary(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the average and the worst task of each base."""
    rows = []
    for variant, bits, seed in dict.fromkeys((r["variant"], r["bits"], r["seed"]) for r in found):
        group = [r for r in found if (r["variant"], r["bits"], r["seed"]) == (variant, bits, seed)]
        dropped = [r for r in group if r["drop"] is not None]
        worst = max(dropped, key=lambda r: r["drop"], default=None)
        rows.append(
            {
                "variant": variant,
                "bits": bits,
                "seed": seed,
                "average_score": sum(r["score"] for r in group) / len(group),
                "average_drop": sum(r["drop"] for r in dropped) / len(dropped) if dropped else None,
                "worst_drop": worst["drop"] if worst else None,
                "worst_task": worst["task"] if worst else None,
                "faults": sorted({r["task"] for r in group if r["faults"]}),
            }
        )
    return rows


def differences(
    cells: Sequence[Cell], others: Sequence[Cell], examples: Mapping[str, Sequence[Example]]
) -> list[dict[str, Any]]:
    """Return where two backends answer differently, cell by cell, with the first few pairs."""
    rows = []
    for one, other in zip(cells, others, strict=True):
        if one.refusal or other.refusal:
            continue
        task, asked = one.task, examples[one.task.name]
        metric = metrics.find(task.metric.primary)
        unlike = [
            i for i, (a, b) in enumerate(zip(one.answers, other.answers)) if (a.text, a.choice) != (b.text, b.choice)
        ]
        scores = [statistics.estimate(metric, task, cell.answers, asked) for cell in (one, other)]
        rows.append(
            {
                "variant": one.base.variant,
                "bits": one.base.bits,
                "task": task.name,
                "adapter": one.adapter or "none",
                "different_answers": len(unlike),
                "examples": len(asked),
                "scores": [score.value for score in scores],
                "within_interval": scores[1].low <= scores[0].value <= scores[1].high,
                "first": [
                    {"id": asked[i].id, "answers": [one.answers[i].text, other.answers[i].text]} for i in unlike[:3]
                ],
            }
        )
    return rows
