"""A step's arithmetic on a GPU: the transformer over fixed buffers, without allocation, so that it can be captured as a
graph. The runner owns one `Forward`; the weights are those of the Transformer that the layers use.

What the step is about arrives as one int32 array, `meta`, cut into named pieces by a `Layout`; a graph is captured per
layout. Padding tokens have id 0, length 0 and write to KV block 0, which nobody reads.

Shapes: T tokens, D decodes (one token each, the first of T), P prefills, L rows to sample, W blocks of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from typing import Any

import torch

from inlaid.kernels import attention_triton, fused_triton, lora_triton
from inlaid.kernels.arriving import Arriving
from inlaid.kernels.backend import AdapterPages, GemmInParts, Parts
from inlaid.kernels.sample_triton import Sampler
from inlaid.layers.attention import Attention
from inlaid.layers.linear import Linear
from inlaid.layers.norm import RMSNorm
from inlaid.model.transformer import Block, KVCache, Transformer

ALIGNMENT = 32  # of the pieces of meta, in elements: kernels are compiled for aligned addresses
QUERY_TILE = 64
SIDE_STREAM_ROWS = 16  # with fewer rows a shrink is shorter than the detour
PENDING_ROWS = 64  # with more rows an expansion of its own, which reads each adapter once, is faster
PARTS_ROWS = 256  # linears before a norm may leave it parts to add, where their backend finds that faster
PENDING_RANK = 32  # a norm has one program a row, which would read a larger B alone
NO_ADAPTERS, ATTENTION_ADAPTERS, ALL_ADAPTERS = 0, 1, 2  # which linears may have adapters in a step


@dataclass(frozen=True)
class Layout:
    """The sizes of a step, and where its pieces lie in meta."""

    tokens: int
    decodes: int
    prefills: int
    samples: int
    tiles: int
    segments: int
    block_rows: int

    @cached_property
    def pieces(self) -> dict[str, tuple[int, int]]:
        """Name -> [begin, end) in meta."""
        sequences = self.decodes + self.prefills
        sizes = {
            "ids": self.tokens,
            "sources": self.tokens,  # the row whose last token this is, or -1: the id above
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
            "temperature": self.samples,  # float32 from here
            "top_p": self.samples,
            "min_p": self.samples,
            "segments": 3 * self.segments,
            "order": self.tokens,
            "adapters": self.tokens,  # the slot of each row
        }
        placed, at = {}, 0
        for name, size in sizes.items():
            placed[name] = (at, at + size)
            at += -(-size // ALIGNMENT) * ALIGNMENT
        placed["end"] = (at, at)
        return placed

    @property
    def size(self) -> int:
        return self.pieces["end"][0]

    def view(self, meta: Any, name: str) -> Any:
        begin, end = self.pieces[name]
        return meta[begin:end]


class Forward:
    """Buffers for the largest step, and the step itself."""

    def __init__(
        self,
        model: Transformer,
        pages: AdapterPages,
        max_tokens: int,
        max_rows: int,
        max_blocks: int,
        max_rank: int,
        device: torch.device,
        dtype: torch.dtype,
        meta_size: int,
    ) -> None:
        spec = model.spec
        self.model, self.pages, self.device = model, pages, device
        self.max_rank = max_rank
        q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

        def buffer(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(*shape, dtype=kind, device=device)

        self.meta = buffer(meta_size, kind=torch.int32)
        self.tables = buffer(max_rows + 1, max_blocks, kind=torch.int32)  # by row; the last row is for padding
        self.step_tables = buffer(2 * max_rows, max_blocks, kind=torch.int32)
        self.last = buffer(max_rows + 1, kind=torch.int32)  # each row's newest token
        self.sampled = buffer(max_rows, kind=torch.int32)
        self.residual, self.x, self.y = (buffer(max_tokens, spec.hidden_size) for _ in range(3))
        self.parts = buffer(self._most_parts(max_tokens) * spec.hidden_size)  # instead of y
        self.qkv = buffer(max_tokens, q_width + 2 * kv_width)
        self.mixed = buffer(max_tokens, q_width)
        self.wide = buffer(max_tokens, 2 * spec.intermediate_size)
        self.narrow = buffer(max_tokens, spec.intermediate_size)
        self.hidden = buffer(max_rows, spec.hidden_size)
        self.logits = buffer(max_rows, spec.vocab_size)
        self.sampler = Sampler(max_rows, spec.vocab_size, device)
        count = max(rows * attention_triton.num_splits(rows, spec.num_kv_heads) for rows in range(1, max_rows + 1))
        self.attention_scratch = attention_triton.decode_scratch(count, spec.num_heads, spec.head_dim, 1, device)
        self.lora_scratch = buffer(self._lora_scratch_size(max_tokens), kind=torch.float32)
        self.cache: KVCache = []
        self.arriving: Arriving | None = None  # adapters of this step that are still coming; never in a captured one
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def views(self, layout: Layout) -> dict[str, torch.Tensor]:
        """The pieces of meta on the device."""
        found = {name: layout.view(self.meta, name) for name in layout.pieces if name != "end"}
        for name in ("temperature", "top_p", "min_p"):
            found[name] = found[name].view(torch.float32)
        found["tiles"] = found["tiles"].view(2, layout.tiles)
        return found

    def run(self, layout: Layout, adapters: int, blocks: Sequence[int] | None = None) -> None:
        """The whole step: from meta to sampled tokens; or with these blocks only, which says nothing but loads every
        kernel that they need."""
        self.layers(layout, adapters, blocks)
        views, count = self.views(layout), layout.samples
        spec, norm = self.model.spec, self.model.norm
        tokens = layout.tokens
        hidden, logits = self.hidden[:count], self.logits[:count]
        y, parts = self._before_norm(self.model.blocks[-1].down, tokens)
        fused_triton.norm(
            y, norm.weight, norm.eps, hidden, self.residual[:tokens], views["logit_rows"], keep=False, parts=parts
        )
        torch.mm(hidden, self.model.head.packed.weight_KN, out=logits)
        assert logits.shape[1] == spec.vocab_size
        self.sampler.sample(
            logits, views["temperature"], views["top_k"], views["top_p"], views["min_p"], views["keys"],
            views["drawn_at"], views["rows"], self.last, self.sampled[:count],
        )  # fmt: skip

    def kinds(self) -> list[int]:
        """Blocks that need between them every kernel that the model needs: the first of each kind, and the last."""
        blocks = self.model.blocks
        firsts: dict[Any, int] = {}
        for index, block in enumerate(blocks):
            firsts.setdefault(_kind(block), index)
        return sorted({*firsts.values(), len(blocks) - 1})

    def layers(self, layout: Layout, adapters: int, blocks: Sequence[int] | None = None) -> None:
        """Everything up to the last residual sum, whose two sides are left in `residual` and where the last block's
        product goes."""
        views, tokens = self.views(layout), layout.tokens
        model, rotary = self.model, self.model.rotary
        sequences = layout.decodes + layout.prefills
        fused_triton.gather_tables(
            self.tables, views["table_rows"], views["lengths"], self.step_tables[:sequences], self._page
        )
        segments = lora_triton.Segments(views["segments"], views["order"], layout.segments, layout.block_rows)
        slots = views["adapters"]
        in_attention, in_mlp = adapters >= ATTENTION_ADAPTERS, adapters >= ALL_ADAPTERS
        large = self.max_rank > PENDING_RANK
        residual, x = self.residual[:tokens], self.x[:tokens]
        blocks = range(len(model.blocks)) if blocks is None else blocks
        first = model.blocks[blocks[0]].attention_norm
        fused_triton.embed_norm(
            views["ids"], views["sources"], self.last, model.embedding.weight_VD, first.weight, first.eps, residual, x
        )
        for index, following in zip(blocks, [*blocks[1:], None], strict=True):
            block, (k_cache, v_cache) = model.blocks[index], self.cache[index]
            attention, last = block.attention, following is None
            norms = None
            if attention.q_norm is not None and attention.k_norm is not None:
                norms = (attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps)
            pending = self._linear(attention.qkv, x, self.qkv[:tokens], segments, slots, in_attention)
            fused_triton.rope_store(
                self.qkv[:tokens], views["positions"], views["slots"], rotary.cos, rotary.sin, k_cache, v_cache,
                attention.num_heads, norms, pending,
            )  # fmt: skip
            self._attend(layout, views, k_cache, v_cache, attention.window or 0)
            y, parts = self._before_norm(attention.output, tokens)
            pending = self._linear(attention.output, self.mixed[:tokens], y, segments, slots, in_attention, large)
            norm = block.mlp_norm
            fused_triton.norm(y, norm.weight, norm.eps, x, residual, pending=pending, parts=parts)
            pending = self._linear(block.gate_up, x, self.wide[:tokens], segments, slots, in_mlp)
            fused_triton.silu_mul(self.wide[:tokens], self.narrow[:tokens], pending)
            y, parts = self._before_norm(block.down, tokens)
            pending = self._linear(block.down, self.narrow[:tokens], y, segments, slots, in_mlp, last or large)
            if following is not None:
                norm = model.blocks[following].attention_norm
                fused_triton.norm(y, norm.weight, norm.eps, x, residual, pending=pending, parts=parts)

    def all_hidden(self, layout: Layout) -> torch.Tensor:
        """Normalized hidden states of every token, after `layers` (for prompt log probabilities)."""
        norm, tokens = self.model.norm, layout.tokens
        y, parts = self._before_norm(self.model.blocks[-1].down, tokens)
        x, residual = self.x[:tokens], self.residual[:tokens]
        fused_triton.norm(y, norm.weight, norm.eps, x, residual, keep=False, parts=parts)
        return x

    @property
    def _page(self) -> int:
        return self.cache[0][0].shape[1]

    def _attend(
        self, layout: Layout, views: dict[str, torch.Tensor], k_cache: torch.Tensor, v_cache: torch.Tensor, window: int
    ) -> None:
        spec, count = self.model.spec, layout.decodes
        heads = (spec.num_heads, spec.head_dim)
        q = self.qkv[: layout.tokens, : heads[0] * heads[1]].unflatten(1, heads)
        out = self.mixed[: layout.tokens].unflatten(1, heads)
        if count:
            attention_triton.decode(
                q[:count], k_cache, v_cache, self.step_tables[:count], views["lengths"][:count], out[:count],
                self.attention_scratch, attention_triton.num_splits(count, spec.num_kv_heads), window,
            )  # fmt: skip
        if layout.prefills:
            attention_triton.prefill(
                q, k_cache, v_cache, self.step_tables[count : count + layout.prefills], views["lengths"][count:],
                views["starts"], views["tiles"], out, window, block_m=QUERY_TILE,
            )  # fmt: skip

    def leaves_parts(self, layout: Layout) -> bool:
        """Whether norms may have parts to add, as many as they are compiled for."""
        return self.parts.numel() > 0 and layout.tokens <= PARTS_ROWS

    def _most_parts(self, max_tokens: int) -> int:
        """Rows of all parts that a product before a norm may have."""
        rows = range(1, min(PARTS_ROWS, max_tokens) + 1)
        blocks = [self.model.blocks[index] for index in self.kinds()]
        linears = [linear for block in blocks for linear in (block.attention.output, block.down)]
        found = ((count, _parts_of(linear, count)) for linear in linears for count in rows)
        return max((count * parts.most for count, parts in found if parts is not None), default=0)

    def _before_norm(self, linear: Linear, rows: int) -> tuple[torch.Tensor, Parts | None]:
        """Where a product goes that a norm reads, and how it lies there."""
        parts, width = _parts_of(linear, rows), linear.out_features
        if parts is None or parts.most * rows * width > self.parts.numel():  # on fewer multiprocessors they may be more
            return self.y[:rows], None
        return self.parts[: parts.most * rows * width].view(parts.most, rows, width), parts

    def _linear(
        self,
        linear: Linear,
        x: torch.Tensor,
        out: torch.Tensor,
        segments: lora_triton.Segments,
        slots: torch.Tensor,
        adapted: bool,
        at_once: bool = False,
    ) -> lora_triton.Pending | None:
        """Of few rows the adapters' part is left to whoever reads `out`, unless it is wanted at once. Where `out` has
        several parts, what is added is added to the first."""
        whole, out = out, out if out.dim() == 2 else out[0]
        site, jobs = linear.site if adapted else None, []
        if site is not None:
            if self.arriving is not None:
                jobs = self.arriving.before(x, site)
            tuning = lora_triton.tuning_for(x.shape[0], segments.block_rows, self.max_rank)
            partial = self._partial(x.shape[0], tuning.parts, len(site.widths))
            beside = self._side if x.shape[0] >= SIDE_STREAM_ROWS else None
            if beside is not None:
                beside.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(beside):  # beside the base weights, which read the same x
                lora_triton.shrink(x, self.pages, segments, partial, site, tuning, alone=beside is None)
        if len(linear.parts) == 1:
            backend, packed = linear.parts[0]
            if whole.dim() == 2:
                backend.gemm(x, packed, out)
            else:
                assert isinstance(backend, GemmInParts)
                backend.gemm_in_parts(x, packed, whole)
        else:  # siblings that could not be fused: each into memory of its own, then into place
            start = 0
            for backend, packed in linear.parts:
                part = out.new_empty(x.shape[0], packed.out_features)
                backend.gemm(x, packed, part)
                out[:, start : start + packed.out_features].copy_(part)
                start += packed.out_features
        if linear.bias_N is not None:
            out.add_(linear.bias_N)
        if site is None:
            return None
        if beside is not None:
            torch.cuda.current_stream(self.device).wait_stream(beside)
        if self.arriving is not None:
            self.arriving.after(jobs, out)
        if x.shape[0] <= PENDING_ROWS and not at_once:
            return lora_triton.Pending(partial, self.pages, slots, site, tuning, joins=beside is not None)
        lora_triton.expand_add(partial, self.pages, segments, out, site, tuning)
        return None

    def _partial(self, rows: int, parts: int, siblings: int) -> torch.Tensor:
        stride = -(-self.max_rank // 16) * 16
        return self.lora_scratch[: parts * siblings * rows * stride].view(parts, siblings, rows, stride)

    def _lora_scratch_size(self, max_tokens: int) -> int:
        stride = -(-self.max_rank // 16) * 16
        rows = (min(8, max_tokens), min(256, max_tokens), max_tokens)
        parts = [lora_triton.tuning_for(count, block_rows_for(count), self.max_rank).parts for count in rows]
        return max(3 * p * count * stride for p, count in zip(parts, rows, strict=True))


def _parts_of(linear: Linear, rows: int) -> Parts | None:
    """How a product lies that a norm reads; None: whole."""
    if rows > PARTS_ROWS or len(linear.parts) > 1:
        return None
    backend, packed = linear.parts[0]
    return backend.parts(packed, rows) if isinstance(backend, GemmInParts) else None


def block_rows_for(tokens: int) -> int:
    """Rows of an adapter segment: prompts are cut coarser."""
    return 16 if tokens <= 256 else 64


def _kind(part: Any) -> Any:
    """What decides which kernels a part of the model needs: types, shapes and settings, not values."""
    if isinstance(part, torch.Tensor):
        return part.dtype, tuple(part.shape), part.stride()
    if isinstance(part, (tuple, list)):
        return tuple(map(_kind, part))
    if isinstance(part, (Block, Attention, Linear, RMSNorm)) or is_dataclass(part):
        names = [name for name in sorted(vars(part)) if name not in ("kernels", "lora", "site")]
        return type(part), tuple(_kind(getattr(part, name)) for name in names)
    return part if isinstance(part, (int, float, str, type(None))) else type(part)
