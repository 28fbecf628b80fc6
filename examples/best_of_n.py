"""Sample several drafts with one adapter, let another grade them, and take the best.

    python examples/best_of_n.py

The drafts' prompt is computed once, and so is the judge's common beginning. The demo has no adapter that grades: its
`safety` is made to write a digit by a grammar, which shows the form and judges nothing. Put your judge in its place.
"""

from __future__ import annotations

from pathlib import Path

from inlaid import LLM, Program
from inlaid.engine.request import Grammar

DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"
ADAPTERS = ("to_velar", "safety")
TEXT = "my tailors loved a ring without the storms."


def build(drafts: int = 4) -> Program:
    """Return the program."""
    program = Program(["drafts", "grades", "best"])
    program.input("text")
    with program.map("drafts", drafts, "number") as each:
        each.chat("draft", "Translate to Velar: {text}", "to_velar", max_tokens=48, temperature=1.2)
    with program.map("grades", "drafts", "candidate") as each:
        grade = Grammar(regex="[0-9]")
        each.chat("grade", "Grade from 0 to 9: {candidate}", "safety", max_tokens=2, temperature=0, grammar=grade)
    program.best("best", "drafts", "grades")
    return program


def main() -> None:
    """Load the demo and print drafts, grades and the best."""
    llm = LLM(str(DEMO / "base"), {name: str(DEMO / "adapters" / name) for name in ADAPTERS})
    results = build().compile(llm).execute({"text": TEXT}, seed=1)
    for draft, grade in zip(results["drafts"], results["grades"]):
        print(grade, draft)
    print("best:", results["best"])


if __name__ == "__main__":
    main()
