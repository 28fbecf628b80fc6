"""An engine on a fake runner and a clock that ticks once a step, checked against the oracle; for the engine's tests."""

from __future__ import annotations

import math
from typing import Any

from inlaid.config import CacheConfig, SchedulerConfig
from inlaid.engine.engine import Engine
from inlaid.engine.policy import Lengths
from inlaid.engine.request import FinishReason, NewRequest, Output, SamplingParams
from inlaid.engine.scheduler import Scheduler
from inlaid.engine.speculation import Speculation
from tests.engine.fake_runner import EOS, FakeAdapters, FakeRunner, generate

ADAPTERS = ("a", "b", "c", "d")


class Bench:
    """An engine on a fake runner and a clock that ticks once a step."""

    def __init__(
        self,
        num_blocks: int = 100,
        block_size: int = 4,
        max_model_len: int = 64,
        overlap: bool = False,
        adapters: FakeAdapters | None = None,
        cache: dict[str, Any] | None = None,
        lengths: Lengths | None = None,
        max_adapter_wait: float = math.inf,
        speculation: Speculation | None = None,
        **config: Any,
    ) -> None:
        self.time = 0.0
        self.adapters = adapters or FakeAdapters(ADAPTERS)
        scheduler = SchedulerConfig(**{"max_num_batched_tokens": 16, "max_num_seqs": 8, **config})
        self.runner = FakeRunner(block_size, overlap, scheduler.max_num_batched_tokens)
        self.scheduler = Scheduler(
            scheduler,
            CacheConfig(block_size=block_size, **(cache or {})),
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            adapters=self.adapters,
            eos_ids=(EOS,),
            lengths=lengths,
            max_adapter_wait=max_adapter_wait,
            speculation=speculation,
        )
        self.engine = Engine(self.scheduler, self.runner, lambda: self.time)
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, Output] = {}
        self.firsts: dict[str, Output] = {}
        self.wanted: dict[str, NewRequest] = {}

    def add(self, id: str, prompt: list[int], adapter: str | None = None, tenant: str = "", **params: Any) -> None:
        priority = params.pop("priority", 0)
        deadline = params.pop("deadline", None)
        true_output_len = params.pop("true_output_len", None)
        may_speculate = params.pop("speculation", True)
        new = NewRequest(
            id=id,
            prompt=prompt,
            params=SamplingParams(**params),
            adapter=adapter,
            tenant=tenant,
            priority=priority,
            deadline=deadline,
            true_output_len=true_output_len,
            speculation=may_speculate,
        )
        self.engine.add(new)
        self.wanted[id] = new
        self.tokens[id] = []

    def step(self) -> list[Output]:
        self.time += 1.0
        outputs = self.engine.step()
        for output in outputs:
            assert output.id not in self.ends, "an output after the end"
            self.firsts.setdefault(output.id, output)
            self.tokens[output.id] += output.tokens
            if output.finish_reason is not None:
                self.ends[output.id] = output
        self.scheduler.check_whole()
        return outputs

    def run(self, max_steps: int = 2000) -> Bench:
        steps = 0
        while self.engine.has_work:
            self.step()
            steps += 1
            assert steps < max_steps, "the engine makes no progress"
        return self

    def expected(self, id: str) -> list[int]:
        new = self.wanted[id]
        stop = frozenset(new.params.stop_token_ids) | (frozenset() if new.params.ignore_eos else {EOS})
        count = min(new.params.max_tokens, self.scheduler.max_model_len - len(new.prompt))
        return generate(new.prompt, new.adapter, count, stop)

    def check_all(self) -> None:
        for id, new in self.wanted.items():
            reason = self.ends[id].finish_reason
            if reason in (FinishReason.ABORT, FinishReason.ERROR):
                assert self.tokens[id] == self.expected(id)[: len(self.tokens[id])]
                continue
            assert self.tokens[id] == self.expected(id), id
            stopped = self.tokens[id][-1:] == [EOS] and not new.params.ignore_eos
            assert reason == (FinishReason.STOP if stopped else FinishReason.LENGTH) or new.params.stop_token_ids
        assert not self.scheduler.num_running
        assert self.scheduler.num_waiting == 0
        assert self.scheduler.pool.num_available == self.scheduler.pool.capacity
        self.adapters.check_idle()
