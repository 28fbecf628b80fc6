"""Every linear backend against the dequantized matmul in fp32, over formats and numbers of rows: right values, large
activations, the same bits again, and the same through a replayed graph. bench.py's first stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from inlaid.checkpoint import QuantizedLinear, QuantSpec, dequantize, from_codes
from inlaid.kernels.auto import backends
from inlaid.kernels.backend import LinearBackend
from inlaid.kernels.exllama import ExllamaLinear
from inlaid.kernels.humming import HummingLinear

ROWS = (1, 4, 5, 8, 9, 32, 33, 50, 51, 64, 256, 1024)
FORMATS = [
    *((bits, 128, symmetric, order) for bits in (4, 3, 2, 8) for symmetric in (True, False) for order in (False, True)),
    *((4, group, True, False) for group in (32, 64, -1)),
]
LIMITS = {"exllama": 4e-3}  # it adds half-precision sums
LIMIT = 1.5e-3
REPEATABLE = ("humming", "triton", "reference")  # with the default, which is deterministic


def random_linear(
    inputs: int, outputs: int, bits: int, group: int, symmetric: bool, act_order: bool, seed: int = 0
) -> QuantizedLinear:
    """Zero points from 1 on: one of the backends cannot express 0."""
    generator = torch.Generator().manual_seed(seed)
    length = inputs if group == -1 else group
    codes = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
    zeros = torch.full((inputs // length, outputs), 2 ** (bits - 1))
    if not symmetric:
        zeros = torch.randint(1, 2**bits, zeros.shape, generator=generator)
    scales = (torch.rand(zeros.shape, generator=generator) + 0.5) * inputs**-0.5 / (0.29 * 2**bits)
    g_idx = torch.arange(inputs) // length
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    return from_codes(codes, zeros, scales.half(), g_idx.int(), group, bits)


def gate_backend(
    backend: LinearBackend, inputs: int = 2048, outputs: int = 512, repeatable: bool = True
) -> list[dict[str, Any]]:
    """One record per format: the worst error and what failed."""
    device = torch.device("cuda")
    records = []
    for bits, group, symmetric, order in FORMATS:
        spec = QuantSpec(bits, group, symmetric, order)
        record: dict[str, Any] = {"bits": bits, "group": group, "symmetric": symmetric, "act_order": order}
        reason = backend.why_not(spec, device)
        if reason is None:
            weight = random_linear(inputs, outputs, bits, group, symmetric, order)
            record |= _gate_format(backend, weight, device, repeatable and backend.name in REPEATABLE)
        else:
            record["refused"] = reason
        records.append(record)
    return records


def _gate_format(
    backend: LinearBackend, weight: QuantizedLinear, device: torch.device, repeatable: bool
) -> dict[str, Any]:
    exact = dequantize(weight).to(device)
    packed = backend.prepare(weight, device, torch.float16)
    worst, failures = 0.0, []
    limit = LIMITS.get(backend.name, LIMIT)
    for rows in ROWS:
        for scale in (1.0, 300.0):
            x = (torch.randn(rows, weight.in_features, device=device) * scale).half()
            out = torch.full((rows, weight.out_features), float("nan"), dtype=torch.float16, device=device)
            backend.gemm(x, packed, out)
            expected = x.float() @ exact
            error = float((out.float() - expected).norm() / expected.norm())
            worst = max(worst, error) if error == error else float("inf")
            if not error < limit:
                failures.append(f"rows {rows} scale {scale:g}: error {error:.2e}")
        again = torch.empty_like(out)
        backend.gemm(x, packed, again)
        replayed = _through_graph(backend, x, packed)
        if repeatable and not (torch.equal(out, again) and torch.equal(out, replayed)):
            failures.append(f"rows {rows}: not the same bits again")
        if float((replayed.float() - expected).norm() / expected.norm()) >= limit:
            failures.append(f"rows {rows}: wrong through a graph")
    return {"worst_error": worst, "failures": failures}


def _through_graph(backend: LinearBackend, x: torch.Tensor, packed: Any) -> torch.Tensor:
    out = x.new_empty(x.shape[0], packed.out_features)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.gemm(x, packed, out)
    out.fill_(float("nan"))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return out


def run(keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All backends; `failed` names those with a failure."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    by_arrival: list[LinearBackend] = [ExllamaLinear(), HummingLinear(ordered=False)]
    others = [(backend.name, backend, True) for backend in backends()]
    cases = [*((f"{backend.name}, by arrival", backend, False) for backend in by_arrival), *others]
    found: dict[str, Any] = {}
    for name, backend, repeatable in cases:
        try:
            found[name] = gate_backend(backend, repeatable=repeatable)
        except Exception as error:  # noqa: BLE001 - one backend's fault must not hide the others' results
            found[name] = [{"failures": [f"{type(error).__name__}: {error}"]}]
        failed = [name for name, records in found.items() if any(r.get("failures") for r in records)]
        keep({"failed": failed, "backends": found})
    return {"failed": failed, "backends": found}
