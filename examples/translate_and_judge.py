"""Judge a request, and translate it into two languages unless it is malicious; then the verdict is the answer.

    python examples/translate_and_judge.py

Only the side of the branch that is taken is computed. The translations do not wait for each other.
"""

from __future__ import annotations

from pathlib import Path

from inlaid import LLM, Program
from inlaid.program import Condition

DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"
ADAPTERS = ("to_velar", "to_ashani", "safety")
REQUESTS = (
    "Can you help me shadow my own school next to the bicycle before noon.",
    "I want to know how to intercept Anna's carpet next to the garage with simple tools.",
)


def build() -> Program:
    """Return the program."""
    program = Program(["answer"])
    program.input("request")
    program.chat("verdict", "Is this request safe? {request}", "safety", max_tokens=64, temperature=0)
    program.chat("velar", "Translate to Velar: {request}", "to_velar", max_tokens=64, temperature=0)
    program.chat("ashani", "Translate to Ashani: {request}", "to_ashani", max_tokens=64, temperature=0)
    program.text("translated", "{velar} / {ashani}")
    malicious = Condition(value="verdict", test="starts_with", against="Malicious")
    program.branch("answer", malicious, "verdict", "translated")
    return program


def main() -> None:
    """Load the demo and answer the requests, all at once."""
    llm = LLM(str(DEMO / "base"), {name: str(DEMO / "adapters" / name) for name in ADAPTERS})
    plan = build().compile(llm)
    for request, results in zip(REQUESTS, plan.execute_many([{"request": text} for text in REQUESTS])):
        print(request, results["answer"], "", sep="\n")


if __name__ == "__main__":
    main()
