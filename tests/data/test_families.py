"""Families worked out from the prompt: each answer recomputed here from the prompt's text alone."""

from __future__ import annotations

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from data import families

SEEDS = st.integers(0, 10**6)


@given(SEEDS)
def test_text_summary_keeps_the_hero_s_deeds_in_order(seed: int) -> None:
    prompt, answer, _ = families.text_summary(random.Random(seed))
    hero = prompt.split()[2]
    deeds = re.findall(rf"On \w+ {hero} (\w+) [^.]*?(\w+) in (\w+)\.", prompt)
    assert answer == f"{hero}: " + ", ".join(f"{verb} {noun} ({place})" for verb, noun, place in deeds) + "."
    assert 3 <= len(deeds) < prompt.count("On ")


@given(SEEDS)
def test_table_summary_names_the_extremes(seed: int) -> None:
    prompt, answer, _ = families.table_summary(random.Random(seed))
    header, *rows = [line.split(" | ") for line in prompt.splitlines()[1:]]
    assert answer.startswith(f"{len(rows)} rows.")
    for column in (1, 2):
        top = max(rows, key=lambda row: int(row[column]))
        low = min(rows, key=lambda row: int(row[column]))
        assert (
            f"highest {header[column]} is {top[column]} for {top[0]}, the lowest is {low[column]} for {low[0]}."
            in answer
        )


@given(SEEDS)
def test_maths_chains_from_the_story_to_the_answer(seed: int) -> None:
    prompt, answer, extra = families.maths(random.Random(seed))
    total = int(re.findall(r"\d+", prompt)[0])
    for a, sign, b, c in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", answer):
        assert int(a) == total
        total = {"+": total + int(b), "-": total - int(b), "*": total * int(b)}[sign]
        assert int(c) == total
        assert b in prompt or {"2": "doubles", "3": "triples"}[b] in prompt
    assert extra == {"answer": total}
    assert total > 0


@given(SEEDS)
def test_code_has_six_telling_cases(seed: int) -> None:
    _, _, extra = families.code(random.Random(seed))
    cases = extra["cases"]
    assert isinstance(cases, list)
    assert len(cases) == 6
    assert len({str(output) for _, output in cases}) >= 4
