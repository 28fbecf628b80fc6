"""The backend `auto`: for each weight the fastest backend that serves it, by a table of measured times per shape and
number of rows (linear_table.json, made by `inlaid kernels --measure`), else by a fixed order. The choice is reported at
start-up.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from inlaid.checkpoint import QuantizedLinear, QuantSpec
from inlaid.kernels.backend import GemmInParts, LinearBackend, Parts
from inlaid.kernels.cpu import ReferenceLinear
from inlaid.kernels.exllama import ExllamaLinear
from inlaid.kernels.humming import HummingLinear

log = logging.getLogger(__name__)

TABLE = Path(__file__).parent / "linear_table.json"
WORTH = 0.05  # share of the time that a second copy of a weight must save for some number of rows
UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Measured:
    """Times of one shape and number of rows on one device, by backend, and the floor of the hardware."""

    device: str
    bits: int
    inputs: int
    outputs: int
    rows: int
    microseconds: dict[str, float]
    floor: float


def read_table(path: Path = TABLE) -> tuple[Measured, ...]:
    """Return the measured times; none where no table was shipped."""
    return tuple(Measured(**row) for row in json.loads(path.read_text())["rows"]) if path.exists() else ()


def choose(
    table: Sequence[Measured], names: Collection[str], device: str, bits: int, inputs: int, outputs: int
) -> list[tuple[int, str]]:
    """Return pairs (most rows, name of a backend), ascending, for a shape measured on such a device; else nothing.

    Most shapes have one best backend. Another one serves few rows only where it saves enough for a second copy of the
    weight (WORTH). The last pair has no bound on its rows."""
    rows = [
        replace(m, microseconds={name: us for name, us in m.microseconds.items() if name in names})
        for m in sorted(table, key=lambda m: m.rows)
        if (m.device, m.bits, m.inputs, m.outputs) == (device, bits, inputs, outputs)
    ]
    if not rows or not all(m.microseconds for m in rows):
        return []
    everywhere = set.intersection(*(set(m.microseconds) for m in rows))
    main = min(everywhere, key=lambda name: sum(m.microseconds[name] / m.floor for m in rows))
    choices: list[tuple[int, str]] = []
    for measured in rows:
        best = min(measured.microseconds, key=lambda name: measured.microseconds[name])
        if measured.microseconds[best] > (1 - WORTH) * measured.microseconds[main]:
            best = main
        if choices and choices[-1][1] == best:
            choices.pop()
        choices.append((measured.rows, best))
    last_rows, last = choices.pop()
    return [*choices, (UNLIMITED if last == main else last_rows, last)] + ([] if last == main else [(UNLIMITED, main)])


@dataclass(frozen=True)
class AutoPacked:
    """A weight in the layout of each chosen backend: (most rows, backend, packed), ascending."""

    choices: tuple[tuple[int, LinearBackend, Any], ...]
    in_features: int
    out_features: int


def backends(deterministic: bool = True) -> tuple[LinearBackend, ...]:
    """Return all backends, the fastest first; with `deterministic`, those whose sums are added in a fixed order."""
    by_arrival = () if deterministic else (ExllamaLinear(),)
    return (HummingLinear(ordered=deterministic), *by_arrival, *_own(), ReferenceLinear())


def _own() -> tuple[LinearBackend, ...]:
    """Return the kernel of this repository, where Triton is installed: it comes with torch's CUDA builds alone."""
    if importlib.util.find_spec("triton") is None:
        return ()
    from inlaid.kernels.linear_triton import TritonLinear

    return (TritonLinear(),)


class AutoLinear:
    """Dispatch each weight to the backends chosen for it."""

    name = "auto"

    def __init__(
        self, candidates: Sequence[LinearBackend] | None = None, table: Sequence[Measured] | None = None
    ) -> None:
        self.candidates = tuple(candidates or backends())
        self.table = read_table() if table is None else tuple(table)
        self.chosen: Counter[str] = Counter()

    def why_not(self, spec: QuantSpec, device: torch.device) -> str | None:
        reasons = [f"{b.name}: {reason}" for b in self.candidates if (reason := b.why_not(spec, device)) is not None]
        return "; ".join(reasons) if len(reasons) == len(self.candidates) else None

    def prepare(self, weight: QuantizedLinear, device: torch.device, dtype: torch.dtype) -> AutoPacked:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        order = [b.name for b in self.candidates]
        timed = set(order) - {ReferenceLinear.name}  # as fast for a thousand rows, but it takes four times the memory
        wanted = choose(self.table, timed, name, weight.bits, weight.in_features, weight.out_features)
        wanted = wanted or [(UNLIMITED, order[0])]
        made: dict[str, tuple[LinearBackend, Any]] = {}
        choices = []
        for rows, first in wanted:
            backend, packed = self._first(weight, device, dtype, first, made)
            choices.append((rows, backend, packed))
        described = ", ".join(
            f"{b.name}" + ("" if rows == UNLIMITED else f" up to {rows} rows") for rows, b, _ in choices
        )
        self.chosen[f"{weight.in_features}x{weight.out_features} {weight.bits} bit: {described}"] += 1
        return AutoPacked(tuple(choices), weight.in_features, weight.out_features)

    def warmup(self, packed: AutoPacked, rows: Sequence[int]) -> None:
        below = 0
        for most, backend, inner in packed.choices:
            backend.warmup(inner, [count for count in rows if below < count <= most])
            below = most

    def gemm(self, x_TK: torch.Tensor, packed: AutoPacked, out_TN: torch.Tensor) -> None:
        backend, inner = self._serving(packed, x_TK.shape[0])
        backend.gemm(x_TK, inner, out_TN)

    def parts(self, packed: AutoPacked, rows: int) -> Parts | None:
        backend, inner = self._serving(packed, rows)
        return backend.parts(inner, rows) if isinstance(backend, GemmInParts) else None

    def gemm_in_parts(self, x_TK: torch.Tensor, packed: AutoPacked, out_PTN: torch.Tensor) -> None:
        backend, inner = self._serving(packed, x_TK.shape[0])
        assert isinstance(backend, GemmInParts)
        backend.gemm_in_parts(x_TK, inner, out_PTN)

    @staticmethod
    def _serving(packed: AutoPacked, rows: int) -> tuple[LinearBackend, Any]:
        return next((backend, inner) for most, backend, inner in packed.choices if rows <= most)

    def report(self) -> list[str]:
        """Return one line per kind of weight: the number of weights and the backend that serves them."""
        return [f"{count} weights of {what}" for what, count in self.chosen.items()]

    def _first(
        self,
        weight: QuantizedLinear,
        device: torch.device,
        dtype: torch.dtype,
        name: str,
        made: dict[str, tuple[LinearBackend, Any]],
    ) -> tuple[LinearBackend, Any]:
        """Prepare a weight for the named backend if that serves it, else for the next that does."""
        if name in made:
            return made[name]
        reasons = []
        for backend in sorted(self.candidates, key=lambda b: b.name != name):
            reason = backend.why_not(weight.spec, device)
            if reason is None:
                try:
                    made[name] = backend, backend.prepare(weight, device, dtype)
                    return made[name]
                except ValueError as error:  # it refuses this shape or these zero points
                    reason = str(error)
            reasons.append(f"{backend.name}: {reason}")
        raise ValueError("; ".join(reasons))
