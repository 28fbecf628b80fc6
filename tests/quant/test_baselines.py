"""AWQ-style scaling does what it is for: finer steps where inputs are loud."""

from __future__ import annotations

import torch

from inlaid.quant.baselines import scaled_weight
from inlaid.quant.grid import Grid
from inlaid.quant.solver import reconstruction_error, round_to_nearest


def test_scaling_beats_rounding_where_inputs_are_loud_and_never_loses() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, generator=generator)
    x = torch.randn(512, 64, generator=generator)
    for loud, factor in ((1.0, 1.0), (30.0, 0.7)):
        x[:, ::16] *= loud
        moment = x.T @ x / len(x)
        for grid in (Grid(4, 32, clip=False), Grid(3, 32, clip=False)):
            scaled = reconstruction_error(weight, scaled_weight(weight, moment, grid), moment)
            rounded = reconstruction_error(weight, round_to_nearest(weight, grid).weight_KN(), moment)
            assert float(scaled) <= factor * float(rounded)
