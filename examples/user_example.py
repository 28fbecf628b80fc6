"""A program as a user writes it: four calls with four adapters of the bundled demo, which share their batches.

python examples/user_example.py
"""

from __future__ import annotations

from pathlib import Path

from inlaid import LLM, Program

DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"
ADAPTERS = ("to_velar", "to_mirun", "to_zembel", "safety")
TEXT = "the small chair badly will count my clever singers beside my big tower."


def build() -> Program:
    """Return the program."""
    program = Program()
    program.input("text")
    for language in ("Velar", "Mirun", "Zembel"):
        name = language.lower()
        program.chat(name, f"Translate to {language}: {{text}}", f"to_{name}", max_tokens=64, temperature=0)
    program.chat("verdict", "Is this request safe? {text}", "safety", max_tokens=64, temperature=0)
    program.text("letter", "Velar: {velar}\nMirun: {mirun}\nZembel: {zembel}\nVerdict: {verdict}")
    return program


def main() -> None:
    """Load the demo, compile, and execute."""
    llm = LLM(str(DEMO / "base"), {name: str(DEMO / "adapters" / name) for name in ADAPTERS})
    plan = build().compile(llm)
    print(plan.show(), end="\n\n")
    print(plan.execute({"text": TEXT})["letter"])


if __name__ == "__main__":
    main()
