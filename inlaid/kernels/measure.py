"""Time kernels on a GPU: the median over replays of a captured graph that walks through copies of the operands, more
than the L2 cache holds. `inlaid kernels --measure` and perf/gpu/ call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import MappingProxyType

import torch

from inlaid.checkpoint import QuantizedLinear, QuantSpec, pack
from inlaid.kernels.backend import LinearBackend

CACHE = 160 << 20  # bytes of operands to walk through, several times any L2 cache


@dataclass(frozen=True)
class Ceiling:
    """The most that a device can do: bytes of a large copy and 16-bit floating-point operations a second."""

    bandwidth: float
    matrix_rate: float

    @classmethod
    def of(cls, name: str) -> Ceiling | None:
        """Return the ceiling of a device that was measured before, by its name; None for any other."""
        return KNOWN.get(name)

    @classmethod
    def measured(cls, device: torch.device) -> Ceiling:
        """Measure a large copy, its bytes read and written, and a large product of random numbers on this device."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        side = 8192
        a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
        copy = time_calls([partial(target.copy_, source)] * 4, 5)
        product = time_calls([partial(torch.mm, a, b, out=torch.empty_like(a))] * 4, 5)
        return cls(2e6 * source.numel() / copy, 2e6 * side**3 / product)

    def microseconds(self, num_bytes: float, operations: float = 0.0) -> float:
        """Return the least time of a kernel: that of its bytes or of its operations, whichever takes longer."""
        return 1e6 * max(num_bytes / self.bandwidth, operations / self.matrix_rate)


KNOWN: Mapping[str, Ceiling] = MappingProxyType({"NVIDIA H200": Ceiling(4.3e12, 790e12)})


def time_calls(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Return the microseconds of one call; each call of the sequence works on operands of its own."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
    stream.wait_stream(torch.cuda.current_stream())  # the operands may still be in the making
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times: list[float] = []
        for _ in range(replays + 3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call, unused-ignore]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return median(times[3:])


def random_weight(inputs: int, outputs: int, spec: QuantSpec, device: torch.device | str) -> QuantizedLinear:
    """Draw a weight of uniform codes: symmetric, inputs in the order of their groups."""
    length = inputs if spec.group_size == -1 else spec.group_size
    groups = inputs // length
    zeros = pack(torch.full((1, outputs), 1 << (spec.bits - 1)), spec.bits, dim=1)
    return QuantizedLinear(
        spec,
        torch.randint(-(2**31), 2**31 - 1, (inputs * spec.bits // 32, outputs), dtype=torch.int32, device=device),
        zeros.repeat(groups, 1).to(device),
        ((torch.rand(groups, outputs, device=device) + 0.5) * inputs**-0.5 / (0.29 * 2**spec.bits)).half(),
        (torch.arange(inputs, device=device) // length).int(),
    )


def weight_bytes(inputs: int, outputs: int, spec: QuantSpec) -> float:
    """Return the bytes of a weight's codes, zeros and scales."""
    groups = spec.groups(inputs)
    return inputs * outputs * spec.bits / 8 + groups * outputs * (2 + spec.bits / 8)


def time_linear(
    backend: LinearBackend, inputs: int, outputs: int, spec: QuantSpec, rows: Sequence[int], device: torch.device
) -> dict[int, float]:
    """Return a backend's microseconds by number of rows, over as many weights as the L2 cache does not hold."""
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
