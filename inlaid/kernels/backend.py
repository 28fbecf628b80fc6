"""What a kernel must offer: the protocols between the layers and whatever computes on a device, and the tensors of
the adapter pool that they share. `reference.py` is the specification of each in plain torch; the layers call these
and nothing else, so that CPU and GPU differ in kernels only.

Shape letters: T tokens of a step, S sequences, K input and N output features, H heads, G key/value heads,
C head width, D model width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from inlaid.checkpoint import QuantizedLinear, QuantSpec
    from inlaid.kernels.context import StepContext

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Site:
    """Sibling projections of one input: adapter sites [first, first + len(widths)) and their output widths."""

    first: int
    widths: tuple[int, ...]

    @property
    def sites(self) -> range:
        return range(self.first, self.first + len(self.widths))


@dataclass
class AdapterPages:
    """The adapters on the device. `pool` is flat; `table[slot, site] = (A offset, B offset, rank)` in elements;
    slot 0 has rank 0 everywhere. A is [rank, K] and B is [N, rank], row-major. `versions[slot]` grows whenever the
    slot's content changes, so that whoever derived something from it knows."""

    pool: torch.Tensor
    table: torch.Tensor  # int64 [slots, sites, 3]
    scale: torch.Tensor  # float32 [slots, sites]
    versions: list[int]


class Packed(Protocol):
    """A weight in the layout of its backend."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


class Gemm(Protocol):
    """y = x @ W."""

    name: str

    def warmup(self, packed: Any, rows: Sequence[int]) -> None:
        """Compile and tune everything that gemm will need for these row counts."""

    def gemm(self, x_TK: torch.Tensor, packed: Any, out_TN: torch.Tensor) -> None:
        """Write the product into out; allocates nothing visible, never synchronizes."""


@dataclass(frozen=True)
class Parts:
    """How a product lies in parts [P, T, N] that whoever reads it adds, the first part first: of a tile of `height`
    rows and `width` columns the first `counts[row tile, column tile]` parts were written, and nothing of the others."""

    counts: torch.Tensor  # int32, on the device
    most: int
    height: int
    width: int


@runtime_checkable
class GemmInParts(Protocol):
    """What a backend may offer besides: blocks that share a sum over K need not wait for each other."""

    def parts(self, packed: Any, rows: int) -> Parts | None:
        """None where one whole product is as fast; before a graph is captured, asked once for the same rows."""

    def gemm_in_parts(self, x_TK: torch.Tensor, packed: Any, out_PTN: torch.Tensor) -> None:
        """Write the parts, as many as `parts` says that there are at most."""


class LinearBackend(Gemm, Protocol):
    """The product with quantized weights."""

    def why_not(self, spec: QuantSpec, device: torch.device) -> str | None:
        """None when it can serve such weights there, else the reason."""

    def prepare(self, weight: QuantizedLinear, device: torch.device, dtype: torch.dtype) -> Packed:
        """Repack once, at load."""


class LoraBackend(Protocol):
    """out += scale * (x @ A.T) @ B.T, each row with the adapter of its slot; rows of slot 0 are left alone."""

    def plan(self, context: StepContext) -> None:
        """Once a step, before any layer."""

    def shrink(self, x_TK: torch.Tensor, site: Site, context: StepContext) -> Any:
        """x @ A.T for all siblings of the site; may run beside the base GEMM."""

    def expand(self, shrunk: Any, site: Site, out_TN: torch.Tensor, context: StepContext) -> None:
        """Add the scaled product with B to out, siblings side by side in N."""


class AttentionBackend(Protocol):
    """Softmax(q k^T / sqrt(C)) v over each sequence's pages, causal, optionally only over the last `window` tokens."""

    def plan(self, context: StepContext) -> None:
        """Once a step, before any layer."""

    def attend(
        self,
        q_THC: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        window: int | None,
        context: StepContext,
    ) -> torch.Tensor:
        """[T, H, C]; this step's keys and values are already in the caches ([blocks, block_size, G, C])."""


class Ops(Protocol):
    """The small operations between the GEMMs."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 inside."""

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """residual += x in place; returns rms_norm(residual)."""

    def rotate(self, x_THC: torch.Tensor, cos_TC: torch.Tensor, sin_TC: torch.Tensor) -> None:
        """Rotary embedding of halves, in place."""

    def silu_mul(self, x_T2F: torch.Tensor) -> torch.Tensor:
        """silu(first half) * second half."""

    def store_kv(
        self,
        k_TGC: torch.Tensor,
        v_TGC: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> None:
        """Write each token's key and value to its slot (block * block_size + offset)."""


@dataclass(frozen=True)
class Kernels:
    """One choice of kernels for a model on a device; `quantized` is tried in order for each weight."""

    quantized: tuple[LinearBackend, ...]
    attention: AttentionBackend
    ops: Ops
    lora: LoraBackend | None = None
