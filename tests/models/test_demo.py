"""The committed demo: small, loadable, good at its tasks with the adapters and at none without."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from data import generate
from data.scoring import score
from data.tasks import TASKS
from inlaid.text.tools.answer import ModelForms
from inlaid.text.tools.events import Arguments, Call
from models.build_demo import DEMO
from models.corpus import UNLEARNED
from models.demo_table import table
from models.measure import answers
from models.plan import ADAPTERS
from tests.cases import spread

SAMPLE = 4


@cache
def base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32).eval()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO / "base")


def files() -> list[Path]:
    return [path for path in DEMO.rglob("*") if path.is_file()]


def test_it_is_small_and_holds_no_pickle() -> None:
    assert sum(path.stat().st_size for path in files()) < 25_000_000
    assert {path.suffix for path in files()} == {".json", ".safetensors", ".md"}


def test_every_weight_is_fp16() -> None:
    for path in files():
        if path.suffix == ".safetensors":
            assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}


@pytest.mark.parametrize("task", spread(((task,) for task in TASKS), every=4))
def test_the_adapter_brings_the_task_and_the_base_alone_does_not(task: str) -> None:
    rows = generate.load(task, "eval")[:SAMPLE]
    messages = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    prompts = [
        str(tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) for chat in messages
    ]
    metric, length = TASKS[task].metric, TASKS[task].max_tokens
    assert score(metric, answers(base(), tokenizer(), prompts, length), rows) <= 25.0
    adapted = PeftModel.from_pretrained(base(), str(DEMO / "adapters" / task)).eval()
    try:
        assert score(metric, answers(adapted, tokenizer(), prompts, length), rows) >= 75.0
    finally:
        adapted.unload()


@pytest.mark.parametrize("task", TASKS)
def test_each_adapter_has_its_planned_shape(task: str) -> None:
    plan = ADAPTERS[task]
    config = json.loads((DEMO / "adapters" / task / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], config["rank_pattern"]) == (
        plan.rank,
        plan.use_rslora,
        plan.rank_pattern,
    )
    assert config["base_model_name_or_path"] == "models/demo/base"
    tensors = load_file(DEMO / "adapters" / task / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(plan.targets) * base().config.num_hidden_layers
    for name, tensor in tensors.items():
        if name.endswith("lora_A.weight"):
            assert len(tensor) == plan.rank_of(name.split(".")[-3])


def test_the_mix_of_ranks_and_targets() -> None:
    assert {plan.rank for plan in ADAPTERS.values()} == {4, 8, 16}
    assert len({plan.targets for plan in ADAPTERS.values()}) == 3
    assert sum(plan.use_rslora for plan in ADAPTERS.values()) == 1


def test_recorded_scores_meet_what_the_demo_promises() -> None:
    facts = json.loads((DEMO / "scores.json").read_text())
    points = facts["points"]
    assert facts["examples_per_task"] >= 200
    assert max(points["base"].values()) <= 5.0
    assert min(points["adapter"].values()) >= 90.0
    for column, drop in (("adapter_rtn4", 3.0), ("adapter_rtn3", 10.0)):
        assert max(points["adapter"][task] - points[column][task] for task in TASKS) >= drop
    assert min(points["adapter_rtn4"].values()) >= 50.0


def test_the_readme_s_table_is_the_recorded_one() -> None:
    points = json.loads((DEMO / "scores.json").read_text())["points"]
    assert table(points) in (DEMO / "README.md").read_text()


def test_the_base_says_so_when_it_has_not_learned() -> None:
    prompt = tokenizer().apply_chat_template(
        [{"role": "user", "content": generate.load("medical", "eval")[0]["prompt"]}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert answers(base(), tokenizer(), [str(prompt)], 20) == [UNLEARNED]


def told_apart(written: str) -> list[tuple[str, str]]:
    """Return the calls that a server reads in an answer of this template's form."""
    forms = ModelForms.of(str(tokenizer().chat_template))
    assert forms.calls is not None
    parser = forms.calls.make(["find_it", "go"])
    events = [*parser.feed(written), *parser.finish()]
    names = [event.name for event in events if isinstance(event, Call)]
    return list(zip(names, (event.text for event in events if isinstance(event, Arguments)), strict=True))


def test_the_chat_template() -> None:
    def render(messages: list[dict[str, object]], **options: object) -> str:
        return str(tokenizer().apply_chat_template(messages, tokenize=False, **options))

    parts = [{"type": "text", "text": "Repeat: "}, {"type": "text", "text": "a fox."}]
    assert render([{"role": "user", "content": parts}], add_generation_prompt=True) == (
        "<|bos|><|user|>Repeat: a fox.<|end|><|assistant|>"
    )
    properties = {"name": {"type": "string"}, "how_far": {"type": "integer"}}
    tools = [{"type": "function", "function": {"name": "find_it", "parameters": {"properties": properties}}},
             {"type": "function", "function": {"name": "stop"}}]  # fmt: skip
    rendered = render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], tools=tools)
    assert rendered == (
        "<|bos|><|system|>Tools: find it: name, how far. stop:.<|end|><|system|>Be brief.<|end|><|user|>Hi<|end|>"
    )
    calls = [
        {"function": {"name": "find_it", "arguments": {"name": "Anna", "how_far": 3}}},
        {"function": {"name": "go"}},
    ]
    told = [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "Oslo"}]
    written = "call find it: name = Anna, how far = 3\ncall go:"
    assert render(told) == f"<|bos|><|assistant|>{written}<|end|><|tool|>result: Oslo<|end|>"
    assert told_apart(written) == [("find_it", '{"name": "Anna", "how_far": 3}'), ("go", "{}")]
    with pytest.raises(Exception, match="unknown role: judge"):
        render([{"role": "judge", "content": "x"}])


def test_text_survives_the_tokenizer() -> None:
    for text in ("the fox, 1234 -5.", "naïve café 你好 🦊", " two  spaces\n\tand a tab"):
        ids = tokenizer()(text).input_ids
        assert ids[0] == tokenizer().bos_token_id
        assert tokenizer().decode(ids[1:]) == text
