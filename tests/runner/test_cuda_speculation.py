"""Drafts checked by the GPU's runner, without a GPU in Triton's interpreter: tokens are those of plain decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from inlaid.config import ConfigError, SpeculationConfig
from inlaid.engine.account import Account
from inlaid.engine.request import Request, SamplingParams, Work
from inlaid.engine.speculation import Speculation
from inlaid.runner.cuda_runner import draft_tokens
from inlaid.runner.layout import Layouts
from inlaid.runner.rows import Rows
from inlaid.runner.staging import Staging
from tests.oracle.oracle import ask, serve
from tests.runner.test_cuda_runner import DEVICE, Bench, few_programs
from tests.runner.test_speculation import Remembered

__all__ = ["few_programs"]  # a fixture that every test here uses
TOKENS = 4 if DEVICE.type == "cpu" else 24
CONFIG = SpeculationConfig(speculation="suffix", num_speculative_tokens=3, speculation_length="fixed")


def test_answers_with_drafts_are_those_without(tmp_path: Path) -> None:
    """Adapters and none, greedy, drawn and penalized; every second token is guessed wrong."""
    bench = Bench(tmp_path, "llama-bias")
    prompt = [7, 8, 9, 7, 8]
    requests = [
        ask("r0", prompt, "a0", max_tokens=TOKENS, logprobs=None),
        ask("r1", prompt[1:], None, max_tokens=TOKENS, logprobs=None, temperature=1.0, seed=3, frequency_penalty=1.0),
    ]
    engine, _ = bench.engine()
    plain = {name: answer.tokens for name, answer in serve(engine, requests).items()}
    engine, _ = bench.engine(speculation=CONFIG)
    speculation = Speculation(CONFIG, Remembered(plain, 2))
    engine.scheduler.state.speculation = speculation
    fast = {name: answer.tokens for name, answer in serve(engine, requests).items()}
    assert fast == plain
    assert speculation.total.accepted > 0
    assert speculation.total.accepted < speculation.total.guesses


def request(name: str, tokens: list[int], num_prompt: int) -> Request:
    return Request(
        id=name, prompt=tokens[:num_prompt], params=SamplingParams(), adapter=None, adapter_name=None,
        account=Account("", 0), arrival=0.0, tokens=tokens, blocks=[1, 2, 3, 4],
    )  # fmt: skip


def test_a_step_with_drafts_is_laid_out_as_prefills_of_few_tokens() -> None:
    layouts = Layouts(64, 16, 4, max_queries=4)
    rows = Rows(16, 4, 4, lambda request: 5)
    staging = Staging(layouts, rows, lambda request: 0, lambda request: 0, 1)
    single, drafted = request("s", [1, 2, 3], 2), request("d", [4, 5, 6, 7, 8], 2)
    step = staging.lay_out([Work(single, 2, 1, True), Work(drafted, 4, 3, True, draft=(11, 12))], captured=True)
    layout = step.layout
    assert (layout.decodes, layout.prefills, layout.tokens, layout.queries, layout.tiles) == (0, 2, 4, 4, 0)
    assert layout in layouts.captured()
    host = np.zeros(layout.size, np.int32)
    staging.write(step, host)

    def piece(name: str) -> list[int]:
        return host[layout.slice(name)].tolist()

    assert piece("ids") == [3, 8, 11, 12]
    assert piece("positions") == [2, 4, 5, 6]
    assert piece("starts") == [0, 1, 4]
    assert piece("lengths") == [3, 7]
    assert piece("leaders") == [0, 1, 1, 1]
    assert piece("token_rows") == [rows.of["s"], *[rows.of["d"]] * 3]
    assert piece("logit_rows") == [0, 1, 2, 3]
    assert piece("drawn_at") == [3, 5, 6, 7]
    assert piece("rows") == [rows.of["s"], 16, 16, 16], "the host tells the newest token of a request with a draft"


def test_padding_of_a_step_with_drafts_follows_no_sequence() -> None:
    layouts, works = Layouts(64, 16, 4, max_queries=4), [Work(request("d", [1, 2, 3], 2), 2, 3, True, draft=(5, 6))]
    rows = Rows(16, 4, 4, lambda request: 5)
    staging = Staging(layouts, rows, lambda request: 0, lambda request: 0, 1)
    step = staging.lay_out(works, captured=True)
    host = np.zeros(step.layout.size, np.int32)
    staging.write(step, host)
    assert step.layout.tokens == 4
    assert host[step.layout.slice("leaders")].tolist() == [0, 0, 0, 3]
    assert host[step.layout.slice("token_rows")].tolist() == [rows.of["d"]] * 3 + [16]


def test_without_drafts_no_layout_is_captured_for_them() -> None:
    assert not any(layout.queries for layout in Layouts(64, 16, 4).captured())
    assert draft_tokens(SpeculationConfig()) == 0
    with pytest.raises(ConfigError, match="at most 15"):
        draft_tokens(SpeculationConfig(speculation="ngram", num_speculative_tokens=16))


@pytest.mark.parametrize("sequences", [1, 3, 9])
def test_captured_layouts_hold_no_more_tokens_than_a_step_samples(sequences: int) -> None:
    layouts = Layouts(64, 16, 4, max_queries=4)
    works = [Work(request(str(i), [1, 2, 3], 2), 2, 2, True, draft=(5,)) for i in range(sequences)]
    layout = layouts.choose_drafts(works, 2 * sequences, captured=True)
    assert layout.samples >= 2 * sequences or 2 * sequences > 16
    assert all(one.samples <= 16 for one in layouts.captured())
