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
    """Curves over seconds: each has a label, its places on the x axis and its values."""

    title: str
    unit: str
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]


def page(title: str, body: str, charts: Sequence[Chart] = ()) -> str:
    """Return a page with this body; `place_of` says where a chart stands in it."""
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


def place_of(chart: Chart) -> str:
    """Return the element that a chart is drawn into."""
    title = html.escape(chart.title)
    legend = "".join(
        f'<span><span class="swatch k{place}"></span>{html.escape(label)} <b></b></span>'
        for place, (label, _, _) in enumerate(chart.curves[:_MAX_CURVES])
    )
    return (
        f'<figure class="card" id="{_id(chart)}"><figcaption><h2>{title}</h2><div class="legend">{legend}</div>'
        f'</figcaption><div class="plot" role="img" aria-label="{title}, over seconds since the start"></div></figure>'
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
    return {"id": _id(chart), "unit": chart.unit, "x": x, "series": series}
