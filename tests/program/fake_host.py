"""A model in this process without weights: the real scheduler over FakeRunner, and a tokenizer of one token a letter.
The answer to a prompt is a function of its tokens and its adapter alone, and FakeRunner checks every KV that is read.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

from inlaid.config import CacheConfig, EngineConfig, SchedulerConfig
from inlaid.engine.engine import make_engine
from inlaid.llm import RequestLoop
from inlaid.text.encoder import RequestEncoder
from inlaid.text.literal import SpecialTokens
from tests.engine.fake_runner import EOS, VOCABULARY, FakeAdapters, FakeRunner

LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789.,:;!?<>[]{}"
BLOCK = 4


class FakeTemplate:
    """A chat template: a letter for the role, the content, and an end."""

    exists = True

    def render(self, messages: Sequence[dict[str, Any]], tools: Any = None, options: Any = None) -> str:
        return "".join(f"<{message['role'][0]}>{message['content']}!" for message in messages) + "<a>"


class FakeTokenizer:
    """One token a letter; capitals lose their size."""

    template = FakeTemplate()
    max_token_bytes = 1
    special_tokens = SpecialTokens(())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [max(0, LETTERS.find(letter)) for letter in text.lower()]

    def encode_literally(self, text: str, stand_ins: object, add_special_tokens: bool) -> list[int]:
        return self.encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(LETTERS[token] if token < len(LETTERS) else "~" for token in ids)


class FakeHost:
    """The model in this process, as far as a program needs it."""

    def __init__(
        self,
        num_blocks: int = 400,
        max_model_len: int = 600,
        slots: int = 100,
        overlap: bool = False,
        adapters: tuple[str, ...] = ("a", "b", "c"),
        **scheduler: Any,
    ) -> None:
        self.runner = FakeRunner(BLOCK, overlap)
        self.directory = FakeAdapters(adapters, slots, load=1)
        config = EngineConfig(scheduler=SchedulerConfig(**scheduler), cache=CacheConfig(block_size=BLOCK))
        self.engine = make_engine(
            config,
            self.runner,
            time.monotonic,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            adapters=self.directory,
            eos_ids={EOS},
        )
        tokenizer: Any = FakeTokenizer()
        self.encoder = RequestEncoder(tokenizer, VOCABULARY, max_model_len)
        self.block_size = BLOCK
        self.requests = RequestLoop(self.engine, tokenizer)
        self.ids = map(str, itertools.count())

    @property
    def adapters(self) -> tuple[str, ...]:
        return self.directory.names

    def check_idle(self) -> None:
        """Assert that nothing is left behind."""
        while self.engine.has_work:
            self.engine.step()
        self.engine.scheduler.check_whole()
        self.directory.check_idle()
        assert self.engine.stats()["kv_blocks_used"] == 0
        assert self.engine.stats()["running"] == self.engine.stats()["waiting"] == 0
