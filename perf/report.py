"""`python -m perf.report A.json B.json ...`: one self-contained HTML page (and PNGs) from summaries of runs.

The first run is what the others are compared with. Records are read from the .jsonl beside each summary.
"""

from __future__ import annotations

import base64
import html
import json
import re
import sys
from pathlib import Path
from typing import Any

from inlaid.flags import Parser
from inlaid.progress import Bar
from inlaid.report.page import charts_of, table
from inlaid.report.page import page as whole_page
from inlaid.report.plots import PlotsMissing
from perf import plots
from perf.records import read_records
from perf.series import Run

NO_MATPLOTLIB = "The figures need matplotlib: pip install matplotlib."
MAX_ROWS = 50

# title, key in the summary, whether more is better
FIGURES: tuple[tuple[str, str, bool], ...] = (
    ("requests/s", "request_throughput", True),
    ("output tokens/s", "output_throughput", True),
    ("goodput (req/s)", "request_goodput", True),
    ("SLO attainment", "slo.attainment", True),
    ("mean TTFT (ms)", "mean_ttft_ms", False),
    ("p99 TTFT (ms)", "p99_ttft_ms", False),
    ("mean TPOT (ms)", "mean_tpot_ms", False),
    ("p99 TPOT (ms)", "p99_tpot_ms", False),
    ("mean ITL (ms)", "mean_itl_ms", False),
    ("p99 ITL (ms)", "p99_itl_ms", False),
    ("mean end to end (ms)", "mean_e2el_ms", False),
    ("mean task completion (s)", "jct.mean_s", False),
    ("Jain's index", "fairness.jain_service", True),
    ("largest service gap", "fairness.gap_max", False),
)
PLAIN: tuple[tuple[str, str], ...] = (
    ("answered", "completed"),
    ("failed", "failed"),
    ("offered (req/s)", "offered_rate"),
    ("generator late p99 (ms)", "lateness_ms.p99"),
)


def load_runs(paths: list[Path]) -> list[Run]:
    """Load runs with labels that differ: a common beginning is left out, and twins are numbered."""
    runs = []
    for path in Bar(paths, desc="reading", unit="run", delay=1, leave=False):
        try:
            summary = json.loads(path.read_text())
            label = summary["label"] or path.stem
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a summary of a run: {type(error).__name__} {error}") from error
        records = [record for record in read_records(path.with_suffix(".jsonl")) if not record.warmup]
        runs.append(Run(label, summary, records))
    names = _apart(_without_common_front([run.label for run in runs]))
    return [Run(name, run.summary, run.records) for name, run in zip(names, runs, strict=True)]


def _without_common_front(labels: list[str]) -> list[str]:
    """Shorten labels: `demo-short/policy-a` and `demo-short/policy-b` become policy-a and policy-b."""
    parts = [label.split("/") for label in labels]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return ["/".join(p) for p in parts]


def _apart(labels: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    names = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        names.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return names


def figure_of(summary: dict[str, Any], key: str) -> float | None:
    """Look up a figure by a dotted key; None where the run has no such figure."""
    value: Any = summary
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return None if value is None else float(value)


def comparison_table(runs: list[Run]) -> str:
    """Format a row per run; each figure has its ratio to the first run's, coloured by which direction is better."""
    shown = [f for f in FIGURES if any(figure_of(run.summary, f[1]) is not None for run in runs)]
    head = [title for title, _ in PLAIN] + [title for title, _, _ in shown]
    rows = []
    for run in runs:
        cells = [_number(figure_of(run.summary, key)) for _, key in PLAIN]
        for _, key, more_is_better in shown:
            value, base = figure_of(run.summary, key), figure_of(runs[0].summary, key)
            cells.append(_number(value) + ("" if run is runs[0] else _ratio(value, base, more_is_better)))
        rows.append([html.escape(run.label), *cells])
    return table("Runs", ["run", *head], rows)


def _ratio(value: float | None, base: float | None, more_is_better: bool) -> str:
    if value is None or not base:
        return ""
    ratio = value / base
    kind = "muted" if abs(ratio - 1) < 0.02 else "good" if (ratio > 1) == more_is_better else "bad"
    return f'<small class="{kind}">&times;{ratio:.2f}</small>'


def _number(value: float | None) -> str:
    if value is None:
        return "&ndash;"
    return (
        f"{value:,.0f}"
        if value == int(value) and abs(value) < 1e9
        else f"{value:,.3g}"
        if abs(value) < 1
        else f"{value:,.1f}"
    )


def group_table(run: Run, kind: str) -> str:
    """Format figures per adapter or per tenant, the busiest first, at most MAX_ROWS of them."""
    groups = sorted(run.summary[kind].items(), key=lambda item: -item[1]["total_output_tokens"])
    present = [column for column in _GROUP_COLUMNS if any(column in figures for _, figures in groups)]
    rows = [[html.escape(name), *(_number(figures.get(c)) for c in present)] for name, figures in groups[:MAX_ROWS]]
    left = f'<p class="muted">and {len(groups) - MAX_ROWS} more</p>' if len(groups) > MAX_ROWS else ""
    group = kind.removeprefix("per_")
    return table(f"{run.label} by {group}", [group, *(c.replace("_", " ") for c in present)], rows) + left


def run_details(run: Run) -> str:
    parts = [f"<summary>{html.escape(run.label)}</summary>"]
    statuses = ", ".join(f"{count} {status}" for status, count in run.summary["statuses"].items())
    parts.append(f'<p class="muted">{html.escape(statuses)}; {html.escape(run.summary["date"])}</p>')
    parts += [f"<h3>{title}</h3>{group_table(run, kind)}" for title, kind in _GROUPS]
    if run.summary.get("slo"):
        by_class = run.summary["slo"]["by_class"].items()
        rows = [[html.escape(n), *(_number(c[k]) for k in _SLO_COLUMNS)] for n, c in by_class]
        parts.append("<h3>Objectives by class</h3>" + table(f"{run.label} by class", ["class", *_SLO_COLUMNS], rows))
    parts.append(f"<p><code>{html.escape(' '.join(run.summary['command']))}</code></p>")
    return f"<details>{''.join(parts)}</details>"


_GROUP_COLUMNS = (
    "completed", "failed", "total_output_tokens", "slo_attainment", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms",
    "p99_tpot_ms", "mean_e2el_ms",
)  # fmt: skip
_GROUPS = (("By adapter", "per_adapter"), ("By tenant", "per_tenant"))
_SLO_COLUMNS = ("requests", "met", "attainment", "ttft", "tpot", "e2el")


def warnings(runs: list[Run]) -> list[str]:
    """List what a reader must know before believing a figure."""
    found = []
    for run in runs:
        if run.summary["interrupted"]:
            found.append(f"{run.label} was interrupted: its figures cover a part of the workload.")
        late, total = run.summary["lateness_ms"]["median"], run.summary["completed"] + run.summary["failed"]
        if late > 10 and run.summary["offered_rate"] is not None:  # a burst behind a bound waits on purpose
            found.append(f"{run.label}: half of the requests were sent more than {late:.0f} ms late.")
        failed = run.summary["failed"]
        if failed:
            found.append(f"{run.label}: {failed} of {total} requests got no full answer; latencies leave them out.")
    return found


def page(runs: list[Run], images: dict[str, bytes], note: str = "") -> str:
    title = "Performance report"
    drawn = "".join(
        f'<figure class="card"><figcaption><h2>{html.escape(name)}</h2></figcaption><img alt="{html.escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
        for name, png in images.items()
    )
    notes = "".join(
        f'<p class="card warn">{html.escape(text)}</p>' for text in [*warnings(runs), *filter(None, [note])]
    )
    base = f"Ratios are to the first run, {html.escape(runs[0].label)}." if len(runs) > 1 else ""
    charts = plots.charts(runs)
    body = (
        f'<h1>{title}</h1><p class="muted">{len(runs)} run{"s" * (len(runs) > 1)}. {base}</p>{notes}'
        f"{comparison_table(runs)}<h2>Over time</h2>{charts_of(charts)}"
        f"<h2>Figures</h2>{drawn or '<p class=muted>none</p>'}<h2>Runs</h2>{''.join(map(run_details, runs))}"
    )
    return whole_page(title, body, charts)


def draw(runs: list[Run]) -> tuple[dict[str, bytes], str]:
    """Draw the figures; return them with a note to stand in their place or beside them."""
    too_many = len(runs) > plots.MAX_CURVES
    note = f"Series and distributions show the first {plots.MAX_CURVES} of {len(runs)} runs." if too_many else ""
    try:
        return plots.draw_all(runs), note
    except PlotsMissing:
        return {}, NO_MATPLOTLIB


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="perf.report", description="One HTML page from summaries of runs.")
    parser.add_argument("summaries", nargs="+", type=Path, metavar="SUMMARY.json")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--no-png", action="store_true", help="do not write the figures as files beside the page")
    arguments = parser.parse_args(argv)
    try:
        runs = load_runs(arguments.summaries)
        images, note = draw(runs)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(page(runs, images, note), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"perf.report: {error}", file=sys.stderr)
        return 2
    if not images:
        print(f"perf.report: {note}", file=sys.stderr)
    for name, png in {} if arguments.no_png else images.items():
        file = f"{arguments.out.stem}-{re.sub(r'[^a-z]+', '-', name.lower())}.png"
        arguments.out.with_name(file).write_bytes(png)
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
