"""Times of kernels on a GPU: the median over replays of a captured graph that walks through copies of the operands
larger than the L2 cache. `inlaid kernels --measure` and perf/gpu/ call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from inlaid.checkpoint import QuantizedLinear, QuantSpec
from inlaid.kernels.backend import LinearBackend

BANDWIDTH = {"NVIDIA H200": 4.3e12}  # bytes per second of a large copy, measured
MATRIX_RATE = {"NVIDIA H200": 790e12}  # 16-bit floating-point operations per second, measured
CACHE = 160 << 20  # bytes to walk through, several times any L2


@dataclass(frozen=True)
class Ceiling:
    """What a device can do at most."""

    bandwidth: float
    matrix_rate: float

    @classmethod
    def of(cls, name: str) -> Ceiling | None:
        return cls(BANDWIDTH[name], MATRIX_RATE[name]) if name in BANDWIDTH else None

    @classmethod
    def measured(cls, device: torch.device) -> Ceiling:
        """A large copy, its bytes read and written, and a large product of random 16-bit numbers, on this device."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        side = 8192
        a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
        copy = time_calls([partial(target.copy_, source)] * 4, 5)
        product = time_calls([partial(torch.mm, a, b, out=torch.empty_like(a))] * 4, 5)
        return cls(2e6 * source.numel() / copy, 2e6 * side**3 / product)

    def microseconds(self, num_bytes: float, operations: float = 0.0) -> float:
        """The larger of moving the bytes and doing the operations."""
        return 1e6 * max(num_bytes / self.bandwidth, operations / self.matrix_rate)


def time_calls(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Microseconds of one call; each call of the sequence works on operands of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the operands may still be in the making
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = []
        for _ in range(replays + 3):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return median(times[3:])


def random_weight(inputs: int, outputs: int, spec: QuantSpec, device: torch.device | str) -> QuantizedLinear:
    """Uniform codes; symmetric, in order."""
    length = inputs if spec.group_size == -1 else spec.group_size
    groups = inputs // length
    zero = sum((1 << (spec.bits - 1)) << (i * spec.bits) for i in range(32 // spec.bits))
    words = (outputs * spec.bits // 32,)
    if 32 % spec.bits:
        from inlaid.checkpoint import pack

        zeros = pack(torch.full((groups, outputs), 1 << (spec.bits - 1)), spec.bits, dim=1)
    else:
        zeros = torch.full((groups, *words), zero - (1 << 32) if zero >> 31 else zero, dtype=torch.int32)
    return QuantizedLinear(
        spec,
        torch.randint(-(2**31), 2**31 - 1, (inputs * spec.bits // 32, outputs), dtype=torch.int32, device=device),
        zeros.to(device),
        ((torch.rand(groups, outputs, device=device) + 0.5) * inputs**-0.5 / (0.29 * 2**spec.bits)).half(),
        (torch.arange(inputs, device=device) // length).int(),
    )


def weight_bytes(inputs: int, outputs: int, spec: QuantSpec) -> float:
    """Codes, zeros and scales."""
    groups = spec.groups(inputs)
    return inputs * outputs * spec.bits / 8 + groups * outputs * (2 + spec.bits / 8)


def time_linear(
    backend: LinearBackend, inputs: int, outputs: int, spec: QuantSpec, rows: Sequence[int], device: torch.device
) -> dict[int, float]:
    """Microseconds by number of rows."""
    copies = max(2, int(CACHE // weight_bytes(inputs, outputs, spec)) + 1)
    packed = [
        backend.prepare(random_weight(inputs, outputs, spec, device), device, torch.float16) for _ in range(copies)
    ]
    times = {}
    for count in rows:
        x = torch.randn(count, inputs, dtype=torch.float16, device=device)
        out = torch.empty(count, outputs, dtype=torch.float16, device=device)
        backend.warmup(packed[0], [count])
        times[count] = time_calls([partial(backend.gemm, x, weight, out) for weight in packed])
    return times
