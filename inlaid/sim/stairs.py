"""Seconds of a step as a staircase of its rows: a device that pads steps to the sizes of its graphs takes as long for
270 tokens as for 384. The edges are found in measured steps by isotonic regression: the best function that never falls.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Stairs = tuple[tuple[int, float], ...]  # (rows, seconds of a step of up to so many rows), in order

_ALIKE = 0.01  # of its value: a smaller rise is no edge


def seconds_at(stairs: Stairs, rows: int) -> float:
    """Return the seconds of a step of so many rows; above the last edge they rise in proportion."""
    place = bisect_left(stairs, rows, key=lambda stair: stair[0])
    if place < len(stairs):
        return stairs[place][1]
    last, seconds = stairs[-1]
    return seconds * rows / last


def fit_stairs(rows: Array, seconds: Array, weights: Array) -> Stairs:
    """Return the staircase of least weighted squares, without edges of less than 1%."""
    sizes, where = np.unique(rows, return_inverse=True)
    weight = np.bincount(where, weights)
    mean = np.bincount(where, weights * seconds) / weight
    blocks: list[tuple[float, float, int]] = []  # value, weight, rows of the last size
    for value, own, size in zip(mean.tolist(), weight.tolist(), sizes.tolist(), strict=True):
        last = int(size)
        while blocks and blocks[-1][0] >= value * (1.0 - _ALIKE):
            before, more, _ = blocks.pop()
            value, own = (before * more + value * own) / (more + own), own + more
        blocks.append((value, own, last))
    return tuple((last, max(0.0, value)) for value, _, last in blocks)


def values_at(stairs: Stairs, rows: Array) -> Array:
    """Return the seconds at each of these numbers of rows."""
    return np.array([seconds_at(stairs, int(each)) for each in rows])
