"""The values that a quantized weight may take: a step and a zero for each group of inputs and each output.

The solver asks for a group's grid when it reaches the group. Steps are half-precision numbers from the start, as the
file will hold them, so that codes are chosen against what is read back.

Legend: K inputs, N outputs, G the inputs of one group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inlaid.checkpoint import QuantSpec
from inlaid.model.spec import ModelSpec

GROUP_SIZES = (128, 64, 32)  # of which the first that fits is the default
CLIP_STEPS = 13  # ranges that are tried, each by a twentieth of the whole one narrower


class SolverError(ValueError):
    """The weight or its Hessian cannot be quantized; the message says why."""


def choose_group_size(spec: ModelSpec, tell: Callable[[str], object]) -> int:
    """Return the largest usual group size that divides the inputs of every linear, and tell where it is not 128."""
    inputs = sorted({spec.hidden_size, spec.num_heads * spec.head_dim, spec.intermediate_size})
    fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in inputs)]
    if not fitting:
        raise SolverError(
            f"none of the group sizes {', '.join(map(str, GROUP_SIZES))} divides this base's inputs "
            f"({', '.join(map(str, inputs))}); give --group-size, -1 for whole columns"
        )
    if fitting[0] != GROUP_SIZES[0]:
        indivisible = ", ".join(str(width) for width in inputs if width % (2 * fitting[0]))
        tell(f"groups of {fitting[0]}: {2 * fitting[0]} does not divide {indivisible} inputs of this base's linears")
    return fitting[0]


@dataclass(frozen=True)
class Grid:
    """The values that a weight may take, and how they are chosen.

    `act_order` lets groups gather inputs that are alike (g_idx says which), small weights of loud inputs first, and
    rounds in that order; with `static_groups` they stay where they are in the weight, so that readers need no
    permutation, and inputs are rounded loudest first.
    `clip` searches each group's range for the least weighted squared error instead of taking its extremes.
    `damping` is a share of the Hessian's mean diagonal; it grows tenfold until the factorization holds.
    `refine` is for how many rounds steps are fitted and codes chosen again after GPTQ's own pass.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    act_order: bool = False
    static_groups: bool = False
    clip: bool = True
    damping: float = 0.01
    refine: int = 4

    def __post_init__(self) -> None:
        if self.static_groups and not self.act_order:
            raise SolverError("static groups are for act-order: give --act-order too, or leave --static-groups out")
        if self.refine < 0:
            raise SolverError(f"{self.refine} rounds of refinement: give 0 for none, or more")
        if self.damping < 0:
            raise SolverError(f"damping is {self.damping}: give 0 or more")

    @classmethod
    def of_width(cls, bits: int, group_size: int) -> Grid:
        """Return the best grid of a width. At 3 and 2 bits groups gather inputs that are alike. From 4 bits up they
        stay in place, since the gain is not worth the permutation that every reader then does.
        """
        return cls(bits, group_size, act_order=bits <= 3)

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(self.bits, self.group_size, self.symmetric, self.act_order and not self.static_groups)

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1


def find_grid(rows_GN: Tensor, importance_G: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scale and zero of one group for every output. The scale is a half-precision number, as it is stored;
    infinite where a range is too large for one (`check_scales`). Nothing is read back from a GPU.
    """
    low_N, high_N = rows_GN.amin(0).clamp(max=0), rows_GN.amax(0).clamp(min=0)
    if grid.symmetric:
        high_N = torch.maximum(high_N, -low_N)
        low_N = -high_N
    if not grid.clip:
        return _grid_of_range(low_N, high_N, grid)
    steps_C1 = (1.0 - 0.05 * torch.arange(CLIP_STEPS, device=rows_GN.device, dtype=torch.float64))[:, None]
    steps_C1 = steps_C1.to(rows_GN.dtype)
    scale_CN, zero_CN = _grid_of_range(low_N * steps_C1, high_N * steps_C1, grid)
    if rows_GN.is_cuda:  # all at once: a CPU's caches hold one range, and a GPU launches one kernel for all
        error_CN = _weighted_error(rows_GN, importance_G, scale_CN[:, None], zero_CN[:, None], grid)
    else:
        tried = zip(scale_CN, zero_CN, strict=True)
        error_CN = torch.stack([_weighted_error(rows_GN, importance_G, *each, grid) for each in tried])
    best_1N = error_CN.argmin(0, keepdim=True)
    scale_N = torch.where(torch.isfinite(scale_CN[0]), scale_CN.gather(0, best_1N)[0], scale_CN[0])
    return scale_N, zero_CN.gather(0, best_1N)[0]


def check_scales(scales_GN: Tensor) -> None:
    """Refuse steps that half precision does not hold."""
    if not torch.isfinite(scales_GN).all():
        raise SolverError("weights are too large for the half-precision scales of the format")


def _grid_of_range(low_N: Tensor, high_N: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scale and zero for codes over [low, high]. A zero of at least 1 is kept, so a range that needs none gives
    up one code below it.
    """
    scale_N = _stored((high_N - low_N) / grid.max_code)
    if grid.symmetric:
        return scale_N, torch.full_like(scale_N, 2 ** (grid.bits - 1))
    zero_N = torch.round(-low_N / scale_N)
    scale_N = torch.where(zero_N < 1, _stored(high_N / (grid.max_code - 1)), scale_N)
    return scale_N, zero_N.clamp(1, grid.max_code)


def _stored(step_N: Tensor) -> Tensor:
    """Round a step to what the file can hold: a half-precision number above zero."""
    return torch.where(step_N > 0, step_N.half().to(step_N.dtype).clamp(min=2.0**-24), torch.ones_like(step_N))


def _weighted_error(rows_GN: Tensor, importance_G: Tensor, scale_N: Tensor, zero_N: Tensor, grid: Grid) -> Tensor:
    quantized_GN = (nearest_codes(rows_GN, scale_N, zero_N, grid.max_code) - zero_N) * scale_N
    return ((rows_GN - quantized_GN).square() * importance_G[:, None]).sum(-2)


def nearest_codes(w: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    return (w / scale).round_().add_(zero).clamp_(0, max_code)
