"""The paper's figures from outcomes: service and response over time per client, and the gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from inlaid.report.plots import new_figure, save
from inlaid.sim.metrics import by_tenant, rates, response
from inlaid.sim.simulate import Outcome

KINDS = (".png", ".pdf")
MAX_CLIENTS = 8  # lines in one panel


def draw_suite(path: Path, title: str, outcomes: Sequence[Outcome], duration: float, bound: float | None) -> None:
    """Draw a column per policy: service rate, response time and gap. PNG and PDF."""
    count = len(outcomes)
    figure, axes = new_figure((4.2 * count, 8.4), 3, count)
    times = np.linspace(0, duration, 61)
    for column, outcome in enumerate(outcomes):
        groups = by_tenant(outcome.records)
        busiest = sorted(groups, key=lambda tenant: -len(groups[tenant]))[:MAX_CLIENTS]
        for tenant in sorted(busiest):
            axes[0][column].plot(times, rates(groups[tenant], times), label=tenant)
            axes[1][column].plot(times, response(groups[tenant], times), label=tenant)
        axes[0][column].set_title(outcome.policy)
        gaps = np.array(outcome.gap_series)
        if len(gaps):
            axes[2][column].plot(gaps[:, 0], gaps[:, 1], color="black", label="largest gap so far")
        if bound is not None:
            axes[2][column].axhline(bound, color="red", linestyle="--", label="VTC's bound")
        axes[2][column].set_xlabel("time, s")
        axes[2][column].legend(fontsize="small")
    for row, label in enumerate(("service per second", "time to first token, s", "gap in service")):
        axes[row][0].set_ylabel(label)
    axes[0][0].legend(fontsize="small")
    figure.suptitle(title)
    save(figure, path, KINDS)


def draw_bars(path: Path, title: str, label: str, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Draw bars of one figure: group -> name -> value."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    figure, ((axis,),) = new_figure((1.6 + 1.1 * len(groups) * max(1, len(names) / 3), 4))
    width = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        left = np.arange(len(groups)) + (place - (len(names) - 1) / 2) * width
        axis.bar(left, [values.get(name, np.nan) for values in groups.values()], width, label=name)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylabel(label)
    axis.legend(fontsize="small")
    axis.set_title(title)
    save(figure, path, KINDS)


def draw_lines(
    path: Path, title: str, labels: tuple[str, str], lines: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """Draw one line per name."""
    figure, ((axis,),) = new_figure((6, 4))
    for name, points in lines.items():
        values = np.array(points)
        axis.plot(values[:, 0], values[:, 1], label=name)
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.legend(fontsize="small")
    axis.set_title(title)
    save(figure, path, KINDS)
