"""Figures: the only file of the project that imports matplotlib, an optional package.

Callers get a figure and its axes from `new_figure`, draw with matplotlib's own methods, and hand the figure to `save`
or `png`. There is no pyplot, hence no state between figures.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure

# Okabe and Ito's colours: told apart by people who do not see red and green as different. Wine stands for their black,
# which is for bounds and other lines that belong to no name.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999999")
DPI = 110
WIDE = 30.0  # values whose largest is so many times their smallest go on a log axis


class PlotsMissing(RuntimeError):
    """matplotlib is not installed; the message says what to do."""


def new_figure(
    size: tuple[float, float], rows: int = 1, columns: int = 1, *, polar: bool = False
) -> tuple[Figure, list[list[Any]]]:
    """Return a figure of `size` inches and its axes, row by row."""
    try:
        from matplotlib import figure as figures
    except ImportError as error:
        raise PlotsMissing("figures need matplotlib: pip install matplotlib; or pass --no-figures") from error
    figure = figures.Figure(figsize=size, dpi=DPI, layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False, subplot_kw={"polar": True} if polar else None)
    return figure, [list(row) for row in grid]


def colours(names: Iterable[str]) -> dict[str, str]:
    """Give each name a colour, in order, so that a name has the same one in every panel; they repeat after eight."""
    return dict(zip(dict.fromkeys(names), itertools.cycle(COLOURS)))


def compare(axes: Sequence[Axes], *, from_zero: bool = True) -> None:
    """Give panels that are compared one y axis: from zero, or from the least value to the largest."""
    lows, highs = zip(*(axis.get_ylim() for axis in axes))
    low, high = min(lows), max(highs)
    if from_zero:
        low = 0.0 if all(axis.dataLim.y0 >= 0 for axis in axes) else min(low, 0.0)
    for axis in axes:
        axis.set_ylim(low, high)


def is_wide(values: Iterable[float]) -> bool:
    """Tell whether positive values span so much that a linear axis would hide the small ones."""
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) > WIDE * min(positive)


def legend(figure: Figure, axes: Iterable[Axes], fontsize: str | int = "small", columns: int = 4) -> None:
    """Put one legend below all panels, clear of the lines: each label of the panels once."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if handles:
        count = min(columns, len(handles))
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=count,
            fontsize=fontsize,
            frameon=False,
        )


def save(figure: Figure, path: Path, kinds: Sequence[str] = (".png",)) -> None:
    """Write a figure under `path` with each suffix of `kinds`; equal figures make equal files."""
    for kind in kinds:
        metadata = {"CreationDate": None} if kind == ".pdf" else {"Software": None}
        figure.savefig(path.with_suffix(kind), dpi=DPI, metadata=metadata)


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
