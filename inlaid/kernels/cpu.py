"""The kernels of a machine without a GPU, in plain torch: linears and the operations between them. Attention is in
cpu_attention.py, adapters are in cpu_lora.py. Shape letters are those of backend.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from inlaid.checkpoint import QuantizedLinear, QuantSpec, dequantize
from inlaid.kernels import kv_codes
from inlaid.kernels.backend import AdapterPages, HeadNorms, Kernels, LayerCache, Product, Workspace
from inlaid.kernels.cpu_attention import CpuAttention
from inlaid.kernels.cpu_lora import CpuLora

if TYPE_CHECKING:
    from inlaid.kernels.context import StepContext


@dataclass(frozen=True)
class DensePacked:
    """A weight in the compute type, [K, N]; on a GPU it is a view of the stored [N, K]."""

    weight_KN: torch.Tensor

    @property
    def in_features(self) -> int:
        return self.weight_KN.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight_KN.shape[1]


class DenseLinear:
    """x @ W.T with W in the compute type: unquantized weights, and the output head."""

    name = "dense"

    def keeps(self, stored: torch.dtype) -> bool:
        """Return whether weights are read as they are stored, not in the compute type."""
        return False

    def pack(self, weight_NK: torch.Tensor) -> DensePacked:
        """Return the weight as [K, N]: a CPU reads it a third faster for one row. A GPU shares tied weights."""
        return DensePacked(weight_NK.t().contiguous() if weight_NK.device.type == "cpu" else weight_NK.t())

    def warmup(self, packed: DensePacked, rows: Sequence[int]) -> None:
        pass

    def gemm(self, x_TK: torch.Tensor, packed: DensePacked, out_TN: torch.Tensor) -> None:
        torch.mm(x_TK, packed.weight_KN, out=out_TN)


DENSE = DenseLinear()


class ReferenceLinear(DenseLinear):
    """Quantized weights, dequantized once at load and multiplied in the compute type: any bits, group and order."""

    name = "reference"

    def why_not(self, spec: QuantSpec, device: torch.device) -> str | None:
        return None

    def prepare(self, weight: QuantizedLinear, device: torch.device, dtype: torch.dtype) -> DensePacked:
        return DensePacked(dequantize(weight).to(device=device, dtype=dtype))


class CpuOps:
    """The operations between the linears. Products are whole, nothing is pending, and each result is new memory."""

    def embed_norm(
        self, step: StepContext, table_VD: torch.Tensor, weight_D: torch.Tensor, eps: float, workspace: Workspace
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual_TD = F.embedding(step.ids_T, table_VD).to(weight_D.dtype)
        return residual_TD, rms_norm(residual_TD, weight_D, eps)

    def add_norm(
        self,
        product: Product,
        residual_TD: torch.Tensor,
        weight_D: torch.Tensor,
        eps: float,
        workspace: Workspace,
        rows_L: torch.Tensor | None = None,
        keep: bool = True,
    ) -> torch.Tensor:
        if keep:
            total = residual_TD.add_(product.whole)
        else:
            total = residual_TD + product.whole
        return rms_norm(total if rows_L is None else total.index_select(0, rows_L), weight_D, eps)

    def angles(self, cos: torch.Tensor, sin: torch.Tensor, step: StepContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Look the tokens' positions up, once for all layers: [T, C]."""
        return cos.index_select(0, step.positions_T), sin.index_select(0, step.positions_T)

    def rope_store(
        self,
        product: Product,
        angles: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache,
        num_heads: int,
        head_norms: HeadNorms | None,
        step: StepContext,
    ) -> torch.Tensor:
        H, (G, C) = num_heads, cache[0].shape[2:]
        qkv = product.whole.view(-1, H + 2 * G, C)
        if head_norms is not None:
            qkv[:, :H] = rms_norm(qkv[:, :H], head_norms.q_weight_C, head_norms.eps)
            qkv[:, H : H + G] = rms_norm(qkv[:, H : H + G], head_norms.k_weight_C, head_norms.eps)
        rotate(qkv[:, : H + G], *angles)
        kv_codes.write(cache, step.kv_slots_T, qkv[:, H : H + G], qkv[:, H + G :])
        return qkv[:, :H]

    def activate(self, product: Product, workspace: Workspace) -> torch.Tensor:
        gate, up = product.whole.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 inside."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


def rotate(x_THC: torch.Tensor, cos_TC: torch.Tensor, sin_TC: torch.Tensor) -> None:
    """Rotate each head's halves in place."""
    half = x_THC.shape[-1] // 2
    turned = torch.cat((-x_THC[..., half:], x_THC[..., :half]), dim=-1)
    x_THC.mul_(cos_TC[:, None]).addcmul_(turned, sin_TC[:, None])


def cpu_kernels(pages: AdapterPages | None = None) -> Kernels:
    """Return every kernel in plain torch."""
    lora = CpuLora(pages) if pages is not None else None
    return Kernels(quantized=(ReferenceLinear(),), attention=CpuAttention(), ops=CpuOps(), lora=lora)
