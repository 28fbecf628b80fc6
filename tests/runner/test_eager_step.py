"""The inputs of a step come through shared memory as they were."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inlaid.kernels.context import ALL_ADAPTERS, NO_ADAPTERS
from inlaid.runner.eager_step import EagerStep, most_bytes
from tests.examples import examples


def step(tokens: int, sequences: int, blocks: int, logits: int, pieces: int, slots: bool) -> EagerStep:
    random = np.random.default_rng(tokens)

    def some(dtype: type, *shape: int) -> np.ndarray:
        return random.integers(1, 1 << 30, shape).astype(dtype)

    return EagerStep(
        *(some(np.int64, tokens) for _ in range(3)),
        some(np.int32, sequences, blocks),
        some(np.int32, sequences),
        some(np.int32, sequences),
        some(np.int32, sequences) * slots,
        some(np.int64, logits),
        some(np.int64, pieces, 2),
        num_decodes=sequences // 2,
        num_drafted=sequences // 3,
        decodes_go_on=bool(sequences % 2),
    )


@given(
    st.integers(1, 50), st.integers(1, 9), st.integers(1, 5), st.integers(0, 9), st.integers(0, 3), st.booleans()
)  # fmt: skip
@examples(60)
def test_a_step_is_read_as_it_was_written(
    tokens: int, sequences: int, blocks: int, logits: int, pieces: int, slots: bool
) -> None:
    tokens = max(tokens, sequences, logits)
    written = step(tokens, sequences, blocks, logits, pieces, slots)
    memory = np.zeros(most_bytes(tokens, sequences, blocks), np.uint8)
    assert written.write(memory) <= len(memory)
    read = EagerStep.read(memory)
    for each in fields(EagerStep):
        assert np.array_equal(getattr(read, each.name), getattr(written, each.name)), each.name
    context = read.context(16, torch.device("cpu"))
    assert context.adapters == (ALL_ADAPTERS if slots else NO_ADAPTERS)
    assert (context.num_tokens, context.num_prefills) == (tokens, sequences - sequences // 2)


def test_a_step_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="a step of 50 tokens has no room in 100 bytes"):
        step(50, 2, 2, 2, 0, False).write(np.zeros(100, np.uint8))
