"""Extract the best of each of several tables, then summarize the table of the best.

    python examples/extract_then_summarize.py

A map has a call for each table, all side by side; a Python function makes a table of what they found; one more call
summarizes it. Results are printed as they come.
"""

from __future__ import annotations

import re
from pathlib import Path

from inlaid import LLM, Program

DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"
ADAPTERS = ("table_summary",)
SHOPS = (
    "dancer 39 40, ladder 47 18, harbor 11 74, tower 17 61, table 24 56",
    "garden 97 22, cake 70 53, hammer 28 88, cup 67 91, bed 42 30",
    "shell 13 64, lamp 81 12, coin 55 37, root 26 90, story 60 45",
    "coat 72 19, knight 34 58, cloud 90 27, ring 16 83, boat 49 66",
    "stone 21 95, lion 63 14, basket 38 71, feather 85 52, pilot 57 33",
)


def table(rows: list[str]) -> str:
    """Return rows of name and two numbers as a table."""
    return "\n".join(["name | stock | weight", *(" | ".join(row.split()) for row in rows)])


def best(extracts: list[str]) -> str:
    """Return the table of each shop's best: the name with the highest stock, and the two highest numbers."""
    rows = []
    for text in extracts:
        (stock, name), (weight, _) = re.findall(r"highest \w+ is (\d+) for (\w+)", text)
        rows.append(f"{name} {stock} {weight}")
    return table(rows)


def build() -> Program:
    """Return the program."""
    program = Program(["extracts", "summary"])
    program.input("tables")
    with program.map("extracts", "tables", "table") as each:
        each.chat("extract", "Summarize the table.\n{table}", "table_summary", max_tokens=96, temperature=0)
    program.function("best", best, "extracts")
    program.chat("summary", "Summarize the table.\n{best}", "table_summary", max_tokens=96, temperature=0)
    return program


def main() -> None:
    """Load the demo and run the program, with its results as they come."""
    llm = LLM(str(DEMO / "base"), {name: str(DEMO / "adapters" / name) for name in ADAPTERS})
    tables = [table(shop.split(", ")) for shop in SHOPS]
    for event in build().compile(llm).stream({"tables": tables}):
        if event.complete and event.name == "extracts" and event.path:
            print(f"table {event.path[0]}: {event.value}")
        elif event.complete and event.name == "summary":
            print(f"all: {event.value}")


if __name__ == "__main__":
    main()
