"""Hold the results of a call against recorded figures of the same card, row by row.

`perf/results/h200-expected.json` lists the figures: the stage, which of its rows (or none: the result itself), the
path to the figure, and its value. A ratio above 1 is better than recorded, whichever way the figure counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "results" / "h200-expected.json"


@dataclass(frozen=True)
class Figure:
    """One recorded figure: `path` leads to it from the row of the stage whose keys are `row`, or from the result.

    `least` is the ratio that passes."""

    stage: str
    title: str
    path: tuple[str, ...]
    expected: float
    row: dict[str, Any] = field(default_factory=dict)
    least: float = 0.98

    @property
    def less_is_better(self) -> bool:
        return self.path[-1].startswith(("ms_", "ttft_"))

    def found_in(self, folder: Path) -> float | None:
        """Return the figure in the results of a folder, or None where the stage did not come so far."""
        file = folder / f"{self.stage}.json"
        found: Any = json.loads(file.read_text())["result"] if file.exists() else {}
        if self.row:
            rows = found.get("rows", ())
            found = next((row for row in rows if self.row.items() <= row.items()), {})
        for key in self.path:
            found = found.get(key, {})
        return float(found) if isinstance(found, (int, float)) else None

    def ratio(self, now: float) -> float:
        return self.expected / now if self.less_is_better else now / self.expected


def read(file: Path = FILE) -> list[Figure]:
    """Return the recorded figures."""
    recorded = json.loads(file.read_text())
    return [Figure(**{**one, "path": tuple(one["path"])}) for one in recorded["figures"]]


def compare(folder: Path, figures: Sequence[Figure]) -> tuple[str, bool]:
    """Return a table of now, expected and ratio, and whether every figure is there at its least ratio or above."""
    lines = [f"{'stage':24s} {'row':38s} {'now':>10s} {'expected':>10s} {'ratio':>6s}"]
    short = []
    for figure in figures:
        now = figure.found_in(folder)
        ratio = None if now is None else figure.ratio(now)
        if ratio is None or ratio < figure.least:
            short.append(f"{figure.title} ({'not measured' if ratio is None else f'{ratio:.3f}'})")
        lines.append(
            f"{figure.stage:24s} {figure.title:38s} {_number(now):>10s} {_number(figure.expected):>10s} "
            f"{'-' if ratio is None else f'{ratio:.3f}':>6s}"
        )
    lines.append(f"{len(figures) - len(short)} of {len(figures)} figures as recorded or near it")
    if short:
        lines.append("below or missing: " + "; ".join(short))
    return "\n".join(lines), not short


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 50 else f"{value:.2f}"
