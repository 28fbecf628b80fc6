"""A claim of a paper, its verdict, and the recorded results that both are computed from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPRODUCED, PARTLY, REFUTED = "reproduced", "partly reproduced", "not found here"
NOT_HERE, NOT_YET = "not on this hardware", "not measured yet"
VERDICTS = (REPRODUCED, PARTLY, REFUTED, NOT_HERE, NOT_YET)


@dataclass(frozen=True)
class Claim:
    """A claim and what was found. `files` are below the repository's root; the first one's command is told."""

    claim: str
    paper: str
    ours: str
    verdict: str
    files: tuple[str, ...] = ()
    command: str = ""  # where the first file has none


@dataclass(frozen=True)
class Paper:
    """A paper, what of it is built here, and its claims."""

    title: str
    built: str
    claims: Sequence[Claim]


class Results:
    """The files of results, read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        """Return a file of perf/results or, with its folder, of elsewhere."""
        path = name if "/" in name else f"perf/results/{name}"
        if path not in self._read:
            self._read[path] = json.loads((self.root / path).read_text())
        return self._read[path]


def row(rows: Sequence[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """Return the row with these values."""
    (found,) = [each for each in rows if all(each[key] == value for key, value in wanted.items())]
    return found


def mean(rows: Sequence[dict[str, Any]], key: str, **wanted: Any) -> float:
    """Return the mean of a figure over the rows with these values."""
    found = [float(each[key]) for each in rows if all(each[name] == value for name, value in wanted.items())]
    return sum(found) / len(found)
