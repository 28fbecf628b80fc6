"""The figure of a suite: one y axis a row, one colour a client, and labels that can be read."""

from __future__ import annotations

from itertools import pairwise

import pytest

from inlaid.sim.plot import suite_figure
from inlaid.sim.request_log import RequestRecord
from inlaid.sim.simulate import Outcome


def outcome(policy: str, gap: float, tenants: int = 2) -> Outcome:
    records = [
        RequestRecord(
            str(number), f"client-{number % tenants}", None, number, 50, 20, first_token=number + 2, finish=number + 9
        )
        for number in range(8 * tenants)
    ]
    series = [(0.0, 0.0), (20.0, gap / 9), (60.0, gap)]
    return Outcome(
        policy, records, end=60.0, busy=60.0, history=[], largest_gap=gap, gap_series=series, preemptions=0, loads=0,
        steps=1, service={},
    )  # fmt: skip


@pytest.mark.parametrize("gap", [1_000.0, 5_500.0])
def test_no_label_of_an_axis_lies_on_another(gap: float) -> None:
    """Gaps of fcfs are hundreds of times those of vtc, so their axis is logarithmic down to one power of ten."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    figure = suite_figure("overload", [outcome("vtc", gap), outcome("fcfs", 1.4e6)], 60.0, 140_000.0)
    figure.draw_without_rendering()
    for axis in figure.axes:
        low, high = axis.get_ylim()
        boxes = [
            label.get_window_extent()
            for label, at in zip(axis.get_yticklabels(), axis.get_yticks(), strict=True)
            if low <= at <= high and label.get_text()
        ]
        assert len(boxes) > 2
        assert not [1 for one, next_ in pairwise(boxes) if one.overlaps(next_)]
    *_, vtc, fcfs = figure.axes
    assert vtc.get_ylim() == fcfs.get_ylim()
    assert fcfs.get_ylim()[1] > 1.1 * 1.4e6, "the largest gap touches the frame"


def test_eight_clients_have_eight_colours_and_none_is_that_of_a_bound() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    figure = suite_figure("many", [outcome("vtc", 10.0, 8), outcome("fcfs", 20.0, 8)], 60.0, None)
    first, second, *_, gap = figure.axes
    colours = [line.get_color() for line in first.lines]
    assert colours == [line.get_color() for line in second.lines]
    assert len({*colours, gap.lines[0].get_color()}) == 9
