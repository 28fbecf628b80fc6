"""The examples on the demo; the first against transformers + peft; and fused, unfused and one by one on real adapters
of several ranks, with samples too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from examples import best_of_n, extract_then_summarize, translate_and_judge, user_example
from inlaid.llm import LLM
from inlaid.program import Options, Program, Results

DEMO = user_example.DEMO
EXAMPLES = (user_example, translate_and_judge, extract_then_summarize, best_of_n)
ONE_BY_ONE = Options(
    fuse_decode=False, merge_equal=False, drop_dead=False, keep_kv=False, share_prefixes=False, max_in_flight=1
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    names = sorted({name for example in EXAMPLES for name in example.ADAPTERS})
    return LLM(str(DEMO / "base"), {name: str(DEMO / "adapters" / name) for name in names}, max_model_len=512)


def answers_of_peft(results: Results) -> dict[str, list[int]]:
    """Return the tokens of each call, made one at a time by transformers and peft."""
    base = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    first, *others = user_example.ADAPTERS
    model: Any = PeftModel.from_pretrained(base, DEMO / "adapters" / first, adapter_name=first)
    for name in others:
        model.load_adapter(DEMO / "adapters" / name, name)
    model.eval()
    answers = {}
    for call in results.calls:
        model.set_adapter(call.adapter)
        ids = torch.tensor([call.prompt])
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=call.params.max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        answers[call.where] = made[0, len(call.prompt) :].tolist()
    return answers


def test_the_users_example_gives_the_tokens_of_transformers_and_peft(llm: LLM) -> None:
    results = user_example.build().compile(llm).execute({"text": user_example.TEXT})
    assert {call.where: call.answer.tokens for call in results.calls} == answers_of_peft(results)
    assert results["letter"].startswith("Velar: ")


def test_a_malicious_request_is_judged_and_another_translated(llm: LLM) -> None:
    plan = translate_and_judge.build().compile(llm)
    good, bad = plan.execute_many([{"request": text} for text in translate_and_judge.REQUESTS], progress=False)
    assert " / " in good["answer"]
    assert bad["answer"].startswith("Malicious")
    assert len(bad.calls) == 1, "what is not shown is not translated"


def test_tables_are_summarized_side_by_side_and_their_best_once_more(llm: LLM) -> None:
    tables = [extract_then_summarize.table(shop.split(", ")) for shop in extract_then_summarize.SHOPS]
    results = extract_then_summarize.build().compile(llm).execute({"tables": tables})
    assert results["extracts"][0].startswith("5 rows. The highest stock is 47 for ladder")
    assert results["summary"].startswith("5 rows. The highest stock is 97 for garden")


def test_the_best_draft_is_the_first_with_the_highest_grade(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    plan = best_of_n.build(6).compile(llm)
    results = plan.execute({"text": best_of_n.TEXT}, seed=3)
    grades = [int(grade) for grade in results["grades"]]
    assert results["best"] == results["drafts"][grades.index(max(grades))]
    assert len(set(results["drafts"])) > 1, "each draft has a seed of its own"
    assert dict(plan.execute({"text": best_of_n.TEXT}, seed=3)) == dict(results)


def mixed() -> Program:
    """Return a program of all ranks, with equal calls, a continuation and samples."""
    program = Program()
    program.input("text")
    for name in ("to_velar", "to_mirun", "to_ashani"):
        program.chat(name, "Translate: {text}", name, max_tokens=8, temperature=0)
        program.chat(f"{name}_again", "Translate: {text}", name, max_tokens=8, temperature=0)
        program.chat(f"{name}_more", "and once more", name, continues=name, max_tokens=4, temperature=0)
        program.chat(f"{name}_sampled", f"Repeat: {{{name}}}", name, max_tokens=4, temperature=1.0)
    program.text("base", "{to_velar_more}")
    program.generate("plain", "{base} and {to_mirun}", None, max_tokens=4, temperature=0)
    program.outputs = [node.name for node in program.nodes]
    return program


def test_short_cuts_change_no_token_on_adapters_of_mixed_ranks(llm: LLM) -> None:
    inputs = [{"text": "my tower"}, {"text": "a ring today will trust this ring."}]
    plainly, fused, by_adapter = (
        [dict(each) for each in mixed().compile(llm, options).execute_many(inputs, seed=11, progress=False)]
        for options in (ONE_BY_ONE, Options(), Options(fuse_decode=False))
    )
    assert fused == plainly
    assert by_adapter == plainly
