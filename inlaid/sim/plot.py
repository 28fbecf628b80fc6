"""The paper's figures from outcomes: service and response over time per client, and the gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from inlaid.report.plots import colours, compare, is_wide, legend, new_figure, save
from inlaid.sim.metrics import by_tenant, rates, response
from inlaid.sim.simulate import Outcome

if TYPE_CHECKING:
    from inlaid.report.plots import Figure

KINDS = (".png", ".pdf")
MAX_CLIENTS = 8  # lines in one panel
WIDEST = 24.0  # inches of a figure whose panels are not at their narrowest
ROWS = ("service per second", "time to first token, s", "gap in service")


def draw_suite(path: Path, title: str, outcomes: Sequence[Outcome], duration: float, bound: float | None) -> None:
    """Draw the figure of a suite as PNG and PDF."""
    save(suite_figure(title, outcomes, duration, bound), path, KINDS)


def suite_figure(title: str, outcomes: Sequence[Outcome], duration: float, bound: float | None) -> Figure:
    """Return a figure with a column per policy: service rate, response time and gap.

    The panels of a row have one y axis, and a client has one colour in all of them.
    """
    count = len(outcomes)
    figure, axes = new_figure((count * max(2.4, min(4.2, WIDEST / count)), 8.8), 3, count)
    times = np.linspace(0, duration, 61)
    tenants = _busiest(outcomes)
    colour = colours(tenants)
    for column, outcome in enumerate(outcomes):
        groups = by_tenant(outcome.records)
        for tenant in (name for name in tenants if name in groups):
            for row, figures in enumerate((rates, response)):
                axes[row][column].plot(times, figures(groups[tenant], times), label=tenant, color=colour[tenant])
        gaps = np.array(outcome.gap_series)
        if len(gaps):
            axes[2][column].plot(gaps[:, 0], gaps[:, 1], color="black", label="largest gap so far")
        if bound is not None:
            axes[2][column].axhline(bound, color="black", linestyle="--", label="VTC's bound")
        axes[0][column].set_title(outcome.policy)
        axes[2][column].set_xlabel("time, s")
    largest = [gap for outcome in outcomes for _, gap in outcome.gap_series[-1:]]
    if is_wide([*largest, *([] if bound is None else [bound])]):
        smallest = max(1.0, min(filter(None, largest)))
        for axis in axes[2]:  # linear to just above a power of ten, else ticks below it would meet that of zero
            axis.set_yscale("symlog", linthresh=1.001 * 10.0 ** np.floor(np.log10(smallest)))
            axis.autoscale_view()  # the margin above the largest gap was that of a linear axis
    for panels, label in zip(axes, ROWS):
        panels[0].set_ylabel(label)
        compare(panels)
    legend(figure, (axis for row in axes for axis in row), columns=2 * count + 2)
    figure.suptitle(title)
    return figure


def _busiest(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the clients with the most requests, by name; all policies have the same requests."""
    groups = by_tenant(outcomes[0].records)
    return sorted(sorted(groups, key=lambda tenant: -len(groups[tenant]))[:MAX_CLIENTS])


def draw_bars(path: Path, title: str, label: str, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Draw bars of one figure: group -> name -> value."""
    colour = colours(name for values in groups.values() for name in values)
    figure, ((axis,),) = new_figure((1.6 + 1.1 * len(groups) * max(1, len(colour) / 3), 4.4))
    width = 0.8 / max(1, len(colour))
    for place, name in enumerate(colour):
        left = np.arange(len(groups)) + (place - (len(colour) - 1) / 2) * width
        heights = [values.get(name, np.nan) for values in groups.values()]
        axis.bar(left, heights, width, label=name, color=colour[name])
    axis.set_xticks(range(len(groups)), list(groups))
    if all(value <= 1 for values in groups.values() for value in values.values()):
        axis.set_ylim(0, 1)  # shares: figures of the same kind are compared
    axis.set_ylabel(label)
    axis.set_title(title)
    legend(figure, [axis])
    save(figure, path, KINDS)


def draw_lines(
    path: Path, title: str, labels: tuple[str, str], lines: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """Draw one line per name, from zero; an axis whose values span much is logarithmic."""
    figure, ((axis,),) = new_figure((6, 4.2))
    colour = colours(lines)
    for name, points in lines.items():
        axis.plot(*zip(*points), label=name, color=colour[name], marker="o", markersize=4)
    for number, scale in enumerate((axis.set_xscale, axis.set_yscale)):
        if is_wide(point[number] for points in lines.values() for point in points):
            scale("log", base=2 if number == 0 else 10)
            if number == 0:
                ticks = sorted({point[0] for points in lines.values() for point in points})
                axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        elif number == 1:
            axis.set_ylim(bottom=0)
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.set_title(title)
    legend(figure, [axis])
    save(figure, path, KINDS)
