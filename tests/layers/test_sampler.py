"""The sampler: each feature against its definition, and noise that is good and belongs to its token alone."""

from __future__ import annotations

import math

import pytest
import torch

from inlaid.layers.sampler import (
    NOT_FINITE,
    Coordinates,
    GrammarMask,
    Noise,
    Penalties,
    SamplingBatch,
    Truncation,
    gumbel,
    sample,
    seed_key,
)

VOCAB = 40


def noise_of(rows: int, temperature: float = 1.0, first_seed: int = 0) -> Noise:
    return Noise(
        rows=torch.arange(rows),
        temperature=torch.full((rows,), temperature),
        keys=torch.tensor([seed_key(first_seed + row) for row in range(rows)]),
        positions=torch.full((rows,), 7),
    )


def test_greedy_is_the_most_likely() -> None:
    logits = torch.randn(5, VOCAB)
    tokens, logprobs = sample(logits.clone(), SamplingBatch())
    assert torch.equal(tokens, logits.argmax(-1))
    assert logprobs is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_has_no_token_and_leaves_the_others_alone(value: float) -> None:
    logits = torch.randn(3, VOCAB)
    logits[1, 5] = value
    batch = SamplingBatch(noise=noise_of(2), logprob_rows=torch.arange(3), num_top=1)
    clean = logits.nan_to_num(0, 0)
    tokens, _ = sample(logits, batch)
    assert tokens[1] == NOT_FINITE
    assert tokens[[0, 2]].tolist() == sample(clean, batch)[0][[0, 2]].tolist()


def test_draws_follow_the_distribution() -> None:
    """20,000 draws with seeds 0, 1, 2, ...: frequencies within five standard errors of the probabilities."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    draws, temperature = 20_000, 0.7
    tokens, _ = sample(logits.repeat(draws, 1), SamplingBatch(noise=noise_of(draws, temperature)))
    want = (logits / temperature).softmax(0)
    got = torch.bincount(tokens, minlength=5) / draws
    error = (want * (1 - want) / draws).sqrt()
    assert ((got - want).abs() < 5 * error + 1e-9).all(), (got, want)


def test_noise_is_standard_gumbel_and_uncorrelated() -> None:
    keys = torch.tensor([seed_key(seed) for seed in range(64)])
    noise = gumbel(keys, torch.arange(64), 2000)
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.05
    assert torch.isfinite(noise).all()
    rows = torch.corrcoef(noise)
    assert float((rows - torch.eye(64)).abs().max()) < 0.12  # 2,016 pairs of 2,000 samples: five sigma
    assert len(noise.unique()) > 0.99 * noise.numel()


def test_no_token_is_favoured() -> None:
    """Each token's noise, over 4,000 seeds, has the mean of the distribution."""
    keys = torch.tensor([seed_key(seed) for seed in range(4000)])
    means = gumbel(keys, torch.zeros(4000, dtype=torch.int64), 300).mean(dim=0)
    assert float((means - 0.5772).abs().max()) < 5 * math.pi / math.sqrt(6 * 4000)


def test_noise_differs_by_seed_and_position_and_repeats() -> None:
    key = torch.tensor([seed_key(1), seed_key(1), seed_key(2), seed_key(1 << 40)])
    noise = gumbel(key, torch.tensor([3, 4, 3, 3]), VOCAB)
    assert len({tuple(row) for row in noise.tolist()}) == 4
    assert torch.equal(noise[:1], gumbel(key[:1], torch.tensor([3]), VOCAB))
    assert torch.equal(noise[:, :7], gumbel(key, torch.tensor([3, 4, 3, 3]), 7))  # a token's noise is its own
    assert seed_key(-1) == seed_key(2**64 - 1)


def test_noise_is_fixed_for_ever() -> None:
    """The definition, in whole numbers: kernels on other devices and later versions must reproduce it."""

    def mix(h: int) -> int:
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
        return h ^ (h >> 16)

    seed, position, token = 123456789012345, 17, 5
    key = mix(mix((seed % 2**32) ^ 0x9E3779B9) ^ (seed >> 32))
    p = mix((key + position) % 2**32)
    q = mix((p + 0x9E3779B9) % 2**32)
    u = (mix(mix((token + p) % 2**32) ^ q) + 0.5) / 2**32
    want = -math.log(-math.log1p(-u))
    assert key == seed_key(seed)
    got = float(gumbel(torch.tensor([seed_key(seed)]), torch.tensor([position]), VOCAB)[0, token])
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "allowed"),
    [
        (2, 1.0, 0.0, {0, 1}),
        (0, 0.6, 0.0, {0, 1}),  # 0.4 + 0.3 reach 0.6
        (0, 0.4, 0.0, {0}),
        (0, 0.0, 0.0, {0}),
        (0, 1.0, 0.45, {0, 1, 2}),  # at least 0.45 of 0.4
        (1, 0.9, 0.1, {0}),
        (3, 0.75, 0.0, {0, 1}),  # of the three: 4/9 + 3/9 reach 0.75
        (0, 1.0, 0.0, {0, 1, 2, 3}),
    ],
)
def test_truncation_keeps_exactly(top_k: int, top_p: float, min_p: float, allowed: set[int]) -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    rows = 400
    truncation = Truncation(
        torch.arange(rows),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
    )
    order = torch.tensor([2, 0, 3, 1])
    tokens, _ = sample(logits[order].repeat(rows, 1), SamplingBatch(noise=noise_of(rows), truncation=truncation))
    assert set(order[tokens].tolist()) == allowed


def test_only_listed_rows_are_touched() -> None:
    logits = torch.randn(3, VOCAB)
    one = torch.tensor([1])
    noise = Noise(one, torch.tensor([1.0]), torch.tensor([seed_key(0)]), torch.tensor([4]))
    best = int(logits[1].argmax())
    bias = Coordinates(one, torch.tensor([best]), torch.tensor([-math.inf]))
    tokens, _ = sample(logits.clone(), SamplingBatch(noise=noise, bias=bias))
    assert tokens[0] == logits[0].argmax()
    assert tokens[2] == logits[2].argmax()
    assert tokens[1] != best


def test_penalties() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 1.5, 0.0]])
    counts = torch.tensor([[0.0, 1.0, 3.0, 0.0, 0.0]])
    seen = torch.tensor([[True, False, False, False, False]])
    penalties = Penalties(
        torch.tensor([0]), torch.tensor([2.0]), torch.tensor([0.25]), torch.tensor([0.5]), counts, seen
    )
    sample(logits, SamplingBatch(penalties=penalties))
    want = [2.0 / 2, -2.0 * 2 - 0.25 - 0.5, 1.0 / 2 - 0.75 - 0.5, 1.5, 0.0]
    torch.testing.assert_close(logits, torch.tensor([want]))


def test_grammar_mask_and_padding_of_the_vocabulary() -> None:
    logits = torch.zeros(2, 70)
    logits[:, 69] = 9.0
    bits = torch.tensor([[1 << 5, -(2**31)]], dtype=torch.int32)  # tokens 5 and 63; 64 and up are not in the mask
    sample(logits, SamplingBatch(grammar=GrammarMask(torch.tensor([0]), bits)))
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [5, 63]
    assert torch.isfinite(logits[1]).all()


def test_logprobs_are_of_the_model_itself() -> None:
    logits = torch.randn(2, VOCAB)
    best = int(logits[1].argmax())
    bias = Coordinates(torch.tensor([1]), torch.tensor([best]), torch.tensor([-math.inf]))
    batch = SamplingBatch(bias=bias, logprob_rows=torch.tensor([1]), num_top=3)
    tokens, logprobs = sample(logits.clone(), batch)
    want = logits[1].log_softmax(0)
    assert logprobs is not None
    assert tokens[1] == want.argsort(descending=True)[1]
    assert float(logprobs.chosen_L[0]) == pytest.approx(float(want[tokens[1]]))
    assert int(logprobs.ranks_L[0]) == 2
    assert logprobs.top_tokens_LK[0].tolist() == want.topk(3).indices.tolist()
    torch.testing.assert_close(logprobs.top_values_LK[0], want.topk(3).values)
