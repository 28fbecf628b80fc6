"""Tables of a recorded result of the stage headline-SHAPE: `python -m perf.gpu.headline_table RESULT.json` writes them
beside it, our figures against S-LoRA-style serving next to the paper's."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inlaid.flags import Parser
from inlaid.report.tables import markdown

SLORA = "S-LoRA-style"  # as headline.py names it
# Of LoRA-Inlaid against S-LoRA: mean and most.
PAPER = (("throughput", 1.27, 1.58), ("latency", 1.31, 1.76), ("job completion", 1.24, 2.0), ("in time", 3.9, 10.0))


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each load that has an objective, what is better than S-LoRA-style serving, and by how much."""
    theirs = {(row["tasks"], row["rate"]): row for row in rows if row["system"] == SLORA}
    found = []
    for row in rows:
        base = theirs[row["tasks"], row["rate"]]
        if row["system"] != SLORA and "slo_attainment" in row:
            found.append(
                {
                    "system": row["system"],
                    "tasks": row["tasks"],
                    "rate": row["rate"],
                    "throughput": row["output_tokens_per_second"] / base["output_tokens_per_second"],
                    "latency": base["mean_latency_s"] / row["mean_latency_s"],
                    "job completion": base["jct_s"] / row["jct_s"],
                    "in time": row["slo_attainment"] / base["slo_attainment"],
                }
            )
    return found


def table(result: Mapping[str, Any]) -> str:
    """Format a recorded result: the figures of each system, and what is better than S-LoRA-style serving."""
    lines, better = [], []
    for shape, found in result["result"].items():
        if not isinstance(found, dict) or "rows" not in found:
            continue
        for row in found["rows"]:
            share = f"{row['slo_attainment']:.1%}" if "slo_attainment" in row else "-"
            load = f"{row['rate']:.0f}" if row["rate"] else "burst"
            figures = (f"{row['output_tokens_per_second']:,.0f}", f"{row['mean_latency_s']:.2f}", f"{row['jct_s']:.2f}")
            lines.append((shape, str(row["tasks"]), load, row["system"], *figures, f"{row['ttft_p99_ms']:.0f}", share))
        for each in ratios(found["rows"]):
            cells = (f"{each[name]:.2f}" for name, *_ in PAPER)
            better.append((shape, str(each["tasks"]), f"{each['rate']:.0f}", each["system"], *cells))
    papers = ("the paper", "2-1,000", "-", "mean, most", *(f"{mean:g}, {most:g}" for _, mean, most in PAPER))
    head = ("shape", "tasks", "req/s", "system", "tok/s", "mean latency s", "job s", "p99 first token ms", "in time")
    parts = [
        "# LoRA-Inlaid's headline\n",
        f"One {result['gpu'].split(',')[0]}, commit {result['commit']}: `{result['command']}`, whose file says what "
        "S-LoRA-style means.\n",
        markdown(head, lines, "lrrlrrrrr"),
        "\n## Better than S-LoRA-style serving, times\n",
        markdown((*head[:4], *(name for name, *_ in PAPER)), [*better, papers], "lrrlrrrr"),
    ]
    return "\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    args = parser.parse_args(arguments)
    args.result.with_suffix(".md").write_text(table(json.loads(args.result.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
