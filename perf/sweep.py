"""Axes of a template: its lists, multiplied out. Used by `perf.template`."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

# Lists that are values in themselves and not axes, by path inside a point's table.
PLAIN_LISTS = re.compile(
    r"^(global\..*|model\.(adapters|random_adapters\..*)|dataset\.(streams|window|.*\.indices)|slo\..*\.adapters)"
)
Path = tuple[str, ...]


class Choice:
    """One value of one axis: its label, and the place where it is set."""

    def __init__(self, path: Path, index: int, value: Any) -> None:
        self.path, self.value = path, value
        self.label = str(index) if isinstance(value, (dict, list)) else str(value)

    def apply(self, table: dict[str, Any]) -> None:
        """Set the value: a scalar at its key; a table beside its siblings, so that one axis can move several keys."""
        for part in self.path[:-1]:
            table = table[part]
        del table[self.path[-1]]
        if isinstance(self.value, dict):
            table.update(copy.deepcopy(self.value))
        else:
            table[self.path[-1]] = self.value


def find_axes(table: dict[str, Any], prefix: Path = ()) -> list[tuple[Path, list[Any]]]:
    """Find every list that is an axis, in the order written."""
    axes: list[tuple[Path, list[Any]]] = []
    for key, value in table.items():
        path = (*prefix, key)
        if PLAIN_LISTS.match(".".join(path)):
            continue
        if isinstance(value, dict):
            axes += find_axes(value, path)
        elif isinstance(value, list):
            axes.append((path, value))
    return axes


def expand(table: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Make one deep copy of the table for each combination, with the axes' names and values as labels."""
    axes = find_axes(table)
    for path, values in axes:
        if not values:
            raise ValueError(f"the axis {'.'.join(path)} is an empty list")
    choices = [[Choice(path, i, value) for i, value in enumerate(values)] for path, values in axes]
    points = []
    for combination in itertools.product(*choices):
        point = copy.deepcopy(table)
        labels = {}
        for choice in combination:
            choice.apply(point)
            labels[choice.path[-1]] = choice.label
        points.append((point, labels))
    return points
