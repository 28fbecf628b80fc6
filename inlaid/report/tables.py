"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]], align: str = "lr") -> str:
    """Return a table without a final newline.

    `align` has l (left) or r (right) for each column; its last letter holds for all columns that follow.
    """
    sides = align + align[-1] * (len(head) - len(align))
    lines = [_line(head), "|" + "|".join("---" if side == "l" else "---:" for side in sides) + "|"]
    return "\n".join([*lines, *map(_line, rows)])


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
