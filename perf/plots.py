"""The figures of `perf.report` as PNG."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from inlaid.progress import Bar
from inlaid.report.page import Chart
from inlaid.report.plots import COLOURS, colours, compare, is_wide, legend, new_figure, png
from perf import series
from perf.series import Points, Run

if TYPE_CHECKING:
    from inlaid.report.plots import Axes, Figure

MAX_CURVES = len(COLOURS)


def draw_all(runs: list[Run]) -> dict[str, bytes]:
    """Map titles to PNGs. Series are drawn for at most MAX_CURVES runs; curves against rate take all of them."""
    shown = runs[:MAX_CURVES]
    width = series.bucket_width(max(run.duration for run in shown))
    since = "seconds since the start"
    makers: dict[str, Callable[[], bytes | None]] = {
        "Rate": lambda: _panels(shown, _rate_panels(width), since),
        "TTFT over time": lambda: _panels(shown, _percentile_panels("ttft", width), since, 1),
        "Inter-token latency over time": lambda: _panels(shown, _percentile_panels("itl", width), since, 1),
        "Distributions": lambda: _panels(shown, _distribution_panels(), "milliseconds", 0),
        "Service by tenant": lambda: _service(shown),
        "Against rate": lambda: _against_rate(runs),
    }
    bar = Bar(makers.items(), desc="drawing", unit="figure", delay=1, leave=False)
    drawn = {title: make() for title, make in bar}
    return {title: image for title, image in drawn.items() if image is not None}


def charts(runs: list[Run]) -> list[Chart]:
    """Return the series over time as charts of an HTML page, a curve for each run."""
    shown = runs[:MAX_CURVES]
    width = series.bucket_width(max(run.duration for run in shown))
    panels = [(title, "", points) for title, points in _rate_panels(width)]
    for kind, name in (("ttft", "Time to first token"), ("itl", "Time between tokens")):
        panels += [
            (f"{name}, {title.removesuffix(' (ms)')}", "ms", points)
            for title, points in _percentile_panels(kind, width)
        ]
    return [
        Chart(title[0].upper() + title[1:], unit, [(run.label, *points(run)) for run in shown])
        for title, unit, points in panels
    ]


Panel = tuple[str, Callable[[Run], Points]]


def _rate_panels(width: float) -> list[Panel]:
    return [
        ("requests due a second", lambda run: series.rate(run, width, finished=False)),
        ("requests answered a second", lambda run: series.rate(run, width, finished=True)),
        ("output tokens a second", lambda run: series.output_rate(run, width)),
    ]


def _percentile_panels(kind: str, width: float) -> list[Panel]:
    return [
        ("median (ms)", lambda run: series.percentile_over_time(run, kind, 50, width)),
        ("p99 (ms)", lambda run: series.percentile_over_time(run, kind, 99, width)),
    ]


def _distribution_panels() -> list[Panel]:
    names = {"ttft": "TTFT", "itl": "inter-token latency", "e2el": "end to end"}
    return [(f"share of {title} up to x", _distribution(kind)) for kind, title in names.items()]


def _distribution(kind: str) -> Callable[[Run], Points]:
    return lambda run: series.distribution(run, kind)


def _panels(runs: list[Run], panels: list[Panel], x_label: str, logs: int | None = None) -> bytes:
    """Draw a panel for each figure of the runs. The axis `logs` (0: x, 1: y) is logarithmic if its values span much."""
    figure, axes = _figure(len(panels))
    for axis, (title, points) in zip(axes, panels, strict=True):
        curves = [points(run) for run in runs]
        for run, colour, curve in zip(runs, COLOURS, curves, strict=False):
            marker = "." if len(curve[0]) < 12 else ""  # a single bucket would make no line
            axis.plot(*curve, color=colour, label=run.label, linewidth=1.6, marker=marker)
        _dress(axis, title, x_label)
        if logs is not None and is_wide(value for curve in curves for value in curve[logs]):
            (axis.set_xscale, axis.set_yscale)[logs]("log")
    legend(figure, axes, fontsize=7, columns=2)
    return png(figure)


def _service(runs: list[Run]) -> bytes:
    """Draw a panel per run, at most four: each tenant's service since the start."""
    chosen = runs[:4]
    figure, axes = _figure(len(chosen))
    served = [series.cumulative_service(run) for run in chosen]
    colour = colours(tenant for curves in served for tenant in curves)
    for axis, run, curves in zip(axes, chosen, served, strict=True):
        for tenant, points in curves.items():
            axis.plot(*points, color=colour[tenant], label=tenant, linewidth=1.6)
        _dress(axis, run.label, "seconds since the start")
    compare(axes)
    legend(figure, axes, fontsize=7, columns=8)
    axes[0].set_ylabel("input + 2 x output tokens", fontsize=8)
    return png(figure)


def _against_rate(runs: list[Run]) -> bytes | None:
    """Draw figures against rate, or nothing unless some curve has two rates."""
    panels = [
        ("SLO attainment", "attainment"),
        ("output tokens a second", "output_throughput"),
        ("mean TTFT (ms)", "mean_ttft_ms"),
    ]
    curves = {title: series.against_rate(runs, figure) for title, figure in panels}
    curves = {title: named for title, named in curves.items() if any(len(x) > 1 for x, _ in named.values())}
    if not curves:
        return None
    figure, axes = _figure(len(curves))
    colour = colours(name for named in curves.values() for name in named)
    for axis, (title, named) in zip(axes, curves.items(), strict=True):
        for name, points in named.items():
            axis.plot(*points, color=colour[name], label=name, marker="o", markersize=4, linewidth=1.6)
        _dress(axis, title, "requests offered a second")
        if title == "SLO attainment":
            axis.set_ylim(-0.03, 1.03)
        elif is_wide(value for _, values in named.values() for value in values):
            axis.set_yscale("log")
    legend(figure, axes, fontsize=7, columns=2)
    return png(figure)


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure, (axes,) = new_figure((12.6, 3.6), columns=panels)
    return figure, axes


def _dress(axis: Axes, title: str, x_label: str) -> None:
    axis.set_title(title, fontsize=9, wrap=True)
    axis.set_xlabel(x_label, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)


def oversubscription(rows: list[dict[str, Any]], resident: dict[str, Any] | None) -> bytes:
    """Draw TTFT and throughput against adapters per place on the device; dashed: all of them resident."""
    figure, ((latency, speed),) = new_figure((9, 3.6), columns=2)
    ordered = sorted(rows, key=lambda row: row["adapters"] / row["places"])
    ratios = [row["adapters"] / row["places"] for row in ordered]
    for colour, (key, label) in zip(COLOURS, (("ttft_p50_ms", "median"), ("ttft_p99_ms", "p99")), strict=False):
        latency.plot(ratios, [row[key] for row in ordered], marker="o", color=colour, label=label)
        if resident is not None:
            latency.axhline(resident[key], color=colour, linestyle="--", linewidth=1)
    speed.plot(ratios, [row["output_tokens_per_second"] for row in ordered], marker="o", color=COLOURS[2])
    if resident is not None:
        speed.axhline(resident["output_tokens_per_second"], color=COLOURS[2], linestyle="--", linewidth=1)
    for axes, title in ((latency, "time to first token (ms)"), (speed, "output tokens a second")):
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set(title=title, xlabel="adapters per place on the device")
    legend(figure, [latency])
    return png(figure, dpi=120)
