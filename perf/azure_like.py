"""`python -m perf.azure_like --out FILE.csv`: a trace in Azure's format and of its statistics, with a burst.

The traces of Azure's LLM inference (2023) may be fetched from Azure/AzurePublicDataset and put in its place; the loader
reads both. Medians and spreads are those published with the traces: conversations have 1,020 tokens in and 129 out,
code 1,500 in and 13 out. The rate is steady, rises fivefold within seconds, and falls again.
"""

from __future__ import annotations

import argparse
import csv
import sys
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType

import numpy as np

from inlaid.flags import Parser

KINDS = MappingProxyType({"conv": (1020.0, 0.75, 129.0, 0.9), "code": (1500.0, 0.8, 13.0, 1.0)})
MOST_IN, MOST_OUT = 4000, 1000


def rows(kind: str, seconds: float, rate: float, burst: float, seed: int) -> list[tuple[float, int, int]]:
    """Return times, tokens in and tokens out: Poisson arrivals, `burst` times as many from 30 to 50% of the time."""
    rng = np.random.default_rng(seed)
    median_in, sigma_in, median_out, sigma_out = KINDS[kind]
    made: list[tuple[float, int, int]] = []
    now = 0.0
    while True:
        high = 0.3 <= now / seconds < 0.5
        now += rng.exponential(1 / (rate * (burst if high else 1.0)))
        if now >= seconds:
            return made
        prompt = int(np.clip(rng.lognormal(np.log(median_in), sigma_in), 4, MOST_IN))
        output = int(np.clip(rng.lognormal(np.log(median_out), sigma_out), 1, MOST_OUT))
        made.append((now, prompt, output))


def write(path: Path, made: list[tuple[float, int, int]]) -> None:
    """Write rows as Azure does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    start = datetime(2023, 11, 16, 18, 0, 0)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
        for at, prompt, output in made:
            stamp = start + timedelta(seconds=at)
            table.writerow((f"{stamp:%Y-%m-%d %H:%M:%S}.{stamp.microsecond:06d}0", prompt, output))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="perf.azure_like", description="Make a trace in Azure's format with a burst.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", choices=tuple(KINDS), default="conv")
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second outside the burst")
    parser.add_argument("--burst", type=float, default=5.0, help="times the rate inside it")
    parser.add_argument("--seed", type=int, default=0)
    arguments: argparse.Namespace = parser.parse_args(argv)
    made = rows(arguments.kind, arguments.seconds, arguments.rate, arguments.burst, arguments.seed)
    write(arguments.out, made)
    print(f"{len(made)} requests in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
