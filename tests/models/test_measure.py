"""Measuring: the stack of adapters equals peft, and plain rounding is plain rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.build_demo import DEMO
from models.measure import peft_agrees, round_to_nearest
from models.plan import ADAPTERS


@pytest.mark.parametrize("task", ["to_velar", "to_zembel", "medical", "safety"])
def test_the_stack_is_what_peft_reads(task: str) -> None:
    ids = torch.randint(20, 1000, (2, 12), generator=torch.Generator().manual_seed(0))
    assert peft_agrees(DEMO / "base", DEMO / "adapters", task, ids) < 1e-3


def test_the_tested_adapters_cover_every_shape() -> None:
    plans = [ADAPTERS[task] for task in ("to_velar", "to_zembel", "medical", "safety")]
    assert {plan.targets for plan in plans} == {plan.targets for plan in ADAPTERS.values()}
    assert any(plan.use_rslora for plan in plans)
    assert any(plan.rank_pattern for plan in plans)


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.sampled_from([64, 128, 256]))
def test_rounding_errs_by_half_a_step_and_stays_on_its_grid(seed: int, bits: int, width: int) -> None:
    w = torch.randn(5, width, generator=torch.Generator().manual_seed(seed))
    rounded = round_to_nearest(w, bits)
    groups, grid = w.reshape(5, -1, min(128, width)), rounded.reshape(5, -1, min(128, width))
    step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / (2**bits - 1)
    assert ((groups - grid).abs() <= step[..., None] * 1.0001).all()
    levels = [len(torch.unique(row)) for row in grid.reshape(-1, grid.shape[-1])]
    assert max(levels) <= 2**bits
    assert torch.allclose(round_to_nearest(rounded, bits), rounded, atol=1e-5)


def test_zero_stays_zero() -> None:
    w = torch.linspace(1.0, 9.0, 128)[None].clone()
    w[0, :5] = 0.0
    assert (round_to_nearest(w, 4)[0, :5] == 0).all()
