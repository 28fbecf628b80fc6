"""One self-contained HTML page for a report: the console's colours, tables and charts, with nothing to fetch."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_CONSOLE = _HERE.parent / "console" / "static"
_MAX_CURVES = 6  # the console has so many colours


@dataclass(frozen=True)
class Chart:
    """Curves over seconds or over something else: each has a label, its places on the x axis and its values. `whole`:
    places are whole numbers."""

    title: str
    unit: str
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]
    x_unit: str = "s"
    over: str = "seconds since the start"
    whole: bool = False


def page(title: str, body: str, charts: Sequence[Chart] = ()) -> str:
    """Return a page with this body; `charts_of` says where the charts stand in it."""
    style = "".join((_CONSOLE / name).read_text() for name in ("vendor/uPlot.min.css", "style.css"))
    script = ""
    if charts:
        library = (_CONSOLE / "vendor" / "uPlot.iife.min.js").read_text()
        own = re.sub(r"^export ", "", (_CONSOLE / "chart.js").read_text(), flags=re.MULTILINE)
        own += (_HERE / "report.js").read_text()
        data = json.dumps([_data(chart) for chart in charts]).replace("<", "\\u003c")
        script = (
            f'<script id="charts" type="application/json">{data}</script>'
            f'<script>{library}</script><script type="module">{own}</script>'
        )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body><main>{body}</main>{script}</body></html>\n"
    )


def table(label: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that scrolls sideways where it is too wide; cells are markup, titles are text."""
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="table report" role="region" aria-label="{html.escape(label)}" tabindex="0">'
        f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def charts_of(charts: Sequence[Chart]) -> str:
    """Return the elements that charts are drawn into, side by side where there is room."""
    return f'<div class="grid">{"".join(map(_place_of, charts))}</div>' if charts else ""


def _place_of(chart: Chart) -> str:
    title = html.escape(chart.title)
    legend = "".join(
        f'<span><span class="swatch k{place}"></span>{html.escape(label)} <b></b></span>'
        for place, (label, _, _) in enumerate(chart.curves[:_MAX_CURVES])
    )
    left = len(chart.curves) - _MAX_CURVES
    more = f"<span>and {left} more, in the table</span>" if left > 0 else ""
    over = html.escape(chart.over)
    return (
        f'<figure class="card" id="{_id(chart)}"><figcaption><h2>{title}</h2><div class="legend">{legend}{more}</div>'
        f'</figcaption><div class="plot" role="img" aria-label="{title}, over {over}"></div></figure>'
    )


def _id(chart: Chart) -> str:
    return "chart-" + re.sub(r"\W+", "-", chart.title.lower())


def _data(chart: Chart) -> dict[str, object]:
    """Return a chart as its script reads it: all curves over the union of their places."""
    curves = chart.curves[:_MAX_CURVES]
    x = sorted({place for _, places, _ in curves for place in places})
    series = []
    for label, places, values in curves:
        known = dict(zip(places, values))
        series.append({"label": label, "values": [known.get(place) for place in x], "spanGaps": True})
    about = {"unit": chart.unit, "xUnit": chart.x_unit, "whole": chart.whole}
    return {"id": _id(chart), **about, "x": x, "series": series}
