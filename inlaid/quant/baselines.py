"""AWQ-style scaling: besides rounding to nearest, the baseline that multi-task GPTQ is compared with.

AWQ multiplies the weights of each input by s and divides the input by it, so that loud inputs get finer steps, and
folds 1/s into whatever comes before. With adapters that fold is not free: it changes what the adapter reads. A GPTQ
file has no place for s, so this is a yardstick for the table (`eval/variants.py`), not something to be written.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from inlaid.quant.grid import Grid
from inlaid.quant.solver import reconstruction_error, round_to_nearest

STEPS = 20


def scaled_weight(weight_KN: Tensor, hessian_KK: Tensor, grid: Grid) -> Tensor:
    """Return the weight rounded after the best scaling by a power of the inputs' loudness, as AWQ's search finds it."""
    loudness_K = hessian_KK.diagonal().clamp(min=1e-12).sqrt()
    plain = replace(grid, clip=False)

    def scale_of(step: int) -> Tensor:
        scale_K = loudness_K ** (step / STEPS)
        return (scale_K / (scale_K.max() * scale_K.min()).sqrt())[:, None]

    def rounded(step: int, by: Grid) -> Tensor:
        return round_to_nearest(weight_KN * scale_of(step), by).weight_KN() / scale_of(step)

    def error(step: int) -> float:
        return float(reconstruction_error(weight_KN, rounded(step, plain), hessian_KK))

    return rounded(min(range(STEPS), key=error), grid)
