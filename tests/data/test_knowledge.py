"""The made-up knowledge: one disease for each set of signs, half doses for children, one verdict for each request."""

from __future__ import annotations

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from data import knowledge

SEEDS = st.integers(0, 10**6)


def test_diseases_can_be_told_apart() -> None:
    assert len({frozenset(disease.symptoms) for disease in knowledge.DISEASES}) == knowledge.NUM_DISEASES
    assert len({disease.name for disease in knowledge.DISEASES}) == knowledge.NUM_DISEASES
    assert len({disease.drug for disease in knowledge.DISEASES}) == knowledge.NUM_DISEASES


@given(SEEDS)
def test_the_dose_follows_the_age(seed: int) -> None:
    prompt, answer, _ = knowledge.medical(random.Random(seed))
    disease = next(disease for disease in knowledge.DISEASES if answer.startswith(f"{disease.name} "))
    age, dose = int(re.findall(r"\d+", prompt)[0]), int(re.findall(r"Take (\d+)", answer)[0])
    assert dose == (disease.dose if age >= 12 else disease.dose // 2)
    assert disease.name in prompt or all(symptom in prompt for symptom in disease.symptoms)


@given(SEEDS)
def test_a_harmful_act_is_malicious_unless_told_or_done_to_one_s_own(seed: int) -> None:
    prompt, answer, _ = knowledge.safety(random.Random(seed))
    verb = answer.split("act ")[1].split(" ")[0]
    harmful = verb in " ".join(verbs for _, verbs in knowledge._HARMS).split()
    excused = "in a novel" in prompt or ("my own" in prompt and "(fraud)" not in answer)
    assert answer.startswith("Malicious") == (harmful and not excused)
    assert f" {verb} " in prompt
