# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False
"""Sampling on the device: greedy, temperature, min-p, top-k and top-p with the counter-based noise of
layers/sampler.py, so that a request draws the same tokens here as there. A captured step ends with it.

A row's truncation is a threshold: tokens above `floor`, and of those equal to it the ones up to `last` in the
vocabulary, are kept. It is found by bisection over the ordered bits of the 16-bit logits, exactly, without sorting.

Arguments that the kernels share: logits 16-bit [L, V]; temperature, top_p, min_p fp32 [L]; top_k int32 [L]; a
temperature below 1e-5 is greedy, top_k 0, top_p 1 and min_p 0 truncate nothing. Helpers take `row`, a pointer to the
logits of one line. BLOCK: tokens of an iteration.

Shapes: L rows, V vocabulary, B blocks of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _mix(h):
    """Return the 32-bit finalizer of layers/sampler.py: every output bit depends on every input bit."""
    h = (h ^ (h >> 16)) * tl.full((), 0x85EBCA6B, tl.uint32)
    h = (h ^ (h >> 13)) * tl.full((), 0xC2B2AE35, tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def _gumbel(key, position, token):
    """Return the noise of a token: -log(-log(1 - u)), with u from the hash of (key, position, token).

    key, position: uint32. token: any tensor of ids. As log(1 - u) is too coarse for small u, a series replaces it."""
    p = _mix((key + position).to(tl.uint32))
    q = _mix(p + tl.full((), 0x9E3779B9, tl.uint32))
    bits = _mix(_mix(token.to(tl.uint32) + p) ^ q)
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    series = u * (1.0 + u * (0.5 + u * (0.3333333333 + u * 0.25)))
    return -tl.log(tl.where(u < 0.01, series, -tl.log(1.0 - u)))


@triton.jit
def _ordered(x):
    """Return int32 that compare as the 16-bit floats x do."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFF, bits)


@triton.jit
def _count_above(row, floor, kept_from, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return the number of tokens whose ordered bits are at `floor` or above, and at `kept_from` or above."""
    total = 0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        key = _ordered(tl.load(row + v, mask=v < V, other=float("-inf")))
        total += tl.sum(((key >= floor) & (key >= kept_from) & (v < V)).to(tl.int32), axis=0)
    return total


@triton.jit
def _mass_above(row, floor, last_kept, kept_from, top, inverse, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of exp((x - top) * inverse) over kept tokens at `floor` or above. Of tokens equal to `kept_from`
    only those up to the id `last_kept` are kept."""
    total = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < V, other=float("-inf"))
        key = _ordered(x)
        kept = (key > kept_from) | ((key == kept_from) & (v <= last_kept))
        weight = tl.exp((x.to(tl.float32) - top) * inverse)
        total += tl.sum(tl.where(kept & (key >= floor) & (v < V), weight, 0.0), axis=0)
    return total


@triton.jit
def _place_of(row, value, count, V: tl.constexpr, BLOCK: tl.constexpr):
    """Return the id of the count-th token whose ordered bits equal `value`."""
    low = 0
    high = V - 1
    while low < high:
        middle = (low + high) // 2
        found = 0
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            key = _ordered(tl.load(row + v, mask=v < V, other=float("-inf")))
            found += tl.sum(((key == value) & (v <= middle) & (v < V)).to(tl.int32), axis=0)
        low = tl.where(found < count, middle + 1, low)
        high = tl.where(found < count, high, middle)
    return low


@triton.jit
def _threshold_kernel(
    logits, temperature, top_k, top_p, min_p, floor_out, last_out, V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Find what each line keeps: tokens with ordered bits above floor, and equal to it with ids up to last.
    Grid: (L,). floor_out, last_out: int32 [L].

    In this order, each on what the one before left, as in layers/sampler.py: min_p keeps x / temperature >= its maximum
    + log(min_p); top_k keeps k tokens, the first in the vocabulary among equals; top_p keeps the fewest tokens, most
    likely first, whose mass reaches p. Each bisection takes 16 passes over the logits, which stay in the cache."""
    line = tl.program_id(0)
    heat = tl.load(temperature + line)
    k = tl.load(top_k + line)
    p = tl.load(top_p + line)
    least = tl.load(min_p + line)
    floor = -65536
    last = V
    if (heat >= 1e-5) & ((k > 0) | (p < 1.0) | (least > 0.0)):
        row = logits + line.to(tl.int64) * V
        inverse = 1.0 / heat
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            best = tl.maximum(best, tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32))
        top = tl.max(best, axis=0)
        if least > 0.0:
            limit = top * inverse + tl.log(least)
            low = -32769
            high = 32767
            while low + 1 < high:  # the smallest ordered value not below the limit
                middle = (low + high) // 2
                bits = tl.where(middle < 0, middle ^ 0x7FFF, middle).to(tl.int16)
                value = bits.to(logits.dtype.element_ty, bitcast=True).to(tl.float32) * inverse
                inside = value >= limit
                high = tl.where(inside, middle, high)
                low = tl.where(inside, low, middle)
            floor = high
        if (k > 0) & (k < V):
            low = -32768
            high = 32768
            while low + 1 < high:  # the largest ordered value that k tokens reach
                middle = (low + high) // 2
                enough = _count_above(row, middle, floor, V, BLOCK) >= k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            above = _count_above(row, low + 1, floor, V, BLOCK)
            if low > floor:
                floor = low
                last = _place_of(row, low, k - above, V, BLOCK)
            elif low == floor:
                ties = _count_above(row, low, floor, V, BLOCK) - above
                if ties > k - above:
                    last = _place_of(row, low, k - above, V, BLOCK)
        if p < 1.0:
            whole = _mass_above(row, -65536, last, floor, top, inverse, V, BLOCK)
            low = -32768
            high = 32768
            while low + 1 < high:  # the largest ordered value that the mass p reaches
                middle = (low + high) // 2
                enough = _mass_above(row, middle, last, floor, top, inverse, V, BLOCK) >= p * whole
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            before = _mass_above(row, low + 1, last, floor, top, inverse, V, BLOCK)
            at = _mass_above(row, low, last, floor, top, inverse, V, BLOCK)
            bits = tl.where(low < 0, low ^ 0x7FFF, low).to(tl.int16)
            value = bits.to(logits.dtype.element_ty, bitcast=True).to(tl.float32)
            each = tl.exp((value - top) * inverse)
            ties = tl.maximum(((at - before) / each + 0.5).to(tl.int32), 1)
            needed = tl.maximum(tl.ceil((p * whole - before) / each).to(tl.int32), 1)
            if low >= floor:
                if needed < ties:
                    place = _place_of(row, low, needed, V, BLOCK)
                    last = tl.where(low == floor, tl.minimum(last, place), place)
                elif low > floor:
                    last = V
                floor = low
    tl.store(floor_out + line, floor)
    tl.store(last_out + line, last)


@triton.jit
def _best_kernel(
    logits, temperature, keys, positions, floors, lasts, values, places, BLOCKS,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Find the best kept token of one block of the vocabulary: the largest x, or x / temperature + noise.
    Grid: (L, BLOCKS).

    keys, positions: int32 [L], the key of the request's noise and the position of the token being drawn. floors, lasts:
    those of `_threshold_kernel`. values: fp32 [L, BLOCKS], the best scores. places: int32 [L, BLOCKS], the first token
    with that score. Logits that are not a number count as infinite."""
    line = tl.program_id(0)
    block = tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + line.to(tl.int64) * V + v, mask=v < V, other=float("-inf"))
    score = x.to(tl.float32)
    heat = tl.load(temperature + line)
    if heat >= 1e-5:
        key = _ordered(x)
        floor = tl.load(floors + line)
        last = tl.load(lasts + line)
        noise = _gumbel(tl.load(keys + line).to(tl.uint32), tl.load(positions + line).to(tl.uint32), v)
        kept = (key > floor) | ((key == floor) & (v <= last))
        score = tl.where(kept, score / heat + noise, float("-inf"))
    score = tl.where(x == x, score, float("inf"))
    score = tl.where((v < V) & (score == score), score, float("-inf"))
    best = tl.max(score, axis=0)
    place = tl.min(tl.where(score == best, v, V), axis=0)
    tl.store(values + line * BLOCKS + block, best)
    tl.store(places + line * BLOCKS + block, place)


@triton.jit
def _pick_kernel(values, places, rows, last, tokens, BLOCKS, V, PAD: tl.constexpr):
    """Take the best of the blocks' best, the first in the vocabulary among equals: tokens[l] and last[rows[l]].
    Where it is infinite the line has no token: tokens[l] is -1 (NOT_FINITE), and last any token that there is.
    Grid: (L,).

    values, places: those of `_best_kernel`. rows: int32 [L], where `last` int32 [R] keeps each sequence's newest token.
    PAD: a power of two, at least BLOCKS."""
    line = tl.program_id(0)
    b = tl.arange(0, PAD)
    value = tl.load(values + line * BLOCKS + b, mask=b < BLOCKS, other=float("-inf"))
    place = tl.load(places + line * BLOCKS + b, mask=b < BLOCKS, other=V)
    best = tl.max(value, axis=0)
    token = tl.min(tl.where((value == best) & (b < BLOCKS), place, V), axis=0)
    token = tl.minimum(token, V - 1)
    tl.store(tokens + line, tl.where(best < float("inf"), token, -1))
    tl.store(last + tl.load(rows + line), token)


class Sampler:
    """Scratch for `rows` rows of a vocabulary, and the three kernels over it."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.blocks = triton.cdiv(vocab_size, BLOCK)
        self.floors = torch.zeros(rows, dtype=torch.int32, device=device)
        self.lasts = torch.zeros(rows, dtype=torch.int32, device=device)
        self.values = torch.zeros(rows * self.blocks, dtype=torch.float32, device=device)
        self.places = torch.zeros(rows * self.blocks, dtype=torch.int32, device=device)

    def sample(
        self,
        logits_LV: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        keys: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        last: torch.Tensor,
        tokens_L: torch.Tensor,
    ) -> None:
        """Write the token drawn to tokens[l] and to last[rows[l]]. Logits are 16-bit floats; see above for the rest."""
        count, vocab = logits_LV.shape
        assert vocab == self.vocab_size
        _threshold_kernel[(count,)](
            logits_LV, temperature, top_k, top_p, min_p, self.floors, self.lasts, V=vocab, BLOCK=BLOCK, num_warps=16
        )
        _best_kernel[(count, self.blocks)](
            logits_LV, temperature, keys, positions, self.floors, self.lasts, self.values, self.places, self.blocks,
            V=vocab, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        _pick_kernel[(count,)](
            self.values, self.places, rows, last, tokens_L, self.blocks, vocab,
            PAD=triton.next_power_of_2(self.blocks), num_warps=1,
        )  # fmt: skip
