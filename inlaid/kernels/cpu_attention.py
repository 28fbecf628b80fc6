"""Attention over paged keys and values on a CPU: decodes as one padded batch, longer queries one by one. Decodes with
drafts are a batch too, padded to the longest draft.

Codes of 8 bits become numbers where they are read. Shapes: S decodes, Q queries of a prefill, H query heads, G
key/value heads, C head width. Caches are [blocks, block size, G, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from inlaid.kernels import kv_codes
from inlaid.kernels.backend import LayerCache, Workspace
from inlaid.kernels.kv_codes import KEYS, VALUES

if TYPE_CHECKING:
    from inlaid.kernels.context import StepContext

_SPARE_BLOCKS = 2  # read beyond the longest decode, so that a few more steps fit into what was gathered

_MOST_KEPT = 16 << 20  # bytes per cache tensor that the decodes of the step before may keep gathered


@dataclass
class _AttentionPlan:
    """The blocks that the decodes read, each longer query's share, and masks by window. `num_tokens` are those of the
    decodes, `spread` is where they stand if some have drafts.

    `gathered` holds the decodes' keys and values by cache, [S, G, decode_len, C]; `newest` is the place of the latest
    token in them. `stale` lists, as (rows, lanes), the lanes of each decode's last block behind its context: what a
    former owner left there is zeroed, since a mask multiplies, and 0 x NaN is NaN."""

    num_tokens: int
    spread: _Spread | None
    decode_blocks: torch.Tensor | None
    decode_len: int
    gathered: dict[int, torch.Tensor]
    newest: tuple[torch.Tensor, torch.Tensor] | None
    chunks: list[_Chunk]
    stale: tuple[torch.Tensor, torch.Tensor] | None = None
    decode_masks: dict[int | None, torch.Tensor] = field(default_factory=dict)


@dataclass
class _Spread:
    """Decodes with drafts of unlike lengths as a batch of S sequences with Q tokens, the last one repeated.

    `tokens_SQ` are rows of T, `back_SQ1` how many tokens of the sequence follow; of each row of T, `sequence_T` is its
    sequence and `place_T` its place in S * Q."""

    tokens_SQ: torch.Tensor
    back_SQ1: torch.Tensor
    sequence_T: torch.Tensor
    place_T: torch.Tensor

    @classmethod
    def of(cls, query_lens: Sequence[int], device: torch.device) -> _Spread:
        lens_S = torch.tensor(query_lens, device=device)
        queries_Q = torch.arange(max(query_lens), device=device)
        last_S1 = (lens_S - 1)[:, None]
        within_SQ = torch.minimum(queries_Q[None], last_S1)
        starts_S = lens_S.cumsum(0) - lens_S
        sequence_T = torch.repeat_interleave(torch.arange(len(query_lens), device=device), lens_S)
        within_T = torch.arange(sequence_T.shape[0], device=device) - starts_S[sequence_T]
        place_T = sequence_T * queries_Q.shape[0] + within_T
        return cls(starts_S[:, None] + within_SQ, (last_S1 - within_SQ)[:, :, None], sequence_T, place_T)


@dataclass
class _Chunk:
    """Query tokens [first, first + num_queries) of T, over a context of `context_len` tokens in `blocks`."""

    first: int
    num_queries: int
    context_len: int
    blocks: torch.Tensor
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)


class CpuAttention:
    """Decodes as one padded batch, longer queries one by one.

    While the same sequences decode on, their gathered keys and values are kept and only the newest token is added:
    reading the pages anew each step would take as long as attention itself."""

    def __init__(self) -> None:
        self._last: _AttentionPlan | None = None

    def plan(self, step: StepContext, workspace: Workspace) -> None:
        sequences = step.on_host
        assert sequences is not None
        decodes, size = sequences.num_drafted or step.num_decodes, step.block_size
        longest = max(sequences.context_lens[:decodes], default=0)
        device, num_tokens = step.positions_T.device, sum(sequences.query_lens[:decodes])
        spread = _Spread.of(sequences.query_lens[:decodes], device) if sequences.num_drafted else None
        chunks, first = [], num_tokens
        for row in range(decodes, len(sequences.query_lens)):
            num_queries, length = sequences.query_lens[row], sequences.context_lens[row]
            chunks.append(_Chunk(first, num_queries, length, step.block_tables[row, : -(-length // size)]))
            first += num_queries
        last = self._last
        if sequences.decodes_go_on and last is not None and last.gathered and longest <= last.decode_len:
            rows = torch.arange(decodes, device=device) if spread is None else spread.sequence_T
            newest = (rows, step.positions_T[:num_tokens])
            self._last = _AttentionPlan(num_tokens, spread, None, last.decode_len, last.gathered, newest, chunks)
        else:
            num_blocks = -(-longest // size) if longest else 0
            blocks = _wider(step.block_tables[:decodes], num_blocks + _SPARE_BLOCKS) if decodes else None
            width = (num_blocks + _SPARE_BLOCKS) * size
            stale = _behind(sequences.context_lens[:decodes], size, device)
            self._last = _AttentionPlan(num_tokens, spread, blocks, width, {}, None, chunks, stale)
        step.attention_plan = self._last

    def attend(
        self, q_THC: torch.Tensor, cache: LayerCache, window: int | None, step: StepContext, workspace: Workspace
    ) -> torch.Tensor:
        plan: _AttentionPlan = step.attention_plan
        decode = self._decode if plan.spread is None else self._decode_drafts
        count = plan.num_tokens
        if not plan.chunks:
            return decode(q_THC, cache, window, step).flatten(1)
        out_THC = q_THC.new_empty(q_THC.shape)
        if count:
            out_THC[:count] = decode(q_THC[:count], cache, window, step)
        for chunk in plan.chunks:
            rows = slice(chunk.first, chunk.first + chunk.num_queries)
            out_THC[rows] = _attend_chunk(q_THC[rows], cache, window, chunk)
        return out_THC.flatten(1)

    def _decode(self, q_SHC: torch.Tensor, cache: LayerCache, window: int | None, step: StepContext) -> torch.Tensor:
        """Attend for the decodes. A group's query heads stand where a sequence's queries would: all of them see the
        same keys."""
        plan: _AttentionPlan = step.attention_plan
        S, H, C = q_SHC.shape
        G = cache[0].shape[2]
        if window not in plan.decode_masks:
            mask = _decode_mask(step.context_lens_S[:S], plan.decode_len, window, q_SHC.dtype)
            plan.decode_masks[window] = mask.repeat_interleave(G, dim=0).expand(-1, H // G, -1)
        k, v = (_gathered(plan, cache, which, S, step.kv_slots_T[:S], q_SHC.dtype) for which in (KEYS, VALUES))
        q = q_SHC.reshape(S * G, H // G, C)
        scores = torch.baddbmm(plan.decode_masks[window], q, k.transpose(1, 2), alpha=C**-0.5)
        return torch.bmm(scores.softmax(dim=-1), v).view(S, H, C)

    def _decode_drafts(
        self, q_THC: torch.Tensor, cache: LayerCache, window: int | None, step: StepContext
    ) -> torch.Tensor:
        """Attend for decodes with drafts: as `_decode`, with Q tokens of each sequence in a group's queries."""
        plan: _AttentionPlan = step.attention_plan
        spread = plan.spread
        assert spread is not None
        (S, Q), (T, H, C), G = spread.tokens_SQ.shape, q_THC.shape, cache[0].shape[2]
        if window not in plan.decode_masks:
            lens_SQ1 = step.context_lens_S[:S, None, None] - spread.back_SQ1
            mask = _decode_mask(lens_SQ1.view(S * Q), plan.decode_len, window, q_THC.dtype)
            wide = mask.view(S, 1, Q, 1, -1).expand(S, G, Q, H // G, -1)
            plan.decode_masks[window] = wide.reshape(S * G, Q * (H // G), -1)
        k, v = (_gathered(plan, cache, which, S, step.kv_slots_T[:T], q_THC.dtype) for which in (KEYS, VALUES))
        q = q_THC[spread.tokens_SQ].view(S, Q, G, H // G, C).transpose(1, 2).reshape(S * G, Q * (H // G), C)
        scores = torch.baddbmm(plan.decode_masks[window], q, k.transpose(1, 2), alpha=C**-0.5)
        mixed = torch.bmm(scores.softmax(dim=-1), v).view(S, G, Q, H // G, C)
        return mixed.transpose(1, 2).reshape(S * Q, H, C)[spread.place_T]


def _wider(table_SB: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Return the block table, cut or padded with block 0 to a width, flat."""
    missing = num_blocks - table_SB.shape[1]
    table_SB = F.pad(table_SB, (0, missing)) if missing > 0 else table_SB[:, :num_blocks]
    return table_SB.reshape(-1)


def _behind(lens: Sequence[int], size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the lanes between the end of each context and the end of its last block, as rows and lanes."""
    pairs = [(row, lane) for row, length in enumerate(lens) for lane in range(length, -(-length // size) * size)]
    if not pairs:
        return None
    rows, lanes = torch.tensor(pairs, device=device).t()
    return rows, lanes


def _gathered(
    plan: _AttentionPlan, cache: LayerCache, which: int, count: int, newest_slots: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the decodes' keys or values side by side, [S * G, decode_len, C]: kept from the step before and extended,
    or read anew."""
    key = kv_codes.pages_of(cache, which).data_ptr()
    if plan.newest is not None:
        kept = plan.gathered[key]
        rows, positions = plan.newest
        kept[rows, :, positions] = kv_codes.read_slots(cache, which, newest_slots, dtype)
        return kept.flatten(0, 1)
    assert plan.decode_blocks is not None
    read = kv_codes.read_blocks(cache, which, plan.decode_blocks, dtype)
    read = read.view(count, plan.decode_len, *read.shape[2:])
    read = read.transpose(1, 2).contiguous()
    if plan.stale is not None:
        rows, lanes = plan.stale
        read[rows, :, lanes] = 0.0
    if read.nbytes <= _MOST_KEPT:
        plan.gathered[key] = read
    return read.flatten(0, 1)


def _decode_mask(lens_S: torch.Tensor, length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Return [S, 1, length]: 0 where the newest token may look, -inf elsewhere."""
    keys = torch.arange(length, device=lens_S.device)
    hidden = keys >= lens_S[:, None]
    if window is not None:
        hidden |= keys < lens_S[:, None] - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=lens_S.device).masked_fill_(hidden, -torch.inf)
    return mask[:, None]


def _attend_chunk(q_QHC: torch.Tensor, cache: LayerCache, window: int | None, chunk: _Chunk) -> torch.Tensor:
    if window not in chunk.masks:
        chunk.masks[window] = _chunk_mask(chunk, window, q_QHC.device)
    H, G = q_QHC.shape[1], cache[0].shape[2]
    k, v = (
        kv_codes.read_blocks(cache, which, chunk.blocks, q_QHC.dtype)
        .flatten(0, 1)[: chunk.context_len]
        .transpose(0, 1)[None]
        for which in (KEYS, VALUES)
    )
    mask = chunk.masks[window]
    out = F.scaled_dot_product_attention(
        q_QHC.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=H != G
    )
    return out[0].transpose(0, 1)


def _chunk_mask(chunk: _Chunk, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return [queries, context] of what may be seen; None stands for plain causal from the first token."""
    if chunk.num_queries == chunk.context_len and (window is None or window >= chunk.context_len):
        return None
    keys = torch.arange(chunk.context_len, device=device)
    queries = keys[chunk.context_len - chunk.num_queries :, None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)
