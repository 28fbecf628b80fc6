"""The report: one JSON file with everything (the gate reads its records), one Markdown page for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval import seeds
from inlaid.files import write_atomically
from inlaid.report import tables

Row = dict[str, Any]


def write_json(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_markdown(path: Path, report: dict[str, Any], figures: Sequence[Path]) -> None:
    write_atomically(path, (markdown(report, figures) + "\n").encode())


def markdown(report: dict[str, Any], figures: Sequence[Path] = ()) -> str:
    """Return the page: head, the two tables, faults, differences between backends, figures."""
    records = report["records"]
    parts = [f"# {report['name']}", _head(report)]
    if len(seeds.seeds_of(records)) > 1:
        worst = seeds.worst_task(records)
        parts += ["## The worst task", worst] if worst else []
        parts += ["## Average and worst task", seeds.average_and_worst(records)]
    else:
        parts += ["## Average and worst task", _summary(report["summary"])]
    parts += [
        "## Drop by task, in points",
        "Against the same adapter on the full-precision base, on the same examples; *: p < 0.05 after correcting for "
        "the number of tasks. The line `fp16` shows scores instead of drops.",
        _by_task(seeds.merged(records)),
    ]
    parts += _faults(records)
    parts += _differences(report.get("differences", []))
    parts += [f"![{figure.stem}]({figure.name})" for figure in figures]
    return "\n\n".join(parts)


def _head(report: dict[str, Any]) -> str:
    made = report["provenance"]
    commit = (made["commit"] or "unknown").replace("+", " with uncommitted changes")
    return (
        f"`{made['command']}`\n\n"
        f"Commit {commit}, {made['finished']}, {made['seconds']:.0f} s on {made['gpu'] or made['processor']}, "
        f"backend {report['backend']['name']} ({report['backend']['setting']}), "
        f"{report['examples_per_task']} examples a task."
    )


def _summary(rows: Sequence[Row]) -> str:
    head = ("variant", "bits", "average score", "average drop", "worst drop", "worst task")
    cells = (
        (
            row["variant"],
            row["bits"],
            _number(row["average_score"]),
            _number(row["average_drop"]),
            _number(row["worst_drop"]),
            row["worst_task"] or "",
        )
        for row in rows
    )
    return tables.markdown(head, cells, "lrrrrl")


def _by_task(records: Sequence[Row]) -> str:
    tasks = list(dict.fromkeys(r["task"] for r in records))
    rows = []
    for variant, bits in dict.fromkeys((r["variant"], r["bits"]) for r in records):
        found = {r["task"]: r for r in records if (r["variant"], r["bits"]) == (variant, bits)}
        rows.append([variant, bits, *(_cell(found.get(task), shows_score=variant == "fp16") for task in tasks)])
    return tables.markdown(["variant", "bits", *tasks], rows)


def _cell(record: Row | None, shows_score: bool) -> str:
    if record is None:
        return ""
    if shows_score or record["drop"] is None:
        return f"{record['score']:.1f}"
    return f"{record['drop']:.1f}" + ("*" if record.get("p_holm", 1) < 0.05 else "")


def _faults(records: Sequence[Row]) -> list[str]:
    lines = list(
        dict.fromkeys(
            f"- **{r['task']}** with adapter {r['adapter']}: {fault}" for r in records for fault in r["faults"]
        )
    )
    return ["## Faults", "\n".join(lines)] if lines else []


def _differences(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    other, unlike = rows[0]["other"], [row for row in rows if row["different_answers"]]
    total, asked = sum(row["different_answers"] for row in rows), sum(row["examples"] for row in rows)
    lines = [f"{total} of {asked} answers differ from the {other}'s."]
    for row in unlike:
        inside = "within" if row["within_interval"] else "OUTSIDE"
        lines.append(
            f"- {row['variant']} {row['bits']}-bit, {row['task']} with {row['adapter']}: {row['different_answers']} of "
            f"{row['examples']}; scores {row['scores'][0]:.2f} and {row['scores'][1]:.2f}, {inside} the interval"
        )
    return [f"## Against the {other}", "\n".join(lines)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
