"""The backend `exllama`: exllamav2's GPTQ kernel, built by nvcc from the installed package's headers at first use.

The package itself is never imported, as it would import much that is not needed; only its header files are read. The
library made from them and csrc/exllama.cu is kept under the user's cache, named by a hash of everything it is made of.

The kernel adds half-precision partial sums into the output with atomics, so the last bit of a sum may differ between
runs, and sums beyond 65504 overflow. Above ROW_LIMIT rows the weight is dequantized and multiplied with fp32
accumulation instead.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from inlaid.checkpoint import QuantizedLinear, QuantSpec, shift_zeros, unpack
from inlaid.kernels import library
from inlaid.kernels.act_order import group_length, sequential
from inlaid.kernels.library import CSRC, BuildError, nvcc

ROW_LIMIT = 32
SOURCE = CSRC / "exllama.cu"


def headers() -> Path | None:
    """Return the folder of the installed exllamav2's sources, without importing it; None where it is not installed."""
    spec = importlib.util.find_spec("exllamav2")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "exllamav2_ext"
    return folder if (folder / "cuda" / "q_gemm_kernel_gptq.cuh").exists() else None


def build(architecture: str) -> Path:
    """Return the library for an architecture such as "90"."""
    folder = headers()
    if folder is None:
        raise BuildError("exllamav2 is not installed: pip install 'exllamav2==0.3.2' (its kernels' sources are used)")
    read = sorted([*folder.glob("cuda/*.cuh"), *folder.glob("cuda/quant/*.cuh"), folder / "config.h"])
    return library.build(nvcc(), SOURCE, [SOURCE, *read], architecture, [f"-I{folder}"])


def load(path: Path) -> ctypes.CDLL:
    """Load the library and declare its functions."""
    loaded = ctypes.CDLL(str(path))
    pointer, whole = ctypes.c_void_p, ctypes.c_int
    loaded.inlaid_exllama_gemm.argtypes = [pointer] * 5 + [whole] * 5 + [pointer] * 2
    loaded.inlaid_exllama_dequantize.argtypes = [pointer] * 4 + [whole] * 3 + [pointer] * 2
    return loaded


def shuffle(qweight: torch.Tensor) -> torch.Tensor:
    """Move codes 0 2 4 6 of each word to its low half and 1 3 5 7 to its high half, as the kernel unpacks them."""
    words = qweight.to(torch.int64) & 0xFFFFFFFF
    out = torch.zeros_like(words)
    for i in range(4):
        out |= ((words >> (8 * i)) & 0xF) << (4 * i)
        out |= ((words >> (8 * i + 4)) & 0xF) << (4 * i + 16)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


@dataclass(frozen=True)
class ExllamaPacked:
    """A weight for the kernel: shuffled codes, zeros less one as v1 files store them, input order as 16-bit numbers."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    permutation: torch.Tensor | None
    length: int
    in_features: int
    out_features: int


class ExllamaLinear:
    """x @ W for 4-bit weights in half precision."""

    name = "exllama"

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        self._dequantized: torch.Tensor | None = None

    def why_not(self, spec: QuantSpec, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"its kernel needs an NVIDIA GPU, not {device}"
        if spec.bits != 4:
            return f"its kernel reads 4 bits, not {spec.bits}"
        if spec.group_size != -1 and spec.group_size % 32:
            return f"its kernel reads groups of a multiple of 32 inputs, not {spec.group_size}"
        if headers() is None:
            return "exllamav2 is not installed: pip install 'exllamav2==0.3.2'"
        if nvcc() is None and self._library is None:
            return "nvcc, which builds it, was not found: install the CUDA toolkit or set CUDA_HOME"
        return None

    def prepare(self, weight: QuantizedLinear, device: torch.device, dtype: torch.dtype) -> ExllamaPacked:
        if dtype != torch.float16:
            raise ValueError(f"the exllama kernel computes in float16, not {dtype}: pass --dtype float16")
        weight, permutation = sequential(weight)
        if bool((unpack(weight.qzeros, 4, dim=1) == 0).any()):
            raise ValueError(
                "the exllama kernel cannot express a zero point of 0; use --linear-backend humming or triton"
            )
        if weight.in_features % 32 or weight.out_features % 8:
            raise ValueError(
                "the exllama kernel needs inputs in 32s and outputs in 8s, not "
                f"{weight.in_features} x {weight.out_features}"
            )
        self._load(device)
        size = weight.in_features * weight.out_features
        if self._dequantized is None or self._dequantized.numel() < size:
            self._dequantized = torch.empty(size, dtype=torch.float16, device=device)
        return ExllamaPacked(
            codes=shuffle(weight.qweight.to(device)).contiguous(),
            zeros=shift_zeros(weight.qzeros, 4, -1).to(device).contiguous(),
            scales=weight.scales.to(device).contiguous(),
            permutation=None if permutation is None else permutation.to(torch.uint16).to(device),
            length=group_length(weight),
            in_features=weight.in_features,
            out_features=weight.out_features,
        )

    def warmup(self, packed: ExllamaPacked, rows: Sequence[int]) -> None:
        """Launch the kernels for these row counts once."""
        for count in rows:
            x = torch.zeros(count, packed.in_features, dtype=torch.float16, device=packed.codes.device)
            self.gemm(x, packed, x.new_empty(count, packed.out_features))

    def gemm(self, x_TK: torch.Tensor, packed: ExllamaPacked, out_TN: torch.Tensor) -> None:
        """Write x @ W into out; above ROW_LIMIT rows by a dequantized weight."""
        assert self._library is not None
        rows, n, k = x_TK.shape[0], packed.out_features, packed.in_features
        stream = torch.cuda.current_stream(x_TK.device).cuda_stream
        order = None if packed.permutation is None else packed.permutation.data_ptr()
        weights = packed.codes.data_ptr(), packed.zeros.data_ptr(), packed.scales.data_ptr()
        if rows <= ROW_LIMIT:
            groups = packed.scales.shape[0]
            error = self._library.inlaid_exllama_gemm(
                x_TK.data_ptr(), *weights, out_TN.data_ptr(), rows, n, k, groups, packed.length, order, stream
            )
        else:
            assert self._dequantized is not None
            weight_KN = self._dequantized[: k * n].view(k, n)
            error = self._library.inlaid_exllama_dequantize(
                *weights, weight_KN.data_ptr(), n, k, packed.length, order, stream
            )
            torch.mm(x_TK, weight_KN, out=out_TN)
        if error:
            raise RuntimeError(f"the exllama kernel failed to launch: CUDA error {error}")

    def _load(self, device: torch.device) -> None:
        if self._library is None:
            major, minor = torch.cuda.get_device_capability(device)
            self._library = load(build(f"{major}{minor}"))
