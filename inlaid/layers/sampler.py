"""Sampling, from logits to tokens: bans, biases, penalties, temperature, truncation, noise, log probabilities.
The runner fills a SamplingBatch; each feature carries the rows that use it, so rows without it pay nothing.

Noise comes from a hash of (seed, position, token id), not from a stream: the same request draws the same tokens
alone, in any batch, and after preemption, on any device. Log probabilities are those of the model itself, before
anything here acts on the logits. Legend: S sampled rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NOT_FINITE = -1  # the token of a row whose logits hold NaN or infinity; the kernels of a GPU write it too

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Penalties:
    """Repetition for tokens of the prompt or the output; frequency and presence for those of the output."""

    rows: torch.Tensor
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor
    output_counts_PV: torch.Tensor  # float32
    prompt_seen_PV: torch.Tensor  # bool


@dataclass(frozen=True)
class Noise:
    """Rows that draw; greedy rows are not listed. `keys` are seed_key of their seeds."""

    rows: torch.Tensor
    temperature: torch.Tensor
    keys: torch.Tensor
    positions: torch.Tensor  # of the token being drawn


@dataclass(frozen=True)
class Truncation:
    """The rows that keep only likely tokens, as indices into Noise.rows. top_k 0: all tokens."""

    rows: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor


@dataclass(frozen=True)
class Coordinates:
    """Single logits: row, token and a value to add."""

    rows: torch.Tensor
    tokens: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class GrammarMask:
    """Allowed tokens as bits, 32 to a word, little end first."""

    rows: torch.Tensor
    bits: torch.Tensor  # int32 [rows, ceil(V / 32)]


@dataclass(frozen=True)
class SamplingBatch:
    """The features that S rows ask for beyond the most likely token."""

    bias: Coordinates | None = None  # logit_bias, and what bans tokens: bad words, ends before min_tokens
    grammar: GrammarMask | None = None
    penalties: Penalties | None = None
    noise: Noise | None = None
    truncation: Truncation | None = None
    logprob_rows: torch.Tensor | None = None
    num_top: int = 0  # most alternatives that any of logprob_rows wants


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities of chosen tokens, their ranks (1 is the most likely), and the most likely alternatives."""

    chosen_L: torch.Tensor
    ranks_L: torch.Tensor
    top_values_LK: torch.Tensor
    top_tokens_LK: torch.Tensor


def sample(logits_SV: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, Logprobs | None]:
    """Return token ids [S] and the log probabilities of batch.logprob_rows; overwrite the logits. A row whose logits
    hold NaN or infinity has the token NOT_FINITE."""
    raw_LV = None if batch.logprob_rows is None else logits_SV.index_select(0, batch.logprob_rows)
    if batch.grammar is not None:
        _forbid(logits_SV, batch.grammar)
    if batch.bias is not None:
        index = (batch.bias.rows, batch.bias.tokens)
        logits_SV.index_put_(index, batch.bias.values, accumulate=True)
    if batch.penalties is not None:
        _penalize(logits_SV, batch.penalties)
    tokens_S = logits_SV.argmax(dim=-1)  # a NaN counts as the largest
    void_S = ~(logits_SV.gather(1, tokens_S[:, None])[:, 0] < torch.inf)
    if batch.noise is not None:
        tokens_S.index_copy_(0, batch.noise.rows, _draw(logits_SV, batch.noise, batch.truncation))
    made = None
    if raw_LV is not None and batch.logprob_rows is not None:
        made = logprobs(raw_LV, tokens_S.index_select(0, batch.logprob_rows), batch.num_top)
    return tokens_S.masked_fill_(void_S, NOT_FINITE), made


def logprobs(logits_LV: torch.Tensor, tokens_L: torch.Tensor, num_top: int) -> Logprobs:
    """Return log probabilities of given tokens under given logits."""
    logprobs_LV = torch.log_softmax(logits_LV, dim=-1)
    chosen_L1 = logprobs_LV.gather(1, tokens_L[:, None])
    ranks_L = (logprobs_LV > chosen_L1).sum(dim=-1) + 1
    top = logprobs_LV.topk(num_top, dim=-1)
    return Logprobs(chosen_L1[:, 0], ranks_L, top.values, top.indices)


def seed_key(seed: int) -> int:
    """Return a 32-bit key of any whole number (its lower 64 bits), made once on the host."""
    low, high = seed & _MASK32, (seed >> 32) & _MASK32
    return _mix_int(_mix_int(low ^ 0x9E3779B9) ^ high)


def gumbel(keys_S: torch.Tensor, positions_S: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return Gumbel noise [S, V]: token t of row s gets mix(mix(t + p) ^ q), where p = mix(key + position) and q =
    mix(p + 0x9E3779B9): an offset that no token has, else that token's bits would always be zero.

    The 32 bits become u = (bits + 0.5) / 2^32 and the noise -log(-log(1 - u)): small u, which is precise, makes the
    large values that decide."""
    p_S1 = _mix((keys_S + positions_S) & _MASK32)[:, None]
    q_S1 = _mix((p_S1 + 0x9E3779B9) & _MASK32)
    tokens_V = torch.arange(vocab_size, dtype=torch.int64, device=keys_S.device)
    bits_SV = _mix(_mix((tokens_V + p_S1) & _MASK32) ^ q_S1)
    u_SV = ((bits_SV.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return torch.log1p(u_SV.neg_()).neg_().log_().neg_()


def _mix(h: torch.Tensor) -> torch.Tensor:
    """Mix 32-bit words so that every output bit depends on every input bit. int64 holds the unsigned words; products
    wrap, and only their low 32 bits are kept."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK32
    return h ^ (h >> 16)


def _mix_int(h: int) -> int:
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK32
    return h ^ (h >> 16)


def _forbid(logits_SV: torch.Tensor, grammar: GrammarMask) -> None:
    shifts = torch.arange(32, dtype=torch.int32, device=logits_SV.device)
    allowed = ((grammar.bits[:, :, None] >> shifts) & 1).flatten(1)[:, : logits_SV.shape[1]].bool()
    if allowed.shape[1] < logits_SV.shape[1]:  # ids past the tokenizer's are padding of the embedding
        padding = logits_SV.shape[1] - allowed.shape[1]
        allowed = torch.nn.functional.pad(allowed, (0, padding))
    rows = logits_SV.index_select(0, grammar.rows).masked_fill_(~allowed, -torch.inf)
    logits_SV.index_copy_(0, grammar.rows, rows)


def _penalize(logits_SV: torch.Tensor, penalties: Penalties) -> None:
    rows_PV = logits_SV.index_select(0, penalties.rows)
    counts_PV = penalties.output_counts_PV
    repetition_P1 = penalties.repetition[:, None]
    repeated = torch.where(rows_PV > 0, rows_PV / repetition_P1, rows_PV * repetition_P1)
    rows_PV = torch.where(penalties.prompt_seen_PV | (counts_PV > 0), repeated, rows_PV)
    rows_PV -= penalties.frequency[:, None] * counts_PV
    rows_PV -= penalties.presence[:, None] * (counts_PV > 0)
    logits_SV.index_copy_(0, penalties.rows, rows_PV)


def _draw(logits_SV: torch.Tensor, noise: Noise, truncation: Truncation | None) -> torch.Tensor:
    scaled_RV = logits_SV.index_select(0, noise.rows) / noise.temperature[:, None]
    if truncation is not None:
        kept = _truncate(scaled_RV.index_select(0, truncation.rows), truncation)
        scaled_RV.index_copy_(0, truncation.rows, kept)
    return scaled_RV.add_(gumbel(noise.keys, noise.positions, scaled_RV.shape[1])).argmax(dim=-1)


def _truncate(scaled_RV: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    """Set tokens to -inf that min_p, then top_k, then top_p of what is left drop; the most likely one always stays."""
    floor_R1 = scaled_RV.amax(dim=-1, keepdim=True) + truncation.min_p.log()[:, None]
    scaled_RV = scaled_RV.masked_fill(scaled_RV < floor_R1, -torch.inf)
    sorted_RV, order_RV = scaled_RV.sort(dim=-1, descending=True, stable=True)
    vocab_size = scaled_RV.shape[1]
    places_V = torch.arange(vocab_size, device=scaled_RV.device)
    top_k = torch.where(truncation.top_k > 0, truncation.top_k, vocab_size)
    sorted_RV = sorted_RV.masked_fill(places_V >= top_k[:, None], -torch.inf)
    probabilities_RV = sorted_RV.softmax(dim=-1)
    before_RV = probabilities_RV.cumsum(dim=-1) - probabilities_RV
    dropped = (before_RV >= truncation.top_p[:, None]) & (places_V > 0) & (truncation.top_p[:, None] < 1)
    return torch.empty_like(scaled_RV).scatter_(1, order_RV, sorted_RV.masked_fill(dropped, -torch.inf))
