"""The runner of a GPU: steps as replayed CUDA graphs, one step ahead of the host.

`submit` writes a step's metadata into pinned memory, sends it, replays the graph of the smallest layout that holds the
step, and returns; the sampled tokens travel back while the next step is being made, and `collect` waits for them. A
token that the host has not seen yet is taken from the device (`DeviceStep.newest`), so steps never wait for the host.

There are graphs for steps of decodes only and for steps with prompts, each without adapters, with adapters on the
attention's linears, and with adapters anywhere. Steps that fit none, and engines without graphs, run the same kernels
one by one. What the sampling kernels do not offer (penalties, grammars, log probabilities) is done by layers/sampler.py
on the logits that the graph leaves behind.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from inlaid.adapters.store import AdapterStore
from inlaid.config import ConfigError, EngineConfig, SpeculationConfig
from inlaid.engine.kv_cache import BlockPool
from inlaid.engine.request import Batch, Request, StepResult, TokenLogprobs, Work
from inlaid.engine.speculation import resolved
from inlaid.kernels import fused_triton
from inlaid.kernels.arriving import Arriving
from inlaid.kernels.auto import AutoLinear
from inlaid.kernels.backend import MODULES
from inlaid.kernels.context import ALL_ADAPTERS, ATTENTION_ADAPTERS, NO_ADAPTERS, VOCABULARY_ADAPTERS
from inlaid.kernels.verify_triton import MAX_QUERIES
from inlaid.kernels.vocabulary import Vocabulary, head_of
from inlaid.layers import sampler
from inlaid.model.kv import KVCache, KVLayout
from inlaid.model.transformer import Transformer
from inlaid.runner.decode import finish_decode
from inlaid.runner.device_step import DeviceStep
from inlaid.runner.graphs import Graphs
from inlaid.runner.layout import ALIGNMENT, Layouts
from inlaid.runner.memory import count_blocks
from inlaid.runner.rows import Rows
from inlaid.runner.sampling import SamplingState, folded, is_penalized, not_finite, to_sampled
from inlaid.runner.staging import StagedStep, Staging
from inlaid.runner.unified import floor_blocks, unify

log = logging.getLogger(__name__)

STAGES = 4  # metadata and results of so many steps may be under way
TABLE_UPDATES = 1 << 16  # new KV blocks told to the device in one go


@dataclass
class Ticket:
    """A submitted step."""

    works: list[Work]  # those that sample, in the order of the device's rows
    lines: Sequence[Work]  # a work for each token sampled
    order: list[int]  # where each of them stands among the batch's sampling works
    tokens: torch.Tensor  # pinned; valid once `done` has happened
    done: torch.cuda.Event | None
    logprobs: sampler.Logprobs | None = None
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)

    def wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()


class CudaRunner:
    """A model on a GPU, its KV pages, its adapters."""

    overlap = True

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
        adapters: AdapterStore,
        progress: bool = True,
        arriving: Arriving | None = None,
        settle: Callable[[], object] = lambda: None,
    ) -> None:
        """Compile, make the KV cache, capture. `settle` returns when no other thread uses the device any more."""
        self.model, self.device, self.dtype = model, device, dtype
        self._captured = model  # the model that the graphs replay
        self.adapters, self.arriving = adapters, arriving
        self.block_size = config.cache.block_size
        max_rows = config.scheduler.max_num_seqs
        max_tokens = max(config.scheduler.max_num_batched_tokens, max_rows)
        max_blocks = -(-max_model_len // self.block_size)
        self._on_gpu = device.type == "cuda"
        max_queries = draft_tokens(config.speculation)
        decode = finish_decode(model, config, max_model_len)
        longest = {} if decode is None else decode.longest
        self.layouts = Layouts(max_tokens, max_rows, adapters.pages.table.shape[0] - 1, max_queries, longest)
        meta_size = self.layouts.largest.size + 2 * TABLE_UPDATES
        max_rank = config.adapters.max_lora_rank
        self.step = DeviceStep(
            model, max_tokens, max_rows, max_blocks, max_rank, meta_size, device, dtype, max(1, max_queries), decode
        )
        self._staged = [self._pinned(meta_size) for _ in range(STAGES)]
        self._results = [self._pinned(max_rows) for _ in range(STAGES)]
        self.sampling = SamplingState(model.spec.vocab_size, device, config.seed)
        self.rows = Rows(max_rows, max_blocks, self.block_size, self.sampling.key)
        self._levels: dict[str, int] = {}  # adapter identity -> which graphs it needs
        self._previous: Ticket | None = None
        self._num_submitted = 0
        self.num_eager_steps = 0
        captured = self.layouts.captured() if self._on_gpu and not config.enforce_eager else []
        self.graphs = Graphs(self.step, self.layouts, captured, progress)
        self._start(config, max_model_len, settle)
        self.staging = Staging(self.layouts, self.rows, self._slot, self._level, self.stride)

    # Start-up.

    def _start(self, config: EngineConfig, max_model_len: int, settle: Callable[[], object]) -> None:
        """Compile everything on a cache of two blocks, give the KV what memory is left, capture the graphs."""
        begin = time.monotonic()
        layout = KVLayout.of(self.model.spec, config.cache, self.dtype)
        self.step.set_cache(layout.pages(2, self.device))
        with torch.inference_mode():
            self.graphs.compile_kernels()
            compiled = time.monotonic()
            settle()
            settled = time.monotonic()
            if self._on_gpu:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            self.num_blocks, self.cache, self.stride, self.pool = self._make_cache(config, layout, max_model_len)
            self.step.set_cache(self.cache)
            self.graphs.capture()
            if self.arriving is not None and len(self.graphs):
                self.arriving.patience = self.graphs.seconds_without_graph()
                log.info("adapters that come in %.0f ms are waited for whole", self.arriving.patience * 1e3)
        for backend in self.model.kernels.quantized:
            if isinstance(backend, AutoLinear):
                for line in backend.report():
                    log.info("linear kernels: %s", line)
        log.info(
            "start-up: kernels of %d layouts warm in %.1f s, %.1f s for adapters still being read, %d graphs captured "
            "in %.1f s, %d KV blocks", len(self.graphs.captured), compiled - begin, settled - compiled,
            len(self.graphs), time.monotonic() - settled, self.num_blocks,
        )  # fmt: skip

    def _make_cache(
        self, config: EngineConfig, layout: KVLayout, max_model_len: int
    ) -> tuple[int, KVCache, int, BlockPool | None]:
        """Return the number of KV blocks, their tensors, the stride of a block, and the pool where memory is shared."""
        unified = config.cache.unified_memory
        floor = floor_blocks(self.adapters, layout) if unified else 0
        num_blocks = count_blocks(config, layout, self.device, max_model_len, floor)
        if unified:
            shared = unify(layout, config.cache, num_blocks, max_model_len, self.adapters, self.device)
            return num_blocks, shared.cache, shared.stride, shared.pool
        return num_blocks, layout.pages(num_blocks, self.device), 1, None

    # A step.

    def submit(self, batch: Batch) -> Ticket:
        for request_id in batch.released:
            self.rows.release(request_id)
            self.sampling.forget(request_id)
        step = self.staging.lay_out(batch.works, captured=len(self.graphs) > 0)
        stage = self._num_submitted % STAGES
        self._num_submitted += 1
        host = self._staged[stage]
        self.staging.write(step, host.numpy())
        with torch.inference_mode():
            self._send_tables(step, host)
            self.step.meta[: step.layout.size].copy_(host[: step.layout.size], non_blocking=True)
            ticket = self._compute(step, stage)
        self._previous = ticket
        return ticket

    def collect(self, ticket: Ticket) -> StepResult:
        ticket.wait()
        made = to_sampled(ticket.lines, ticket.tokens, ticket.logprobs)
        if ticket.lines is not ticket.works:
            made = folded(ticket.works, made)
        sampled: list[Any] = [None] * len(made)
        for place, one in zip(ticket.order, made, strict=True):
            sampled[place] = one
        void = not_finite(ticket.works, made, ticket.prompt_logprobs)
        return StepResult(sampled, ticket.prompt_logprobs, void)

    @contextmanager
    def on(self, model: Transformer) -> Iterator[None]:
        """Compute with another model of the same shape, kernel by kernel, while the body runs. Graphs hold the
        addresses of the runner's own model."""
        own, self.model, self.step.model = self.model, model, model
        try:
            yield
        finally:
            self.model = self.step.model = own

    def _compute(self, step: StagedStep, stage: int) -> Ticket:
        """Replay the step's graph, or run it kernel by kernel where it has none or wants more than tokens."""
        arriving = self._arriving_in(step)
        wants_prompt = any(w.request.params.prompt_logprobs is not None for w in step.prompts + step.singles)
        eager = arriving is not None or wants_prompt or self.model is not self._captured
        graph = None if eager else self.graphs.find(step.layout, step.adapters)
        prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        if graph is not None:
            graph.replay()
        else:
            self.num_eager_steps += 1
            prompt_logprobs = self._run_eagerly(step, arriving, wants_prompt)
        special = any(self._is_special(work) for work in step.lines)
        logprobs = self._sample_specially(step.lines) if special else None
        count = len(step.lines)
        tokens = self._results[stage][:count]
        tokens.copy_(self.step.sampled[:count], non_blocking=True)
        done = None
        if self._on_gpu:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return Ticket(step.sampling, step.lines, step.order, tokens, done, logprobs, prompt_logprobs)

    def _run_eagerly(
        self, step: StagedStep, arriving: Arriving | None, wants_prompt: bool
    ) -> dict[str, list[TokenLogprobs]]:
        """Run the step kernel by kernel; return the log probabilities of prompts where they are wanted."""
        context = self.step.context(step.layout, step.adapters, arriving)
        works = [*step.singles, *step.prompts]
        if step.adapters == VOCABULARY_ADAPTERS and context.on_device is not None:
            changes = self.adapters.vocabulary(self._slot(work.request) for work in works)
            context.vocabulary = Vocabulary(changes, context.on_device.adapter_slots_T)
        last = self.step.forward(step.layout, context)
        self.step.sample(step.layout, context, last)
        if not wants_prompt:
            return {}
        hidden_TD = self.model.hidden(last, self.step.workspace)
        heads = [head_of(context.vocabulary, self._slot(work.request)) for work in works]
        return self.sampling.prompt_logprobs(self.model, works, hidden_TD, heads)

    def _arriving_in(self, step: StagedStep) -> Arriving | None:
        """Return adapters that are still coming, where a step with prompts asks for them layer by layer. Decodes, which
        are short, wait for all of them, on the device, and so do prompts where that is quicker than launching every
        kernel."""
        arriving = self.arriving
        if arriving is None or not step.adapters or not arriving.plan(self._slots_of(step)):
            return None
        if step.prompts and not arriving.is_soon_whole():
            return arriving
        arriving.wait_for_all()
        return None

    def _slots_of(self, step: StagedStep) -> list[int]:
        """Return the adapter slots in a step."""
        return [self._slot(work.request) for work in (*step.singles, *step.prompts)]

    def _is_special(self, work: Work) -> bool:
        """Return whether the sampling kernels do not suffice."""
        request, params = work.request, work.request.params
        if self.rows.params.special[self.rows.of[request.id]]:
            return True
        return params.min_tokens > work.start + work.num_tokens - request.num_prompt

    def _sample_specially(self, works: Sequence[Work]) -> sampler.Logprobs | None:
        """Sample from the step's logits with layers/sampler.py, in the place of what the kernels sampled."""
        batch = self.sampling.batch(works, self._unseen_tokens(works))
        tokens_S, logprobs = sampler.sample(self.step.logits(len(works)).float(), batch)
        self.step.sampled[: len(works)].copy_(tokens_S)
        padding = self.layouts.max_rows
        held = [padding if work.draft else self.rows.of[work.request.id] for work in works]
        rows = torch.from_numpy(np.array(held)).to(self.device)
        self.step.newest.index_copy_(0, rows, tokens_S.clamp_min(0).to(torch.int32))  # the next step may read it
        return logprobs

    def _unseen_tokens(self, works: Sequence[Work]) -> Mapping[str, int]:
        """Return tokens of the step before that penalties must count and the engine has not been told of yet."""
        penalized = any(is_penalized(work.request.params) for work in works)
        previous = self._previous
        if not penalized or previous is None:
            return {}
        previous.wait()
        tokens = previous.tokens.tolist()
        found = {work.request.id: max(0, token) for work, token in zip(previous.lines, tokens, strict=True)}
        return {w.request.id: found[w.request.id] for w in works if _in_flight(w) and w.request.id in found}

    def _send_tables(self, step: StagedStep, host: torch.Tensor) -> None:
        """Write new blocks into the device's tables, before the step reads them."""
        places, values = step.updates
        begin = host.numel() - 2 * TABLE_UPDATES
        flat, meta = host.numpy(), self.step.meta
        for start in range(0, len(places), TABLE_UPDATES):
            if start and self._on_gpu:
                torch.cuda.synchronize()  # the buffer is still being read; only enormous prefix hits come here
            count = len(places[start : start + TABLE_UPDATES])
            room = -(-count // ALIGNMENT) * ALIGNMENT
            flat[begin : begin + count] = places[start : start + count]
            flat[begin + room : begin + room + count] = values[start : start + count]
            meta[begin : begin + 2 * room].copy_(host[begin : begin + 2 * room], non_blocking=True)
            fused_triton.scatter(
                self.step.tables, meta[begin : begin + count], meta[begin + room : begin + room + count]
            )

    def _slot(self, request: Request) -> int:
        return self.adapters.slot(request.adapter)

    def _level(self, request: Request) -> int:
        """Return which linears a request's adapter is on."""
        identity = request.adapter
        if identity is None:
            return NO_ADAPTERS
        if identity not in self._levels:
            sites = self.adapters.sites(identity)
            attention_only = all(site % len(MODULES) < 4 for site in sites)
            linears = ATTENTION_ADAPTERS if attention_only else ALL_ADAPTERS
            self._levels[identity] = VOCABULARY_ADAPTERS if min(sites) < 0 else linears
        return self._levels[identity]

    def _pinned(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, pin_memory=self._on_gpu)


def draft_tokens(config: SpeculationConfig) -> int:
    """Return the most tokens of a decode with its draft; 0: no drafts are made. ConfigError: more than are served."""
    settled = resolved(config)
    if settled.speculation == "off":
        return 0
    if settled.num_speculative_tokens >= MAX_QUERIES:
        raise ConfigError(
            f"--num-speculative-tokens {settled.num_speculative_tokens}: on a GPU give at most {MAX_QUERIES - 1}"
        )
    return settled.num_speculative_tokens + 1


def _in_flight(work: Work) -> bool:
    return work.start + work.num_tokens - len(work.draft) > len(work.request.tokens)
