"""Layouts: the sizes of a step on a GPU, and where its inputs lie in one int32 array.

What a step is about reaches the device as one array, `meta`, cut into named pieces by a `Layout`. A graph is captured
per layout and adapter level; `Layouts` makes the captured ones and chooses the smallest that holds a step. Padding
tokens have id 0, padding sequences length 0; both write to KV block 0, which no request reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch

from inlaid.engine.request import Work
from inlaid.kernels import lora_triton
from inlaid.kernels.attention_triton import QUERY_TILE

ALIGNMENT = 32  # of the pieces of meta, in elements: kernels are compiled for aligned addresses
DECODE_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
TOKEN_BUCKETS = (64, 128, 192, 256, *range(384, 2048, 128), 2048, 3072, 4096, 6144, 8192)
DRAFT_WIDTHS = (2, 4, 8, 16)  # tokens of each sequence in a captured step with drafts, on average
SPARE_TILES = 128  # prompts in a captured step beyond those that fill their query tiles
MOST_TEMPLATES = 256  # sizes that no graph has come in any number
FLOATS = frozenset({"temperature", "top_p", "min_p"})  # pieces of float32


@dataclass(frozen=True)
class Layout:
    """The sizes of a step. It is the key of a graph."""

    tokens: int
    decodes: int
    prefills: int
    samples: int
    tiles: int
    segments: int
    block_rows: int
    queries: int = 0  # most tokens of each prefill, in a step with drafts; 0: any number
    is_long: bool = False  # decodes of which one has a context that the decode kernel is not meant for

    @cached_property
    def pieces(self) -> dict[str, tuple[int, int]]:
        """Return name -> [begin, end) in meta."""
        sequences = self.decodes + self.prefills
        sizes = {
            "ids": self.tokens,
            "sources": self.tokens,  # the row whose newest token this is, or -1: the id above
            "positions": self.tokens,
            "slots": self.tokens,  # of KV
            "lengths": sequences,
            "table_rows": sequences,
            "starts": self.prefills + 1,
            "tiles": 2 * self.tiles,
            "logit_rows": self.samples,
            "rows": self.samples,  # of the sampled sequences
            "keys": self.samples,
            "drawn_at": self.samples,  # position of the token being drawn
            "top_k": self.samples,
            "temperature": self.samples,
            "top_p": self.samples,
            "min_p": self.samples,
            "segments": 3 * self.segments,
            "order": self.tokens,
            "adapters": self.tokens,  # the slot of each row
            "token_rows": self.tokens if self.queries else 0,  # of the block tables, by token
            "leaders": self.tokens if self.queries else 0,  # the first token of each token's sequence
        }
        placed, at = {}, 0
        for name, size in sizes.items():
            placed[name] = (at, at + size)
            at += -(-size // ALIGNMENT) * ALIGNMENT
        placed["end"] = (at, at)
        return placed

    @property
    def rows(self) -> int:
        """Return the tokens of decodes and their guesses, or 0 in a step with prompts."""
        if self.queries:
            return self.tokens
        return 0 if self.prefills else self.decodes

    @property
    def size(self) -> int:
        """Return the elements of meta that the step uses."""
        return self.pieces["end"][0]

    def slice(self, name: str) -> slice:
        """Return where a piece lies in meta."""
        return slice(*self.pieces[name])

    def view(self, meta: torch.Tensor, name: str) -> torch.Tensor:
        """Return a piece on the device in its own type."""
        piece = meta[self.slice(name)]
        return piece.view(torch.float32) if name in FLOATS else piece


class Layouts:
    """The layouts of a runner with room for `max_tokens` tokens and `max_rows` sequences."""

    def __init__(
        self,
        max_tokens: int,
        max_rows: int,
        num_slots: int,
        max_queries: int = 0,
        longest: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """`max_queries`: most tokens of a sequence in steps with drafts; 0: there are no such steps.

        `longest`: rows of steps that the decode kernel serves, and up to which context it is meant for them."""
        self.max_tokens, self.max_rows, self.max_queries = max_tokens, max_rows, max_queries
        self.longest = longest
        self.num_slots = num_slots  # adapter slots, the empty one aside
        self.largest = self.exact(max_tokens, max_rows, max_rows, max_rows, max_tokens)
        self._templates: dict[Layout, np.ndarray] = {}

    def exact(self, tokens: int, decodes: int, prefills: int, samples: int, tiles: int, queries: int = 0) -> Layout:
        """Return the layout of exactly these sizes."""
        block_rows = lora_triton.block_rows_for(tokens)
        segments = lora_triton.max_segments(tokens, self.num_slots, block_rows)
        return Layout(tokens, decodes, prefills, samples, tiles, segments, block_rows, queries)

    def decodes(self, count: int) -> Layout:
        """Return the captured layout of `count` decodes and nothing else."""
        return self.exact(count, count, 0, count, 0)

    def _by_context(self, layout: Layout, works: Sequence[Work]) -> Layout:
        """Return the layout of these works: another where a context is too long for the decode kernel."""
        longest = self.longest.get(layout.rows)
        is_long = longest is not None and any(work.start >= longest for work in works)
        return replace(layout, is_long=True) if is_long else layout

    def prompts(self, tokens: int) -> Layout:
        """Return the captured layout of up to `tokens` tokens of decodes and prompts."""
        rows = min(self.max_rows, tokens)
        return self.exact(tokens, rows, rows, rows, tokens // QUERY_TILE + min(SPARE_TILES, rows))

    def drafts(self, sequences: int, tokens: int) -> Layout:
        """Return the layout of up to `sequences` decodes, with drafts or without: all are prefills of few tokens,
        and each token may be sampled."""
        return self.exact(tokens, 0, sequences, min(tokens, self.max_rows), 0, self.max_queries)

    def captured(self) -> list[Layout]:
        """Return all layouts that graphs are captured for, the smallest of each kind first."""
        decodes = [b for b in DECODE_BUCKETS if b < self.max_rows] + [self.max_rows]
        tokens = [t for t in TOKEN_BUCKETS if t < self.max_tokens] + [self.max_tokens]
        found = [self.decodes(count) for count in decodes] + [self.prompts(count) for count in tokens]
        found += [self.drafts(*sizes) for sizes in self._draft_sizes()]
        return found + [replace(one, is_long=True) for one in found if one.rows in self.longest]

    def _draft_sizes(self) -> list[tuple[int, int]]:
        """Return sequences and tokens of the captured steps with drafts: no more tokens than may be sampled."""
        if not self.max_queries:
            return []
        counts = [b for b in DECODE_BUCKETS if b < self.max_rows]
        sizes = {(s, min(s * min(w, self.max_queries), self.max_rows)) for s in counts for w in DRAFT_WIDTHS}
        return sorted(size for size in sizes if size[0] < size[1] <= self.max_tokens)

    def has_drafts_only(self, works: Sequence[Work]) -> bool:
        """Return True for a step of decodes of which one has a draft, all within what such steps hold."""
        return any(work.draft for work in works) and all(
            work.num_tokens == 1 or (work.draft and work.num_tokens <= self.max_queries) for work in works
        )

    def choose_drafts(self, works: Sequence[Work], samples: int, captured: bool) -> Layout:
        """Return the smallest captured layout that holds a step for which `has_drafts_only`, or the exact one."""
        tokens = sum(work.num_tokens for work in works)
        sizes = self._draft_sizes() if captured else []
        fitting = [size for size in sizes if len(works) <= size[0] and max(tokens, samples) <= size[1]]
        if fitting:
            return self._by_context(self.drafts(*min(fitting, key=lambda size: (size[1], size[0]))), works)
        return self._by_context(self.exact(tokens, 0, len(works), samples, 0, self.max_queries), works)

    def choose(self, singles: Sequence[Work], prompts: Sequence[Work], samples: int, captured: bool) -> Layout:
        """Return the smallest captured layout that holds the step (where layouts are captured), or the exact one."""
        tokens = len(singles) + sum(work.num_tokens for work in prompts)
        tiles = sum(-(-work.num_tokens // QUERY_TILE) for work in prompts)
        if captured:
            buckets = TOKEN_BUCKETS if prompts else DECODE_BUCKETS
            most = self.max_tokens if prompts else self.max_rows
            size = next((b for b in buckets if tokens <= b < most), most)
            layout = self.prompts(size) if prompts else self.decodes(size)
            fits = samples <= layout.samples and len(singles) <= layout.decodes
            if fits and len(prompts) <= layout.prefills and tiles <= layout.tiles:
                return self._by_context(layout, singles)
        return self._by_context(self.exact(tokens, len(singles), len(prompts), max(1, samples), tiles), singles)

    def template(self, layout: Layout) -> np.ndarray:
        """Return the meta of a step of padding only."""
        if layout not in self._templates:
            template = np.zeros(layout.size, dtype=np.int32)
            padding = self.max_rows
            for name, value in (
                ("sources", -1), ("tiles", -1), ("rows", padding), ("table_rows", padding), ("token_rows", padding),
            ):  # fmt: skip
                template[layout.slice(name)] = value
            if layout.queries:
                template[layout.slice("leaders")] = np.arange(layout.tokens)
            template[layout.slice("top_p")].view(np.float32)[:] = 1.0
            if len(self._templates) > MOST_TEMPLATES:
                self._templates.clear()
            self._templates[layout] = template
        return self._templates[layout]
