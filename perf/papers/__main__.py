"""The page of the five papers, made from recorded results: `python -m perf.papers` writes docs/papers.md.

Each claim has the paper's figure, ours, computed from the files of results, and a verdict. A verdict that depends on
our figures is computed from them too, so that a new result changes it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from types import MappingProxyType

from inlaid.flags import Parser
from inlaid.report.tables import markdown
from perf.papers.auto_batching import auto_batching
from perf.papers.blitz import blitz
from perf.papers.claims import VERDICTS, Claim, Paper, Results
from perf.papers.lora_inlaid import lora_inlaid
from perf.papers.toppings import toppings
from perf.papers.vtc import vtc

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path("docs/papers.md")

# Modules of recorded commands that have another name now.
RENAMED = MappingProxyType(
    {
        "perf.scheduling.artifact": "perf.scheduling.vtc_published",
    }
)


PAPERS: tuple[Callable[[Results], Paper], ...] = (lora_inlaid, vtc, toppings, auto_batching, blitz)


def command_of(results: Results, claim: Claim) -> str:
    """Return the command that makes a claim's first file, by the names of today."""
    if claim.command or not claim.files:
        return claim.command
    found = re.search(r'"command": "((?:[^"\\]|\\.)*)"', (results.root / claim.files[0]).read_text())
    command = json.loads(f'"{found[1]}"') if found else ""
    for old, new in RENAMED.items():
        command = command.replace(old, new)
    return re.sub(r"/tmp/\S+/", "perf/results/", str(command))


def page(results: Results) -> str:
    """Return the page."""
    papers = [make(results) for make in PAPERS]
    counts = [
        (verdict, sum(each.verdict == verdict for paper in papers for each in paper.claims)) for verdict in VERDICTS
    ]
    parts = [
        "# The five papers, claim by claim",
        "Made by `python -m perf.papers` from recorded results: our figures and the verdicts are computed from the "
        "linked files, so a page that is out of date fails the tests.",
        ", ".join(f"{count} {verdict}" for verdict, count in counts if count) + ".",
    ]
    for paper in papers:
        lines = [
            (each.claim, each.paper, each.ours, f"**{each.verdict}**", _sources(results, each)) for each in paper.claims
        ]
        table = markdown(("claim", "the paper", "here", "verdict", "from"), lines, "lllll")
        parts += [f"## {paper.title}", f"Here: {paper.built}", table]
    return (
        "\n\n".join(
            part if part.startswith("|") else fill(part, 120, break_long_words=False, break_on_hyphens=False)
            for part in parts
        )
        + "\n"
    )


def _sources(results: Results, claim: Claim) -> str:
    links = ", ".join(f"[{Path(file).name}](../{file})" for file in claim.files)
    command = command_of(results, claim).replace("|", "\\|")
    return f"{links}; `{command}`" if command else links or "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or check it."""
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    args = parser.parse_args(arguments)
    made = page(Results(ROOT))
    if args.check:
        same = (ROOT / PAGE).is_file() and (ROOT / PAGE).read_text() == made
        print(f"{PAGE} is {'up to date' if same else 'out of date: run python -m perf.papers'}")
        return 0 if same else 1
    (ROOT / PAGE).write_text(made)
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
