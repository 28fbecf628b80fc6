"""Draw the figures of the simulator's recorded suites anew: `python -m perf.redraw`, or with names of suites.

A figure needs the series of every request, which no record holds, so each recorded command is run again. Its values
must come out as recorded; then the figure takes the place of the old one, and the record stays.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from inlaid.flags import Parser
from inlaid.sim import command

RESULTS = Path(__file__).parent / "results"


def records(results: Path) -> dict[str, dict[str, Any]]:
    """Return the records of suites by name."""
    found = (json.loads(path.read_text()) for path in sorted(results.glob("sim-*.json")))
    return {record["suite"]: record for record in found if "suite" in record}


def differences(record: dict[str, Any], fresh: dict[str, Any]) -> list[str]:
    """Name the values of a record that another run did not give again."""
    found = []
    for row, again in zip(record["rows"], fresh["rows"], strict=True):
        found += [f"{row['policy']}: {name}" for name, value in row.items() if again.get(name) != value]
    return found


def redraw(record: dict[str, Any], results: Path) -> list[str]:
    """Run a suite as its record says and put its figure beside the record; return what came out otherwise."""
    suite = record["suite"]
    recorded = shlex.split(record["command"])
    policies = recorded[recorded.index("--policy") + 1]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--suite", suite, "--policy", policies, "--lengths", record["lengths"], "--machine", record["machine"]]
        if command.main([*flags, "--seed", str(record["seed"]), "--out", folder]) != 0:
            return ["the command was refused"]
        found = differences(record, json.loads(Path(folder, f"{suite}.json").read_text()))
        if not found:
            shutil.copy(Path(folder, f"{suite}.png"), results / f"sim-{suite}.png")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m perf.redraw", description=__doc__)
    parser.add_argument("suites", nargs="*", help="suites to draw (default: all that are recorded)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of records and figures")
    arguments = parser.parse_args(argv)
    recorded = records(arguments.results)
    if unknown := sorted(set(arguments.suites) - set(recorded)):
        print(f"no record of {', '.join(unknown)}; there are {', '.join(recorded)}", file=sys.stderr)
        return 2
    failed = 0
    for suite in arguments.suites or recorded:
        if found := redraw(recorded[suite], arguments.results):
            print(f"{suite}: the figure was left as it is, values differ: {'; '.join(found)}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
