"""Average the seconds of requests by the parts that a server's log tells: one file for each way of serving.

    inlaid serve … --adapter-load on-demand 2> on-demand.log
    python -m perf.parse_log on-demand.log pipelined.log --skip 3

Each request's line has the seconds in the queue, of these for its adapter (reading it, copying it to the device,
waiting for a place), from there to its first token, and from the first token to the last; and its share of the host's
seconds. Lines may be text or JSON (`--log-format`); requests without an answer are left out. `perf.client --server-log`
adds these seconds to its records.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from inlaid.flags import Parser
from inlaid.report.tables import markdown

PARTS = (
    "queue", "adapter", "adapter_read", "adapter_copy", "adapter_wait", "prefill", "decode", "host", "first_token",
)  # fmt: skip
_LINE = re.compile(r"\bINFO request (.*)$")
_NUMBER = re.compile(r"^perf-(-?\d+)$")  # the name of a request that perf.client has sent
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


def seconds(fields: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of a request by part; those that its line does not tell are left out."""
    return {part: float(value) for part in PARTS if (value := fields.get(f"{part}_seconds")) is not None}


def spans(path: Path) -> dict[int, dict[str, float]]:
    """Return the seconds by part of the requests that `perf.client` has sent, by their number; the last of each."""
    numbered = ((_NUMBER.search(str(fields.get("request_id"))), fields) for fields in requests(path))
    return {int(number[1]): seconds(fields) for number, fields in numbered if number is not None}


def averages(path: Path, skip: int = 0) -> dict[str, float]:
    """Return the number of requests and the mean milliseconds of each part that their lines tell, without the first
    `skip` requests."""
    found = [seconds(fields) for fields in requests(path)][skip:]
    if not found:
        raise ValueError(f"{path} has no line of an answered request behind the first {skip}; log at info or lower")
    known = {part: [each[part] for each in found if part in each] for part in PARTS}
    return {
        "requests": float(len(found)),
        **{part: 1e3 * fmean(values) for part, values in known.items() if values},
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
    print(markdown(head, [(name, f"{row['requests']:.0f}", *map(partial(_cell, row), PARTS)) for name, row in rows]))
    return 0


def _cell(row: dict[str, float], part: str) -> str:
    return f"{row[part]:.2f}" if part in row else "-"


if __name__ == "__main__":
    sys.exit(main())
