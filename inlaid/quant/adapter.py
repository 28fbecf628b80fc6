"""An adapter at work while a model calibrates: the linears of a block compute with it. Adapters are read by the one
reader, `adapters/peft.py`; None stands for the base alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from inlaid.adapters.adapter import Adapter, AdapterEntry, site_path


@contextmanager
def attached(adapter: Adapter | None, block: nn.Module, prefix: str) -> Iterator[None]:
    """While open, the linears of `block` (named `prefix` + their name in it) compute with the adapter."""
    entries = {site_path(entry.site): entry for entry in adapter.entries} if adapter is not None else {}
    handles = [
        module.register_forward_hook(_hook(adapter, entries[prefix + name], module))
        for name, module in block.named_modules()
        if adapter is not None and isinstance(module, nn.Linear) and prefix + name in entries
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(adapter: Adapter, entry: AdapterEntry, linear: nn.Linear) -> Any:
    a_RK, b_NR = entry.factors(adapter.flat, (linear.out_features, linear.in_features))
    a_RK, b_NR = a_RK.to(linear.weight), b_NR.to(linear.weight)

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (inputs[0] @ a_RK.T) @ b_NR.T * entry.scale

    return add
