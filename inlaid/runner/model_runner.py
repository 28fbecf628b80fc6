"""The eager runner: takes a Batch, computes it, answers a StepResult. The engine drives it through the Runner protocol.
It runs on a CPU or any torch device, one step at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from inlaid.adapters.store import AdapterStore
from inlaid.engine.kv_cache import BlockPool
from inlaid.engine.request import Batch, Request, Sampled, StepResult, TokenLogprobs, Work
from inlaid.kernels.arriving import Arriving
from inlaid.kernels.timed import StepSplit
from inlaid.kernels.vocabulary import Vocabulary, head_of
from inlaid.kernels.workspace import FreshMemory
from inlaid.kv_format import AUTO, KVFormat
from inlaid.layers import sampler
from inlaid.model.kv import KVLayout
from inlaid.model.transformer import Transformer
from inlaid.runner.eager_step import EagerStep
from inlaid.runner.sampling import SamplingState, folded, lines, not_finite, scored_pieces, to_sampled
from inlaid.runner.unified import Unified


class Members(Protocol):
    """The other members of the group whose lead this runner is."""

    def step(self, step: EagerStep) -> AbstractContextManager[None]:
        """Let them compute a step beside the body. If the body raises, none of them waits for the rest of it."""
        ...


class ModelRunner:
    """A model, its KV pages, its adapters."""

    overlap = False

    def __init__(
        self,
        model: Transformer,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        adapters: AdapterStore | None = None,
        seed: int = 0,
        unified: Unified | None = None,
        arriving: Arriving | None = None,
        split: StepSplit | None = None,
        kv: KVFormat = AUTO,
        members: Members | None = None,
    ) -> None:
        """Make the KV cache too, in the form `kv`, unless `unified` brings it. With `members` the model is the lead's
        shard."""
        self.model = model
        self.split = split  # of the time of steps; None: it cannot be measured here
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.adapters = adapters
        self.arriving = arriving
        self.members = members
        layout = KVLayout(model.spec, block_size, dtype, kv)
        self.cache = layout.pages(num_blocks, device) if unified is None else unified.cache
        self.stride = 1 if unified is None else unified.stride  # a block's number in the caches, by the scheduler's
        self.pool: BlockPool | None = None if unified is None else unified.pool  # where adapters share the memory
        self.sampling = SamplingState(model.spec.vocab_size, device, seed)
        self._workspace = FreshMemory(device, dtype)
        self._decodes: list[tuple[Request, int, int, int]] = []  # of the step before: start, tokens, preemptions

    def submit(self, batch: Batch) -> StepResult:
        """Compute the whole step; collect hands it out."""
        for request_id in batch.released:
            self.sampling.forget(request_id)
        with torch.inference_mode(), nullcontext() if self.split is None else self.split.step():
            return self._run_drafts(batch.works) if any(w.draft for w in batch.works) else self._run(batch.works)

    def collect(self, ticket: StepResult) -> StepResult:
        return ticket

    @contextmanager
    def on(self, model: Transformer) -> Iterator[None]:
        """Compute with another model of the same shape while the body runs."""
        own, self.model = self.model, model
        try:
            yield
        finally:
            self.model = own

    def _run_drafts(self, works: Sequence[Work]) -> StepResult:
        """Run a step with drafts. Its decodes stand in the order of the step before, whoever has a draft, so that
        attention keeps what it has gathered of them."""
        count = _num_decodes(works)
        places = {request.id: place for place, (request, *_) in enumerate(self._decodes)}
        first = sorted(works[:count], key=lambda work: places.get(work.request.id, count))
        result = self._run([*first, *works[count:]])
        sampling = [work.request.id for work in (*first, *works[count:]) if work.samples]
        of = dict(zip(sampling, result.sampled, strict=True))
        return replace(result, sampled=[of[work.request.id] for work in works if work.samples])

    def _run(self, works: Sequence[Work]) -> StepResult:
        step, model, memory = self.lay_out(works), self.model, self._workspace
        with nullcontext() if self.members is None else self.members.step(step):
            context = step.context(self.block_size, self.device, self._arriving_in(step))
            context.vocabulary = self._vocabulary(step)
            last = model.forward(context, self.cache, memory)
            sampling = [work for work in works if work.samples]
            sampled: list[Sampled] = []
            if sampling:
                each = lines(sampling)
                hidden_SD = model.hidden(last, memory, context.logit_rows_L)
                logits_SV = model.logits(hidden_SD, memory)
                if context.vocabulary is not None:
                    context.vocabulary.head(hidden_SD, logits_SV, context.logit_rows_L)
                tokens_S, logprobs = sampler.sample(logits_SV.float(), self.sampling.batch(each))
                sampled = to_sampled(each, tokens_S, logprobs)
                if each is not sampling:
                    sampled = folded(sampling, sampled)
            prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
            if any(work.request.params.prompt_logprobs is not None for work in works):
                heads = [head_of(context.vocabulary, self._slot(work.request)) for work in works]
                prompt_logprobs = self.sampling.prompt_logprobs(model, works, model.hidden(last, memory), heads)
        return StepResult(sampled, prompt_logprobs, not_finite(sampling, sampled, prompt_logprobs))

    def lay_out(self, works: Sequence[Work]) -> EagerStep:
        """Return the step's inputs on the host."""
        size = self.block_size
        lens = [work.start + work.num_tokens for work in works]
        table = np.zeros((len(works), -(-max(lens) // size)), dtype=np.int32)
        ids: list[int] = []
        for row, (work, length) in enumerate(zip(works, lens, strict=True)):
            num_blocks = -(-length // size)
            table[row, :num_blocks] = np.array(work.request.blocks[:num_blocks]) * self.stride
            ids += work.request.tokens[work.start : length]
            ids += work.draft
        query_lens = np.array([work.num_tokens for work in works], dtype=np.int32)
        starts = np.zeros(len(works) + 1, dtype=np.int32)
        np.cumsum(query_lens, out=starts[1:])
        rows = np.repeat(np.arange(len(works)), query_lens)
        first = np.fromiter((work.start for work in works), dtype=np.int64, count=len(works))
        positions = np.arange(len(ids)) - starts[rows] + first[rows]
        num_drafted = _num_decodes(works) if any(work.draft for work in works) else 0
        ends = [
            starts[row + 1] - 1 - back
            for row, work in enumerate(works)
            if work.samples
            for back in range(len(work.draft), -1, -1)
        ]
        return EagerStep(
            ids=np.array(ids, dtype=np.int64),
            positions=positions,
            kv_slots=table[rows, positions // size].astype(np.int64) * size + positions % size,
            table=table,
            context_lens=np.array(lens, dtype=np.int32),
            query_lens=query_lens,
            adapter_slots=np.array([self._slot(work.request) for work in works], dtype=np.int32),
            logit_rows=np.array(ends, dtype=np.int64),
            scored=np.array(scored_pieces(works), dtype=np.int64).reshape(-1, 2),
            num_decodes=0 if num_drafted else _num_decodes(works),
            num_drafted=num_drafted,
            decodes_go_on=self._decodes_go_on(works),
        )

    def _vocabulary(self, step: EagerStep) -> Vocabulary | None:
        """Return what the adapters of this step do to the embedding and the head."""
        changes = [] if self.adapters is None else self.adapters.vocabulary(step.adapter_slots.tolist())
        if not changes:
            return None
        slots = torch.from_numpy(np.repeat(step.adapter_slots, step.query_lens))
        return Vocabulary(changes, slots.to(self.device))

    def _arriving_in(self, step: EagerStep) -> Arriving | None:
        """Return the adapters of this step that are still coming. Data derived from a slot that is not whole does not
        hold in the next step."""
        arriving, store = self.arriving, self.adapters
        if arriving is None or store is None:
            return None
        versions = store.pages.versions
        for slot in range(1, len(versions)):
            if not arriving.arrivals.all_landed(slot):
                versions[slot] += 1
        return arriving if arriving.plan(step.adapter_slots.tolist()) else None

    def _decodes_go_on(self, works: Sequence[Work]) -> bool:
        """Remember this step's decodes; return whether they carry on those of the step before."""
        before, decodes = self._decodes, works[: _num_decodes(works)]
        self._decodes = [(w.request, w.start, w.num_tokens, w.request.num_preemptions) for w in decodes]
        return bool(decodes) and len(before) == len(decodes) and all(
            request is work.request and start < work.start <= start + count and preemptions == request.num_preemptions
            for work, (request, start, count, preemptions) in zip(decodes, before)
        )  # fmt: skip

    def _slot(self, request: Request) -> int:
        return 0 if self.adapters is None else self.adapters.slot(request.adapter)


def _num_decodes(works: Sequence[Work]) -> int:
    """Return how many works at the front have one token, or a draft."""
    return next((place for place, work in enumerate(works) if work.num_tokens > 1 and not work.draft), len(works))
