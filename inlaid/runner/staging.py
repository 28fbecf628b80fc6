"""Staging, from a batch to `meta`: the order of a step's rows, its layout, and its inputs in pinned memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inlaid.engine.request import Request, Work
from inlaid.kernels import lora_triton
from inlaid.kernels.attention_triton import QUERY_TILE
from inlaid.kernels.context import NO_ADAPTERS
from inlaid.runner.layout import Layout, Layouts
from inlaid.runner.rows import Rows
from inlaid.runner.sampling import lines


@dataclass(frozen=True)
class StagedStep:
    """A step laid out on the host."""

    layout: Layout
    adapters: int  # the level
    singles: list[Work]
    prompts: list[Work]  # and, in a step with drafts, decodes with and without
    sampling: list[Work]
    lines: Sequence[Work]  # a work for each token that they sample, see sampling.lines
    order: list[int]  # where each of `sampling` stands among the batch's sampling works
    updates: tuple[list[int], list[int]]  # of the block tables: places and values


class Staging:
    """Lays steps out for the device's rows. `stride`: numbers in the caches for one block of the scheduler."""

    def __init__(
        self, layouts: Layouts, rows: Rows, slot: Callable[[Request], int], level: Callable[[Request], int], stride: int
    ) -> None:
        self.layouts, self.rows = layouts, rows
        self.slot, self.level = slot, level
        self.block_size, self.stride = rows.block_size, stride

    def lay_out(self, works: Sequence[Work], captured: bool) -> StagedStep:
        """Order the works: decodes first, prompts after; within each, rows of one adapter side by side."""
        num_singles = next((i for i, work in enumerate(works) if work.num_tokens > 1), len(works))
        slots = [self.slot(work.request) for work in works]
        order = sorted(range(num_singles), key=slots.__getitem__)
        order += sorted(range(num_singles, len(works)), key=slots.__getitem__)
        ordered = [works[i] for i in order]
        has_drafts_only = self.layouts.max_queries > 0 and self.layouts.has_drafts_only(works)
        if has_drafts_only:
            num_singles = 0
        singles, prompts = ordered[:num_singles], ordered[num_singles:]
        sampling = [work for work in ordered if work.samples]
        each = lines(sampling)
        if has_drafts_only:
            layout = self.layouts.choose_drafts(ordered, len(each), captured)
        else:
            layout = self.layouts.choose(singles, prompts, len(each), captured)
        places = {i: place for place, i in enumerate(i for i, work in enumerate(works) if work.samples)}
        return StagedStep(
            layout=layout,
            adapters=max((self.level(work.request) for work in works), default=NO_ADAPTERS),
            singles=singles,
            prompts=prompts,
            sampling=sampling,
            lines=each,
            order=[places[i] for i in order if works[i].samples],
            updates=self.rows.table_updates(ordered, self.stride),
        )

    def write(self, step: StagedStep, host: np.ndarray) -> None:
        """Write a step into pinned memory."""
        layout = step.layout
        host[: layout.size] = self.layouts.template(layout)

        def put(name: str, values: Any, offset: int = 0) -> None:
            begin = layout.pieces[name][0] + offset
            host[begin : begin + len(values)] = values

        ids, sources, positions, kv_slots, slots = self._single_tokens(step.singles)
        lengths = [position + 1 for position in positions]
        put("lengths", lengths)
        put("table_rows", [self.rows.of[work.request.id] for work in step.singles])
        if step.prompts:
            put("table_rows", [self.rows.of[work.request.id] for work in step.prompts], layout.decodes)
            put("lengths", [work.start + work.num_tokens for work in step.prompts], layout.decodes)
            starts, tiles = [len(ids)], []
            leaders: list[int] = []
            for index, work in enumerate(step.prompts):
                self._prompt_tokens(work, ids, sources, positions, kv_slots)
                slots += [self.slot(work.request)] * work.num_tokens
                leaders += starts[-1:] * work.num_tokens
                starts.append(len(ids))
                tiles += [(index, at) for at in range(0, work.num_tokens, QUERY_TILE)]
            put("starts", starts + [starts[-1]] * (layout.prefills + 1 - len(starts)))
            if layout.queries:
                put("leaders", leaders)
                put("token_rows", [self._row(work) for work in step.prompts for _ in range(work.num_tokens)])
            if layout.tiles:
                put("tiles", [sequence for sequence, _ in tiles])
                put("tiles", [at for _, at in tiles], layout.tiles)
        for name, values in (("ids", ids), ("sources", sources), ("positions", positions), ("slots", kv_slots)):
            put(name, values)
        if step.adapters:
            segments, order = host[layout.slice("segments")], host[layout.slice("order")]
            lora_triton.write_segments(np.array(slots, np.int32), segments, order, layout.block_rows)
            put("adapters", slots)
        if step.sampling:
            self._write_sampling(step, put)

    def _single_tokens(self, singles: list[Work]) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
        """Return of each decode: its token id, or the row whose newest token it is; position; KV slot; adapter slot."""
        ids, sources, positions, kv_slots, slots = [], [], [], [], []
        size = self.block_size
        for work in singles:
            request, at = work.request, work.start
            known = at < len(request.tokens)
            ids.append(request.tokens[at] if known else 0)
            sources.append(-1 if known else self.rows.of[request.id])
            positions.append(at)
            kv_slots.append(request.blocks[at // size] * self.stride * size + at % size)
            slots.append(self.slot(request))
        return ids, sources, positions, kv_slots, slots

    def _prompt_tokens(
        self, work: Work, ids: list[int], sources: list[int], positions: list[int], kv_slots: list[int]
    ) -> None:
        """Append the tokens of a prompt's chunk, or of a decode with or without a draft."""
        begin, end, size = work.start, work.start + work.num_tokens, self.block_size
        if begin < len(work.request.tokens):
            ids.extend(work.request.tokens[begin:end])
            ids.extend(work.draft)
            sources.extend([-1] * (end - begin))
        else:  # a decode whose token is still on the device
            ids.append(0)
            sources.append(self.rows.of[work.request.id])
        positions.extend(range(begin, end))
        blocks = np.array(work.request.blocks[begin // size : -(-end // size)], np.int64) * self.stride
        kv_slots.extend((blocks[:, None] * size + np.arange(size)).ravel()[begin % size :][: end - begin].tolist())

    def _row(self, work: Work) -> int:
        return self.rows.of[work.request.id]

    def _write_sampling(self, step: StagedStep, put: Callable[[str, Any], None]) -> None:
        logit_rows: list[int] = []
        newest: list[int] = []
        at = 0
        for work in (*step.singles, *step.prompts):
            at += work.num_tokens
            if work.samples:
                logit_rows += range(at - 1 - len(work.draft), at)
                # How many guesses are right decides the newest token of a request with a draft: the host tells it.
                newest += [self.layouts.max_rows] * (1 + len(work.draft)) if work.draft else [self._row(work)]
        rows = np.array([self._row(work) for work in step.lines])
        put("logit_rows", logit_rows)
        put("rows", newest)
        put("drawn_at", [work.start + work.num_tokens for work in step.lines])
        params = self.rows.params
        put("keys", params.keys[rows])
        put("top_k", params.top_k[rows])
        for name in ("temperature", "top_p", "min_p"):
            put(name, getattr(params, name)[rows].view(np.int32))
