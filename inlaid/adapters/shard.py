"""Adapters for a tensor-parallel group: each member has A and B as its shard of the linear needs them, so that its part
of the adapter joins its part of the base's product, and no sum is needed that the base does not make.

Of a linear divided by outputs A is whole and B divided, of one divided by inputs A is divided and B whole. All members'
parts have one layout, so that one table of places serves them all.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from inlaid.adapters.adapter import Adapter, AdapterError
from inlaid.adapters.base import Outputs
from inlaid.adapters.factors import Factors
from inlaid.adapters.peft import lay_out
from inlaid.kernels.backend import MODULES
from inlaid.model.shard import BY_INPUTS, Shard
from inlaid.model.spec import ModelSpec


def divide(adapter: Adapter, spec: ModelSpec, count: int) -> Adapter:
    """Return an adapter of `count` members: `flat` holds their parts one behind the other, and the entries are those of
    each part. `spec` is the whole model's. AdapterError: it changes the embedding or the head."""
    if any(entry.site < 0 for entry in adapter.entries):
        raise AdapterError(
            f"adapter {adapter.path}: it changes the embedding or the head, which --tensor-parallel-size {count} "
            "divides; serve it with 1"
        )
    parts = [_part(adapter, spec, Shard(index, count)) for index in range(count)]
    flat = torch.cat([part.flat for part in parts])
    flat = flat.pin_memory() if adapter.flat.is_pinned() else flat
    return replace(adapter, flat=flat, entries=parts[0].entries)


def _part(adapter: Adapter, spec: ModelSpec, shard: Shard) -> Adapter:
    factors: Factors = {}
    scales: dict[int, float] = {}
    outputs: dict[int, Outputs] = {}
    for entry in adapter.entries:
        module = MODULES[entry.site % len(MODULES)]
        rows, columns = (
            slice(part.start, part.stop) for part in (shard.outputs(spec, module), shard.inputs(spec, module))
        )
        width = spec.module_shape(module)[0]
        a_RK, b_NR = entry.factors(adapter.flat, spec.module_shape(module))
        factors[entry.site] = a_RK[:, columns], b_NR[rows]
        scales[entry.site] = entry.scale
        scale_N, bias_N = (_vector(adapter.flat, start, width) for start in (entry.out_scale, entry.out_bias))
        if bias_N is not None and module in BY_INPUTS and shard.index:
            bias_N = torch.zeros_like(bias_N)  # the first member adds it, once
        outputs[entry.site] = Outputs(*(None if each is None else each[rows] for each in (scale_N, bias_N)))
    return lay_out(adapter.identity, adapter.path, factors, scales, adapter.flat.dtype, False, outputs)


def _vector(flat: Tensor, start: int, width: int) -> Tensor | None:
    return flat[start : start + width] if start else None
