"""The specification of every kernel: plain loops in fp32, for reading and for tests, never for serving.

Each function states one operation: a formula, and a loop that follows it. Kernels of every device are tested against
these functions. A function returns new fp32 tensors, or codes; only `store` writes, into the cache that it is given.

T tokens of a step, S sequences, K inputs, N outputs, H query heads, G key/value heads, C head width, D model width,
F MLP width, P parts of a product, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from inlaid.checkpoint import QuantizedLinear
from inlaid.kernels.backend import AdapterPages, Parts, Site

Tensor = torch.Tensor


def code(words: Tensor, index: int, bits: int) -> Tensor:
    """Return code number `index` of every column of `words` (int32 [W, M]), as int64 [M].

    A column is a stream of bits, the least significant bit of the first word first; code i holds bits
    [i * bits, (i + 1) * bits)."""
    value = torch.zeros(words.shape[1], dtype=torch.int64, device=words.device)
    for place in range(bits):
        word, shift = divmod(index * bits + place, 32)
        value += ((words[word].long() >> shift) & 1) << place
    return value


def weight(linear: QuantizedLinear) -> Tensor:
    """Return the weight [K, N]: W[k, n] = scale[g, n] * (code[k, n] - zero[g, n]) with g = g_idx[k].

    Codes are packed along K and zero points along N. Zero points are true zeros: nothing is added to them."""
    K, N = linear.in_features, linear.out_features
    zeros_GN = torch.stack([code(linear.qzeros.t(), n, linear.bits) for n in range(N)], dim=1)
    rows = []
    for k in range(K):
        group = int(linear.g_idx[k])
        rows.append(linear.scales[group].float() * (code(linear.qweight, k, linear.bits) - zeros_GN[group]))
    return torch.stack(rows)


def quantized_linear(x_TK: Tensor, linear: QuantizedLinear) -> Tensor:
    """Return x @ W [T, N], with W as `weight` gives it."""
    return x_TK.float() @ weight(linear)


def sum_of_parts(x_PTN: Tensor, parts: Parts) -> Tensor:
    """Return the product [T, N] of which a kernel left `parts`: the sum of the parts that were written.

    The tile of row t and column n is (t // height, n // width); counts[tile] of its parts were written, from part 0
    on. The others hold anything, and are not read."""
    _, T, N = x_PTN.shape
    total = torch.zeros(T, N, device=x_PTN.device)
    for t in range(T):
        for first in range(0, N, parts.width):
            columns = slice(first, min(first + parts.width, N))
            for part in range(int(parts.counts[t // parts.height, first // parts.width])):
                total[t, columns] += x_PTN[part, t, columns].float()
    return total


def lora(x_TK: Tensor, y_TN: Tensor, slots_T: Sequence[int], pages: AdapterPages, site: Site) -> Tensor:
    """Return y + scale * (x @ A^T) @ B^T [T, N], each row with the adapter of its own slot, at that adapter's rank.

    Siblings of a site stand side by side in N, each with its own A, B, rank and scale. Rows of slot 0, and siblings of
    rank 0, stay as they are."""
    out_TN, K = y_TN.float().clone(), x_TK.shape[1]
    for t, slot in enumerate(slots_T):
        column = 0
        for sibling, width in zip(site.sites, site.widths, strict=True):
            a_start, b_start, rank = pages.table[slot, sibling].tolist()
            if slot and rank:
                a_RK = pages.pool[a_start : a_start + rank * K].view(rank, K).float()
                b_NR = pages.pool[b_start : b_start + width * rank].view(width, rank).float()
                delta_N = b_NR @ (a_RK @ x_TK[t].float())
                out_TN[t, column : column + width] += pages.scale[slot, sibling].float() * delta_N
            column += width
    return out_TN


def attention(
    q_THC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables_SB: Tensor,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    window: int | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k^T / sqrt(C)) v [T, H, C], each sequence over the tokens of its own pages.

    The queries of sequence s are its last query_lens[s] tokens of context_lens[s]. Token j of the sequence lies in
    block block_tables[s, j // block_size], at j % block_size, of the caches [blocks, block_size, G, C]. The query at
    position i sees tokens (i - window, i], or [0, i] without a window. Query head h reads key/value head
    h // (H / G). A sequence without tokens gives zeros. With `scales` [blocks, G, block_size, 2] the caches hold codes:
    a key is its code times scales[..., 0], a value times scales[..., 1]."""
    _, H, C = q_THC.shape
    block_size, G = k_cache.shape[1], k_cache.shape[2]
    out_THC, t = torch.zeros(q_THC.shape, device=q_THC.device), 0
    for s, (num_queries, length) in enumerate(zip(query_lens, context_lens, strict=True)):
        places = [(int(block_tables_SB[s, j // block_size]), j % block_size) for j in range(length)]
        for position in range(length - num_queries, length):
            first = 0 if window is None else max(0, position - window + 1)
            seen = places[first : max(0, position + 1)]
            for h in range(H if seen else 0):
                k_LC, v_LC = (
                    torch.stack([cache[block, place].float()[h // (H // G)] for block, place in seen])
                    for cache in (k_cache, v_cache)
                )
                if scales is not None:
                    scale_L2 = torch.stack([scales[block, h // (H // G), place] for block, place in seen]).float()
                    k_LC, v_LC = k_LC * scale_L2[:, :1], v_LC * scale_L2[:, 1:]
                out_THC[t, h] = (k_LC @ q_THC[t, h].float() / math.sqrt(C)).softmax(dim=0) @ v_LC
            t += 1
    return out_THC


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension."""
    x = x.float()
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight_D.float()


def add_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the new residual, x + residual, and its RMS norm."""
    total_TD = x_TD.float() + residual_TD.float()
    return total_TD, rms_norm(total_TD, weight_D, eps)


def embed_norm(
    ids_T: Sequence[int],
    sources_T: Sequence[int],
    newest_R: Sequence[int],
    table_VD: Tensor,
    weight_D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the embedding of each token, which is the first residual, and its RMS norm.

    Token t is ids[t], or, if sources[t] >= 0, newest[sources[t]]: the token that row sampled last."""
    tokens = [newest_R[source] if source >= 0 else token for token, source in zip(ids_T, sources_T, strict=True)]
    residual_TD = torch.stack([table_VD[token].float() for token in tokens])
    return residual_TD, rms_norm(residual_TD, weight_D, eps)


def rotate(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Return x turned by its position: the pair (x[c], x[c + C/2]) turns by one angle.

    out[c] = x[c] cos - x[c + C/2] sin and out[c + C/2] = x[c + C/2] cos + x[c] sin, for c < C/2."""
    out_THC, half = x_THC.float().clone(), x_THC.shape[2] // 2
    for t in range(x_THC.shape[0]):
        cos, sin = cos_TC[t, :half].float(), sin_TC[t, :half].float()
        low_HC, high_HC = x_THC[t, :, :half].float(), x_THC[t, :, half:].float()
        out_THC[t, :, :half] = low_HC * cos - high_HC * sin
        out_THC[t, :, half:] = high_HC * cos + low_HC * sin
    return out_THC


def kv_codes(x_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the codes [C] of a token's key or value of one head, and its scale, a float16: x is about code * scale.

    scale = max |x| / most, at least 2^-24 and at most 65504, with most = 127 for int8 and 448 for float8_e4m3fn. A code
    of int8 is floor(x / scale + 1/2), of float8 the nearest number to x / scale, even in a tie; both within [-most,
    most]. If any x is not finite, the scale is NaN, so that what reads it is not finite either."""
    most, x_C = 127 if dtype == torch.int8 else 448, x_C.float()
    top = max(abs(x) for x in x_C.tolist())
    if not all(math.isfinite(x) for x in x_C.tolist()):
        return torch.zeros_like(x_C).to(dtype), torch.tensor(math.nan, dtype=torch.float16)
    scale = torch.tensor(min(max(top / most, 2.0**-24), 65504.0)).half()
    ratios = [x / float(scale) for x in x_C.tolist()]
    codes = [min(max(math.floor(ratio + 0.5) if most == 127 else ratio, -most), most) for ratio in ratios]
    return torch.tensor(codes, dtype=torch.float32).to(dtype), scale


def store(
    values_TGC: Tensor, cache: Tensor, slots_T: Sequence[int], scales: Tensor | None = None, which: int = 0
) -> None:
    """Write token t's keys or values to place slots[t] % block_size of block slots[t] // block_size of the cache.

    With `scales` [blocks, G, block_size, 2] the cache gets codes, and scales[..., which] their scales."""
    for t, slot in enumerate(slots_T):
        block, place = divmod(slot, cache.shape[1])
        if scales is None:
            cache[block, place] = values_TGC[t].to(cache.dtype)
            continue
        for g in range(cache.shape[2]):
            cache[block, place, g], scales[block, g, place, which] = kv_codes(values_TGC[t, g], cache.dtype)


def rope_store(
    qkv_TN: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Sequence[int],
    norms: tuple[Tensor, Tensor, float] | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Return the rotated queries [T, H, C]; store the rotated keys and the values, which are not rotated, as `store`
    does.

    A row of qkv has H query heads, then G key heads, then G value heads. `norms`: weights [C] of RMS norms of query and
    of key heads, and their eps; applied to each head before the rotation."""
    G, C = k_cache.shape[2:]
    heads_THC = qkv_TN.float().view(qkv_TN.shape[0], -1, C)
    q_THC, k_TGC, v_TGC = heads_THC[:, : -2 * G], heads_THC[:, -2 * G : -G], heads_THC[:, -G:]
    if norms is not None:
        q_THC, k_TGC = rms_norm(q_THC, norms[0], norms[2]), rms_norm(k_TGC, norms[1], norms[2])
    store(rotate(k_TGC, cos_TC, sin_TC), k_cache, slots_T, scales, 0)
    store(v_TGC, v_cache, slots_T, scales, 1)
    return rotate(q_THC, cos_TC, sin_TC)


def silu_mul(x_T2F: Tensor) -> Tensor:
    """Return silu(gate) * up [T, F], with gate the first half of a row, up the second, silu(g) = g / (1 + exp(-g))."""
    gate_TF, up_TF = x_T2F.float().chunk(2, dim=-1)
    return gate_TF / (1 + torch.exp(-gate_TF)) * up_TF


# Sampling: one row of logits at a time, in Python's own numbers.


def mix(h: int) -> int:
    """Return a 32-bit hash of a 32-bit number: every bit of the result depends on every bit of `h`."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ (h >> 16)


def noise(key: int, position: int, token: int) -> float:
    """Return the Gumbel noise of a token: it depends on the request's key, the position and the token alone.

    p = mix(key + position), q = mix(p + 0x9E3779B9), bits = mix(mix(token + p) ^ q), sums modulo 2^32;
    u = (bits + 0.5) / 2^32, but at most 1 - 2^-24, the largest fp32 number below 1; noise = -log(-log(1 - u))."""
    p = mix((key + position) & 0xFFFFFFFF)
    q = mix((p + 0x9E3779B9) & 0xFFFFFFFF)
    u = min((mix(mix((token + p) & 0xFFFFFFFF) ^ q) + 0.5) / 2**32, 1 - 2**-24)
    return -math.log(-math.log1p(-u))


def kept(logits_V: Sequence[float], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """Return the tokens that truncation leaves: min_p first, then top_k, then top_p of what is left.

    min_p keeps tokens whose probability is at least min_p times that of the likeliest. top_k keeps the k likeliest (0:
    all). top_p keeps the likeliest tokens until their probabilities, renormalized, reach top_p. Among equals the
    smaller token comes first. The likeliest token is always kept."""
    best = max(logits_V)
    order = sorted(range(len(logits_V)), key=lambda token: (-logits_V[token], token))
    if min_p > 0:
        order = [token for token in order if logits_V[token] >= best + math.log(min_p)]
    order = order[: top_k or None]
    masses = [math.exp(logits_V[token] - best) for token in order]
    wanted, reached, found = top_p * sum(masses), 0.0, set[int]()
    for token, mass in zip(order, masses, strict=True):
        if found and top_p < 1 and reached >= wanted:
            break
        found.add(token)
        reached += mass
    return found


def draw(
    logits_V: Sequence[float],
    temperature: float,
    key: int,
    position: int,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """Return the token drawn: argmax over kept tokens of logit / temperature + noise; the smallest among equals.

    Truncation acts on the logits divided by the temperature. A temperature of 0 takes the likeliest token."""
    if temperature == 0:
        return max(range(len(logits_V)), key=lambda token: (logits_V[token], -token))
    heated = [logit / temperature for logit in logits_V]
    scores = {token: heated[token] + noise(key, position, token) for token in kept(heated, top_k, top_p, min_p)}
    return max(scores, key=lambda token: (scores[token], -token))
