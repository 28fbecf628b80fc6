"""Stage latency-SHAPE: a decode step of few rows as one persistent kernel, as that kernel without its fences, and as a
kernel for each operation: microseconds, the distance of the logits, tokens that are the same, bits over repetitions.

The server's milliseconds are in the stages serve-SHAPE and serve-SHAPE-one. The model is loaded once; steps are taken
from the running engine and replayed as graphs (step.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from inlaid.checkpoint import QuantSpec
from inlaid.engine.engine import Engine
from inlaid.kernels import library
from inlaid.kernels.decode import SOURCES, DecodeKernel, load
from inlaid.kernels.measure import Ceiling
from perf.gpu import Keep, offline
from perf.gpu import step as step_module
from perf.gpu.step import Variant

REPETITIONS = 100
STEPS: Mapping[str, tuple[tuple[int, int, int], ...]] = MappingProxyType({  # (rows, adapters, tokens of context)
    "7b": ((1, 0, 300), (1, 1, 300), (2, 2, 300), (4, 0, 300), (4, 4, 300), (1, 1, 3900), (4, 4, 3900)),
    "8b": ((1, 0, 300), (1, 1, 300), (4, 4, 300), (1, 0, 3900), (4, 4, 3900)),
})  # fmt: skip


def choices(engine: Engine) -> list[Variant]:
    """Return the ways to compute a step of few rows, the one that all others are compared with first."""
    runner = step_module.runner_of(engine)
    kernel = runner.step.decode
    assert kernel is not None
    return [
        Variant("a kernel for each operation", ((runner.step, "decode", None),)),
        Variant("one kernel"),
        Variant("one kernel without fences", ((kernel, "_loaded", _without_fences(kernel)),)),
        Variant("one kernel, again"),
    ]


def _without_fences(kernel: DecodeKernel) -> Any:
    flags = [*kernel.shape.flags(kernel.zeros), "-DINLAID_FENCES=0"]
    loaded = load(library.build(library.nvcc(), SOURCES[0], SOURCES, kernel.target, flags))
    for rows in kernel.longest:
        assert loaded.inlaid_decode_ready(rows) > 0
    return loaded


def run(shape: str, keep: Keep, steps: Sequence[tuple[int, int, int]] | None = None) -> dict[str, Any]:
    """Measure each step with each choice."""
    loaded, spec = offline.load(shape, 32, decode_kernel="one")
    engine, runner = loaded.engine, step_module.runner_of(loaded.engine)
    ceiling, mean_rank = Ceiling.measured(runner.device), sum(offline.RANKS[shape]) / len(offline.RANKS[shape])
    report: dict[str, Any] = {"shape": shape, "ceiling": asdict(ceiling), "steps": []}
    ways = choices(engine)
    for seed, (rows, adapters, context) in enumerate(STEPS[shape] if steps is None else steps):
        names = [f"a{i % adapters}" if adapters else None for i in range(rows)]
        step = step_module.decoding(engine, names, context, spec.vocab_size, seed)
        floors = step_module.floors(spec, QuantSpec(4, 128, True, False), step, mean_rank, ceiling)
        found: dict[str, Any] = {"rows": rows, "adapters": adapters, "context": context, "floors": floors}
        report["steps"].append(found | {"choices": []})
        for record in step_module.compare(engine, step, ways, REPETITIONS):
            report["steps"][-1]["choices"].append(record)
            keep(report)
            print(context, record, flush=True)
        step_module.leave(engine, rows, seed)
    return report
