"""Average the seconds of requests by the parts that a server's log tells: one file for each way of serving.

    inlaid serve … --adapter-load on-demand 2> on-demand.log
    python -m perf.parse_log on-demand.log pipelined.log --skip 3

Each request's line has the seconds in the queue, of these waiting for its adapter, from there to its first token, and
from the first token to the last. Lines may be text or JSON (`--log-format`); requests without an answer are left out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from inlaid.flags import Parser
from inlaid.report.tables import markdown

PARTS = ("queue", "adapter", "prefill", "decode", "first_token")
_LINE = re.compile(r"\bINFO request (.*)$")
_FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)')


def requests(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the fields of each answered request, in the order of their ends."""
    for line in path.read_text(errors="replace").splitlines():
        fields: dict[str, Any] = {}
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            fields = found if isinstance(found, dict) and found.get("message") == "request" else {}
        elif (match := _LINE.search(line)) is not None:
            fields = {name: value.strip('"') for name, value in _FIELD.findall(match[1])}
        if "queue_seconds" in fields:
            yield fields


def averages(path: Path, skip: int = 0) -> dict[str, float]:
    """Return the number of requests and the mean milliseconds of each part, without the first `skip` requests."""
    found = list(requests(path))[skip:]
    if not found:
        raise ValueError(f"{path} has no line of an answered request behind the first {skip}; log at info or lower")
    return {
        "requests": float(len(found)),
        **{part: 1e3 * fmean(float(each[f"{part}_seconds"]) for each in found) for part in PARTS},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, a line for each file."""
    parser = Parser(description=__doc__)
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG")
    parser.add_argument("--skip", type=int, default=3, help="requests at the beginning that do not count")
    args = parser.parse_args(arguments)
    try:
        rows = [(path.stem, averages(path, args.skip)) for path in args.logs]
    except (OSError, ValueError) as error:
        print(f"parse_log: {error}", file=sys.stderr)
        return 2
    head = ("log", "requests", *(f"{part.replace('_', ' ')} ms" for part in PARTS))
    print(markdown(head, [(name, f"{row['requests']:.0f}", *(f"{row[p]:.2f}" for p in PARTS)) for name, row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
