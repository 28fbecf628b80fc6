"""Azure's trace of functions (2019), and one of its statistics: how often each function was called in each minute.

The format is that of `invocations_per_function_md.anon.dNN.csv`: the columns HashOwner, HashApp, HashFunction and
Trigger, then one for each minute of the day. Toppings takes a function for an adapter, leaves out minutes with more
than ten calls of one function, and spreads the calls of a minute evenly over it.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

HEAD = ("HashOwner", "HashApp", "HashFunction", "Trigger")
MINUTES = 1440
MOST = 10  # calls of one function in a minute; more are left out, as Toppings does

# Of the rates that functions are called at: 45% of them at most once an hour, 81% at most once a minute (Shahrad et
# al., ATC 2020), which makes the busiest 18.6% of them responsible for 99.9% of calls (published: 99.6%).
MEDIAN, SPREAD = 0.0278, 4.08  # calls a minute, and the standard deviation of their logarithm


@dataclass(frozen=True)
class Functions:
    """Calls of each function in each minute, [functions, minutes]."""

    counts: npt.NDArray[np.int32]

    def calls(self, minute: int, seed: int) -> list[tuple[float, int]]:
        """Return the calls of a minute in order: seconds within it, and the function."""
        column = np.where(self.counts[:, minute] <= MOST, self.counts[:, minute], 0)
        called = np.repeat(np.arange(len(column)), column)
        times = np.random.default_rng((seed, minute)).uniform(0.0, 60.0, len(called))
        order = np.argsort(times, kind="stable")
        return [(float(times[place]), int(called[place])) for place in order]


def synthetic(functions: int = 40_000, seed: int = 0, minutes: int = 1) -> Functions:
    """Draw functions of the published statistics: log-normal rates, and Poisson counts in each minute."""
    rng = np.random.default_rng(seed)
    rates = np.minimum(rng.lognormal(np.log(MEDIAN), SPREAD, functions), 1e6)
    return Functions(rng.poisson(rates[:, None], (functions, minutes)).astype(np.int32))


def read(path: Path, minutes: int = MINUTES) -> Functions:
    """Read a trace, of which only the first `minutes` are kept. ValueError says what is wrong, and in which line."""
    try:
        return Functions(np.array(list(_rows(path, minutes)), dtype=np.int32).reshape(-1, minutes))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a trace of functions: {error}") from error


def _rows(path: Path, minutes: int) -> Iterator[list[int]]:
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
        lines = csv.reader(file)
        head = next(lines, [])
        columns = [str(minute) for minute in range(1, len(head) - len(HEAD) + 1)]
        if tuple(head[: len(HEAD)]) != HEAD or head[len(HEAD) :] != columns or len(columns) < minutes:
            raise ValueError(
                f"{path}: the first line must be {','.join(HEAD)},1,2,… with {minutes} minutes or more, as in Azure's "
                "invocations_per_function_md files"
            )
        for number, line in enumerate(lines, 2):
            try:
                if len(line) != len(head):
                    raise ValueError(f"it has {len(line)} columns, the first line {len(head)}")
                counts = [int(cell) for cell in islice(line, len(HEAD), len(HEAD) + minutes)]
                if min(counts) < 0:
                    raise ValueError("a count is negative")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            yield counts


def write(path: Path, functions: Functions) -> None:
    """Write a trace in Azure's format."""
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow([*HEAD, *range(1, functions.counts.shape[1] + 1)])
        for number, counts in enumerate(functions.counts):
            lines.writerow([f"owner{number // 8}", f"app{number // 4}", f"function{number}", "http", *counts])
