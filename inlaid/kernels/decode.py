"""A step of few tokens, decodes and their guesses, as one persistent kernel (csrc/decode.cu), built by nvcc for the
model's shape.

`DecodeKernel` keeps the quantized weights in a layout of its own, a second copy, while the model is loaded; the runner
binds it to the KV cache and calls it for steps of decodes only, in the place of the transformer's blocks. What it does
not serve it names in `refusal`, and then keeps nothing.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from inlaid.checkpoint import QuantizedLinear, unpack
from inlaid.kernels import library
from inlaid.kernels.backend import MODULES, AdapterPages, LayerCache, Site
from inlaid.kernels.context import NO_ADAPTERS, StepContext
from inlaid.kernels.library import CSRC, BuildError

log = logging.getLogger(__name__)

# Rows of steps that the kernel serves, and up to which context it was measured faster than a kernel for each operation:
# a 7B's two meet at 19,000 tokens for one row, some 5,000 for two and 2,300 for four.
LONGEST: Mapping[int, int] = MappingProxyType({1: 8192, 2: 4096, 4: 2048})
ROWS = tuple(LONGEST)
SOURCES = tuple(CSRC / f"decode{part}" for part in (".cu", "_shape.cuh", "_parts.cuh", "_block.cuh", "_attention.cuh"))
MEASURED = frozenset({"NVIDIA H200"})  # devices on which it was found faster than a kernel for each operation
LINEARS = (0, 3, 4, 6)  # first modules of qkv, o, gate and up, down
HEAD_DIM, GROUP = 128, 128
HALF_UNIT = 8  # outputs of gate, and of up, in a unit
MOST_RANK = 256


@dataclass(frozen=True)
class DecodeShape:
    """The sizes for which the library is compiled."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    layers: int
    max_rank: int
    multiprocessors: int
    block_size: int  # tokens of a KV block

    def why_not(self, head_dim: int) -> str | None:
        """Return None when the kernel serves such a model, else the reason."""
        if head_dim != HEAD_DIM:
            return f"it reads heads of {HEAD_DIM}, not of {head_dim}"
        if not 16 * self.multiprocessors <= self.hidden <= 4096 or self.hidden % 256:
            return f"it reads hidden sizes from {16 * self.multiprocessors} to 4096 in 256s, not {self.hidden}"
        if self.heads * head_dim > 4096 or self.heads % 2 or self.heads // self.kv_heads not in (1, 2, 4, 8):
            return f"it reads up to 32 heads, 1, 2, 4 or 8 to a key head, not {self.heads} to {self.kv_heads}"
        if self.mlp % 256 or self.mlp > 16384:
            return f"it reads MLPs of up to 16384 in 256s, not of {self.mlp}"
        if self.max_rank > MOST_RANK:
            return f"it reads adapters of ranks up to {MOST_RANK}, not {self.max_rank}"
        if max(ROWS) * self.kv_heads > self.multiprocessors:
            return f"{self.multiprocessors} multiprocessors are fewer than {max(ROWS)} rows of {self.kv_heads} heads"
        return None

    def flags(self, zeros: bool) -> list[str]:
        """Return the compiler's definitions."""
        values = {
            "D": self.hidden, "F": self.mlp, "HEADS": self.heads, "KV_HEADS": self.kv_heads, "LAYERS": self.layers,
            "MAX_RANK": -(-max(8, self.max_rank) // 8) * 8, "ZEROS": int(zeros), "SMS": self.multiprocessors,
            "BLOCK": self.block_size,
        }  # fmt: skip
        return [f"-DINLAID_{name}={value}" for name, value in values.items()]


def unit_rows(outputs: int, interleaved: bool) -> torch.Tensor:
    """Return the output that each place of the units holds. Interleaved (gate and up): eight of each half a unit."""
    if not interleaved:
        return torch.arange(outputs)
    return torch.arange(outputs).view(2, -1, HALF_UNIT).transpose(0, 1).reshape(-1)


def pack_units(weight: QuantizedLinear, interleaved: bool, zeros: bool, device: torch.device) -> torch.Tensor:
    """Return the weight as int32 [units, groups, words], in the order in which tensor cores take it.

    A unit is 16 outputs (`unit_rows`). A group of it has 256 words of codes, 8 of scales (of outputs r and r + 8 in a
    word) and, with `zeros`, 8 of 8 less the zero points in half precision. Word ((t // 4) * 32 + lane) * 4 + t % 4 has
    codes of outputs r = lane // 4 and r + 8, inputs k = 32 (lane % 4) + 4 t: nibble a + 2 b + 4 c is that of output
    r + 8 a and input k + 2 b + c."""
    order = unit_rows(weight.out_features, interleaved).to(device)
    codes_NK = unpack(weight.qweight.to(device), 4).t()[order]
    units, count = weight.out_features // 16, weight.in_features // GROUP
    view = codes_NK.view(units, 2, 8, count, 4, 2, 4, 2, 2)  # [unit, a, r, group, quarter, t // 4, t % 4, b, c]
    words = torch.zeros(units, count, 2, 8, 4, 4, dtype=torch.int32, device=device)
    for a in range(2):
        for b in range(2):
            for c in range(2):
                part = view[:, a, :, :, :, :, :, b, c].permute(0, 2, 4, 1, 3, 5)
                words |= part.to(torch.int32) << (4 * (a + 2 * b + 4 * c))

    def by_unit(values_GN: torch.Tensor) -> torch.Tensor:
        pairs = values_GN.to(device).t()[order].view(units, 2, 8, count).permute(0, 3, 2, 1)
        return pairs.to(torch.float16).contiguous().view(torch.int32).flatten(2)

    pieces = [words.flatten(2), by_unit(weight.scales)]
    if zeros:
        pieces.append(by_unit(8 - unpack(weight.qzeros, 4, dim=1).to(torch.int16)))
    return torch.cat(pieces, dim=2)


class _Layer(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("qkv", "o", "gate_up", "down", "norm1", "norm2", "keys", "values")
    )


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "layers", "boxes", "embedding", "ids", "sources", "newest", "positions", "slots", "table_rows", "tables",
            "leaders", "cos", "sin", "adapters", "table", "scale", "pool", "product", "residual",
        )),
        ("table_width", ctypes.c_longlong), ("eps", ctypes.c_float),
    )  # fmt: skip


@dataclass(frozen=True)
class Surroundings:
    """The parts of the model that are not quantized, and the memory that every step reads."""

    embedding_VD: torch.Tensor
    gains: Sequence[tuple[torch.Tensor, torch.Tensor]]  # of each layer's two norms
    eps: float
    cos: torch.Tensor
    sin: torch.Tensor


class DecodeKernel:
    """The blocks of a transformer for up to four rows of one token each."""

    longest: Mapping[int, int] = LONGEST

    def __init__(self, shape: DecodeShape, head_dim: int, pages: AdapterPages) -> None:
        self.shape, self.pages = shape, pages
        self.device, dtype = pages.pool.device, pages.pool.dtype
        self.zeros = False
        self._units: dict[int, torch.Tensor] = {}  # by first site
        self.refusal = shape.why_not(head_dim)
        if dtype != torch.float16:
            self.refuse(f"it computes in float16, not {dtype}")
        if library.nvcc() is None:
            self.refuse("nvcc, which builds it, was not found: install the CUDA toolkit or set CUDA_HOME")
        self._library: Future[Path] | None = None
        self._loaded: ctypes.CDLL | None = None
        self._held: list[torch.Tensor] = []  # what the kernel reads by address
        self._arguments = _Arguments()

    # While the model is loaded.

    def keep(self, site: Site, weights: Sequence[QuantizedLinear], bias: bool) -> None:
        """Take the weights of a linear, siblings fused, or refuse the model."""
        if self.refusal is not None:
            return
        first = weights[0]
        if len(weights) > 1:
            self.refuse("it reads siblings that could be fused only")
        elif first.bits != 4 or first.group_size != GROUP or first.spec.act_order:
            self.refuse(f"it reads 4 bits in groups of {GROUP} without act-order, not {first.spec}")
        elif bias:
            self.refuse("it adds no bias")
        else:
            if not self._units:  # the first weight tells: a checkpoint is symmetric or not
                self.zeros = not first.spec.symmetric
                self._library = ThreadPoolExecutor(1, "build-decode").submit(self._build)
            if not first.spec.symmetric and not self.zeros:
                self.refuse("some of its weights are symmetric and some are not")
                return
            interleaved = LINEARS.index(site.first % len(MODULES)) == 2
            self._units[site.first] = pack_units(first, interleaved, self.zeros, self.device)

    def refuse(self, reason: str) -> None:
        """Give up, for the first reason given, and give the memory back."""
        self.refusal = self.refusal or reason
        self._units.clear()

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the second copy of the weights."""
        return sum(units.numel() * units.element_size() for units in self._units.values())

    @property
    def target(self) -> str:
        """Return the device's architecture, as nvcc names it."""
        major, minor = torch.cuda.get_device_capability(self.device)
        return f"{major}{minor}" + ("a" if major >= 9 else "")

    def _build(self) -> Path:
        return library.build(library.nvcc(), SOURCES[0], SOURCES, self.target, self.shape.flags(self.zeros))

    def finish(self) -> str | None:
        """Load the library once the model is whole; return the reason for which the kernel does not serve it."""
        if self.refusal is None and len(self._units) != self.shape.layers * len(LINEARS):
            self.refuse("not all of the model's linears are quantized")
        if self.refusal is None:
            try:
                assert self._library is not None
                self._loaded = load(self._library.result())
                for rows in ROWS:
                    blocks = self._loaded.inlaid_decode_ready(rows)
                    if blocks < 1:
                        self.refuse(f"its blocks for {rows} rows are not resident all at once ({blocks})")
            except (BuildError, OSError) as error:
                self.refuse(str(error))
        return self.refusal

    # Steps.

    def bind(self, around: Surroundings, cache: Sequence[LayerCache]) -> None:
        """Prepare for steps on this cache. To be called before graphs are captured."""
        assert self._loaded is not None
        layers = (_Layer * self.shape.layers)()
        for index, ((norm1, norm2), pages) in enumerate(zip(around.gains, cache, strict=True)):
            units = [self._units[index * len(MODULES) + first].data_ptr() for first in LINEARS]
            layers[index] = _Layer(*units, *(tensor.data_ptr() for tensor in (norm1, norm2, pages.keys, pages.values)))
        table = torch.frombuffer(bytearray(layers), dtype=torch.uint8).to(self.device)
        words = max(self._loaded.inlaid_decode_boxes(rows) for rows in ROWS) // 4
        boxes = torch.empty(words, dtype=torch.int32, device=self.device)
        self._held = [table, boxes, *(gain for pair in around.gains for gain in pair)]
        self._arguments = _Arguments(
            layers=table.data_ptr(), boxes=boxes.data_ptr(), embedding=around.embedding_VD.data_ptr(),
            cos=around.cos.data_ptr(), sin=around.sin.data_ptr(), table=self.pages.table.data_ptr(),
            scale=self.pages.scale.data_ptr(), eps=around.eps,
        )  # fmt: skip

    def run(self, step: StepContext, product_TD: torch.Tensor, residual_TD: torch.Tensor) -> None:
        """Run the blocks over as many tokens of decodes, guesses included, as `ROWS` names; write both sides of the
        last sum.

        The step's keys and values go into the cache. Adapters of every level are added where a row has one."""
        assert self._loaded is not None
        here = step.on_device
        assert here is not None
        rows = step.num_tokens
        assert rows in ROWS
        assert step.num_prefills == 0 or step.few_queries
        arguments = _Arguments.from_buffer_copy(self._arguments)
        tensors = {
            "ids": step.ids_T, "sources": here.sources_T, "newest": here.newest_R, "positions": step.positions_T,
            "slots": step.kv_slots_T, "table_rows": here.table_rows_S, "tables": step.block_tables,
            "pool": self.pages.pool, "product": product_TD, "residual": residual_TD,
        }  # fmt: skip
        if step.few_queries:
            assert here.token_rows_T is not None
            assert here.leaders_T is not None
            tensors |= {"table_rows": here.token_rows_T, "leaders": here.leaders_T}
        if step.adapters != NO_ADAPTERS:
            tensors["adapters"] = here.adapter_slots_T
        for name, tensor in tensors.items():
            setattr(arguments, name, tensor.data_ptr())
        arguments.table_width = step.block_tables.stride(0)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        error = self._loaded.inlaid_decode_launch(ctypes.byref(arguments), rows, stream)
        if error:
            raise RuntimeError(
                f"the decode kernel failed to launch: CUDA error {error}; all its blocks must be resident at once, so "
                "start with --decode-kernel layers where the GPU is shared or divided"
            )


def load(path: Path) -> ctypes.CDLL:
    """Load the library and declare its functions."""
    loaded = ctypes.CDLL(str(path))
    loaded.inlaid_decode_ready.argtypes = [ctypes.c_int]
    loaded.inlaid_decode_boxes.argtypes = [ctypes.c_int]
    loaded.inlaid_decode_boxes.restype = ctypes.c_longlong
    loaded.inlaid_decode_launch.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    return loaded
