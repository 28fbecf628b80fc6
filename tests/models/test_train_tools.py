"""The adapter `tools`: its examples, a row of several that learns as each alone would, and what it was judged at."""

from __future__ import annotations

import itertools
import json
import random
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from data import tool_requests
from data.tool_requests import KINDS, TOOLS
from inlaid.text.tools.events import Arguments, Call
from inlaid.text.tools.word_schema import calls_pattern
from inlaid.text.tools.words import WordCalls
from models import train_tools

DEMO = train_tools.DEMO


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(DEMO / "base")
    return made


def requests(split: str, count: int) -> set[str]:
    groups = itertools.islice(tool_requests.groups(split, "0", 12), count)
    return {str(example.messages[0]["content"]) for _, examples in groups for example in examples}


def test_no_request_is_in_both_splits_and_every_kind_is_drawn() -> None:
    assert not requests("train", 60) & requests("eval", 20)
    assert {example.kind for _, example in train_tools.held_out(8)} == set(KINDS)


def test_calls_are_written_as_the_template_writes_them_and_as_the_server_reads_them() -> None:
    for name, tool in TOOLS.items():
        (menu, _), arguments = next(tool_requests.groups("train", name, 1)), tool.arguments(random.Random(0))
        written = tool_requests.written(name, arguments)
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        told = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        assert str(tokenizer().apply_chat_template(told, tools=menu.definitions, tokenize=False)).endswith(
            f"<|assistant|>{written}<|end|>"
        )
        parser = WordCalls([name])
        made, given = [*parser.feed(written), *parser.finish()]
        assert made == Call(0, name)
        assert isinstance(given, Arguments)
        assert json.loads(given.text) == arguments


def test_examples_of_one_row_do_not_see_each_other() -> None:
    base = LlamaForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    model = train_tools.adapted(base, seed=0)
    menu, examples = next(tool_requests.groups("train", "0", 3))
    with torch.no_grad():
        together = train_tools.loss_of(model, train_tools.pack(tokenizer(), menu, examples)).item()
        total, count = 0.0, 0
        for example in examples:
            prompt = train_tools.prompt(tokenizer(), menu, example) + example.begun
            start = len(tokenizer()(prompt, add_special_tokens=False).input_ids)
            ids = torch.tensor(tokenizer()(f"{prompt}{example.answer}<|end|>", add_special_tokens=False).input_ids)
            logits = model(input_ids=ids[None]).logits[0, start - 1 : -1]
            total += functional.cross_entropy(logits, ids[start:], reduction="sum").item()
            count += len(ids) - start
    assert together == pytest.approx(total / count, rel=1e-4)


def test_demanded_calls_are_those_of_the_servers_grammar() -> None:
    drawn = itertools.islice(tool_requests.groups("train", "0", 16), 20)
    demanded = [(menu, example) for menu, examples in drawn for example in examples if example.begun]
    assert {menu.form is not None and menu.form.within for menu, _ in demanded} >= {None, "tasks", False}
    for menu, example in demanded:
        pattern = calls_pattern({name: tool["function"]["parameters"] for name, tool in menu.tools.items()}, 1)
        assert pattern is not None
        assert re.fullmatch(pattern, example.begun + example.answer)


def test_a_tiny_run_writes_an_adapter_and_its_figures(tmp_path: Path) -> None:
    assert train_tools.main(["--output", str(tmp_path), "--steps", "1", "--held-out", "1"]) == 0
    assert {path.name for path in (tmp_path / "extra" / "tools").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert json.loads((tmp_path / "extra" / "tools.json").read_text())["examples"] == 16


def test_it_was_right_in_nine_held_out_requests_of_ten() -> None:
    held_out = json.loads((DEMO / "extra" / "tools.json").read_text())["held_out"]
    assert set(held_out) == set(KINDS)
    assert held_out.pop(tool_requests.DEMANDED)["right"] >= 0.7  # which of several to call is the hardest
    assert min(kind["right"] for kind in held_out.values()) >= 0.9
    assert sum(kind["asked"] for kind in held_out.values()) >= 150
