"""The specification of every kernel in plain torch, and the kernels of a machine without a GPU. Exact first; quick
where that costs no clarity. Shape letters are those of backend.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from inlaid.checkpoint import QuantizedLinear, QuantSpec, dequantize
from inlaid.kernels.backend import MODULES, AdapterPages, Kernels, Site

if TYPE_CHECKING:
    from inlaid.kernels.context import StepContext


@dataclass(frozen=True)
class DensePacked:
    """A weight in the compute type, [K, N]; on a GPU it is a view of the stored [N, K]."""

    weight_KN: torch.Tensor

    @property
    def in_features(self) -> int:
        return self.weight_KN.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight_KN.shape[1]


class DenseLinear:
    """x @ W.T with W in the compute type: unquantized weights, and the output head."""

    name = "dense"

    def pack(self, weight_NK: torch.Tensor) -> DensePacked:
        """A CPU reads [K, N] a third faster when there is one row; a GPU does not care and shares tied weights."""
        return DensePacked(weight_NK.t().contiguous() if weight_NK.device.type == "cpu" else weight_NK.t())

    def warmup(self, packed: DensePacked, rows: Sequence[int]) -> None:
        pass

    def gemm(self, x_TK: torch.Tensor, packed: DensePacked, out_TN: torch.Tensor) -> None:
        torch.mm(x_TK, packed.weight_KN, out=out_TN)


DENSE = DenseLinear()


class ReferenceLinear(DenseLinear):
    """Quantized weights, dequantized once at load and multiplied in the compute type: any bits, group and order."""

    name = "reference"

    def why_not(self, spec: QuantSpec, device: torch.device) -> str | None:
        return None

    def prepare(self, weight: QuantizedLinear, device: torch.device, dtype: torch.dtype) -> DensePacked:
        return DensePacked(dequantize(weight).to(device=device, dtype=dtype))


class ReferenceOps:
    """The small operations."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, weight.shape, weight, eps)
        return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps)

    def rotate(self, x_THC: torch.Tensor, cos_TC: torch.Tensor, sin_TC: torch.Tensor) -> None:
        half = x_THC.shape[-1] // 2
        turned = torch.cat((-x_THC[..., half:], x_THC[..., :half]), dim=-1)
        x_THC.mul_(cos_TC[:, None]).addcmul_(turned, sin_TC[:, None])

    def silu_mul(self, x_T2F: torch.Tensor) -> torch.Tensor:
        gate, up = x_T2F.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def store_kv(
        self,
        k_TGC: torch.Tensor,
        v_TGC: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> None:
        k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slots_T, k_TGC)
        v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slots_T, v_TGC)


_SPARE_BLOCKS = 2  # read beyond the longest decode, so that a few more steps fit into what was gathered

_MOST_KEPT = 16 << 20  # bytes per cache tensor that the decodes of the step before may keep gathered
_SIDE_BY_SIDE = 24_000  # rows times columns up to which adapters are multiplied side by side


@dataclass
class _AttentionPlan:
    """Which blocks the decodes read and how far, each longer query's share, and masks by window. `gathered` holds
    the decodes' keys and values by cache, [S, G, decode_len, C]; `newest` is where in them the latest token goes."""

    decode_blocks: torch.Tensor | None
    decode_len: int
    gathered: dict[int, torch.Tensor]
    newest: tuple[torch.Tensor, torch.Tensor] | None
    chunks: list[_Chunk]
    decode_masks: dict[int | None, torch.Tensor] = field(default_factory=dict)


@dataclass
class _Chunk:
    """Query tokens [first, first + num_queries) of T, over a context of `context_len` tokens in `blocks`."""

    first: int
    num_queries: int
    context_len: int
    blocks: torch.Tensor
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)


class ReferenceAttention:
    """Decodes as one padded batch, longer queries one by one.

    While the same sequences decode on, their gathered keys and values are kept and only the newest token is added: on
    a CPU reading the pages anew each step takes as long as attention itself."""

    def __init__(self) -> None:
        self._last: _AttentionPlan | None = None

    def plan(self, context: StepContext) -> None:
        decodes, size = context.num_decodes, context.block_size
        longest = max(context.context_lens[:decodes], default=0)
        chunks, first = [], decodes
        for row in range(decodes, len(context.query_lens)):
            num_queries, length = context.query_lens[row], context.context_lens[row]
            chunks.append(_Chunk(first, num_queries, length, context.block_tables_SB[row, : -(-length // size)]))
            first += num_queries
        last = self._last
        if context.decodes_go_on and last is not None and last.gathered and longest <= last.decode_len:
            rows = torch.arange(decodes, device=context.positions_T.device)
            self._last = _AttentionPlan(
                None, last.decode_len, last.gathered, (rows, context.positions_T[:decodes]), chunks
            )
        else:
            num_blocks = -(-longest // size) if longest else 0
            blocks = _wider(context.block_tables_SB[:decodes], num_blocks + _SPARE_BLOCKS) if decodes else None
            width = (num_blocks + _SPARE_BLOCKS) * size
            self._last = _AttentionPlan(blocks, width, {}, None, chunks)
        context.attention_plan = self._last

    def attend(
        self,
        q_THC: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        window: int | None,
        context: StepContext,
    ) -> torch.Tensor:
        plan: _AttentionPlan = context.attention_plan
        decodes = context.num_decodes
        if not plan.chunks:
            return self._decode(q_THC, k_cache, v_cache, window, context)
        out_THC = q_THC.new_empty(q_THC.shape)
        if decodes:
            out_THC[:decodes] = self._decode(q_THC[:decodes], k_cache, v_cache, window, context)
        for chunk in plan.chunks:
            rows = slice(chunk.first, chunk.first + chunk.num_queries)
            out_THC[rows] = _attend_chunk(q_THC[rows], k_cache, v_cache, window, chunk)
        return out_THC

    def _decode(
        self,
        q_SHC: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        window: int | None,
        context: StepContext,
    ) -> torch.Tensor:
        """A group's query heads stand where a sequence's queries would: they all see the same keys."""
        plan: _AttentionPlan = context.attention_plan
        S, H, C = q_SHC.shape
        G = k_cache.shape[2]
        if window not in plan.decode_masks:
            mask = _decode_mask(context.context_lens_S[:S], plan.decode_len, window, q_SHC.dtype)
            plan.decode_masks[window] = mask.repeat_interleave(G, dim=0).expand(-1, H // G, -1)
        k = _gathered(plan, k_cache, context.kv_slots_T[:S]).flatten(0, 1)
        v = _gathered(plan, v_cache, context.kv_slots_T[:S]).flatten(0, 1)
        q = q_SHC.reshape(S * G, H // G, C)
        scores = torch.baddbmm(plan.decode_masks[window], q, k.transpose(1, 2), alpha=C**-0.5)
        return torch.bmm(scores.softmax(dim=-1), v).view(S, H, C)


def _wider(table_SB: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The block table cut or padded with block 0 to a width, flat."""
    missing = num_blocks - table_SB.shape[1]
    table_SB = F.pad(table_SB, (0, missing)) if missing > 0 else table_SB[:, :num_blocks]
    return table_SB.reshape(-1)


def _gathered(plan: _AttentionPlan, cache: torch.Tensor, newest_slots_S: torch.Tensor) -> torch.Tensor:
    """The decodes' keys or values, side by side: kept from the step before and extended, or read from the pages."""
    key = cache.data_ptr()
    if plan.newest is not None:
        kept = plan.gathered[key]
        rows, positions = plan.newest
        kept[rows, :, positions] = cache.view(-1, *cache.shape[2:]).index_select(0, newest_slots_S)
        return kept
    assert plan.decode_blocks is not None
    read = cache.index_select(0, plan.decode_blocks).view(newest_slots_S.shape[0], plan.decode_len, *cache.shape[2:])
    read = read.transpose(1, 2).contiguous()
    if read.nbytes <= _MOST_KEPT:
        plan.gathered[key] = read
    return read


def _decode_mask(lens_S: torch.Tensor, length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[S, 1, length]: 0 where the newest token may look, -inf elsewhere."""
    keys = torch.arange(length, device=lens_S.device)
    hidden = keys >= lens_S[:, None]
    if window is not None:
        hidden |= keys < lens_S[:, None] - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=lens_S.device).masked_fill_(hidden, -torch.inf)
    return mask[:, None]


def _attend_chunk(
    q_QHC: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, window: int | None, chunk: _Chunk
) -> torch.Tensor:
    if window not in chunk.masks:
        chunk.masks[window] = _chunk_mask(chunk, window, q_QHC.device)
    H, G = q_QHC.shape[1], k_cache.shape[2]
    k, v = (
        cache.index_select(0, chunk.blocks).flatten(0, 1)[: chunk.context_len].transpose(0, 1)[None]
        for cache in (k_cache, v_cache)
    )
    mask = chunk.masks[window]
    out = F.scaled_dot_product_attention(
        q_QHC.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=H != G
    )
    return out[0].transpose(0, 1)


def _chunk_mask(chunk: _Chunk, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[queries, context] of what may be seen; None stands for plain causal from the first token."""
    if chunk.num_queries == chunk.context_len and (window is None or window >= chunk.context_len):
        return None
    keys = torch.arange(chunk.context_len, device=device)
    queries = keys[chunk.context_len - chunk.num_queries :, None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


@dataclass
class _Group:
    """Adapters of about the same size side by side: per site A as [n, K, R] and B, scaled, as [n, R, N], made on
    demand, None where none of them acts. R is the largest sum of sibling ranks among them."""

    slots: tuple[int, ...]
    matrices: dict[int, tuple[torch.Tensor, torch.Tensor] | None] = field(default_factory=dict)


@dataclass
class _Stack:
    """The groups of the adapters at work, and what they were made from."""

    slots: tuple[int, ...]
    versions: tuple[int, ...]
    groups: list[_Group]
    num_columns: int  # of all of them side by side, where they have the most
    sites: dict[int, _Site | None] = field(default_factory=dict)


@dataclass
class _Rows:
    """The rows of T that a group adapts. Padded: `gather` lists rows [adapters, most rows] and `results` says where
    each of `rows` stands in that; or, when padding would cost more than it saves, (adapter, rows) segments."""

    group: _Group
    gather: torch.Tensor | None
    rows: torch.Tensor
    results: torch.Tensor
    segments: list[tuple[int, torch.Tensor]]


@dataclass
class _Site:
    """All adapters at work side by side at one site: A as [K, W], each column's scale and the slot that it belongs to,
    and for each sibling its columns [of W], its outputs and B as [columns, outputs]."""

    a_KW: torch.Tensor
    scale_W: torch.Tensor
    owner_W: torch.Tensor
    siblings: list[tuple[slice, slice, torch.Tensor]]


@dataclass
class _SideBySide:
    """Few rows: one matmul with the A of every adapter at work costs less than gathering the rows of each. `hidden`, by
    site: the products of a row with adapters that are not its own."""

    stack: _Stack
    slots_T: torch.Tensor
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)


_Plan = list[_Rows] | _SideBySide
_Shrunk = list[tuple[_Rows, torch.Tensor, list[torch.Tensor]]]  # rows, B, products with A


class ReferenceLora:
    """Two batched matmuls a site and group over the adapters at work, stacked once per set of adapters; of few rows and
    adapters, plain matmuls with all adapters side by side."""

    def __init__(self, pages: AdapterPages, side_by_side: int = _SIDE_BY_SIDE) -> None:
        self.pages = pages
        self._most_side_by_side = side_by_side if pages.pool.dtype == torch.float32 else -1
        self._stack = _Stack((), (), [], 0)
        self._last: tuple[object, _Plan] = (None, [])

    def plan(self, context: StepContext) -> None:
        if not context.has_adapters:
            return
        stack = self._stack_for({slot for slot in context.adapter_slots if slot})
        key = (stack.slots, stack.versions, context.adapter_slots, context.query_lens)
        if self._last[0] != key:
            self._last = (key, self._plan(stack, context))
        context.lora_plan = self._last[1]

    def _plan(self, stack: _Stack, context: StepContext) -> _Plan:
        device = context.positions_T.device
        if context.num_tokens * stack.num_columns <= self._most_side_by_side:
            slots = np.repeat(np.array(context.adapter_slots), context.query_lens)
            return _SideBySide(stack, torch.from_numpy(slots).to(device))
        rows_of = _rows_by_slot(context)
        plans = [_plan_rows(group, rows_of, device) for group in stack.groups]
        return [plan for plan in plans if plan is not None]

    def shrink(self, x_TK: torch.Tensor, site: Site, context: StepContext) -> _Shrunk | torch.Tensor | None:
        if isinstance(context.lora_plan, _SideBySide):
            return self._shrink_side_by_side(x_TK, site, context.lora_plan)
        shrunk: _Shrunk = []
        for plan in context.lora_plan:
            group = plan.group
            if site.first not in group.matrices:
                group.matrices[site.first] = _stack_site(self.pages, group.slots, site, x_TK.shape[1])
            matrices = group.matrices[site.first]
            if matrices is None:
                continue
            a_nKR, b_nRN = matrices
            if plan.gather is not None:
                x_nMK = x_TK.index_select(0, plan.gather).view(len(group.slots), -1, x_TK.shape[1])
                parts = [torch.bmm(x_nMK, a_nKR)]
            else:
                parts = [x_TK.index_select(0, rows) @ a_nKR[index] for index, rows in plan.segments]
            shrunk.append((plan, b_nRN, parts))
        return shrunk

    def _shrink_side_by_side(self, x_TK: torch.Tensor, site: Site, plan: _SideBySide) -> torch.Tensor | None:
        """Products with other rows' adapters are struck out, not multiplied by zero: they may be infinite."""
        sites = plan.stack.sites
        if site.first not in sites:
            sites[site.first] = _side_by_side(self.pages, plan.stack.slots, site, x_TK.shape[1])
        matrices = sites[site.first]
        if matrices is None:
            return None
        if site.first not in plan.hidden:
            plan.hidden[site.first] = plan.slots_T[:, None] != matrices.owner_W
        return (x_TK @ matrices.a_KW).mul_(matrices.scale_W).masked_fill_(plan.hidden[site.first], 0.0)

    def expand(
        self, shrunk: _Shrunk | torch.Tensor | None, site: Site, out_TN: torch.Tensor, context: StepContext
    ) -> None:
        if isinstance(context.lora_plan, _SideBySide):
            matrices = context.lora_plan.stack.sites[site.first]
            if matrices is not None:
                assert isinstance(shrunk, torch.Tensor)
                for columns, outputs, b_WN in matrices.siblings:
                    out_TN[:, outputs].addmm_(shrunk[:, columns], b_WN)
            return
        assert isinstance(shrunk, list)
        for plan, b_nRN, parts in shrunk:
            if plan.gather is not None:
                delta = torch.bmm(parts[0], b_nRN).flatten(0, 1).index_select(0, plan.results)
                out_TN.index_add_(0, plan.rows, delta)
                continue
            for (index, rows), part in zip(plan.segments, parts, strict=True):
                out_TN.index_add_(0, rows, part @ b_nRN[index])

    def _stack_for(self, active: set[int]) -> _Stack:
        """Keep the last stack while it is current, holds all that is active and not much more."""
        stack, versions = self._stack, self.pages.versions
        current = stack.versions == tuple(versions[slot] for slot in stack.slots)
        if not current or not active.issubset(stack.slots) or len(stack.slots) > max(4, 2 * len(active)):
            slots = tuple(sorted(active))
            columns = _num_columns(self.pages, slots)
            self._stack = _Stack(slots, tuple(versions[slot] for slot in slots), _group(self.pages, slots), columns)
        return self._stack


def _group(pages: AdapterPages, slots: tuple[int, ...]) -> list[_Group]:
    """By size within a factor of two, and those that leave the MLP alone apart: then stacking wastes little, and the
    groups stay few (finer groups were slower)."""
    ranks = pages.table[list(slots), :, 2].view(len(slots), -1, len(MODULES)).amax(dim=1).tolist()
    groups: dict[tuple[bool, int], list[int]] = {}
    for slot, by_module in zip(slots, ranks, strict=True):
        groups.setdefault((any(by_module[4:]), sum(by_module).bit_length()), []).append(slot)
    return [_Group(tuple(members)) for members in groups.values()]


def _num_columns(pages: AdapterPages, slots: tuple[int, ...]) -> int:
    """The most that q, k and v, or gate and up, come to, whatever is fused."""
    ranks = pages.table[list(slots), :, 2].sum(dim=0).view(-1, len(MODULES))
    return int(torch.stack([ranks[:, :3].sum(dim=1), ranks[:, 4:6].sum(dim=1), ranks.amax(dim=1)]).max())


def _side_by_side(pages: AdapterPages, slots: tuple[int, ...], site: Site, in_features: int) -> _Site | None:
    a, scales, owners, siblings = [], [], [], []
    first = output = 0
    for sibling, width in enumerate(site.widths):
        b = []
        for slot in slots:
            a_start, b_start, rank = pages.table[slot, site.first + sibling].tolist()
            if rank:
                a.append(pages.pool[a_start : a_start + rank * in_features].view(rank, in_features))
                b.append(pages.pool[b_start : b_start + width * rank].view(width, rank).t())
                scales.append(pages.scale[slot, site.first + sibling].expand(rank))
                owners += [slot] * rank
        if b:
            last = len(owners)
            siblings.append((slice(first, last), slice(output, output + width), torch.cat(b).contiguous()))
            first = last
        output += width
    if not siblings:
        return None
    owner_W = torch.tensor(owners, device=pages.pool.device)
    return _Site(torch.cat(a).t().contiguous(), torch.cat(scales).to(pages.pool.dtype), owner_W, siblings)


def _rows_by_slot(context: StepContext) -> dict[int, list[int]]:
    rows_of: dict[int, list[int]] = {}
    row = 0
    for slot, length in zip(context.adapter_slots, context.query_lens, strict=True):
        rows_of.setdefault(slot, []).extend(range(row, row + length))
        row += length
    return rows_of


def _plan_rows(group: _Group, rows_of: dict[int, list[int]], device: torch.device) -> _Rows | None:
    mine = [(index, rows_of[slot]) for index, slot in enumerate(group.slots) if slot in rows_of]
    if not mine:
        return None
    num_rows, widest = sum(len(rows) for _, rows in mine), max(len(rows) for _, rows in mine)
    empty = torch.empty(0, dtype=torch.int64, device=device)
    if widest * len(group.slots) > 2 * num_rows + 16:
        segments = [(index, torch.tensor(rows, device=device)) for index, rows in mine]
        return _Rows(group, None, empty, empty, segments)
    placed = sorted((row, index * widest + place) for index, rows in mine for place, row in enumerate(rows))
    rows, results = (torch.tensor(column) for column in zip(*placed, strict=True))
    gather = torch.zeros(len(group.slots) * widest, dtype=torch.int64)
    gather[results] = rows
    return _Rows(group, gather.to(device), rows.to(device), results.to(device), [])


def _stack_site(
    pages: AdapterPages, slots: tuple[int, ...], site: Site, in_features: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    table = pages.table[list(slots), site.first : site.first + len(site.widths)].tolist()
    scale = pages.scale[list(slots), site.first : site.first + len(site.widths)].tolist()
    width = max(sum(rank for _, _, rank in entries) for entries in table)
    if width == 0:
        return None
    a_nKR = pages.pool.new_zeros(len(slots), in_features, width)
    b_nRN = pages.pool.new_zeros(len(slots), width, sum(site.widths))
    for n, entries in enumerate(table):
        column = start = 0
        for sibling, (a_start, b_start, rank) in enumerate(entries):
            N = site.widths[sibling]
            a = pages.pool[a_start : a_start + rank * in_features].view(rank, in_features)
            b = pages.pool[b_start : b_start + N * rank].view(N, rank)
            a_nKR[n, :, column : column + rank] = a.t()
            b_nRN[n, column : column + rank, start : start + N] = b.t() * scale[n][sibling]
            column, start = column + rank, start + N
    return a_nKR, b_nRN


def reference_kernels(pages: AdapterPages | None = None) -> Kernels:
    """Every kernel in plain torch."""
    lora = ReferenceLora(pages) if pages is not None else None
    return Kernels(quantized=(ReferenceLinear(),), attention=ReferenceAttention(), ops=ReferenceOps(), lora=lora)
