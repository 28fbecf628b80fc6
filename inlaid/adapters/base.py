"""The base's linears as an adapter needs them while it is read: for DoRA, whose norms are those of the base's rows with
the adapter in them; for PiSSA and OLoRA, which took a part of the base away; for biases, which are counted from the
base's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from inlaid.adapters.adapter import AdapterError, site_path
from inlaid.checkpoint import Checkpoint, dequantize

PISSA, OLORA = "pissa", "olora"
RESIDUAL_INITS = (PISSA, OLORA)


@dataclass(frozen=True)
class BaseLinears:
    """The linears of a base. `scales_outputs`: its kernels apply what `Outputs` says, as those of a CPU do."""

    folder: Path
    scales_outputs: bool

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder)

    def weight(self, site: int) -> Tensor:
        """Return the weight [N, K] in fp32, dequantized."""
        path = site_path(site)
        if path in self.checkpoint.linears:
            return dequantize(self.checkpoint.linear(path)).T
        return self.checkpoint.tensor(f"{path}.weight").float()

    def bias(self, site: int) -> Tensor | None:
        """Return the bias [N] in fp32, or None."""
        name = f"{site_path(site)}.bias"
        return self.checkpoint.tensor(name).float() if name in self.checkpoint else None

    def vocabulary(self, part: str) -> Tensor:
        """Return the weight [V, D] of embed_tokens or lm_head in fp32."""
        tied = "lm_head.weight" not in self.checkpoint
        name = "model.embed_tokens.weight" if tied or part != "lm_head" else "lm_head.weight"
        return self.checkpoint.tensor(name).float()


@dataclass(frozen=True, eq=False)
class Outputs:
    """The change of a linear's outputs by an adapter: out = (base + adapter) * scale + bias; None: nothing."""

    scale_N: Tensor | None = None
    bias_N: Tensor | None = None


def dora_outputs(
    base: BaseLinears, site: int, a_RK: Tensor, b_NR: Tensor, scale: float, magnitude_N: Tensor
) -> Outputs:
    """Return DoRA's scale m / |W + scale B A|, row by row, which the base's bias is not to take part in."""
    norm_N = (base.weight(site) + scale * (b_NR.float() @ a_RK.float())).norm(dim=1)
    if not bool((norm_N > 0).all()):
        raise AdapterError(f"{site_path(site)}: a row of the base with the adapter in it is zero, and has no direction")
    scale_N = magnitude_N.float() / norm_N
    bias_N = base.bias(site)
    return Outputs(scale_N, None if bias_N is None else (1 - scale_N) * bias_N)


def with_residual(
    base: BaseLinears, site: int, a_RK: Tensor, b_NR: Tensor, scale: float, init: str
) -> tuple[Tensor, Tensor]:
    """Return the factors of an adapter for the base as it is, of twice the rank: training began with scale B0 A0 taken
    out of the base, so B A - B0 A0 is what it learnt. B0 and A0 follow from the base: its first singular vectors
    (PiSSA), or the first columns of its QR decomposition (OLoRA)."""
    if base.checkpoint.is_quantized:
        raise AdapterError(
            f"init_lora_weights {init!r} took a part of the unquantized base away, which a quantized one does not "
            "tell; serve it on the base that it was trained on, or convert it to a plain LoRA (PEFT's "
            "path_initial_model_for_weight_conversion)"
        )
    if scale <= 0:
        raise AdapterError(f"init_lora_weights {init!r} needs a lora_alpha above 0")
    weight_NK, rank = base.weight(site), a_RK.shape[0]
    if rank > min(weight_NK.shape):
        raise AdapterError(f"{site_path(site)} has rank {rank}, more than the base's linear has")
    if init == OLORA:
        q_NR, r_RK = torch.linalg.qr(weight_NK)
        b0_NR, a0_RK = q_NR[:, :rank], r_RK[:rank]
    else:
        u_NR, s_R, v_RK = torch.linalg.svd(weight_NK, full_matrices=False)
        root_R = (s_R[:rank] / scale).sqrt()
        b0_NR, a0_RK = u_NR[:, :rank] * root_R, root_R[:, None] * v_RK[:rank]
    return torch.cat([a_RK.float(), a0_RK]), torch.cat([b_NR.float(), -b0_NR], dim=1)
