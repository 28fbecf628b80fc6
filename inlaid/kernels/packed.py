"""The kernels of a CPU whose quantized weights stay in 4 or 8 bits, in C, built at first use: linears, an output head
in half precision, and norms, rotation and attention of decodes, which torch takes longer to start than to compute.

Products of many rows dequantize some columns at a time, so that memory stays small, and multiply them in torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from inlaid.checkpoint import QuantizedLinear, QuantSpec, pack, unpack
from inlaid.kernels import kv_codes, library
from inlaid.kernels.act_order import group_length, sequential
from inlaid.kernels.backend import AdapterPages, HeadNorms, Kernels, LayerCache, Product, Workspace
from inlaid.kernels.cpu import DENSE, CpuOps, DensePacked, ReferenceLinear, cpu_kernels
from inlaid.kernels.cpu_attention import CpuAttention
from inlaid.kernels.native_lora import NativeLora

if TYPE_CHECKING:
    from inlaid.kernels.context import StepContext

SOURCE = library.CSRC / "packed.c"
TILE = 16  # columns that lie side by side
MANY_ROWS = 48  # from here on dequantizing is cheaper than reading codes again for every four rows
MANY_COLUMNS = 128  # dequantized at a time: they fit the processor's cache; twice as many for hundreds of rows
HALVES = (torch.float16, torch.bfloat16)
KINDS = (torch.float32, torch.int8, torch.float8_e4m3fn)  # of keys and values, by packed.c's numbers for them


class _Weight(ctypes.Structure):
    """The library's view of a weight."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int) for name in ("bits", "inputs", "columns", "groups")),
    )


class _Pages(ctypes.Structure):
    """The library's view of a layer's keys and values. `scale_block`: scales from block to block."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "scales", "table", "lens")),
        ("scale_block", ctypes.c_long),
        *((name, ctypes.c_int) for name in ("kind", "blocks", "block_size", "groups", "width")),
    )


@dataclass(frozen=True)
class CodesPacked:
    """A quantized weight, [N / 16, ..., 16]: codes in 32-bit words, and of each group scales and zero points of
    1 + code / 2**bits."""

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    permutation: torch.Tensor | None
    in_features: int
    out_features: int

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    @cached_property
    def view(self) -> _Weight:
        """The library's view: pointers to the tensors, which never move."""
        pointers = (tensor.data_ptr() for tensor in (self.codes, self.scales, self.zeros))
        return _Weight(*pointers, self.bits, self.in_features, self.out_features, self.groups)


@dataclass(frozen=True)
class HalfPacked:
    """A weight in half precision, [N / 16, K, 16]."""

    tiles: torch.Tensor
    in_features: int
    out_features: int


class PackedLinear:
    """x @ W in single precision with codes as they are. Groups that are no multiple of 8 inputs are dequantized."""

    name = "packed"

    def __init__(self) -> None:
        self._dense = ReferenceLinear()

    def why_not(self, spec: QuantSpec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "its kernel is a processor's"
        return library.NO_C_COMPILER if library.c_compiler() is None else None

    def warmup(self, packed: CodesPacked | DensePacked, rows: Sequence[int]) -> None:
        pass

    def prepare(self, weight: QuantizedLinear, device: torch.device, dtype: torch.dtype) -> CodesPacked | DensePacked:
        length = group_length(weight)
        if length % 8 or weight.in_features % length or dtype != torch.float32:
            return self._dense.prepare(weight, device, dtype)
        weight, permutation = sequential(weight)
        bits = 8 if weight.bits == 8 else 4  # narrower codes lie in four bits
        words = weight.qweight if weight.bits == bits else pack(unpack(weight.qweight, weight.bits), bits)
        zeros = unpack(weight.qzeros, weight.bits, dim=1).float()
        return CodesPacked(
            bits=bits,
            codes=tiled(words),
            scales=tiled(weight.scales.float() * 2**bits),
            zeros=tiled(zeros / 2**bits + 1),
            permutation=permutation,
            in_features=weight.in_features,
            out_features=weight.out_features,
        )

    def gemm(self, x_TK: torch.Tensor, packed: CodesPacked | DensePacked, out_TN: torch.Tensor) -> None:
        if isinstance(packed, DensePacked):
            self._dense.gemm(x_TK, packed, out_TN)
            return
        x_TK = x_TK.contiguous() if packed.permutation is None else x_TK.index_select(1, packed.permutation)
        if len(x_TK) >= MANY_ROWS:
            self._gemm_many(x_TK, packed, out_TN)
            return
        rows = len(x_TK)
        spare = x_TK.new_empty(rows * (packed.groups + TILE))
        load().inlaid_packed_gemm(
            packed.view, x_TK.data_ptr(), out_TN.data_ptr(), spare.data_ptr(), rows, torch.get_num_threads()
        )

    def _gemm_many(self, x_TK: torch.Tensor, packed: CodesPacked, out_TN: torch.Tensor) -> None:
        step = MANY_COLUMNS // TILE * (2 if len(x_TK) >= 256 else 1) * torch.get_num_threads()
        for first in range(0, len(packed.codes), step):
            last = min(first + step, len(packed.codes))
            some_KN = x_TK.new_empty(packed.in_features, (last - first) * TILE)
            load().inlaid_packed_dequantize(packed.view, some_KN.data_ptr(), first, last, torch.get_num_threads())
            here = out_TN[:, first * TILE : last * TILE]
            here.copy_((x_TK @ some_KN)[:, : here.shape[1]])


class HalfLinear:
    """x @ W.T with W as it is stored, in half precision, and everything else in single precision."""

    name = "half"

    def keeps(self, stored: torch.dtype) -> bool:
        return stored in HALVES

    def warmup(self, packed: HalfPacked | DensePacked, rows: Sequence[int]) -> None:
        pass

    def pack(self, weight_NK: torch.Tensor) -> HalfPacked | DensePacked:
        if weight_NK.dtype not in HALVES:
            return DENSE.pack(weight_NK)
        return HalfPacked(tiled(weight_NK.t()), weight_NK.shape[1], weight_NK.shape[0])

    def gemm(self, x_TK: torch.Tensor, packed: HalfPacked | DensePacked, out_TN: torch.Tensor) -> None:
        if isinstance(packed, DensePacked):
            DENSE.gemm(x_TK, packed, out_TN)
            return
        x_TK = x_TK.contiguous()
        spare = x_TK.new_empty(len(x_TK), TILE)
        load().inlaid_half_gemm(
            int(packed.tiles.dtype == torch.bfloat16), x_TK.data_ptr(), packed.tiles.data_ptr(), out_TN.data_ptr(),
            spare.data_ptr(), len(x_TK), packed.in_features, packed.out_features, torch.get_num_threads(),
        )  # fmt: skip


def native_kernels(pages: AdapterPages) -> Kernels:
    """Return the kernels of a CPU where C does what torch takes long to start. BuildError: there is no library."""
    load()
    return replace(cpu_kernels(pages), attention=PackedAttention(), ops=PackedOps(), lora=NativeLora(pages))


def packed_kernels(pages: AdapterPages) -> Kernels:
    """Return those with quantized weights left packed."""
    return replace(native_kernels(pages), quantized=(PackedLinear(),), head=HalfLinear())


class PackedAttention(CpuAttention):
    """Decodes without drafts read the pages where they lie; everything else is as on any CPU."""

    def _decode(self, q_SHC: torch.Tensor, cache: LayerCache, window: int | None, step: StepContext) -> torch.Tensor:
        S, H, C = q_SHC.shape
        if C % 8 or q_SHC.stride()[1:] != (C, 1):
            return super()._decode(q_SHC, cache, window, step)
        assert step.on_host is not None
        step.attention_plan.gathered.clear()  # lacks this step's tokens: a step with drafts reads all pages anew
        longest = max(step.on_host.context_lens[:S])
        table_SB, scales = step.block_tables, cache.scales
        pointers = (tensor.data_ptr() for tensor in (table_SB, step.context_lens_S))
        pages = _Pages(
            cache.keys.data_ptr(), cache.values.data_ptr(), None if scales is None else scales.data_ptr(), *pointers,
            0 if scales is None else scales.stride(0), KINDS.index(cache.keys.dtype), table_SB.stride(0),
            step.block_size, cache.keys.shape[2], C,
        )  # fmt: skip
        out, scores = q_SHC.new_empty(S, H, C), q_SHC.new_empty(S * H * longest)
        load().inlaid_decode_attention(
            pages, q_SHC.data_ptr(), q_SHC.stride(0), out.data_ptr(), scores.data_ptr(), S, H, longest, window or 0,
            C**-0.5, torch.get_num_threads(),
        )  # fmt: skip
        return out


class PackedOps(CpuOps):
    """The operations between the linears, where torch would take longer to start them than to compute them."""

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
        if rows_L is not None:
            return super().add_norm(product, residual_TD, weight_D, eps, workspace, rows_L, keep)
        whole, out = product.whole, torch.empty_like(residual_TD)
        load().inlaid_add_norm(
            residual_TD.data_ptr(), whole.data_ptr(), weight_D.data_ptr(), out.data_ptr(), *out.shape, eps, int(keep)
        )
        return out

    def rope_store(
        self,
        product: Product,
        angles: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache,
        num_heads: int,
        head_norms: HeadNorms | None,
        step: StepContext,
    ) -> torch.Tensor:
        if head_norms is not None:
            return super().rope_store(product, angles, cache, num_heads, head_norms, step)
        groups, width = cache.keys.shape[2:]
        qkv = product.whole.view(-1, num_heads + 2 * groups, width)
        whole = cache.scales is None  # else the library rotates, and codes are made here
        pages = [pages.data_ptr() if whole else None for pages in (cache.keys, cache.values)]
        given = (tensor.data_ptr() for tensor in (qkv, *angles))
        load().inlaid_rope_store(*given, *pages, step.kv_slots_T.data_ptr(), len(qkv), num_heads, groups, width)
        if not whole:
            kv_codes.write(cache, step.kv_slots_T, qkv[:, num_heads:-groups], qkv[:, -groups:])
        return qkv[:, :num_heads]


def tiled(rows_XN: torch.Tensor) -> torch.Tensor:
    """Return [N / 16, X, 16] of [X, N], with zeros behind the last column."""
    width = rows_XN.shape[1]
    padded = F.pad(rows_XN, (0, -width % TILE))
    return padded.view(len(rows_XN), -1, TILE).permute(1, 0, 2).contiguous()


@cache
def load() -> ctypes.CDLL:
    """Return the library, built at first use. BuildError: there is no compiler, or it refuses."""
    made = library.load_for_cpu(SOURCE)
    pointer: Any = ctypes.c_void_p
    whole: Any = ctypes.c_int
    weight: list[Any] = [ctypes.POINTER(_Weight)]
    arguments: Mapping[str, list[Any]] = {
        "inlaid_packed_gemm": weight + 3 * [pointer] + 2 * [whole],
        "inlaid_packed_dequantize": [*weight, pointer] + 3 * [whole],
        "inlaid_half_gemm": [whole] + 4 * [pointer] + 4 * [whole],
        "inlaid_add_norm": 4 * [pointer] + [whole, whole, ctypes.c_float, whole],
        "inlaid_rope_store": 6 * [pointer] + 4 * [whole],
        "inlaid_decode_attention": [
            ctypes.POINTER(_Pages),
            pointer,
            ctypes.c_long,
            pointer,
            pointer,
            *4 * [whole],
            ctypes.c_float,
            whole,
        ],
    }
    for name, types in arguments.items():
        function = getattr(made, name)
        function.argtypes, function.restype = types, None
    return made
