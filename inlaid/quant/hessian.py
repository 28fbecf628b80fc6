"""Second moments of the inputs of a block's linears, for one task, with that task's adapter attached.

Linears that read the same tensor (q, k, v; gate, up) are one site and share one Hessian: E[x xᵀ] over the task's
tokens, each weighted, the sum divided by the weights, so that long prompts do not win. Sums are single precision
whatever the activations are: products of 16-bit numbers are exact in it, so tensor cores lose nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inlaid.adapters.adapter import Adapter
from inlaid.quant.adapter import attached
from inlaid.quant.blocks import BlockModel, Stream
from inlaid.quant.stopwatch import Stopwatch


def second_moment(x_TK: Tensor) -> Tensor:
    """Return xᵀ x in single precision."""
    if x_TK.is_cuda and x_TK.dtype != torch.float32:
        return torch.mm(x_TK.T, x_TK, out_dtype=torch.float32)
    x_TK = x_TK.float()
    return x_TK.T @ x_TK


class Sites:
    """Listens to the linears of one block. `members` names each site's linears, `sums` holds its running sum."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.members: dict[str, list[str]] = {}
        self.sums: dict[str, Tensor] = {}
        self.weight_BS = torch.empty(0)
        self.total = 0.0
        self._last: Tensor | None = None
        self._site = ""

    @contextmanager
    def listening(self, linears: dict[str, nn.Linear]) -> Iterator[None]:
        handles = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in linears.items()]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def begin(self, weight_BS: Tensor) -> None:
        """Begin a forward of a batch with these token weights."""
        self.weight_BS, self._last = weight_BS, None
        self.total += float(weight_BS.sum(dtype=torch.float64))

    def hessians(self) -> dict[str, Tensor]:
        """Return E[x xᵀ] of each site; the sums are used up."""
        return {site: self.sums.pop(site).div_(self.total) for site in list(self.sums)}

    def _hook(self, name: str) -> Any:
        def listen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0] is not self._last:
                self._last, self._site = inputs[0], name
                self._add(inputs[0])
            members = self.members.setdefault(self._site, [])
            if name not in members:
                members.append(name)

        return listen

    def _add(self, x_BSK: Tensor) -> None:
        weight_T = self.weight_BS.to(x_BSK.device).flatten()
        kept_T = weight_T > 0
        x_TK = x_BSK.flatten(0, 1)[kept_T] * weight_T[kept_T].sqrt().to(x_BSK.dtype)[:, None]
        with self.stopwatch.part("Hessians"):
            moment_KK = second_moment(x_TK)
            if self._site in self.sums:
                self.sums[self._site] += moment_KK
            else:
                self.sums[self._site] = moment_KK


@torch.no_grad()
def block_hessians(
    model: BlockModel, block: nn.Module, index: int, adapter: Adapter | None, streams: list[Stream], advance: bool
) -> Sites:
    """Run a task's streams through a loaded block and collect; `advance` moves the streams past it."""
    sites = Sites(model.stopwatch)
    listening = sites.listening(model.linears(index))
    with model.stopwatch.part("forward"), attached(adapter, block, model.prefix(index)), listening:
        for stream in streams:
            sites.begin(stream.batch.weight_BS)
            output_BSD = model.run(block, index, stream)
            if advance:
                stream.hidden_BSD = output_BSD
    return sites


@torch.no_grad()
def advance(model: BlockModel, block: nn.Module, index: int, adapter: Adapter | None, streams: list[Stream]) -> None:
    """Move streams past a loaded block."""
    with model.stopwatch.part("forward"), attached(adapter, block, model.prefix(index)):
        for stream in streams:
            stream.hidden_BSD = model.run(block, index, stream)
