"""Check every linear backend against the specification, over formats and numbers of rows: right values, also for large
activations; the same bits again; and the same through a replayed graph. A stage of bench.py."""

from __future__ import annotations

import time
from typing import Any

import torch

from inlaid.checkpoint import QuantizedLinear, QuantSpec, from_codes
from inlaid.kernels import spec
from inlaid.kernels.auto import backends
from inlaid.kernels.backend import LinearBackend
from inlaid.kernels.exllama import ExllamaLinear
from inlaid.kernels.humming import HummingLinear
from perf.gpu import Keep

ROWS = (1, 4, 5, 8, 9, 32, 33, 50, 51, 64, 256, 1024)
FORMATS = (  # (bits, group, symmetric, act-order); those that are served most come first
    *((bits, 128, symmetric, order) for bits in (4, 3, 2, 8) for symmetric in (True, False) for order in (False, True)),
    *((4, group, True, False) for group in (32, 64, -1)),
)
BY_ARRIVAL = 4e-3  # relative error of a backend that adds half-precision sums
LIMIT = 1.5e-3
INPUTS, OUTPUTS = 2048, 512


def random_linear(
    inputs: int, outputs: int, bits: int, group: int, symmetric: bool, act_order: bool, seed: int = 0
) -> QuantizedLinear:
    """Draw a weight. Its zero points are 1 or more: exllama cannot express 0."""
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


def check_format(
    backend: LinearBackend, weight: QuantizedLinear, exact_KN: torch.Tensor, repeatable: bool
) -> dict[str, Any]:
    """Return the worst relative error over ROWS, and what failed."""
    device = exact_KN.device
    packed = backend.prepare(weight, device, torch.float16)
    worst, failures = 0.0, []
    limit = BY_ARRIVAL if backend.name == ExllamaLinear.name else LIMIT
    for rows in ROWS:
        for scale in (1.0, 300.0):
            x = (torch.randn(rows, weight.in_features, device=device) * scale).half()
            out = torch.full((rows, weight.out_features), float("nan"), dtype=torch.float16, device=device)
            backend.gemm(x, packed, out)
            expected = x.float() @ exact_KN
            error = float((out.float() - expected).norm() / expected.norm())
            worst = max(worst, error) if error == error else float("inf")
            if not error < limit:
                failures.append(f"rows {rows} scale {scale:g}: error {error:.2e}")
        again = torch.empty_like(out)
        backend.gemm(x, packed, again)
        replayed = _through_graph(backend, x, packed)
        if repeatable and not (torch.equal(out, again) and torch.equal(out, replayed)):
            failures.append(f"rows {rows}: not the same bits again")
        if not float((replayed.float() - expected).norm() / expected.norm()) < limit:
            failures.append(f"rows {rows}: wrong through a graph")
    return {"worst_error": worst, "failures": failures}


def _through_graph(backend: LinearBackend, x: torch.Tensor, packed: Any) -> torch.Tensor:
    """Return the product as a captured graph computes it when it is replayed."""
    out = x.new_empty(x.shape[0], packed.out_features)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.gemm(x, packed, out)
    out.fill_(float("nan"))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return out


def run(keep: Keep, seconds: float) -> dict[str, Any]:
    """Check all backends, format by format, and start no format after `seconds`.

    `failed` names the backends with a failure; `not_reached` counts the formats that the time was too short for."""
    end = time.monotonic() + seconds
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    by_arrival: list[LinearBackend] = [ExllamaLinear(), HummingLinear(ordered=False)]
    cases = [(backend.name, backend, True) for backend in backends()]
    cases += [(f"{backend.name}, by arrival", backend, False) for backend in by_arrival]
    report: dict[str, Any] = {"failed": [], "not_reached": 0, "backends": {name: [] for name, _, _ in cases}}
    for number, (bits, group, symmetric, order) in enumerate(FORMATS):
        if time.monotonic() > end:
            report["not_reached"] = len(FORMATS) - number
            break
        weight = random_linear(INPUTS, OUTPUTS, bits, group, symmetric, order)
        exact_KN = spec.weight(weight).cuda()
        for name, backend, repeatable in cases:
            about: dict[str, Any] = {"bits": bits, "group": group, "symmetric": symmetric, "act_order": order}
            reason = backend.why_not(QuantSpec(bits, group, symmetric, order), exact_KN.device)
            try:
                found = check_format(backend, weight, exact_KN, repeatable) if reason is None else {"refused": reason}
            except Exception as error:  # noqa: BLE001 - one backend's fault must not hide the others' results
                found = {"failures": [f"{type(error).__name__}: {error}"]}
            report["backends"][name].append(about | found)
            if found.get("failures") and name not in report["failed"]:
                report["failed"].append(name)
        keep(report)
        print(bits, group, symmetric, order, report["failed"] or "as specified", flush=True)
    return report
