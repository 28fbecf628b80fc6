"""`python -m eval.merge OUT PART.json …`: one report from those of several runs of `eval.run`, which may each have made
other variants, widths, seeds or tasks at the same time. All must be of one base, with as many examples of each task.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval import judge
from eval.run import write
from inlaid.flags import Parser

SHARED = ("base", "backend", "examples_per_task")


class MergeError(ValueError):
    """Reports that do not belong together; the message says which."""


def merged(name: str, parts: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """Return the report of all parts. A record that several have, as full precision's, is taken from the first."""
    first_path, first = parts[0]
    tasks: dict[str, Any] = {}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path, part in parts:
        for field in SHARED:
            if part[field] != first[field]:
                raise MergeError(f"{path} has {field} {part[field]!r}, {first_path} has {first[field]!r}")
        for task, facts in part["tasks"].items():
            if tasks.setdefault(task, facts) != facts:
                raise MergeError(f"{path}: task {task} has other examples than in the parts before it")
        for record in part["records"]:
            key = tuple(record[field] for field in ("variant", "bits", "seed", "task", "adapter"))
            found.setdefault(key, record)
    records = sorted(found.values(), key=lambda record: (-record["bits"], record["seed"]))
    judge.correct_p_values(records)
    provenance = {**first["provenance"], "seconds": sum(part["provenance"]["seconds"] for _, part in parts)}
    commands = dict.fromkeys(part["provenance"]["command"] for _, part in parts)
    return {
        **first,
        "name": name,
        "provenance": {**provenance, "command": "; ".join(commands)},
        "tasks": tasks,
        "summary": judge.summary(records),
        "records": records,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Merge reports and return the exit status."""
    parser = Parser(prog="python -m eval.merge", description=__doc__)
    parser.add_argument("out", type=Path, help="path of the report without its ending")
    parser.add_argument("parts", type=Path, nargs="+", metavar="PART.json", help="reports of eval.run")
    arguments = parser.parse_args(argv)
    try:
        parts = [(path, json.loads(path.read_bytes())) for path in arguments.parts]
        made = merged(arguments.out.name, parts)
    except (OSError, ValueError, KeyError) as error:
        print(f"eval.merge: {error}", file=sys.stderr)
        return 2
    write(arguments.out, made, with_figures=True)
    print(f"report: {arguments.out}.json, .md and .html, of {len(made['records'])} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
