"""Adapters on a CPU: y += scale * (x A^T) B^T, each row with its own adapter, over matrices stacked once per set of
adapters at work. Where an adapter changes a linear's outputs (DoRA, biases), y * out_scale + out_bias follows.

Shapes: T rows, K inputs, N outputs, R rank, W columns of all adapters side by side, n adapters of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inlaid.kernels.backend import MODULES, AdapterPages, Site, Workspace

if TYPE_CHECKING:
    from inlaid.kernels.context import OnHost, StepContext
    from inlaid.kernels.lora_triton import Pending

_SIDE_BY_SIDE = 24_000  # rows times columns up to which adapters are multiplied side by side


@dataclass
class _Group:
    """Adapters of about the same size side by side: per site A as [n, K, R] and B, scaled, as [n, R, N].

    Made on demand; None where no adapter of the group acts. R is the largest sum of sibling ranks among them."""

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
    """The plan of few rows: one matmul with the A of every adapter at work costs less than gathering the rows of each.

    `hidden`, by site, marks the products of a row with adapters that are not its own."""

    stack: _Stack
    slots_T: torch.Tensor
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _SideBySideProduct:
    """The products with A of a site where all adapters at work stand side by side."""

    matrices: _Site
    shrunk_TW: torch.Tensor


_Product = tuple[_Rows, torch.Tensor, list[torch.Tensor]]  # rows, B, products with A


@dataclass(frozen=True)
class _Changed:
    """The sum that is added to a site's outputs, and the changes after it: rows, columns, scale and bias."""

    added: Any
    changes: list[tuple[torch.Tensor, slice, torch.Tensor | None, torch.Tensor | None]]


_Shrunk = Any | _Changed


class CpuLora:
    """Two batched matmuls for each site and group of the adapters at work, stacked once per set of adapters. Few rows
    and adapters are multiplied with all adapters side by side."""

    def __init__(self, pages: AdapterPages, side_by_side: int = _SIDE_BY_SIDE) -> None:
        self.pages = pages
        self._most_side_by_side = side_by_side if pages.pool.dtype == torch.float32 else -1
        self._stack = _Stack((), (), [], 0)
        self._last: tuple[object, Any] = (None, None)
        self._changed_rows: dict[int, torch.Tensor] = {}  # by slot, of the step

    def plan(self, step: StepContext) -> None:
        if not step.adapters:
            return
        sequences = step.on_host
        assert sequences is not None
        active = sorted({slot for slot in sequences.adapter_slots if slot})
        versions = [self.pages.versions[slot] for slot in active]
        key = (active, versions, sequences.adapter_slots, sequences.query_lens)
        if self._last[0] != key:
            self._last = (key, self.make_plan(sequences, step))
            outputs = self.pages.outputs
            changing = [] if outputs is None else [slot for slot in active if bool((outputs[slot] >= 0).any())]
            rows_of = _rows_by_slot(sequences) if changing else {}
            self._changed_rows = {slot: torch.tensor(rows_of[slot]) for slot in changing}
        step.lora_plan = self._last[1]

    def make_plan(self, sequences: OnHost, step: StepContext) -> Any:
        """Derive what every site of a step needs."""
        stack = self._stack_for({slot for slot in sequences.adapter_slots if slot})
        device = step.positions_T.device
        if step.num_tokens * stack.num_columns <= self._most_side_by_side:
            slots = np.repeat(np.array(sequences.adapter_slots), sequences.query_lens)
            return _SideBySide(stack, torch.from_numpy(slots).to(device))
        rows_of = _rows_by_slot(sequences)
        plans = [_plan_rows(group, rows_of, device) for group in stack.groups]
        return [plan for plan in plans if plan is not None]

    def shrink(self, x_TK: torch.Tensor, site: Site, step: StepContext, workspace: Workspace, beside: bool) -> _Shrunk:
        added = self.multiply(x_TK, site, step)
        changes = self._changes(site) if self._changed_rows else []
        return _Changed(added, changes) if changes else added

    def _changes(self, site: Site) -> list[tuple[torch.Tensor, slice, torch.Tensor | None, torch.Tensor | None]]:
        """List what the step's adapters do to the outputs of a site, sibling by sibling."""
        assert self.pages.outputs is not None
        changes = []
        for slot, rows in self._changed_rows.items():
            begin = 0
            for sibling, width in enumerate(site.widths):
                places = self.pages.outputs[slot, site.first + sibling].tolist()
                vectors = [None if at < 0 else self.pages.pool[at : at + width] for at in places]
                if any(vector is not None for vector in vectors):
                    changes.append((rows, slice(begin, begin + width), vectors[0], vectors[1]))
                begin += width
        return changes

    def multiply(self, x_TK: torch.Tensor, site: Site, step: StepContext) -> Any:
        """Multiply with A; `add` takes what this returns."""
        if isinstance(step.lora_plan, _SideBySide):
            return self._shrink_side_by_side(x_TK, site, step.lora_plan)
        plans: list[_Rows] = step.lora_plan
        shrunk: list[_Product] = []
        for plan in plans:
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

    def _shrink_side_by_side(self, x_TK: torch.Tensor, site: Site, plan: _SideBySide) -> _SideBySideProduct | None:
        """Multiply every row with every adapter. Products with other rows' adapters are struck out, not multiplied by
        zero: they may be infinite."""
        sites = plan.stack.sites
        if site.first not in sites:
            sites[site.first] = _side_by_side(self.pages, plan.stack.slots, site, x_TK.shape[1])
        matrices = sites[site.first]
        if matrices is None:
            return None
        if site.first not in plan.hidden:
            plan.hidden[site.first] = plan.slots_T[:, None] != matrices.owner_W
        shrunk_TW = (x_TK @ matrices.a_KW).mul_(matrices.scale_W).masked_fill_(plan.hidden[site.first], 0.0)
        return _SideBySideProduct(matrices, shrunk_TW)

    def defer(self, shrunk: _Shrunk, row_by_row: bool) -> Pending | None:
        return None

    def expand(self, shrunk: _Shrunk, out_TN: torch.Tensor, step: StepContext) -> None:
        added, changes = (shrunk.added, shrunk.changes) if isinstance(shrunk, _Changed) else (shrunk, [])
        if added is not None:
            self.add(added, out_TN)
        for rows, columns, scale_N, bias_N in changes:
            part_TN = out_TN[rows, columns]
            part_TN = part_TN if scale_N is None else part_TN * scale_N
            out_TN[rows, columns] = part_TN if bias_N is None else part_TN + bias_N

    def add(self, product: Any, out_TN: torch.Tensor) -> None:
        """Add the product with A, times B, to the outputs."""
        if isinstance(product, _SideBySideProduct):
            for columns, outputs, b_WN in product.matrices.siblings:
                out_TN[:, outputs].addmm_(product.shrunk_TW[:, columns], b_WN)
            return
        for plan, b_nRN, parts in product:
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
            made = tuple(versions[slot] for slot in slots)
            self._stack = _Stack(slots, made, _group(self.pages, slots), _num_columns(self.pages, slots))
        return self._stack


def _group(pages: AdapterPages, slots: tuple[int, ...]) -> list[_Group]:
    """Group adapters by size within a factor of two, those that leave the MLP alone apart: stacking then wastes little,
    and the groups stay few (finer groups were slower)."""
    ranks = pages.table[list(slots), :, 2].view(len(slots), -1, len(MODULES)).amax(dim=1).tolist()
    groups: dict[tuple[bool, int], list[int]] = {}
    for slot, by_module in zip(slots, ranks, strict=True):
        groups.setdefault((any(by_module[4:]), sum(by_module).bit_length()), []).append(slot)
    return [_Group(tuple(members)) for members in groups.values()]


def _num_columns(pages: AdapterPages, slots: tuple[int, ...]) -> int:
    """Return the largest sum of ranks over a site's siblings, whatever is fused."""
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


def _rows_by_slot(sequences: OnHost) -> dict[int, list[int]]:
    rows_of: dict[int, list[int]] = {}
    row = 0
    for slot, length in zip(sequences.adapter_slots, sequences.query_lens, strict=True):
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
