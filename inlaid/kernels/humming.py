"""The backend `humming`: humming-kernels' tensor-core GEMM for 2, 3, 4 and 8-bit weights; the fast path on Hopper GPUs.

The package compiles its kernels at run time, one per shape and range of rows. Left alone it compiles 92 ranges per
shape; here a shape gets one kernel for each of ROW_BUCKETS, compiled in parallel while the weights load and kept in
the package's cache on disk. The first use waits for them, so after the warm-up nothing is compiled. Zero points are
true zeros in memory and go in as they are; act-order weights are put in order and x is permuted to match.

With `ordered`, which is the default, every sum is added in a fixed order: the same batch gives the same bits every
time. Where a sweep found it faster, a product is left in parts that its reader adds. What is changed inside the package
for both stands in humming_patches.py.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inlaid.checkpoint import QuantizedLinear, QuantSpec
from inlaid.kernels import early, humming_patches
from inlaid.kernels.act_order import group_length, sequential
from inlaid.kernels.backend import Parts
from inlaid.kernels.humming_patches import IN_PARTS, VERSION
from inlaid.kernels.humming_schedule import Problem, slices_of

ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
TUNING = Path(__file__).parent / "humming_tuning.json"  # made by perf/gpu/humming_sweep.py
GENERATION = 9  # major compute capability of the devices in it (Hopper), whose instructions others do not have
OPEN = 1 << 30  # the end of the last bucket
LOCKS = 4096  # counters on which slices of a sum wait for each other; 132 multiprocessors need far fewer
Kernel = dict[str, Any]  # a kernel's parameters, as the package names them


@dataclass(frozen=True)
class HummingPacked:
    """A weight repacked for the tensor cores; weights of one `kind`, the package's text for a layer, share kernels."""

    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    permutation_K: torch.Tensor | None
    kind: str
    in_features: int
    out_features: int


class HummingLinear:
    """x @ dequantize(W).T on tensor cores."""

    name = "humming"

    def __init__(self, ordered: bool = True) -> None:
        """Add every sum in a fixed order if `ordered`, else as the package does."""
        self.ordered = ordered
        self.configs: dict[str, Any] = {}  # the package's LayerConfig of each kind
        self._kernels: dict[str, torch.Tensor] = {}
        self._compiling: dict[str, Future[torch.Tensor]] = {}
        self._in_parts: dict[str, dict[int, Kernel]] = {}  # kind -> bucket -> parameters
        self._parts: dict[tuple[str, int, int, int], Parts | None] = {}
        self._compilers = ThreadPoolExecutor(8, "humming")
        self._locks: torch.Tensor | None = None
        self._ordered: torch.Tensor | None = None

    def why_not(self, spec: QuantSpec, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"its kernels need an NVIDIA GPU, not {device}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "its kernels need a GPU of compute capability 8.0 or newer"
        if importlib.util.find_spec("humming") is None:
            return f"humming-kernels is not installed: pip install 'humming-kernels=={VERSION}'"
        if spec.group_size != -1 and (spec.group_size < 32 or spec.group_size & (spec.group_size - 1)):
            return f"its kernels read groups of 32, 64, 128, ... or whole columns, not {spec.group_size}"
        return None

    def prepare(self, weight: QuantizedLinear, device: torch.device, dtype: torch.dtype) -> HummingPacked:
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"humming computes in float16 or bfloat16, not {dtype}: pass --dtype float16")
        if weight.out_features % 128 or weight.in_features % 64:
            raise ValueError(
                "humming's tiles need inputs in 64s and outputs in 128s, not "
                f"{weight.in_features} x {weight.out_features}"
            )
        humming = humming_patches.load()
        humming_patches.use_headers(self.ordered)
        weight, permutation = sequential(weight)
        tensors = {
            "weight": weight.qweight.to(device).t().contiguous(),
            "weight_scale": weight.scales.to(device).to(dtype).t().contiguous(),
        }
        if not weight.spec.symmetric:
            tensors["zero_point"] = weight.qzeros.to(device).t().contiguous()
        length = group_length(weight)
        if weight.group_size == -1:  # it scales whole columns after half-precision sums, which overflow: give it groups
            length = 128 if weight.in_features % 128 == 0 else 64
            times = (1, weight.in_features // length)
            tensors |= {name: tensors[name].repeat(times) for name in tensors if name != "weight"}
        schema = humming.schema(
            b_dtype=f"uint{weight.bits}",
            bs_dtype=str(dtype).removeprefix("torch."),
            weight_scale_group_size=length,
            has_zero_point=not weight.spec.symmetric,
        )
        with torch.cuda.device(device):
            config, packed = humming.transform(
                tensors,
                shape_n=weight.out_features,
                shape_k=weight.in_features,
                weight_schema=schema,
                torch_dtype=dtype,
                device=device,
            )
        if permutation is not None:
            self._grow(weight.in_features, device, dtype)
        if self._locks is None:
            self._locks = torch.zeros(LOCKS, dtype=torch.int32, device=device)
        made = HummingPacked(
            weight=packed["weight"],
            scales=packed["weight_scale"],
            zeros=packed.get("zero_point"),
            permutation_K=None if permutation is None else permutation.to(device),
            kind=config.to_str(),
            in_features=weight.in_features,
            out_features=weight.out_features,
        )
        self._compile(made.kind, config, device)
        return made

    def warmup(self, packed: HummingPacked, rows: Sequence[int]) -> None:
        """Load the kernels of these row counts onto the device; they are compiled already."""
        for count in rows:
            x = torch.zeros(count, packed.in_features, dtype=packed.scales.dtype, device=packed.weight.device)
            self.gemm(x, packed, x.new_empty(count, packed.out_features))

    def gemm(self, x_TK: torch.Tensor, packed: HummingPacked, out_TN: torch.Tensor) -> None:
        if packed.permutation_K is not None:
            x_TK = self._permuted(x_TK, packed.permutation_K)
        self.launch(self._kernels_of(packed.kind), x_TK, packed, out_TN)

    def parts(self, packed: HummingPacked, rows: int) -> Parts | None:
        """Return the layout of a product in parts, or None where a whole one is as fast.

        It follows from the parameters of the bucket's kernel and the multiprocessors that it is launched on."""
        bucket = next((most for most in ROW_BUCKETS if rows <= most), OPEN)
        config = self._in_parts[packed.kind].get(bucket)
        if config is None:
            return None
        _, _, kernel, sms = next(row for row in self._kernels_of(packed.kind).view(-1, 4).tolist() if rows <= row[1])
        device = packed.weight.device
        key = (packed.kind, kernel, sms, -(-rows // config["block_shape"][0]))
        if key not in self._parts:
            self._parts[key] = parts_of(config, self.configs[packed.kind], rows, sms, device)
        return self._parts[key]

    def gemm_in_parts(self, x_TK: torch.Tensor, packed: HummingPacked, out_PTN: torch.Tensor) -> None:
        if packed.permutation_K is not None:
            x_TK = self._permuted(x_TK, packed.permutation_K)
        assert out_PTN.is_contiguous()
        self.launch(self._kernels_of(packed.kind), x_TK, packed, out_PTN[0], IN_PARTS)

    def launch(
        self, kernels: torch.Tensor, x_TK: torch.Tensor, packed: HummingPacked, out_TN: torch.Tensor, top_k: int = 1
    ) -> None:
        """Launch the kernel that a table of kernels has for x's rows, on x in the weight's order.

        `kernels`: [from, to, kernel, multiprocessors] of each bucket, flat. With top_k = IN_PARTS, out is the first of
        the parts, which lie one behind the other."""
        torch.ops.humming.launch_kernel.out(
            kernels, x_TK, packed.weight, packed.scales, None, None, None, packed.zeros,
            None, out_TN, None, None, None, None, self._locks, top_k, 0,
        )  # fmt: skip

    def _permuted(self, x_TK: torch.Tensor, permutation_K: torch.Tensor) -> torch.Tensor:
        from inlaid.kernels.linear_triton import permute_columns

        assert self._ordered is not None
        rows, width = x_TK.shape
        out = self._ordered[: rows * width].view(rows, width)
        permute_columns(x_TK, permutation_K, out)
        return out

    def _grow(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make room for x in a weight's order, for as many rows as the largest bucket twice over."""
        size = width * ROW_BUCKETS[-1] * 2
        if self._ordered is None or self._ordered.numel() < size:
            self._ordered = torch.empty(size, dtype=dtype, device=device)

    def recompile(self, ordered: bool, device: torch.device) -> None:
        """Compile all kernels anew for the weights as they lie, with sums in a fixed order or not."""
        self.ordered = ordered
        humming_patches.use_headers(ordered)
        self._compiling.clear()
        self._kernels.clear()
        for kind, config in self.configs.items():
            self._compile(kind, config, device)

    def _compile(self, kind: str, config: Any, device: torch.device) -> None:
        """Start compiling one kernel per bucket of rows, once per kind of layer; kinds compile side by side."""
        if kind not in self._compiling:
            self.configs[kind] = config
            chosen = intervals(config, device, self.ordered)
            found = tuned(config, device, self.ordered)
            buckets = {bucket for bucket, entry in found.items() if entry.get("parts")}
            self._in_parts[kind] = {most: parameters for _, most, parameters in chosen if most in buckets}
            self._compiling[kind] = self._compilers.submit(humming_patches.load().prepare, kind, None, chosen, device)

    def _kernels_of(self, kind: str) -> torch.Tensor:
        """Return [from, to, kernel, multiprocessors] of each bucket, flat; wait until they are compiled."""
        if kind not in self._kernels:
            self._kernels[kind] = self._compiling[kind].result()
        return self._kernels[kind]


def intervals(config: Any, device: torch.device, ordered: bool = True) -> list[list[Any]]:
    """Return [rows above, rows up to, kernel parameters] of each bucket; the last bucket has no end."""
    changes = tuned_for(config, device, ordered)
    out: list[list[Any]] = []
    for below, bucket in zip((0, *ROW_BUCKETS[:-1]), ROW_BUCKETS, strict=True):
        own = humming_patches.load().heuristics(config, shape_m=bucket, device=device)
        chosen = {**own, **changes.get(bucket, {})}
        most = bucket if bucket != ROW_BUCKETS[-1] else OPEN
        out.append([below, most, {**chosen, "use_pdl": True} if early.wanted() else chosen])
    return out


def tuned_for(config: Any, device: torch.device, ordered: bool, parts: bool = True) -> dict[int, Kernel]:
    """Return the changes of the package's parameters by bucket of rows."""
    return {bucket: entry["changes"] for bucket, entry in tuned(config, device, ordered, parts).items()}


def tuned(config: Any, device: torch.device, ordered: bool, parts: bool = True) -> dict[int, dict[str, Any]]:
    """Return the entries of the shipped table (TUNING) for a layer, by bucket of rows.

    An entry is what a sweep on this device, or else on another of its generation, found faster than the package's
    choice. An entry for parts serves the bucket's whole products too, as each bucket has one kernel; without `parts`
    such entries are left out."""
    if not TUNING.exists() or torch.cuda.get_device_capability(device)[0] != GENERATION:
        return {}
    found: dict[int, dict[str, Any]] = {}
    name, entries = torch.cuda.get_device_name(device), json.loads(TUNING.read_text())["entries"]
    for entry in sorted(entries, key=lambda entry: (entry["device"] == name, entry.get("parts", False))):
        same = entry["bits"] == config.b_dtype.num_bits and entry.get("ordered", False) == ordered
        same &= parts or not entry.get("parts", False)
        if same and (entry["inputs"], entry["outputs"]) == (config.shape_k, config.shape_n):
            found |= dict.fromkeys(entry["buckets"], entry)  # the last wins
    return found


def parts_of(config: Kernel, layer: Any, rows: int, sms: int, device: torch.device) -> Parts | None:
    """Return the layout of the parts that a launch on `sms` multiprocessors (0: all) leaves.

    None where no tile is cut, or where the kernel stores by TMA, which writes whole products only."""
    by_tma = config.get("use_tma_c")
    if config.get("use_tma") if by_tma is None else by_tma:
        return None
    sms = sms or torch.cuda.get_device_properties(device).multi_processor_count
    problem = Problem(layer.shape_k, layer.shape_n, layer.weight_scale_group_size, 0, rows, sms)
    counts = slices_of({**config, "num_sms": 0}, problem, problem.row_tiles(config))
    most = max(map(max, counts))
    height, width = config["block_shape"][0] * config.get("multi_cast_size_b", 1), config["block_shape"][1]
    return None if most == 1 else Parts(torch.tensor(counts, dtype=torch.int32, device=device), most, height, width)
