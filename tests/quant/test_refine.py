"""Refinement against its definition, coordinate by coordinate, and against the one thing it promises: never worse."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inlaid.quant.refine import refine
from inlaid.quant.rounding import rounder

MAX_CODE = 7


def start(seed: int, inputs: int = 48, outputs: int = 6, size: int = 16) -> tuple[Tensor, ...]:
    """Make a weight, a damped Hessian, and codes and grids that could be better."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, mix = normal(inputs, outputs), normal(inputs, inputs) / inputs**0.5
    hessian = mix @ mix.T + 0.05 * torch.eye(inputs, dtype=torch.float64)
    codes = torch.randint(0, MAX_CODE + 1, (inputs, outputs), generator=generator, dtype=torch.uint8)
    scales = (normal(inputs // size, outputs).abs() + 0.1).half().double()
    zeros = torch.randint(1, MAX_CODE + 1, (inputs // size, outputs), generator=generator).double()
    return weight, hessian, codes, scales, zeros


def value(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    size = len(codes) // len(scales)
    return (codes.double() - zeros.repeat_interleave(size, 0)) * scales.repeat_interleave(size, 0)


def error(weight: Tensor, hessian: Tensor, quantized: Tensor) -> Tensor:
    """Return the error of each output."""
    delta = weight - quantized
    return ((hessian @ delta) * delta).sum(0)


def improved(weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, rounds: int, block: int):
    codes, scales = codes.clone(), scales.clone()
    refine(weight, hessian, codes, scales, zeros, rounds, block, rounder(weight[:block], MAX_CODE))
    return codes, scales


def by_definition(weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor):
    """One round, every change found by trying: all codes of an input, and a line search for a group's steps."""
    codes, scales = codes.clone(), scales.clone()
    size = len(codes) // len(scales)
    for group in range(len(scales)):
        at_zero, at_one, at_two = (
            error(weight, hessian, value(codes, torch.cat([scales[:group], factor * scales[group][None],
                                                           scales[group + 1 :]]), zeros))
            for factor in (0.0, 1.0, 2.0)
        )  # fmt: skip
        bend, slope = (at_two - 2 * at_one + at_zero) / 2, (4 * at_one - at_two - 3 * at_zero) / 2
        tried = scales.clone()
        tried[group] = (scales[group] * -slope / (2 * bend)).half().double()
        better = error(weight, hessian, value(codes, tried, zeros)) < at_one
        scales[group] = torch.where(better & (tried[group] > 0), tried[group], scales[group])
        for i in range(group * size, (group + 1) * size):
            every = []
            for code in range(MAX_CODE + 1):
                codes[i] = code
                every.append(error(weight, hessian, value(codes, scales, zeros)))
            codes[i] = torch.stack(every).argmin(0).to(torch.uint8)
    return codes, scales


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**20), block=st.sampled_from([4, 8, 16]))
def test_a_round_is_what_trying_every_change_in_turn_gives(seed: int, block: int) -> None:
    problem = start(seed)
    codes, scales = improved(*problem, rounds=1, block=block)
    expected_codes, expected_scales = by_definition(*problem)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes, expected_codes)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), size=st.sampled_from([16, 48]))
def test_no_output_ever_gets_worse(seed: int, size: int) -> None:
    weight, hessian, codes, scales, zeros = start(seed, size=size)
    before = error(weight, hessian, value(codes, scales, zeros))
    for _ in range(4):
        codes, scales = improved(weight, hessian, codes, scales, zeros, rounds=1, block=16)
        assert torch.equal(scales, scales.half().double())
        after = error(weight, hessian, value(codes, scales, zeros))
        assert bool((after <= before * (1 + 1e-9)).all())
        before = after
