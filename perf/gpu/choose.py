"""From what the stages of variants measured to the constants in the package: `python -m perf.gpu.choose
variants-7b.json variants-8b.json` rewrites them where another value made a step shorter, on average over the steps, by
more than chance; and says so. A stage of bench.py too, so that what is served afterwards is what was chosen.

A value is taken only if it gave the shipped one's logits (within half precision) and the same bits every time. How much
chance does is seen in the shipped choice, which is measured first and last.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from perf.gpu.step import Variant, variants

GAIN = 0.003  # of a step, on average over all that were measured
ERROR = 5e-3


def ratios(steps: Sequence[dict[str, Any]], name: str) -> list[float]:
    """A choice's time over the shipped one's, for each step; infinity where it may not be taken."""
    found = []
    for step in steps:
        by_name = {choice["variant"]: choice for choice in step["choices"]}
        if name not in by_name or "us" not in by_name.get("as shipped", {}):
            continue
        choice = by_name[name]
        times, _, of = choice.get("same_bits", "0 of 1").partition(" of ")
        right = "us" in choice and choice["error"] < ERROR and times == of
        found.append(choice["us"] / by_name["as shipped"]["us"] if right else float("inf"))
    return found


def decide(steps: Sequence[dict[str, Any]]) -> list[tuple[Variant, float]]:
    """For each constant the value that is best, where it is better than the shipped one by more than chance."""
    chance = max((abs(ratio - 1) for ratio in ratios(steps, "as shipped, again")), default=1.0)
    best: dict[str, tuple[Variant, float]] = {}
    for variant in {variant.name: variant for grouped in (False, True) for variant in variants(grouped)}.values():
        found = ratios(steps, variant.name)
        if len(variant.changes) != 1 or not found:
            continue
        constant, average = variant.changes[0][1], mean(found)
        if average < 1 - max(GAIN, chance) and (constant not in best or average < best[constant][1]):
            best[constant] = variant, average
    return list(best.values())


def rewrite(text: str, constant: str, value: Any) -> str:
    """The module with another value of a constant, its comment left as it is."""
    changed, count = re.subn(
        rf"^({constant} = )(?:\([^)]*\)|[^#\n]*?)(?=\s*(?:#|$))", rf"\g<1>{value!r}", text, flags=re.MULTILINE
    )
    if count != 1:
        raise ValueError(f"{constant} is set {count} times")
    return changed


def run(files: Sequence[Path]) -> dict[str, Any]:
    """Rewrite what is to be chosen; what was."""
    steps = [step for file in files for step in json.loads(file.read_text())["result"]["steps"]]
    chosen = []
    for variant, average in decide(steps):
        owner, constant, value = variant.changes[0]
        module = Path(owner.__file__)
        module.write_text(rewrite(module.read_text(), constant, value))
        chosen.append({"constant": f"{owner.__name__}.{constant}", "value": value, "ratio": round(average, 4)})
        print(chosen[-1], flush=True)
    return {"chosen": chosen}


if __name__ == "__main__":
    run([Path(name) for name in sys.argv[1:]])
