"""Results on disk: a JSONL of requests per run, the table as JSON and Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from inlaid.report import tables
from inlaid.sim.simulate import Outcome

COLUMNS = (
    ("policy", "policy", "{}"),
    ("max_difference", "max diff", "{:.1f}"),
    ("mean_difference", "avg diff", "{:.1f}"),
    ("variance_difference", "diff var", "{:.0f}"),
    ("throughput", "tok/s", "{:.0f}"),
    ("mean_ttft", "mean TTFT s", "{:.2f}"),
    ("p99_ttft", "p99 TTFT s", "{:.2f}"),
    ("mean_latency", "mean latency s", "{:.2f}"),
    ("slo_attainment", "SLO", "{:.1%}"),
    ("refused", "refused", "{}"),
    ("largest_gap", "largest gap", "{:.0f}"),
    ("bound", "VTC's bound", "{:.0f}"),
    ("isolation", "isolation", "{}"),
    ("preemptions", "preempted", "{}"),
    ("adapter_loads", "loads", "{}"),
)


def file_name(policy: str) -> str:
    """Make a policy with options a part of a file's name."""
    return re.sub(r"[^a-zA-Z0-9_.]+", "-", policy)


def write_records(path: Path, manifest: dict[str, Any], outcome: Outcome) -> None:
    """First what made it, then one line per request."""
    encode = msgspec.json.encode
    lines = [encode({"manifest": manifest}), *(encode(asdict(record)) for record in outcome.records)]
    path.write_bytes(b"\n".join(lines) + b"\n")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Format the table; columns without a value are left out."""
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    align = "".join("l" if key in ("policy", "isolation") else "r" for key, _, _ in columns)
    cells = (["-" if row.get(key) is None else form.format(row[key]) for key, _, form in columns] for row in rows)
    return tables.markdown([title for _, title, _ in columns], cells, align) + "\n"


def write_table(folder: Path, name: str, about: str, manifest: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    record = msgspec.json.format(msgspec.json.encode({**manifest, "rows": rows}), indent=1)
    (folder / f"{name}.json").write_bytes(record + b"\n")
    made = f"Made by `{manifest['command']}` at {manifest['commit']}, machine {manifest['machine']}."
    (folder / f"{name}.md").write_text(f"# {name}\n\n{about}. {made}\n\n{markdown(rows)}")
