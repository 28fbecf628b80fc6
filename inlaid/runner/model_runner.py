"""The device's side of a step: takes a Batch, computes it, answers a StepResult. The engine drives it through the
Runner protocol. Eager, on a CPU or any torch device; one step at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from inlaid.adapters.store import AdapterStore
from inlaid.config import ConfigError, EngineConfig
from inlaid.engine.kv_cache import BlockPool
from inlaid.engine.request import Batch, Request, Sampled, SamplingParams, StepResult, TokenLogprobs, Work
from inlaid.kernels.context import StepContext
from inlaid.layers import sampler
from inlaid.layers.sampler import SamplingBatch, seed_key
from inlaid.model.spec import ModelSpec
from inlaid.model.transformer import Transformer, block_bytes, new_cache
from inlaid.runner.unified import Unified
from inlaid.text.grammar import completing, token_bits

_BAN = -1e9  # beyond any logit, yet above what must not be chosen at all
_PROMPT_LOGPROB_ROWS = 256  # rows of logits held at once for prompt logprobs


class ModelRunner:
    """A model, its KV pages, its adapters."""

    overlap = False
    stride = 1  # a block's number in the caches, by its number for the scheduler
    pool: BlockPool | None = None  # where adapters share the KV cache's memory

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
    ) -> None:
        self.model = model
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.adapters = adapters
        self.seed = seed
        self.cache = new_cache(model.spec, num_blocks, block_size, device, dtype) if unified is None else unified.cache
        self.stride = 1 if unified is None else unified.stride
        self.pool = None if unified is None else unified.pool
        self._decodes: list[tuple[Request, int, int]] = []  # of the step before: request, next start, preemptions
        self._keys: dict[str, int] = {}  # request id -> key of its noise
        self._counts: dict[str, _Counts] = {}

    def submit(self, batch: Batch) -> StepResult:
        """Compute the whole step; collect hands it out."""
        for request_id in batch.released:
            self._keys.pop(request_id, None)
            self._counts.pop(request_id, None)
        with torch.inference_mode():
            return self._run(batch.works)

    def collect(self, ticket: StepResult) -> StepResult:
        return ticket

    def _run(self, works: Sequence[Work]) -> StepResult:
        context, ids_T = self.context(works)
        self.model.plan(context)
        hidden_TD = self.model.forward(ids_T, self.cache, context)
        sampling = [work for work in works if work.samples]
        sampled: list[Sampled] = []
        if sampling:
            logits_SV = self.model.logits(hidden_TD, context.logit_rows_L)
            tokens_S, logprobs = sampler.sample(logits_SV, self.sampling_batch(sampling))
            sampled = _sampled(sampling, tokens_S, logprobs)
        return StepResult(sampled, self._prompt_logprobs(works, hidden_TD))

    def context(self, works: Sequence[Work]) -> tuple[StepContext, torch.Tensor]:
        """The step's metadata and its token ids."""
        size = self.block_size
        lens = [work.start + work.num_tokens for work in works]
        table = np.zeros((len(works), -(-max(lens) // size)), dtype=np.int32)
        ids: list[int] = []
        for row, (work, length) in enumerate(zip(works, lens, strict=True)):
            num_blocks = -(-length // size)
            table[row, :num_blocks] = np.array(work.request.blocks[:num_blocks]) * self.stride
            ids += work.request.tokens[work.start : length]
        query_lens = tuple(work.num_tokens for work in works)
        starts = np.zeros(len(works) + 1, dtype=np.int32)
        np.cumsum(query_lens, out=starts[1:])
        rows = np.repeat(np.arange(len(works)), query_lens)
        first = np.fromiter((work.start for work in works), dtype=np.int64, count=len(works))
        positions = np.arange(len(ids)) - starts[rows] + first[rows]
        slots = tuple(self._slot(work.request) for work in works)
        context = StepContext(
            positions_T=self._tensor(positions),
            kv_slots_T=self._tensor(table[rows, positions // size].astype(np.int64) * size + positions % size),
            block_tables_SB=self._tensor(table),
            context_lens_S=self._tensor(np.array(lens, dtype=np.int32)),
            query_starts_S1=self._tensor(starts),
            logit_rows_L=self._tensor(
                np.array([starts[row + 1] - 1 for row, work in enumerate(works) if work.samples], dtype=np.int64)
            ),
            adapter_slots_T=self._tensor(np.array(slots, dtype=np.int32)[rows]),
            block_size=size,
            num_decodes=next((row for row, n in enumerate(query_lens) if n > 1), len(works)),
            max_context_len=max(lens),
            query_lens=query_lens,
            context_lens=tuple(lens),
            adapter_slots=slots,
            has_adapters=any(slots),
            decodes_go_on=self._decodes_go_on(works),
        )
        return context, self._tensor(np.array(ids, dtype=np.int64))

    def _decodes_go_on(self, works: Sequence[Work]) -> bool:
        """Remembers this step's decodes; true when they carry on those of the step before."""
        singles = [work for work in works if work.num_tokens == 1]
        now = [(work.request, work.start, work.request.num_preemptions) for work in singles]
        carried_on = bool(now) and now == self._decodes
        self._decodes = [(request, start + 1, preemptions) for request, start, preemptions in now]
        return carried_on

    def sampling_batch(self, works: Sequence[Work]) -> SamplingBatch:
        """What these requests ask of the sampler, feature by feature."""
        params = [work.request.params for work in works]
        wanting = [row for row, p in enumerate(params) if p.logprobs is not None]
        drawing = [row for row, p in enumerate(params) if not p.greedy]
        return SamplingBatch(
            bias=self._bias(works),
            grammar=self._grammar(works),
            penalties=self._penalties(works),
            noise=self._noise(works, drawing) if drawing else None,
            truncation=self._truncation([params[row] for row in drawing]),
            logprob_rows=self._tensor(np.array(wanting)) if wanting else None,
            num_top=max((params[row].logprobs or 0 for row in wanting), default=0),
        )

    def _bias(self, works: Sequence[Work]) -> sampler.Coordinates | None:
        """logit_bias, a ban on what would complete a bad word, and -inf for what would end an output before
        min_tokens. A grammar may leave nothing but the end, so it overrules min_tokens, and so do allowed_token_ids
        that are all ends; both overrule bad words, whose ban is finite."""
        coordinates: list[tuple[int, int, float]] = []
        for row, work in enumerate(works):
            request, params = work.request, work.request.params
            coordinates += [(row, token, value) for token, value in params.logit_bias.items()]
            if params.bad_words:
                coordinates += [(row, token, _BAN) for token in completing(request.outputs, params.bad_words)]
            num_outputs = work.start + work.num_tokens - request.num_prompt
            if num_outputs < params.min_tokens and request.grammar is None:
                ends = request.stop_ids | frozenset(params.stop_token_ids)
                if not params.allowed_token_ids or not ends.issuperset(params.allowed_token_ids):
                    coordinates += [(row, token, -torch.inf) for token in ends]
        if not coordinates:
            return None
        rows, tokens, values = zip(*coordinates, strict=True)
        return sampler.Coordinates(
            self._tensor(np.array(rows)), self._tensor(np.array(tokens)), self._tensor(np.array(values, np.float32))
        )

    def _grammar(self, works: Sequence[Work]) -> sampler.GrammarMask | None:
        """The masks of grammars and of allowed_token_ids; a request has one or the other."""
        rows = [r for r, w in enumerate(works) if w.request.grammar is not None or w.request.params.allowed_token_ids]
        if not rows:
            return None
        bits = []
        for row in rows:
            request = works[row].request
            if request.grammar is not None:
                bits.append(request.grammar.mask(request.outputs))
            else:
                bits.append(token_bits(request.params.allowed_token_ids, self.model.spec.vocab_size))
        return sampler.GrammarMask(self._tensor(np.array(rows)), self._tensor(np.stack(bits)))

    def _penalties(self, works: Sequence[Work]) -> sampler.Penalties | None:
        rows = [row for row, work in enumerate(works) if _penalized(work.request.params)]
        if not rows:
            return None
        counts = [self._counts_of(works[row].request) for row in rows]
        params = [works[row].request.params for row in rows]
        return sampler.Penalties(
            rows=self._tensor(np.array(rows)),
            repetition=self._floats([p.repetition_penalty for p in params]),
            frequency=self._floats([p.frequency_penalty for p in params]),
            presence=self._floats([p.presence_penalty for p in params]),
            output_counts_PV=torch.stack([count.outputs_V for count in counts]),
            prompt_seen_PV=torch.stack([count.prompt_V for count in counts]),
        )

    def _counts_of(self, request: Request) -> _Counts:
        """Brought up to the request's outputs."""
        if request.id not in self._counts:
            self._counts[request.id] = _Counts.of(request.prompt, self.model.spec.vocab_size, self.device)
        counts = self._counts[request.id]
        counts.add(request.tokens[request.num_prompt + counts.num_added :])
        return counts

    def _noise(self, works: Sequence[Work], rows: list[int]) -> sampler.Noise:
        chosen = [works[row] for row in rows]
        return sampler.Noise(
            rows=self._tensor(np.array(rows)),
            temperature=self._floats([work.request.params.temperature for work in chosen]),
            keys=self._tensor(np.array([self._key(work.request) for work in chosen], dtype=np.int64)),
            positions=self._tensor(np.array([work.start + work.num_tokens for work in chosen], dtype=np.int64)),
        )

    def _key(self, request: Request) -> int:
        if request.id not in self._keys:
            seed = request.params.seed
            if seed is None:
                digest = hashlib.blake2b(f"{self.seed}:{request.id}".encode(), digest_size=8).digest()
                seed = int.from_bytes(digest, "little")
            self._keys[request.id] = seed_key(seed)
        return self._keys[request.id]

    def _truncation(self, drawing: Sequence[SamplingParams]) -> sampler.Truncation | None:
        rows = [row for row, p in enumerate(drawing) if p.top_p < 1 or p.top_k > 0 or p.min_p > 0]
        if not rows:
            return None
        return sampler.Truncation(
            rows=self._tensor(np.array(rows)),
            top_k=self._tensor(np.array([max(0, drawing[row].top_k) for row in rows])),
            top_p=self._floats([drawing[row].top_p for row in rows]),
            min_p=self._floats([drawing[row].min_p for row in rows]),
        )

    def _prompt_logprobs(self, works: Sequence[Work], hidden_TD: torch.Tensor) -> dict[str, list[TokenLogprobs]]:
        """For positions start+1 .. start+num_tokens, as far as they are prompt."""
        found: dict[str, list[TokenLogprobs]] = {}
        first = 0
        for work in works:
            request, wanted = work.request, work.request.params.prompt_logprobs
            if wanted is not None:
                targets = request.prompt[work.start + 1 : work.start + work.num_tokens + 1]
                found[request.id] = self._logprobs_of(hidden_TD[first : first + len(targets)], targets, wanted)
            first += work.num_tokens
        return found

    def _logprobs_of(self, hidden_QD: torch.Tensor, targets: list[int], num_top: int) -> list[TokenLogprobs]:
        made: list[TokenLogprobs] = []
        for start in range(0, len(targets), _PROMPT_LOGPROB_ROWS):
            part = targets[start : start + _PROMPT_LOGPROB_ROWS]
            rows = torch.arange(start, start + len(part), device=self.device)
            tokens = torch.tensor(part, device=self.device)
            logprobs = sampler.logprobs(self.model.logits(hidden_QD, rows), tokens, num_top)
            made += _to_host(part, logprobs, [num_top] * len(part))
        return made

    def _slot(self, request: Request) -> int:
        return 0 if self.adapters is None else self.adapters.slot(request.adapter)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _floats(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)


@dataclass
class _Counts:
    """What a request with penalties has in its prompt and its outputs so far."""

    prompt_V: torch.Tensor
    outputs_V: torch.Tensor
    num_added: int = 0

    @classmethod
    def of(cls, prompt: list[int], vocab_size: int, device: torch.device) -> _Counts:
        seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        seen[torch.tensor(prompt, device=device)] = True
        return cls(seen, torch.zeros(vocab_size, dtype=torch.float32, device=device))

    def add(self, tokens: list[int]) -> None:
        if tokens:
            index = torch.tensor(tokens, device=self.outputs_V.device)
            self.outputs_V.index_add_(0, index, torch.ones(len(tokens), device=self.outputs_V.device))
            self.num_added += len(tokens)


def _penalized(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def _sampled(works: Sequence[Work], tokens_S: torch.Tensor, logprobs: sampler.Logprobs | None) -> list[Sampled]:
    tokens = tokens_S.tolist()
    if logprobs is None:
        return [Sampled(token) for token in tokens]
    wanted = [(row, work.request.params.logprobs) for row, work in enumerate(works)]
    counts = [count for _, count in wanted if count is not None]
    chosen = [tokens[row] for row, count in wanted if count is not None]
    made = iter(_to_host(chosen, logprobs, counts))
    return [Sampled(tokens[row], None if count is None else next(made)) for row, count in wanted]


def _to_host(tokens: list[int], logprobs: sampler.Logprobs, counts: list[int]) -> list[TokenLogprobs]:
    columns = zip(
        tokens,
        logprobs.chosen_L.tolist(),
        logprobs.ranks_L.tolist(),
        logprobs.top_tokens_LK.tolist(),
        logprobs.top_values_LK.tolist(),
        counts,
        strict=True,
    )
    return [
        TokenLogprobs(token, value, rank, list(zip(top[:count], values[:count], strict=True)))
        for token, value, rank, top, values, count in columns
    ]


def count_blocks(
    config: EngineConfig,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    floor: int = 0,
) -> int:
    """As many KV blocks as asked for, or as the memory set aside holds beside the adapters' floor (on a GPU); the
    longest request must fit."""
    each = block_bytes(spec, config.cache.block_size, dtype)
    needed = -(-max_model_len // config.cache.block_size) + 1
    if config.cache.num_blocks:
        return config.cache.num_blocks
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = int(free - total * (1 - config.cache.gpu_memory_utilization)) - floor * each
    else:
        room = int(config.cache.cpu_memory_gib * 2**30)
    fitting = room // each
    if fitting < needed:
        raise ConfigError(
            f"{room / 2**30:.2f} GiB for KV hold {max(0, fitting) * config.cache.block_size} tokens, fewer than one "
            f"request of max_model_len {max_model_len} needs; give it more memory or lower max_model_len"
        )
    return min(fitting, needed * max(2, config.scheduler.max_num_seqs))
