# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
"""Adapter kernels for a GPU: y += scale * (x A^T) B^T, each row with its own adapter, each adapter at its own rank.

The runner calls `write_segments` once a step on the host; `TritonLora` calls `shrink` and `expand_add` at every adapted
linear. Weights lie unpadded in one flat pool; `table[slot, site] = (A offset, B offset, rank)` says where. Rows are cut
into segments of one slot, so a weight is read once per segment; rows of slot 0 are in no segment and cost nothing. With
few rows the expansion may be left (`Pending`) to the kernel that reads y next, which saves a launch and a pass over y:
`pending_part` is what such a kernel (fused_triton.py) adds to its columns of a row. K is split over programs whose
partial sums go to fp32 scratch and are added in a fixed order: no atomics, so the same batch gives the same bits.

Arguments that the kernels share:
  pool            [elements] of the compute type: every A [rank, K] and B [N, rank], row-major
  table           int64 [slots, num_sites, 3]: offset of A, offset of B, rank; offsets are multiples of ALIGN
  scale           fp32 [slots, num_sites]
  segments        int32 [3 * capacity]: start in `order`, length (0: unused), slot
  order           int32 [T]: rows, those of a segment side by side
  partial         fp32 [P, G, T, R_STRIDE]: sums over a P-th of K; `partial_stride` = T * R_STRIDE
  site            the first of the G siblings' sites
Dividing an offset by its alignment and multiplying again tells the compiler that loads may be wide.

Shapes: T rows, K inputs, N outputs, S segments, G siblings (linears sharing x: q, k, v), P partial sums, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl

from inlaid.kernels.backend import AdapterPages, Site, Workspace
from inlaid.kernels.early import early

if TYPE_CHECKING:
    from inlaid.kernels.context import StepContext

PENDING_RANK = 32  # a reader with one program a row would read a larger B alone
OFFSET_ALIGNMENT = 8  # elements; the pool's owner starts every matrix at a multiple of this


@triton.jit
def _shrink_rank_block(
    x_rows, row_mask, a_base, partial_rows, rank, r0, k_begin, k_end,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Set partial[m, r0 : r0 + BLOCK_R] = sum over k in [k_begin, k_end) of x[m, k] A[r, k], in fp32.

    x_rows: [BLOCK_M] pointers to rows of x. row_mask: [BLOCK_M], rows of the segment. a_base: pointer to A [rank, K].
    partial_rows: [BLOCK_M] pointers to rows of `partial`. Ranks from `rank` up are not written."""
    r = r0 + tl.arange(0, BLOCK_R)
    k_lane = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    a_rows = a_base + r[:, None] * K
    for k0 in range(k_begin, k_end, BLOCK_K):
        k = k0 + k_lane
        if K % BLOCK_K == 0:
            x_MK = tl.load(x_rows[:, None] + k[None, :], mask=row_mask[:, None], other=0.0)
            a_RK = tl.load(a_rows + k[None, :], mask=r[:, None] < rank, other=0.0)
        else:
            inside = k[None, :] < K
            x_MK = tl.load(x_rows[:, None] + k[None, :], mask=row_mask[:, None] & inside, other=0.0)
            a_RK = tl.load(a_rows + k[None, :], mask=(r[:, None] < rank) & inside, other=0.0)
        acc = tl.dot(x_MK, tl.trans(a_RK), acc)
    tl.store(partial_rows[:, None] + r[None, :], acc, mask=row_mask[:, None] & (r[None, :] < rank))


@triton.jit(do_not_specialize=["site", "capacity"])
def _shrink_kernel(
    x, x_stride, pool, table, segments, order, partial, partial_stride, capacity, num_sites, site,
    K: tl.constexpr, G: tl.constexpr, P: tl.constexpr, R_STRIDE: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ALIGN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """partial[p, g, t, :rank] = x[t, part p of K] A^T for the rows t of each segment and each sibling g.
    Grid: (capacity, P, siblings * SHARES).

    x: [T, K], rows `x_stride` elements apart. BLOCK_M: rows of a segment, at most. SHARES: programs that divide the
    blocks of BLOCK_R ranks among them, as the largest rank sets the time.

    Parts of K are whole multiples of BLOCK_K, the last one is shorter or empty; an empty part writes zeros. A program
    is short and each wait counts, so loads that do not depend on each other stand together ahead of the branch."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    segment = tl.program_id(0)
    part = tl.program_id(1)
    sibling = tl.program_id(2) // SHARES
    share = tl.program_id(2) % SHARES  # programs that divide the blocks of a large rank among them
    start = tl.load(segments + segment)
    length = tl.load(segments + capacity + segment)
    slot = tl.load(segments + 2 * capacity + segment).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    row_mask = m < length
    rows = tl.load(order + start + m, mask=row_mask, other=0).to(tl.int64)
    entry = table + (slot * num_sites + site + sibling) * 3
    rank = tl.load(entry + 2).to(tl.int32)
    a_offset = tl.load(entry)
    if length > 0:
        a_base = pool + (a_offset // ALIGN) * ALIGN  # the division tells the compiler of the alignment
        span = tl.cdiv(tl.cdiv(K, P), BLOCK_K) * BLOCK_K
        k_begin = part * span
        k_end = tl.minimum(k_begin + span, K)
        partial_rows = partial + (part * G + sibling) * partial_stride + rows * R_STRIDE
        for r0 in range(share * BLOCK_R, rank, SHARES * BLOCK_R):
            _shrink_rank_block(
                x + rows * x_stride, row_mask, a_base, partial_rows, rank, r0, k_begin, k_end,
                K, BLOCK_K, BLOCK_M, BLOCK_R,
            )  # fmt: skip


@triton.jit
def _expand_tile(
    partial_rows, partial_step, row_mask, b_base, rank, n, n_mask,
    P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return, in fp32 [BLOCK_M, BLOCK_N], the sum over r of (sum over p of partial[p, m, r]) B[n, r].

    partial_rows: [BLOCK_M] pointers to part 0. partial_step: elements from part to part. b_base: pointer to B
    [N, rank]. n: [BLOCK_N] columns. The inner sum is scaled down to the range of 16-bit floats for the matrix units,
    row by row, and the product scaled up again."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    r_lane = tl.arange(0, BLOCK_R)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + r_lane
        mask = row_mask[:, None] & (r[None, :] < rank)
        s_MR = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for p in tl.static_range(P):
            s_MR += tl.load(partial_rows[:, None] + p * partial_step + r[None, :], mask=mask, other=0.0)
        b_NR = tl.load(b_base + n[:, None] * rank + r[None, :], mask=n_mask[:, None] & (r[None, :] < rank), other=0.0)
        largest = tl.maximum(tl.max(tl.abs(s_MR), axis=1) * (1.0 / 16384.0), 1.0)
        down = (s_MR / largest[:, None]).to(b_NR.dtype)
        acc += tl.dot(down, tl.trans(b_NR)) * largest[:, None]
    return acc


@triton.jit(do_not_specialize=["site", "capacity"])
def _expand_kernel(
    partial, partial_stride, pool, table, scale, segments, order, y, y_stride, capacity, num_sites, site,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, G: tl.constexpr, P: tl.constexpr, R_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """y[t, columns of sibling g] += scale * (sum over p of partial[p, g, t]) B^T for the rows t of each segment.
    Grid: (capacity, blocks of BLOCK_N columns of all siblings).

    y: [T, N0 + N1 + N2], rows `y_stride` elements apart; N0, N1, N2 are the widths of the siblings, 0 for none.

    y is read, summed in fp32 and rounded once. A rank that is a multiple of 8 takes wide loads: the row stride of B is
    then a multiple of 16 bytes."""
    segment = tl.program_id(0)
    block = tl.program_id(1)
    start = tl.load(segments + segment)
    length = tl.load(segments + capacity + segment)
    slot = tl.load(segments + 2 * capacity + segment).to(tl.int64)
    blocks0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    blocks1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
    sibling = (block >= blocks0).to(tl.int32) + (block >= blocks0 + blocks1).to(tl.int32)
    first_block = tl.where(sibling == 0, 0, tl.where(sibling == 1, blocks0, blocks0 + blocks1))
    first_column = tl.where(sibling == 0, 0, tl.where(sibling == 1, N0, N0 + N1))
    width = tl.where(sibling == 0, N0, tl.where(sibling == 1, N1, N2))
    m = tl.arange(0, BLOCK_M)
    row_mask = m < length
    rows = tl.load(order + start + m, mask=row_mask, other=0).to(tl.int64)
    entry = table + (slot * num_sites + site + sibling) * 3
    rank = tl.load(entry + 2).to(tl.int32)
    b_offset = tl.load(entry + 1)
    factor = tl.load(scale + slot * num_sites + site + sibling)
    if (length > 0) & (rank > 0):
        n = (block - first_block) * BLOCK_N + tl.arange(0, BLOCK_N)
        n_mask = n < width
        target = y + rows[:, None] * y_stride + (first_column + n)[None, :]
        mask = row_mask[:, None] & n_mask[None, :]
        base = tl.load(target, mask=mask, other=0.0)
        b_base = pool + (b_offset // ALIGN) * ALIGN
        partial_rows = partial + sibling * partial_stride + rows * R_STRIDE
        if rank % 8 == 0:  # wide loads
            acc = _expand_tile(
                partial_rows, G * partial_stride, row_mask, b_base, (rank // 8) * 8, n, n_mask,
                P, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        else:
            acc = _expand_tile(
                partial_rows, G * partial_stride, row_mask, b_base, rank, n, n_mask,
                P, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        tl.store(target, (base.to(tl.float32) + acc * factor).to(base.dtype), mask=mask)


@triton.jit
def _row_times(partial_row, part_step, b_base, rank, n, n_mask, P: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return, in fp32, the sum over r of (sum over p of partial[p, r]) B[n, r] for one row, without matrix units.

    partial_row: pointer to part 0 of the row. part_step: elements from part to part. b_base: pointer to B [N, rank].
    n: columns, with their mask."""
    acc = tl.zeros(n.shape, dtype=tl.float32)
    r_lane = tl.arange(0, BLOCK_R)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + r_lane
        b_NR = tl.load(b_base + n[:, None] * rank + r[None, :], mask=n_mask[:, None] & (r[None, :] < rank), other=0.0)
        s_R = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for p in tl.static_range(P):
            s_R += tl.load(partial_row + p * part_step + r, mask=r < rank, other=0.0)
        acc += tl.sum(b_NR.to(tl.float32) * s_R[None, :], axis=1)
    return acc


@triton.jit
def pending_part(
    row, sibling, n, n_mask, partial, partial_stride, pool, table, scale, slots, num_sites, site,
    G: tl.constexpr, P: tl.constexpr, R_STRIDE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return scale * (sum over p of partial[p, sibling, row]) B[n]^T for columns n of one row, in fp32; zeros without
    adapter.

    row: of T. sibling: of G. n: columns within the sibling, with their mask. slots: int32 [T], the adapter slot of each
    row. The value depends on this row alone, whatever else is in the step."""
    entry = tl.load(slots + row).to(tl.int64) * num_sites + site + sibling
    rank = tl.load(table + entry * 3 + 2).to(tl.int32)
    b_base = pool + (tl.load(table + entry * 3 + 1) // 8) * 8  # the division tells the compiler of the alignment
    partial_row = partial + sibling * partial_stride + row.to(tl.int64) * R_STRIDE
    if rank % 8 == 0:  # wide loads
        acc = _row_times(partial_row, G * partial_stride, b_base, (rank // 8) * 8, n, n_mask, P, BLOCK_R)
    else:
        acc = _row_times(partial_row, G * partial_stride, b_base, rank, n, n_mask, P, BLOCK_R)
    return acc * tl.load(scale + entry)


@dataclass(frozen=True)
class Tuning:
    """Block shapes of a launch. `parts`: programs that share the inner dimension of one shrink."""

    parts: int
    block_k: int
    block_n: int
    block_r: int = 16
    shares: int = 1  # programs for the rank of one adapter
    shrink_warps: int = 4
    expand_warps: int = 4
    shrink_stages: int = 3


def tuning_for(rows: int, block_rows: int, max_rank: int = 16) -> Tuning:
    """Return the tuning as measured: few rows need many programs per segment to fill the chip, many fill it anyway."""
    block_r = 16 if max_rank <= 16 else 32
    shares = min(4, triton.cdiv(max_rank, block_r))  # a program to each block of a rank: the largest sets the time
    if block_rows > 16:
        return Tuning(parts=8, block_k=64, block_n=128, block_r=block_r, shares=shares)
    if rows <= 8:
        return Tuning(parts=16, block_k=256, block_n=128, block_r=block_r, shares=shares, shrink_stages=2)
    return Tuning(parts=4, block_k=128, block_n=256, block_r=block_r, shares=shares, shrink_warps=2, shrink_stages=4)


def max_segments(rows: int, max_slots: int, block_rows: int) -> int:
    """Return a bound on the segments of `rows` rows in at most two sorted runs over `max_slots` adapters."""
    return max(1, min(rows, rows // block_rows + 2 * max_slots))


def cut(slots: np.ndarray, block_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of the adapted rows, and segments [3, S] of (start in that order, length, slot), int32."""
    order = np.argsort(slots, kind="stable").astype(np.int32)
    order = order[int(np.count_nonzero(slots == 0)) :]
    ordered = slots[order]
    if not len(order):
        return order, np.zeros((3, 0), np.int32)
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    counts = np.diff(first, append=len(ordered))
    pieces = -(-counts // block_rows)
    run = np.repeat(np.arange(len(first)), pieces)
    within = (np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * block_rows
    lengths = np.minimum(block_rows, counts[run] - within)
    return order, np.stack([first[run] + within, lengths, ordered[first[run]]]).astype(np.int32)


@dataclass(frozen=True)
class Segments:
    """The rows of each adapter, on the device, in arrays of fixed size so that a captured graph serves every mix.

    `segments` [3 * capacity] are starts, lengths (zero: unused) and slots, counted in `order`, which lists rows."""

    segments: torch.Tensor
    order: torch.Tensor
    capacity: int
    block_rows: int


def write_segments(slots: np.ndarray, segments: np.ndarray, order: np.ndarray, block_rows: int) -> None:
    """Write the segments of rows with these slots into host arrays that say "unused" everywhere."""
    cut_order, found = cut(slots, block_rows)
    capacity, count = len(segments) // 3, found.shape[1]
    if count > capacity or len(slots) > len(order):
        raise ValueError(
            f"{len(slots)} rows in {count} segments exceed the plan's {len(order)} rows in {capacity} segments"
        )
    segments.reshape(3, capacity)[:, :count] = found
    order[: len(cut_order)] = cut_order


def plan_rows(slots: np.ndarray, capacity: int, block_rows: int, device: torch.device | str) -> Segments:
    """Return the segments of rows with these slots on the device, without waiting for them to arrive."""
    host = torch.zeros(3 * capacity + len(slots), dtype=torch.int32, pin_memory=torch.device(device).type == "cuda")
    flat = host.numpy()
    write_segments(slots, flat[: 3 * capacity], flat[3 * capacity :], block_rows)
    arrays = host.to(device, non_blocking=True)
    return Segments(arrays[: 3 * capacity], arrays[3 * capacity :], capacity, block_rows)


def scratch(rows: int, max_rank: int, parts: int, device: torch.device | str, siblings: int = 3) -> torch.Tensor:
    """Return memory for partial sums [P, G, T, R], which every site of a step may use again."""
    return torch.empty(parts, siblings, rows, rank_stride(max_rank), dtype=torch.float32, device=device)


def shrink(
    x_TK: torch.Tensor,
    adapters: AdapterPages,
    plan: Segments,
    partial_PGTR: torch.Tensor,
    site: Site,
    tuning: Tuning,
    alone: bool = False,
) -> None:
    """Set partial[p, g, t, :rank] = part p of x[t] A^T for each sibling g; leave rows without adapter alone. `alone`:
    the kernel that made x is the only one before this (early.py)."""
    parts, groups, rows, stride = partial_PGTR.shape
    siblings = len(site.widths)
    assert siblings <= groups
    assert parts >= tuning.parts
    assert x_TK.shape[0] <= rows
    _shrink_kernel[(plan.capacity, tuning.parts, siblings * tuning.shares)](
        x_TK, x_TK.stride(0), adapters.pool, adapters.table, plan.segments, plan.order,
        partial_PGTR, rows * stride, plan.capacity, adapters.table.shape[1], site.first,
        K=x_TK.shape[1], G=groups, P=tuning.parts, R_STRIDE=stride, SHARES=tuning.shares, BLOCK_M=plan.block_rows,
        BLOCK_K=min(tuning.block_k, triton.next_power_of_2(x_TK.shape[1])), BLOCK_R=tuning.block_r,
        ALIGN=OFFSET_ALIGNMENT, **early(alone), num_warps=tuning.shrink_warps, num_stages=tuning.shrink_stages,
    )  # fmt: skip


def expand_add(
    partial_PGTR: torch.Tensor,
    adapters: AdapterPages,
    plan: Segments,
    y_TN: torch.Tensor,
    site: Site,
    tuning: Tuning,
) -> None:
    """Add scale * (sum over p of partial[p, g, t]) B^T to y[t, columns of g], siblings side by side in y."""
    _, groups, rows, stride = partial_PGTR.shape
    blocks = sum(triton.cdiv(width, tuning.block_n) for width in site.widths)
    n0, n1, n2 = (*site.widths, 0, 0)[:3]
    _expand_kernel[(plan.capacity, blocks)](
        partial_PGTR, rows * stride, adapters.pool, adapters.table, adapters.scale, plan.segments, plan.order,
        y_TN, y_TN.stride(0), plan.capacity, adapters.table.shape[1], site.first,
        N0=n0, N1=n1, N2=n2, G=groups, P=tuning.parts, R_STRIDE=stride, BLOCK_M=plan.block_rows,
        BLOCK_N=tuning.block_n, BLOCK_R=tuning.block_r, ALIGN=OFFSET_ALIGNMENT,
        num_warps=tuning.expand_warps, num_stages=1,
    )  # fmt: skip


@dataclass(frozen=True)
class Pending:
    """An expansion left to the kernel that reads y next: the sums of `shrink` and the adapter slot of each row.

    `joins`: the shrink ran on a stream of its own, which that kernel joins, so it cannot launch early."""

    partial_PGTR: torch.Tensor
    adapters: AdapterPages
    slots_T: torch.Tensor
    site: Site
    tuning: Tuning
    joins: bool = False

    @property
    def block_r(self) -> int:
        """Return how many ranks are taken at a time; more would need too many registers beside many partial sums."""
        return self.tuning.block_r if self.tuning.parts <= 8 else 16

    def arguments(self, block_r: int = 0) -> dict[str, Any]:
        """Return the arguments of `pending_part`, by the names that kernels give them."""
        _, groups, rows, stride = self.partial_PGTR.shape
        pages = self.adapters
        return {
            "partial": self.partial_PGTR, "partial_stride": rows * stride, "pool": pages.pool, "table": pages.table,
            "scale": pages.scale, "adapters": self.slots_T, "num_sites": pages.table.shape[1],
            "site": self.site.first, "GROUPS": groups, "P": self.tuning.parts, "R_STRIDE": stride,
            "BLOCK_R": block_r or self.block_r,
        }  # fmt: skip


def nothing_pending(stand_in: torch.Tensor) -> dict[str, Any]:
    """Return arguments for a kernel compiled without `pending_part`, which reads none of them."""
    names = ("partial", "pool", "table", "scale", "adapters")
    numbers = {"partial_stride": 0, "num_sites": 0, "site": 0, "GROUPS": 1, "P": 0, "R_STRIDE": 1, "BLOCK_R": 16}
    return dict.fromkeys(names, stand_in) | numbers


class TritonLora:
    """The adapter backend: expansions of few rows may be left to the reader of the product."""

    def __init__(self, pages: AdapterPages, max_rank: int) -> None:
        self.pages = pages
        self.max_rank = max_rank

    def plan(self, step: StepContext) -> None:
        """Derive nothing: the runner writes the segments."""

    def shrink(self, x_TK: torch.Tensor, site: Site, step: StepContext, workspace: Workspace, beside: bool) -> Pending:
        device = step.on_device
        assert device is not None
        rows, segments = x_TK.shape[0], device.segments
        tuning = tuning_for(rows, segments.block_rows, self.max_rank)
        partial_PGTR = workspace.take(
            "shrunk", tuning.parts, len(site.widths), rows, rank_stride(self.max_rank), dtype=torch.float32
        )
        shrink(x_TK, self.pages, segments, partial_PGTR, site, tuning, alone=not beside)
        return Pending(partial_PGTR, self.pages, device.adapter_slots_T, site, tuning, joins=beside)

    def defer(self, shrunk: Pending, row_by_row: bool) -> Pending | None:
        return None if row_by_row and self.max_rank > PENDING_RANK else shrunk

    def expand(self, shrunk: Pending, out_TN: torch.Tensor, step: StepContext) -> None:
        assert step.on_device is not None
        expand_add(shrunk.partial_PGTR, self.pages, step.on_device.segments, out_TN, shrunk.site, shrunk.tuning)


def rank_stride(max_rank: int) -> int:
    """Return the columns set aside for a row's sums."""
    return -(-max_rank // 16) * 16


def block_rows_for(tokens: int) -> int:
    """Return the rows of an adapter segment: prompts are cut coarser."""
    return 16 if tokens <= 256 else 64
