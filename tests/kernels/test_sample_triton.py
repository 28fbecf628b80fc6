"""The sampling kernels against the specification: the same draws, with and without truncation."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from inlaid.kernels import sample_triton, spec
from inlaid.layers import sampler
from inlaid.layers.sampler import NOT_FINITE
from tests.cases import spread

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    rows, vocab = logits.shape
    made = sample_triton.Sampler(rows, vocab, DEVICE)
    last = torch.full((2 * rows,), -1, dtype=torch.int32, device=DEVICE)
    tokens = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    keys = torch.tensor([sampler.seed_key(row) for row in range(rows)])
    made.sample(
        logits,
        torch.full((rows,), temperature, device=DEVICE),
        torch.full((rows,), top_k, dtype=torch.int32, device=DEVICE),
        torch.full((rows,), top_p, device=DEVICE),
        torch.full((rows,), min_p, device=DEVICE),
        torch.where(keys >= 2**31, keys - 2**32, keys).int().to(DEVICE),
        (torch.arange(rows, device=DEVICE) + 5).int(),
        (torch.arange(rows, device=DEVICE) * 2).int(),
        last,
        tokens,
    )
    assert torch.equal(last[::2], torch.where(tokens == NOT_FINITE, last[::2], tokens))
    assert 0 <= int(last[::2].min()) <= int(last[::2].max()) < vocab, "the next step reads the embedding there"
    assert (last[1::2] == -1).all()
    return tokens.tolist()


def expected_of(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    rows = logits.tolist()
    keys = [sampler.seed_key(row) for row in range(len(rows))]
    return [
        spec.draw(row, temperature, key, place + 5, top_k, top_p, min_p)
        for place, (row, key) in enumerate(zip(rows, keys, strict=True))
    ]


TRUNCATIONS = (  # temperature, top_k, top_p, min_p
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 1, 1.0, 0.0),
    (1.5, 3, 1.0, 0.0),
    (1.0, 0, 0.5, 0.0),
    (2.0, 0, 0.9, 0.0),
    (1.0, 0, 1.0, 0.3),
    (1.3, 20, 0.8, 0.01),
    (3.0, 5, 0.99, 0.0),
)


@pytest.mark.parametrize(
    ("levels", "temperature", "top_k", "top_p", "min_p"),
    spread(((levels, *truncation) for levels in (0, 6) for truncation in TRUNCATIONS), every=2),
)
def test_same_draws(levels: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """`levels`: logits of so few values that most truncations fall among equals."""
    generator = torch.Generator().manual_seed(levels)
    logits = torch.randn(4, 4500, generator=generator) * 3
    if levels:
        logits = (logits / 9 * levels).round().clamp(-levels, levels)
    logits = logits.half().to(DEVICE)
    expected = expected_of(logits, temperature, top_k, top_p, min_p)
    assert draw(logits, temperature, top_k, top_p, min_p) == expected


def test_first_of_equals_wins() -> None:
    logits = torch.zeros(3, 9000).half().to(DEVICE)
    logits[1, [7000, 8000]] = 4.0
    logits[2, 4999] = -1.0
    assert draw(logits, 0.0, 0, 1.0, 0.0) == [0, 7000, 0]


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 3)])
def test_a_line_that_is_not_finite_has_no_token(temperature: float, top_k: int) -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    expected = draw(logits, temperature, top_k, 1.0, 0.0)
    logits[0] = float("nan")
    logits[1, 4500] = float("inf")
    logits[2, 42] = float("nan")
    assert draw(logits, temperature, top_k, 1.0, 0.0) == [NOT_FINITE] * 3 + expected[3:]
