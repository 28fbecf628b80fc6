"""An adapter at work while a model calibrates: the linears of a block compute with it. Adapters are read by the one
reader, `adapters/peft.py`; None stands for the base alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from inlaid.adapters.adapter import Adapter, AdapterEntry, site_path

ALL_ROWS = slice(None)


@contextmanager
def attached(adapter: Adapter | None, block: nn.Module, prefix: str) -> Iterator[None]:
    """While open, the linears of `block` (named `prefix` + their name in it) compute with the adapter."""
    with attached_to_rows([(ALL_ROWS, adapter)], block, prefix):
        yield


@contextmanager
def attached_to_rows(adapters: Sequence[tuple[slice, Adapter | None]], block: nn.Module, prefix: str) -> Iterator[None]:
    """While open, the linears of `block` compute each range of a batch's rows with its own adapter."""
    linears = {prefix + name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    handles = [
        linears[path].register_forward_hook(_hook(adapter, entry, linears[path], rows))
        for rows, adapter in adapters
        if adapter is not None
        for entry in adapter.entries
        if (path := site_path(entry.site)) in linears
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(adapter: Adapter, entry: AdapterEntry, linear: nn.Linear, rows: slice) -> Any:
    a_RK, b_NR = entry.factors(adapter.flat, (linear.out_features, linear.in_features))
    a_RK, b_NR = a_RK.to(linear.weight), b_NR.to(linear.weight)

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if rows == ALL_ROWS:
            return output + (inputs[0] @ a_RK.T) @ b_NR.T * entry.scale
        output[rows] += (inputs[0][rows] @ a_RK.T) @ b_NR.T * entry.scale
        return output

    return add
