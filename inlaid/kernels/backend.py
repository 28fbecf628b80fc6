"""Protocols between the layers and the kernels of a device, and the data they share.

The transformer calls `Ops`, `AttentionBackend`, `LoraBackend` and the linear backends, and nothing else of a device.
Each has a plain torch version for CPUs (`cpu.py`) and one for GPUs (`*_triton.py` and the linear kernels). A linear
returns a `Product`, which its reader completes: an operation that reads a product adds its split parts and the adapter
expansion that is still pending. Memory comes from a `Workspace`.

Shapes: T tokens of a step, S sequences, L rows listed, K inputs and N outputs of a linear, P split parts, H query
heads, G key/value heads, C head width, D model width, F MLP width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from inlaid.checkpoint import QuantizedLinear, QuantSpec
    from inlaid.kernels.context import StepContext
    from inlaid.kernels.decode import DecodeKernel
    from inlaid.kernels.lora_triton import Pending

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
    """The adapters on the device.

    `pool` is flat. `table[slot, site]` is (A offset, B offset, rank), offsets in elements; slot 0 has rank 0
    everywhere. A is [rank, K] and B is [N, rank], row-major. `versions[slot]` grows whenever the slot's content
    changes, so that data derived from the slot can be told to be stale. `outputs[slot, site]` is the offsets of a scale
    and a bias [N] of the linear's outputs, each -1 where there is none; None on devices that do not apply them."""

    pool: torch.Tensor
    table: torch.Tensor  # int64 [slots, sites, 3]
    scale: torch.Tensor  # float32 [slots, sites]
    versions: list[int]
    outputs: torch.Tensor | None = None  # int64 [slots, sites, 2]


@dataclass(frozen=True)
class Parts:
    """The layout [P, T, N] of a product in split parts, which the reader adds in order, the first part first.

    Of a tile of `height` rows and `width` columns the first `counts[row tile, column tile]` parts are written; nothing
    is written to the others."""

    counts: torch.Tensor  # int32, on the device
    most: int
    height: int
    width: int


@dataclass(frozen=True)
class Product:
    """The output of a linear, which its reader completes.

    The value is `tensor` (if `parts` is given: the sum of its parts, rounded once) plus the expansion `pending`."""

    tensor: torch.Tensor  # [T, N]; with `parts` [P, T, N]
    parts: Parts | None = None
    pending: Pending | None = None

    @property
    def first(self) -> torch.Tensor:
        """[T, N]: the part to which a bias or an expansion is added."""
        return self.tensor if self.parts is None else self.tensor[0]

    @property
    def whole(self) -> torch.Tensor:
        """[T, N] of a product that is complete."""
        assert self.parts is None
        assert self.pending is None
        return self.tensor


class Workspace(Protocol):
    """Memory for what a step computes, by name.

    On a CPU every request allocates. On a GPU each name is a fixed buffer, so that a captured step allocates nothing: a
    tensor is valid until the next request for the same name."""

    side: torch.cuda.Stream | None  # for work beside the main stream; None where there are no streams

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a contiguous tensor of this shape with undefined content; `dtype` None is the compute type."""

    def fits(self, name: str, size: int) -> bool:
        """Return whether `size` elements may be taken under a name that is not always provided for."""


class Gemm(Protocol):
    """The product y = x @ W."""

    name: str

    def warmup(self, packed: Any, rows: Sequence[int]) -> None:
        """Compile and tune everything that gemm will need for these row counts."""

    def gemm(self, x_TK: torch.Tensor, packed: Any, out_TN: torch.Tensor) -> None:
        """Write the product into out; allocate nothing visible, never synchronize."""


@runtime_checkable
class GemmInParts(Protocol):
    """A backend that can also leave a product in split parts: blocks that share a sum over K need not wait."""

    def parts(self, packed: Any, rows: int) -> Parts | None:
        """Return the layout for this many rows, or None where one whole product is as fast. It is asked once for the
        same rows before a graph is captured."""

    def gemm_in_parts(self, x_TK: torch.Tensor, packed: Any, out_PTN: torch.Tensor) -> None:
        """Write the parts into [`most`, T, N]."""


class HeadLinear(Gemm, Protocol):
    """The product with the output head's weight."""

    def keeps(self, stored: torch.dtype) -> bool:
        """Return whether weights are read as they are stored, not in the compute type."""

    def pack(self, weight_NK: torch.Tensor) -> Any:
        """Lay a weight out, once, at load."""


class Packed(Protocol):
    """A weight in the layout of its backend."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


class LinearBackend(Gemm, Protocol):
    """The product with quantized weights."""

    def why_not(self, spec: QuantSpec, device: torch.device) -> str | None:
        """Return None when the backend serves such weights on this device, else the reason."""

    def prepare(self, weight: QuantizedLinear, device: torch.device, dtype: torch.dtype) -> Packed:
        """Repack a weight, once, at load."""


class LoraBackend(Protocol):
    """out += scale * (x @ A.T) @ B.T, each row with the adapter of its slot; rows of slot 0 are left alone."""

    def plan(self, step: StepContext) -> None:
        """Derive once a step, before any layer, what every site needs."""

    def shrink(self, x_TK: torch.Tensor, site: Site, step: StepContext, workspace: Workspace, beside: bool) -> Any:
        """Return x @ A.T for all siblings of the site, in a form of the backend's own. `beside`: it runs on the side
        stream."""

    def defer(self, shrunk: Any, row_by_row: bool) -> Pending | None:
        """Return what is left to do as an expansion that the reader of the product adds, or None where `expand` must
        do it. `row_by_row`: the reader has one program for each row."""

    def expand(self, shrunk: Any, out_TN: torch.Tensor, step: StepContext) -> None:
        """Add the scaled product with B to out, siblings side by side in N."""


class AttentionBackend(Protocol):
    """Softmax(q k^T / sqrt(C)) v over each sequence's pages, causal, optionally only over the last `window` tokens."""

    def plan(self, step: StepContext, workspace: Workspace) -> None:
        """Derive once a step, before any layer, what every layer needs."""

    def attend(
        self, q_THC: torch.Tensor, cache: LayerCache, window: int | None, step: StepContext, workspace: Workspace
    ) -> torch.Tensor:
        """Return [T, H * C]; this step's keys and values are already in the cache."""


class Ops(Protocol):
    """The operations between the linears. Norms are RMS norms over the last dimension, in fp32 inside."""

    def embed_norm(
        self, step: StepContext, table_VD: torch.Tensor, weight_D: torch.Tensor, eps: float, workspace: Workspace
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embedding of each token (the residual) and its norm."""

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
        """Return norm(residual + product), of all rows or of those listed. With `keep` the sum of all rows is written
        to the residual."""

    def angles(self, cos: torch.Tensor, sin: torch.Tensor, step: StepContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines in the form that `rope_store` reads, from the tables [positions, C]."""

    def rope_store(
        self,
        product: Product,
        angles: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache,
        num_heads: int,
        head_norms: HeadNorms | None,
        step: StepContext,
    ) -> torch.Tensor:
        """Return the rotated queries [T, H, C]; write rotated keys, and values, to their slots in the cache. The
        product holds q, k and v side by side; `head_norms` are applied to q and k before the rotation."""

    def activate(self, product: Product, workspace: Workspace) -> torch.Tensor:
        """Return silu(first half) * second half, [T, F]."""


class LayerCache(NamedTuple):
    """Keys and values of a layer, each [blocks, block_size, G, C]: numbers, or codes of 8 bits and their scales.

    `scales` are float16 [blocks, G, block_size, 2], of a token's key and of its value; None: there are no codes. Blocks
    may lie apart in it; what belongs to a block lies side by side."""

    keys: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor | None = None


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of each query head and each key head."""

    q_weight_C: torch.Tensor
    k_weight_C: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Kernels:
    """One choice of kernels for a model on a device; `quantized` is tried in order for each weight, `head` (else the
    compute type's product) makes the logits, and `decode` runs all blocks of a small step where there is one."""

    quantized: tuple[LinearBackend, ...]
    attention: AttentionBackend
    ops: Ops
    lora: LoraBackend | None = None
    decode: DecodeKernel | None = None
    head: HeadLinear | None = None
