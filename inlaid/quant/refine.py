"""Better codes and steps for a weight that GPTQ has quantized: the same file, a smaller tr(dW H dWᵀ).

GPTQ decides each code once, before those after it are known, and steps before any code. Here groups take turns, a few
rounds long: a group's steps are fitted to its codes by least squares, then each of its codes is chosen again with all
others held. Neither makes the error larger (under the damped Hessian), so rounds may stop at any time.

With dW = W - Q and G = H dW, input i of the weight would best be Q[i] + G[i] / H[i, i]; and steps s of a group whose
codes less their zeros are t change the error least at s + <t, G> / <t, H t>.

Legend: K inputs, N outputs, G groups, S inputs of one group, B inputs of one block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inlaid.quant.rounding import RoundBlock


def refine(
    weight_KN: Tensor,
    hessian_KK: Tensor,
    codes_KN: Tensor,
    scales_GN: Tensor,
    zeros_GN: Tensor,
    rounds: int,
    block: int,
    round_block: RoundBlock,
    rest: Callable[[], object] = lambda: None,
) -> None:
    """Improve codes and scales where they are. Inputs are sorted by group; scales hold half-precision numbers. After
    each group `rest` is called.
    """
    size = len(weight_KN) // len(scales_GN)
    steps_KN = _steps(codes_KN, zeros_GN, size)
    errors_KN = weight_KN - steps_KN * scales_GN.repeat_interleave(size, dim=0)
    for _ in range(rounds):
        gradient_KN = hessian_KK @ errors_KN
        for group in range(len(scales_GN)):
            rows = slice(group * size, (group + 1) * size)
            steps_SN = _steps(codes_KN[rows], zeros_GN[group : group + 1], size)
            change_N = _change(steps_SN, gradient_KN[rows], hessian_KK[rows, rows], scales_GN[group])
            scales_GN[group] += change_N
            errors_KN[rows] -= steps_SN * change_N
            gradient_KN.addmm_(hessian_KK[:, rows], steps_SN * change_N, alpha=-1)
            for start in range(rows.start, rows.stop, block):
                part = slice(start, min(start + block, rows.stop))
                before_BN, curvature_BB = errors_KN[part].clone(), hessian_KK[part, part]
                diagonal_B = curvature_BB.diagonal()[:, None]
                # What the block's own errors add is put in by the loop, once each input's new error is known.
                target_BN = weight_KN[part] + (gradient_KN[part] - curvature_BB.tril() @ before_BN) / diagonal_B
                shape = (part.stop - part.start, -1)
                errors_KN[part] = round_block(
                    target_BN,
                    -curvature_BB / diagonal_B.T,
                    scales_GN[group].expand(shape),
                    zeros_GN[group].expand(shape),
                    codes_KN[part],
                    weight_KN[part],
                )
                gradient_KN.addmm_(hessian_KK[:, part], errors_KN[part] - before_BN)
            rest()


def _steps(codes_KN: Tensor, zeros_GN: Tensor, size: int) -> Tensor:
    return codes_KN.to(zeros_GN.dtype) - zeros_GN.repeat_interleave(size, dim=0)


def _change(steps_SN: Tensor, gradient_SN: Tensor, curvature_SS: Tensor, scale_N: Tensor) -> Tensor:
    """Return the change of a group's scales; 0 where half precision has no better one."""
    slope_N = (steps_SN * gradient_SN).sum(0)
    curvature_N = (steps_SN * (curvature_SS @ steps_SN)).sum(0)
    best_N = scale_N + slope_N / curvature_N.clamp(min=torch.finfo(scale_N.dtype).tiny)
    change_N = best_N.half().to(scale_N.dtype) - scale_N
    better_N = (scale_N + change_N > 0) & (change_N * (2 * slope_N - change_N * curvature_N) > 0)
    return torch.where(better_N, change_N, torch.zeros_like(change_N))
