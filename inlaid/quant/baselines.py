"""What multi-task GPTQ is compared with, besides rounding: AWQ-style scaling.

AWQ multiplies the weights of each input by s and divides the input by it, so that loud inputs get finer steps, and
folds 1/s into whatever comes before. With adapters that fold is not free: it changes what the adapter reads. A GPTQ
file has no place for s, so this is a yardstick for the table (`eval/quant_table.py`), not something to be written.
"""

from __future__ import annotations

from torch import Tensor

from inlaid.quant.solver import Grid, reconstruction_error, round_to_nearest

STEPS = 20


def scaled_weight(weight_KN: Tensor, hessian_KK: Tensor, grid: Grid) -> Tensor:
    """The weight that AWQ's search ends with: rounded after the best scaling by a power of the inputs' loudness."""
    loudness_K = hessian_KK.diagonal().clamp(min=1e-12).sqrt()
    best_error, best_KN = float("inf"), weight_KN
    for step in range(STEPS):
        scale_K = loudness_K ** (step / STEPS)
        scale_K = scale_K / (scale_K.max() * scale_K.min()).sqrt()
        quantized_KN = round_to_nearest(weight_KN * scale_K[:, None], grid).weight_KN() / scale_K[:, None]
        error = float(reconstruction_error(weight_KN, quantized_KN, hessian_KK))
        if error < best_error:
            best_error, best_KN = error, quantized_KN
    return best_KN
