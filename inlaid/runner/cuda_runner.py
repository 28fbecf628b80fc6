"""The runner of a GPU: steps as replayed CUDA graphs, one step ahead of the host.

`submit` writes a step's metadata into pinned memory, sends it, replays the graph of the smallest layout that holds the
step, and returns; the sampled tokens travel back while the next step is being made, and `collect` waits for them. A
token that the host has not seen yet is taken from the device (`Forward.last`), so steps never wait for the host.

There are graphs for steps of decodes only and for steps with prompts, each without adapters, with adapters on the
attention's linears, and with adapters anywhere. Steps that fit none, and engines without graphs, run the same kernels
one by one. What the sampling kernels do not offer (penalties, grammars, log probabilities) is done by layers/sampler.py
on the logits that the graph leaves behind.
"""

from __future__ import annotations

import gc
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from threading import Thread
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from inlaid.adapters.store import AdapterStore
from inlaid.config import ConfigError, EngineConfig
from inlaid.engine.request import Batch, Request, Sampled, SamplingParams, StepResult, TokenLogprobs, Work
from inlaid.kernels import fused_triton, lora_triton
from inlaid.kernels.arriving import Arriving
from inlaid.kernels.attention_triton import TritonAttention
from inlaid.kernels.auto import AutoLinear, backends
from inlaid.kernels.backend import MODULES, AdapterPages, Kernels
from inlaid.kernels.cpu import ReferenceLinear
from inlaid.kernels.exllama import ExllamaLinear
from inlaid.kernels.humming import HummingLinear
from inlaid.kernels.linear_triton import TritonLinear
from inlaid.layers import sampler
from inlaid.model.transformer import Transformer, new_cache
from inlaid.runner.cuda_forward import (
    ALL_ADAPTERS,
    ATTENTION_ADAPTERS,
    NO_ADAPTERS,
    QUERY_TILE,
    Forward,
    Layout,
    block_rows_for,
)
from inlaid.runner.model_runner import ModelRunner, _penalized, _sampled, count_blocks
from inlaid.runner.unified import floor_blocks, unify

log = logging.getLogger(__name__)

DECODE_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
TOKEN_BUCKETS = (64, 128, 192, 256, *range(384, 2048, 128), 2048, 3072, 4096, 6144, 8192)
STAGES = 4  # metadata and results of so many steps may be under way
SPARE_TILES = 128  # prompts in a captured step beyond those that fill their query tiles
TABLE_UPDATES = 1 << 16  # new KV blocks told to the device in one go


@dataclass
class Ticket:
    """A submitted step."""

    works: list[Work]  # those that sample, in the order of the device's rows
    order: list[int]  # where each of them stands among the batch's sampling works
    tokens: torch.Tensor  # pinned; valid once `done` has happened
    done: Any
    logprobs: sampler.Logprobs | None = None
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Step:
    """A step laid out on the host."""

    layout: Layout
    adapters: int
    singles: list[Work]
    prompts: list[Work]
    sampling: list[Work]
    order: list[int]
    updates: tuple[list[int], list[int]]


class CudaRunner(ModelRunner):
    """A model on a GPU."""

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
        """`settle` returns when no other thread uses the device any more."""
        self.model, self.config, self.device, self.dtype = model, config, device, dtype
        self.adapters, self.seed, self.block_size = adapters, config.seed, config.cache.block_size
        self.max_rows = config.scheduler.max_num_seqs
        self.max_tokens = max(config.scheduler.max_num_batched_tokens, self.max_rows)
        self.max_blocks = -(-max_model_len // self.block_size)
        self._keys: dict[str, int] = {}
        self._counts: dict[str, Any] = {}
        self._on_gpu = device.type == "cuda"
        largest = self._exact_layout(self.max_tokens, self.max_rows, self.max_rows, self.max_rows, self.max_tokens)
        self._meta_size = largest.size + 2 * TABLE_UPDATES
        self.forward = Forward(
            model, adapters.pages, self.max_tokens, self.max_rows, self.max_blocks, config.adapters.max_lora_rank,
            device, dtype, self._meta_size,
        )  # fmt: skip
        self._staging = [self._pinned(self._meta_size) for _ in range(STAGES)]
        self._results = [self._pinned(self.max_rows) for _ in range(STAGES)]
        self._templates: dict[Layout, np.ndarray] = {}
        self._graphs: dict[tuple[Layout, int], torch.cuda.CUDAGraph] = {}
        self._rows: dict[str, int] = {}
        self._free_rows = list(range(self.max_rows - 1, -1, -1))
        self._sent = [0] * (self.max_rows + 1)  # blocks of each row that the device knows
        self._state = _RowState(self.max_rows + 1)
        self.arriving = arriving
        self._levels: dict[str, int] = {}  # adapter identity -> which graphs it needs
        self._previous: Ticket | None = None
        self._unseen: dict[str, int] = {}
        self._num_submitted = 0
        self.num_eager_steps = 0
        self.num_blocks = 0
        self._start(config, max_model_len, progress, settle)

    # Start-up.

    def _start(self, config: EngineConfig, max_model_len: int, progress: bool, settle: Callable[[], object]) -> None:
        """Compile everything on a cache of two blocks, give the KV what memory is left, capture the graphs."""
        spec = self.model.spec
        begin = time.monotonic()
        self.forward.cache = new_cache(spec, 2, self.block_size, self.device, self.dtype)
        with torch.inference_mode():
            layouts = self._captured_layouts() if self._on_gpu and not config.enforce_eager else []
            kinds = self.forward.kinds()
            for layout in tqdm(layouts, desc="compiling kernels", disable=not progress, delay=1, leave=False):
                self._idle_step(layout, ALL_ADAPTERS, kinds)
            for layout in layouts:
                if layout is layouts[0] or self.forward.leaves_parts(layout):
                    # Kernels that add no adapter, where few rows had them all adding.
                    self._idle_step(layout, NO_ADAPTERS, kinds)
                    self._idle_step(layout, ATTENTION_ADAPTERS, kinds)
            compiled = time.monotonic()
            settle()
            settled = time.monotonic()
            if self._on_gpu:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            self._make_cache(config, max_model_len)
            pool = None
            gc.collect()
            gc.freeze()  # every capture collects garbage, and all that is loaded is none
            for layout in tqdm(layouts[::-1], desc="capturing graphs", disable=not progress, delay=1, leave=False):
                for level in (NO_ADAPTERS, ATTENTION_ADAPTERS, ALL_ADAPTERS):
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool):
                        self.forward.run(layout, level)
                    pool = pool or graph.pool()
                    self._graphs[layout, level] = graph
            gc.unfreeze()
            if self.arriving is not None and layouts:
                prompts = [layout for layout in layouts if layout.prefills]
                self.arriving.patience = self._seconds_without_graph(min(prompts, key=lambda layout: layout.tokens))
                log.info("adapters that come in %.0f ms are waited for whole", self.arriving.patience * 1e3)
        for backend in self.model.kernels.quantized:
            if isinstance(backend, AutoLinear):
                for line in backend.report():
                    log.info("linear kernels: %s", line)
        log.info(
            "start-up: kernels of %d layouts warm in %.1f s, %.1f s for adapters still being read, %d graphs captured "
            "in %.1f s, %d KV blocks", len(layouts), compiled - begin, settled - compiled, len(self._graphs),
            time.monotonic() - settled, self.num_blocks,
        )  # fmt: skip

    def _seconds_without_graph(self, layout: Layout, times: int = 5) -> float:
        """By how much longer a step takes whose kernels are launched one by one."""

        def seconds(run: Callable[[], object]) -> float:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            return time.perf_counter() - begin

        ways = self._graphs[layout, ALL_ADAPTERS].replay, partial(self._idle_step, layout, ALL_ADAPTERS)
        self._idle_step(layout, ALL_ADAPTERS)
        whole, apart = (median(seconds(way) for _ in range(times)) for way in ways)
        return max(0.0, apart - whole)

    def _make_cache(self, config: EngineConfig, max_model_len: int) -> None:
        spec, store = self.model.spec, self.adapters
        assert store is not None
        unified = config.cache.unified_memory
        floor = floor_blocks(store, spec, self.block_size) if unified else 0
        self.num_blocks = count_blocks(config, spec, self.device, self.dtype, max_model_len, floor)
        if unified:
            shared = unify(spec, config.cache, self.num_blocks, max_model_len, store, self.device, self.dtype)
            self.cache, self.stride, self.pool = shared.cache, shared.stride, shared.pool
        else:
            self.cache = new_cache(spec, self.num_blocks, self.block_size, self.device, self.dtype)
        self.forward.cache = self.cache

    def _captured_layouts(self) -> list[Layout]:
        decodes = [b for b in DECODE_BUCKETS if b < self.max_rows] + [self.max_rows]
        tokens = [t for t in TOKEN_BUCKETS if t < self.max_tokens] + [self.max_tokens]
        return [self._decode_layout(count) for count in decodes] + [self._prompt_layout(count) for count in tokens]

    def _decode_layout(self, count: int) -> Layout:
        return self._exact_layout(count, count, 0, count, 0)

    def _prompt_layout(self, tokens: int) -> Layout:
        rows = min(self.max_rows, tokens)
        return self._exact_layout(tokens, rows, rows, rows, tokens // QUERY_TILE + min(SPARE_TILES, rows))

    def _exact_layout(self, tokens: int, decodes: int, prefills: int, samples: int, tiles: int) -> Layout:
        block_rows = block_rows_for(tokens)
        slots = self.adapters.pages.table.shape[0] - 1 if self.adapters is not None else 1
        segments = lora_triton.max_segments(tokens, slots, block_rows)
        return Layout(tokens, decodes, prefills, samples, tiles, segments, block_rows)

    def _idle_step(self, layout: Layout, level: int, blocks: Sequence[int] | None = None) -> None:
        """A step of padding only, of these blocks or all."""
        self.forward.meta[: layout.size].copy_(torch.from_numpy(self._template(layout)))
        self.forward.run(layout, level, blocks)

    # A step.

    def submit(self, batch: Batch) -> Ticket:  # type: ignore[override]
        for request_id in batch.released:
            self._release(request_id)
        step = self._lay_out(batch.works)
        stage = self._num_submitted % STAGES
        self._num_submitted += 1
        host = self._staging[stage]
        self._write(step, host.numpy())
        with torch.inference_mode():
            self._tell_tables(step, host)
            self.forward.meta[: step.layout.size].copy_(host[: step.layout.size], non_blocking=True)
            ticket = self._compute(step, stage)
        self._previous = ticket
        return ticket

    def collect(self, ticket: Ticket) -> StepResult:  # type: ignore[override]
        if ticket.done is not None:
            ticket.done.synchronize()
        tokens = ticket.tokens.tolist()
        if ticket.logprobs is None:
            made = [Sampled(token) for token in tokens]
        else:
            made = _sampled(ticket.works, ticket.tokens, ticket.logprobs)
        sampled: list[Any] = [None] * len(made)
        for place, one in zip(ticket.order, made, strict=True):
            sampled[place] = one
        return StepResult(sampled, ticket.prompt_logprobs)

    def _compute(self, step: _Step, stage: int) -> Ticket:
        layout, count = step.layout, len(step.sampling)
        prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        self.forward.arriving = self._arriving_in(step)
        graph = None if self.forward.arriving is not None else self._graphs.get((layout, step.adapters))
        if any(w.request.params.prompt_logprobs is not None for w in step.prompts + step.singles):
            self.forward.layers(layout, step.adapters)
            ordered = [*step.singles, *step.prompts]
            prompt_logprobs = self._prompt_logprobs(ordered, self.forward.all_hidden(layout))
            graph = None
        if graph is not None:
            graph.replay()
        else:
            self.num_eager_steps += 1
            self.forward.run(layout, step.adapters)
        logprobs = self._sample_specially(step) if any(self._is_special(work) for work in step.sampling) else None
        tokens = self._results[stage][:count]
        tokens.copy_(self.forward.sampled[:count], non_blocking=True)
        done = None
        if self._on_gpu:
            done = torch.cuda.Event()
            done.record()
        return Ticket(step.sampling, step.order, tokens, done, logprobs, prompt_logprobs)

    def _arriving_in(self, step: _Step) -> Arriving | None:
        """Asked layer by layer when a step with prompts has adapters that are still coming. Decodes, which are short,
        wait for all of them, on the device, and so do prompts where that is quicker than launching every kernel."""
        arriving = self.arriving
        if arriving is None or not step.adapters or not arriving.plan(self._rows_of(step)):
            return None
        if step.prompts and not arriving.is_soon_whole():
            return arriving
        arriving.wait_for_all()
        return None

    def _rows_of(self, step: _Step) -> dict[int, list[tuple[int, int]]]:
        """The rows of each adapter slot in a step: one range among the decodes, one among the prompts."""
        found: dict[int, list[tuple[int, int]]] = {}
        row = 0
        for works in (step.singles, step.prompts):
            for slot, group in itertools.groupby(works, lambda work: self._slot(work.request)):
                begin, row = row, row + sum(work.num_tokens for work in group)
                if slot:
                    found.setdefault(slot, []).append((begin, row))
        return found

    def _is_special(self, work: Work) -> bool:
        """Whether the sampling kernels do not suffice."""
        request, params = work.request, work.request.params
        if self._state.special[self._rows[request.id]]:
            return True
        return params.min_tokens > work.start + work.num_tokens - request.num_prompt

    def _sample_specially(self, step: _Step) -> sampler.Logprobs | None:
        """layers/sampler.py over the step's logits, in the place of what the kernels sampled."""
        works, count = step.sampling, len(step.sampling)
        self._unseen = self._newest_tokens(works)
        logits_SV = self.forward.logits[:count].float()
        tokens_S, logprobs = sampler.sample(logits_SV, self.sampling_batch(works))
        self.forward.sampled[:count].copy_(tokens_S)
        rows = self._tensor(np.array([self._rows[work.request.id] for work in works]))
        self.forward.last.index_copy_(0, rows, tokens_S.to(torch.int32))
        return logprobs

    def _newest_tokens(self, works: Sequence[Work]) -> dict[str, int]:
        """Tokens of the step before that penalties must count and the engine has not been told yet."""
        penalized = any(_penalized(work.request.params) for work in works)
        previous = self._previous
        if not penalized or previous is None:
            return {}
        if previous.done is not None:
            previous.done.synchronize()
        tokens = previous.tokens.tolist()
        found = {work.request.id: token for work, token in zip(previous.works, tokens, strict=True)}
        return {w.request.id: found[w.request.id] for w in works if self._in_flight(w) and w.request.id in found}

    @staticmethod
    def _in_flight(work: Work) -> bool:
        return work.start + work.num_tokens > len(work.request.tokens)

    def _counts_of(self, request: Request) -> Any:
        counts = super()._counts_of(request)
        unseen = self._unseen.get(request.id)
        if unseen is not None and counts.num_added == request.num_outputs:
            counts.add([unseen])
        return counts

    # Laying a step out.

    def _lay_out(self, works: Sequence[Work]) -> _Step:
        """Decodes first, prompts after; within each, rows of one adapter side by side."""
        num_singles = next((i for i, work in enumerate(works) if work.num_tokens > 1), len(works))
        slots = [self._slot(work.request) for work in works]
        order = sorted(range(num_singles), key=slots.__getitem__)
        order += sorted(range(num_singles, len(works)), key=slots.__getitem__)
        ordered = [works[i] for i in order]
        singles, prompts = ordered[:num_singles], ordered[num_singles:]
        sampling = [work for work in ordered if work.samples]
        places = {i: place for place, i in enumerate(i for i, work in enumerate(works) if work.samples)}
        updates = self._table_updates(ordered)
        level = max((self._level(work.request.adapter) for work in works), default=NO_ADAPTERS)
        layout = self._layout_for(singles, prompts, len(sampling))
        return _Step(layout, level, singles, prompts, sampling, [places[i] for i in order if works[i].samples], updates)

    def _layout_for(self, singles: list[Work], prompts: list[Work], samples: int) -> Layout:
        """The smallest captured layout that holds the step, or one of exactly its size."""
        tokens = len(singles) + sum(work.num_tokens for work in prompts)
        tiles = sum(-(-work.num_tokens // QUERY_TILE) for work in prompts)
        if self._graphs:
            buckets = TOKEN_BUCKETS if prompts else DECODE_BUCKETS
            most = self.max_tokens if prompts else self.max_rows
            size = next((b for b in buckets if tokens <= b < most), most)
            layout = self._prompt_layout(size) if prompts else self._decode_layout(size)
            fits = samples <= layout.samples and len(singles) <= layout.decodes
            if fits and len(prompts) <= layout.prefills and tiles <= layout.tiles:
                return layout
        return self._exact_layout(tokens, len(singles), len(prompts), max(1, samples), tiles)

    def _table_updates(self, works: Sequence[Work]) -> tuple[list[int], list[int]]:
        """Blocks that the device has not been told of: places in the tables, and values."""
        places: list[int] = []
        values: list[int] = []
        for work in works:
            request = work.request
            row = self._rows.get(request.id)
            if row is None:
                row = self._admit(request)
            known, needed = self._sent[row], -(-(work.start + work.num_tokens) // self.block_size)
            if needed > known:
                first = row * self.max_blocks
                places.extend(range(first + known, first + needed))
                values.extend(block * self.stride for block in request.blocks[known:needed])
                self._sent[row] = needed
        return places, values

    def _admit(self, request: Request) -> int:
        row = self._free_rows.pop()
        self._rows[request.id] = row
        self._sent[row] = 0
        self._state.set(row, request.params, self._key(request))
        return row

    def _release(self, request_id: str) -> None:
        row = self._rows.pop(request_id, None)
        if row is not None:
            self._free_rows.append(row)
        self._keys.pop(request_id, None)
        self._counts.pop(request_id, None)

    def _level(self, identity: str | None) -> int:
        if identity is None or self.adapters is None:
            return NO_ADAPTERS
        if identity not in self._levels:
            attention_only = all(site % len(MODULES) < 4 for site in self.adapters.sites(identity))
            self._levels[identity] = ATTENTION_ADAPTERS if attention_only else ALL_ADAPTERS
        return self._levels[identity]

    def _template(self, layout: Layout) -> np.ndarray:
        """A step of padding only."""
        if layout not in self._templates:
            template = np.zeros(layout.size, dtype=np.int32)
            for name, value in (("sources", -1), ("tiles", -1), ("rows", self.max_rows), ("table_rows", self.max_rows)):
                layout.view(template, name)[:] = value
            layout.view(template, "top_p").view(np.float32)[:] = 1.0
            if len(self._templates) > 256:  # sizes that no graph has come in any number
                self._templates.clear()
            self._templates[layout] = template
        return self._templates[layout]

    def _write(self, step: _Step, host: np.ndarray) -> None:
        """The step into pinned memory."""
        layout = step.layout
        host[: layout.size] = self._template(layout)

        def put(name: str, values: Any, offset: int = 0) -> None:
            begin = layout.pieces[name][0] + offset
            host[begin : begin + len(values)] = values

        ids, sources, positions, kv_slots, slots = self._single_tokens(step.singles)
        lengths = [position + 1 for position in positions]
        rows = [self._rows[work.request.id] for work in step.singles]
        put("lengths", lengths)
        put("table_rows", rows)
        if step.prompts:
            put("table_rows", [self._rows[work.request.id] for work in step.prompts], layout.decodes)
            put("lengths", [work.start + work.num_tokens for work in step.prompts], layout.decodes)
            starts, tiles = [len(ids)], []
            for index, work in enumerate(step.prompts):
                self._prompt_tokens(work, ids, sources, positions, kv_slots)
                slots += [self._slot(work.request)] * work.num_tokens
                starts.append(len(ids))
                tiles += [(index, at) for at in range(0, work.num_tokens, QUERY_TILE)]
            put("starts", starts)
            put("tiles", [sequence for sequence, _ in tiles])
            put("tiles", [at for _, at in tiles], layout.tiles)
        for name, values in (("ids", ids), ("sources", sources), ("positions", positions), ("slots", kv_slots)):
            put(name, values)
        if step.adapters:
            segments, order = layout.view(host, "segments"), layout.view(host, "order")
            lora_triton.write_segments(np.array(slots, np.int32), segments, order, layout.block_rows)
            put("adapters", slots)
        self._write_sampling(step, put)

    def _single_tokens(self, singles: list[Work]) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
        """Token ids, or rows whose newest token it is; positions; KV slots; adapter slots."""
        ids, sources, positions, kv_slots, slots = [], [], [], [], []
        size = self.block_size
        for work in singles:
            request, at = work.request, work.start
            known = at < len(request.tokens)
            ids.append(request.tokens[at] if known else 0)
            sources.append(-1 if known else self._rows[request.id])
            positions.append(at)
            kv_slots.append(request.blocks[at // size] * self.stride * size + at % size)
            slots.append(self._slot(request))
        return ids, sources, positions, kv_slots, slots

    def _prompt_tokens(
        self, work: Work, ids: list[int], sources: list[int], positions: list[int], kv_slots: list[int]
    ) -> None:
        begin, end, size = work.start, work.start + work.num_tokens, self.block_size
        ids.extend(work.request.tokens[begin:end])
        sources.extend([-1] * (end - begin))
        positions.extend(range(begin, end))
        blocks = np.array(work.request.blocks[begin // size : -(-end // size)], np.int64) * self.stride
        kv_slots.extend((blocks[:, None] * size + np.arange(size)).ravel()[begin % size :][: end - begin].tolist())

    def _write_sampling(self, step: _Step, put: Any) -> None:
        if not step.sampling:
            return
        first = len(step.singles)
        token_rows, at = {}, 0
        for work in (*step.singles, *step.prompts):
            at += work.num_tokens
            token_rows[id(work)] = at - 1
        assert at >= first
        rows = np.array([self._rows[work.request.id] for work in step.sampling])
        put("logit_rows", [token_rows[id(work)] for work in step.sampling])
        put("rows", rows)
        put("drawn_at", [work.start + work.num_tokens for work in step.sampling])
        state = self._state
        put("keys", state.keys[rows])
        put("top_k", state.top_k[rows])
        for name in ("temperature", "top_p", "min_p"):
            put(name, getattr(state, name)[rows].view(np.int32))

    def _tell_tables(self, step: _Step, host: torch.Tensor) -> None:
        """New blocks into the device's tables, before the step reads them."""
        places, values = step.updates
        begin = self._meta_size - 2 * TABLE_UPDATES
        flat, meta = host.numpy(), self.forward.meta
        for start in range(0, len(places), TABLE_UPDATES):
            if start:
                self._synchronize()  # the buffer is still being read; only enormous prefix hits come here
            count = len(places[start : start + TABLE_UPDATES])
            room = -(-count // 32) * 32
            flat[begin : begin + count] = places[start : start + count]
            flat[begin + room : begin + room + count] = values[start : start + count]
            meta[begin : begin + 2 * room].copy_(host[begin : begin + 2 * room], non_blocking=True)
            fused_triton.scatter(
                self.forward.tables, meta[begin : begin + count], meta[begin + room : begin + room + count]
            )

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def _pinned(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, pin_memory=self._on_gpu)


def cuda_kernels(config: EngineConfig, pages: AdapterPages) -> Kernels:
    """The kernels of a GPU that the configuration names."""
    if pages.pool.dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(f"a GPU computes in float16 or bfloat16 here, not {pages.pool.dtype}: choose another dtype")
    if config.attention_backend not in ("auto", "triton"):
        raise ConfigError(f"attention backend {config.attention_backend!r} is for a CPU; use auto or triton on a GPU")
    linears: dict[str, Callable[[], Any]] = {
        "auto": lambda: AutoLinear(backends(config.deterministic)),
        "humming": lambda: HummingLinear(ordered=config.deterministic),
        "exllama": ExllamaLinear,
        "triton": TritonLinear,
        "reference": ReferenceLinear,
    }
    backend = linears[config.linear_backend]()
    lora = lora_triton.TritonLora(pages, config.adapters.max_lora_rank)
    Thread(target=_name_triton, daemon=True).start()
    return Kernels((backend,), TritonAttention(), fused_triton.TritonOps(), lora)


def _name_triton() -> None:
    """Triton reads and hashes itself once, in most of a second: beside the weights, where it can be asked to."""
    with suppress(ImportError):  # those before 3.6 keep it elsewhere
        from triton.runtime.cache import triton_key

        triton_key()


class _RowState:
    """What sampling needs to know of each row's request, set once when it gets its row."""

    def __init__(self, rows: int) -> None:
        self.keys = np.zeros(rows, np.int32)
        self.top_k = np.zeros(rows, np.int32)
        self.temperature = np.zeros(rows, np.float32)
        self.top_p = np.ones(rows, np.float32)
        self.min_p = np.zeros(rows, np.float32)
        self.special = [False] * rows

    def set(self, row: int, params: SamplingParams, key: int) -> None:
        self.keys[row] = key - (1 << 32) if key >> 31 else key
        self.top_k[row] = max(0, params.top_k)
        self.temperature[row] = 0.0 if params.greedy else params.temperature
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.special[row] = (
            params.logprobs is not None
            or params.grammar is not None
            or bool(params.logit_bias or params.allowed_token_ids or params.bad_words)
            or _penalized(params)
        )
