"""`python -m eval.page REPORT.json`: the HTML page of a report, from its JSON file. `python -m eval.run` writes it too.

The page holds all that it shows and asks no host for anything.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from eval import judge, seeds
from eval.figures import RADAR, text_metrics
from eval.variants import FULL
from inlaid.files import write_atomically
from inlaid.flags import Parser
from inlaid.report.page import Chart, charts_of, page, table

Row = dict[str, Any]
_SHADES = (1.0, 3.0, 10.0, 30.0)  # points lost from which a cell has the next colour


def write_page(path: Path, report: Row) -> None:
    """Write a report as one HTML file."""
    write_atomically(path, html(report).encode())


def html(report: Row) -> str:
    """Return the page: the worst task, tables by variant and task, faults, differences, and how it was made."""
    records = [{"seed": 0, "faults": [], **record} for record in report["records"]]
    shown = seeds.merged(records)
    charts = _charts(judge.summary(shown))
    parts = [
        f"<h1>{escape(report['name'])}</h1>{_head(report)}",
        "<h2>Average and worst task</h2>",
        _summary(judge.summary(records)),
        charts_of(charts),
        "<h2>Points lost by task</h2><p class=muted>Against the same adapter on the full-precision base, on the same "
        f"examples; *: p &lt; 0.05 after correcting for the number of tasks. The rows <code>{FULL}</code> show scores. "
        "The redder, the more is lost.</p>",
        _by_task(shown),
        _texts(shown),
        _faults(records),
        _differences(report.get("differences", [])),
    ]
    return page(f"{report['name']}: accuracy", "".join(parts), charts)


def _head(report: Row) -> str:
    made, backend = report["provenance"], report["backend"]
    device = made.get("gpu") or made.get("processor") or made.get("machine") or "an unknown machine"
    said = (
        f"Commit {made['commit'] or 'unknown'}, {made['finished']}, {made['seconds']:.0f} s on {device}; backend "
        f"{backend['name']} ({backend['setting']}), {report['examples_per_task']} examples a task."
    )
    return f"<p class=muted>{escape(said)}</p><p><code>{escape(made['command'])}</code></p>"


def _charts(summary: Sequence[Row]) -> list[Chart]:
    """Return the points that the worst task loses, and the average, against bits: a curve for each variant."""
    rows = [row for row in summary if row["worst_drop"] is not None and row["variant"] != FULL]
    if len({row["bits"] for row in rows}) < 2:
        return []
    lost = {name: sum(row["worst_drop"] for row in rows if row["variant"] == name) for name in _variants(rows)}
    made = []
    for title, field in (("Points lost by the worst task", "worst_drop"), ("Points lost on average", "average_drop")):
        curves = []
        for variant in sorted(lost, key=lost.__getitem__):  # the best first: there are not colours for all
            points = sorted((row["bits"], row[field]) for row in rows if row["variant"] == variant)
            curves.append((variant, [bits for bits, _ in points], [drop for _, drop in points]))
        made.append(Chart(title, "points", curves, x_unit="bits", over="bits of the weights", whole=True))
    return made


def _variants(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["variant"] for row in rows))


def _summary(summary: Sequence[Row]) -> str:
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in summary:
        groups.setdefault((row["variant"], row["bits"]), []).append(row)
    rows = []
    for (variant, bits), group in groups.items():
        figures = [_spread([row[field] for row in group]) for field in ("average_score", "average_drop", "worst_drop")]
        worst = ", ".join(sorted({row["worst_task"] for row in group if row["worst_drop"]}))
        rows.append([escape(variant), str(bits), *figures, escape(worst)])
    several = any(len(group) > 1 for group in groups.values())
    note = "<p class=muted>Mean over calibration seeds (range).</p>" if several else ""
    head = ["variant", "bits", "average score", "average drop, points", "worst drop, points", "worst task"]
    return note + table("Average and worst task", head, rows)


def _spread(values: Sequence[float | None]) -> str:
    """Return the mean of values, and their range where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "&ndash;"
    spread = f" ({min(known):.2f}&ndash;{max(known):.2f})" if len(known) > 1 else ""
    return f"{fmean(known):.2f}{spread}"


def _by_task(records: Sequence[Row]) -> str:
    tasks = list(dict.fromkeys(record["task"] for record in records))
    rows = []
    for variant, bits in dict.fromkeys((record["variant"], record["bits"]) for record in records):
        found = {r["task"]: r for r in records if (r["variant"], r["bits"]) == (variant, bits)}
        rows.append([escape(variant), str(bits), *(_cell(found.get(task), variant == FULL) for task in tasks)])
    return table("Points lost by task", ["variant", "bits", *tasks], rows)


def _cell(record: Row | None, shows_score: bool) -> str:
    if record is None:
        return "&ndash;"
    if shows_score or record["drop"] is None:
        return f"{record['score']:.1f}"
    star = "*" if record.get("p_holm", 1) < 0.05 else ""
    return f'<span class="token p{sum(record["drop"] >= shade for shade in _SHADES)}">{record["drop"]:.1f}{star}</span>'


def _texts(records: Sequence[Row]) -> str:
    """Return the text metrics as shares of full precision, means over the tasks that have them."""
    full = text_metrics([record for record in records if record["variant"] == FULL])
    names = [name for name in RADAR if full.get(name)]
    rows = []
    for variant, bits in dict.fromkeys((r["variant"], r["bits"]) for r in records if r["variant"] != FULL):
        found = text_metrics([r for r in records if (r["variant"], r["bits"]) == (variant, bits)])
        if found:
            shares = [f"{100 * found[name] / full[name]:.1f} %" if name in found else "&ndash;" for name in names]
            rows.append([escape(variant), str(bits), *shares])
    if not names or not rows:
        return ""
    return "<h2>Text metrics, of full precision</h2>" + table("Text metrics", ["variant", "bits", *names], rows)


def _faults(records: Sequence[Row]) -> str:
    lines = dict.fromkeys(
        f"<li><b>{escape(r['task'])}</b> with adapter {escape(r['adapter'])}: {escape(fault)}</li>"
        for r in records
        for fault in r["faults"]
    )
    return f"<h2>Faults</h2><ul>{''.join(lines)}</ul>" if lines else ""


def _differences(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    total, asked = sum(row["different_answers"] for row in rows), sum(row["examples"] for row in rows)
    cells = [
        [
            *(escape(str(row[name])) for name in ("variant", "bits", "task", "adapter")),
            f"{row['different_answers']} of {row['examples']}",
            *(f"{score:.2f}" for score in row["scores"]),
            "within" if row["within_interval"] else '<span class="bad">outside</span>',
        ]
        for row in rows
        if row["different_answers"]
    ]
    other = escape(rows[0]["other"])
    head = ["variant", "bits", "task", "adapter", "different answers", "score", f"score of {other}", "interval"]
    listed = table(f"Against the {other}", head, cells) if cells else ""
    return f"<h2>Against the {other}</h2><p>{total} of {asked} answers differ from the {other}'s.</p>{listed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write pages and return the exit status."""
    parser = Parser(prog="python -m eval.page", description="One HTML page from a report of python -m eval.run.")
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json")
    parser.add_argument("--out", type=Path, help="the page's file; default: beside each report, as .html")
    arguments = parser.parse_args(argv)
    if arguments.out is not None and len(arguments.reports) > 1:
        parser.error("--out names one file: give one report, or leave it out")
    for path in arguments.reports:
        out = arguments.out or path.with_suffix(".html")
        try:
            write_page(out, json.loads(path.read_bytes()))
        except OSError as error:
            print(f"eval.page: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        except (ValueError, KeyError, TypeError) as error:
            print(
                f"eval.page: {path} is no report of python -m eval.run: {type(error).__name__} {error}", file=sys.stderr
            )
            return 2
        print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
