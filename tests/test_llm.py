"""LLM on the demo: answers in order, adapters side by side, stop strings, chat, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlaid.engine.refusal import Refused
from inlaid.engine.request import FinishReason, SamplingParams
from inlaid.llm import LLM

DEMO = Path(__file__).parents[1] / "models" / "demo"
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def llm() -> LLM:
    adapters = {name: str(DEMO / "adapters" / name) for name in ("to_velar", "maths")}
    return LLM(str(DEMO / "base"), adapters, max_model_len=256, scheduler={"max_num_seqs": 4})


def test_a_batch_answers_as_each_prompt_alone(llm: LLM) -> None:
    prompts = ["one", "two", "three", "four", "five", "six"]
    adapters = [None, "to_velar", "maths", "to_velar", None, "maths"]
    together = llm.generate(prompts, GREEDY, adapters, progress=False)
    alone = [llm.generate(p, GREEDY, a, progress=False)[0] for p, a in zip(prompts, adapters)]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert len({tuple(answer.tokens) for answer in together}) > 1


def test_more_prompts_than_the_queue_takes_are_all_answered() -> None:
    llm = LLM(str(DEMO / "base"), max_model_len=64, scheduler={"max_num_seqs": 2, "max_num_waiting": 2})
    answers = llm.generate(["a"] * 9, SamplingParams(max_tokens=2), progress=False)
    assert [len(answer.tokens) for answer in answers] == [2] * 9


def test_a_stop_string_ends_the_request_in_the_engine_too(llm: LLM) -> None:
    free = llm.generate("the", GREEDY, progress=False)[0]
    stop = free.text[2:4]
    charged = llm.engine.stats()["output_tokens"]
    answer = llm.generate("the", SamplingParams(max_tokens=12, temperature=0.0, stop=(stop,)), progress=False)[0]
    assert answer.finish_reason is FinishReason.STOP
    assert answer.stop_reason == stop
    assert free.text.startswith(answer.text + stop)
    while llm.engine.has_work:
        llm.engine.step()
    assert llm.engine.stats()["kv_blocks_used"] == 0
    assert llm.engine.stats()["output_tokens"] - charged == len(answer.tokens)


def test_chat_is_generate_on_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hello"}]
    prompt = llm.tokenizer.encode(llm.tokenizer.template.render(conversation), False)
    by_chat = llm.chat(conversation, GREEDY, "maths", progress=False)
    assert by_chat == llm.generate([prompt], GREEDY, "maths", progress=False)


def test_a_stream_that_is_left_leaves_nothing_behind(llm: LLM) -> None:
    pieces = llm.stream("the", SamplingParams(max_tokens=200, ignore_eos=True))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    while llm.engine.has_work:
        llm.engine.step()
    assert llm.engine.stats()["running"] == 0


def test_what_cannot_be_served_is_refused_by_name(llm: LLM) -> None:
    with pytest.raises(Refused, match="top_p is 2"):
        llm.generate("a", SamplingParams(top_p=2.0))
    with pytest.raises(ValueError, match="'nobody' is not loaded"):
        llm.generate("a", GREEDY, "nobody")
    with pytest.raises(ValueError, match="2 prompts, 1 params"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(ValueError, match="unknown setting colour"):
        LLM("nothing", colour="red")
