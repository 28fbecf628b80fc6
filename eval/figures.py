"""The report's figures: heat map, worst task against bits, radar of text metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inlaid.report.plots import colours, legend, new_figure, save

if TYPE_CHECKING:
    from inlaid.report.plots import Figure

Row = dict[str, Any]
RADAR = ("rouge1", "rouge2", "nist", "bleu", "meteor", "gleu")


def draw(stem: Path, records: Sequence[Row], summary: Sequence[Row]) -> list[Path]:
    """Draw heat map, worst task against bits, and the radar, where the records hold enough for them."""
    made = [_heat_map(stem, records), _worst(stem, summary), _radar(stem, records)]
    return [path for path in made if path is not None]


def _heat_map(stem: Path, records: Sequence[Row]) -> Path | None:
    """Draw the drop by task (columns) and base (rows), in colours by its logarithm so that 4 bits still shows."""
    dropped = [r for r in records if r["drop"] is not None and r["variant"] != "fp16"]
    if not dropped:
        return None
    tasks = list(dict.fromkeys(r["task"] for r in dropped))
    bases = list(dict.fromkeys((r["variant"], r["bits"]) for r in dropped))
    bases.sort(key=lambda base: -base[1])
    drops = np.full((len(bases), len(tasks)), np.nan)
    for record in dropped:
        drops[bases.index((record["variant"], record["bits"])), tasks.index(record["task"])] = record["drop"]
    figure, ((axes,),) = new_figure((2.5 + 0.75 * len(tasks), max(3.2, 1.6 + 0.32 * len(bases))))
    largest = max(10.0, float(np.nanmax(drops)))
    shade = np.log2(1 + np.clip(drops, 0, None))  # a drop below zero is a gain: white
    image = axes.imshow(shade, cmap="Reds", vmin=0, vmax=1.15 * np.log2(1 + largest), aspect="auto")
    axes.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right")
    axes.set_yticks(range(len(bases)), [f"{variant} {bits}-bit" for variant, bits in bases])
    for (row, column), drop in np.ndenumerate(drops):
        colour = "white" if shade[row, column] > 0.65 * np.log2(1 + largest) else "black"
        axes.text(column, row, f"{drop:.1f}", ha="center", va="center", fontsize=7, color=colour)
    bar = figure.colorbar(image, label="points lost")
    ticks = [tick for tick in (0, 1, 3, 10, 30, 100) if tick <= largest]
    bar.set_ticks([np.log2(1 + tick) for tick in ticks], labels=[str(tick) for tick in ticks])
    axes.set_title("Points lost against full precision")
    return _save(figure, stem, "heat-map")


def _worst(stem: Path, summary: Sequence[Row]) -> Path | None:
    """Draw the worst task's drop against bits, a line for each variant."""
    rows = [row for row in summary if row["worst_drop"] is not None and row["variant"] != "fp16"]
    widths = sorted({row["bits"] for row in rows})
    if len(widths) < 2:
        return None
    figure, ((axes,),) = new_figure((6, 4.4))
    colour = colours(row["variant"] for row in rows)
    for place, variant in enumerate(colour):
        points = sorted((row["bits"], row["worst_drop"]) for row in rows if row["variant"] == variant)
        beside = 0.03 * (place - (len(colour) - 1) / 2)  # equal values stand side by side
        widths_shown, drops = [bits + beside for bits, _ in points], [drop for _, drop in points]
        axes.plot(widths_shown, drops, marker="o", label=variant, color=colour[variant])
    axes.set_xticks(widths)
    axes.invert_xaxis()
    axes.set(xlabel="bits", ylabel="points lost by the worst task", title="The worst task")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    axes.set_ylim(-0.2, 130)
    axes.grid(alpha=0.3)
    legend(figure, [axes])
    return _save(figure, stem, "worst-task")


def _radar(stem: Path, records: Sequence[Row]) -> Path | None:
    """Draw six text metrics as shares of full precision, means over the tasks that have them; a panel a width."""
    full = text_metrics([r for r in records if r["variant"] == "fp16"])
    widths = sorted({r["bits"] for r in records if r["variant"] != "fp16"}, reverse=True)
    names = [name for name in RADAR if full.get(name)]
    if len(names) < 3 or not widths:
        return None
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    figure, panels = new_figure((4.2 * len(widths), 4.6), columns=len(widths), polar=True)
    colour = colours(r["variant"] for r in records if r["variant"] != "fp16")
    for axes, bits in zip(panels[0], widths):
        for variant in colour:
            found = text_metrics([r for r in records if (r["variant"], r["bits"]) == (variant, bits)])
            if found:
                shares = [100 * found[name] / full[name] for name in names]
                axes.plot(np.append(angles, angles[0]), [*shares, shares[0]], label=variant, color=colour[variant])
        axes.set_xticks(angles, names)
        axes.set_ylim(0, 105)
        axes.set_title(f"{bits} bits, % of full precision")
    legend(figure, panels[0], columns=8)
    return _save(figure, stem, "radar")


def text_metrics(records: Sequence[Row]) -> dict[str, float]:
    """Return the mean of each text metric over the tasks that have all of those that any has."""
    values: dict[str, list[float]] = {}
    for record in records:
        scores = {**record.get("also", {}), record["metric"]: record["score"]}
        for name in RADAR:
            if scores.get(name) is not None:
                values.setdefault(name, []).append(scores[name])
    return {name: float(np.mean(found)) for name, found in values.items()}


def _save(figure: Figure, stem: Path, name: str) -> Path:
    path = stem.with_name(f"{stem.name}-{name}.png")
    save(figure, path)
    return path
