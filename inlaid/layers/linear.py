"""A linear layer: base weights (dense or quantized, siblings fused where they can be), bias, and the adapters of each
row, in one forward. The model builds it; the kernels compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch

from inlaid.kernels.backend import MODULES, Gemm, GemmInParts, LoraBackend, Parts, Product, Site, Workspace
from inlaid.kernels.context import ALL_ADAPTERS, ATTENTION_ADAPTERS, StepContext
from inlaid.kernels.group import Group

Reader = Literal["rope", "norm", "activation", "sum"]

SIDE_STREAM_ROWS = 16  # with fewer rows a shrink is shorter than the detour
PENDING_ROWS = 64  # with more rows an expansion of its own, which reads each adapter once, is faster
PARTS_ROWS = 256  # linears before a norm may leave it parts to add, where their backend finds that faster


class Linear:
    """out = x @ W.T + bias + adapters.

    `parts` are (backend, packed weight), side by side in the output: one when the siblings are fused, several when they
    could not be (different act-order permutations). `reader` names the operation that reads the product: a norm adds
    split parts, and has one program for each row. With a `group` the weights are its members' shards by inputs, and
    the product, adapters included, is summed over the members."""

    def __init__(
        self,
        parts: Sequence[tuple[Gemm, Any]],
        bias_N: torch.Tensor | None = None,
        site: Site | None = None,
        lora: LoraBackend | None = None,
        reader: Reader = "norm",
        group: Group | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self.bias_N = bias_N
        self.site = site
        self.lora = lora
        self.reader: Reader = reader if group is None else "sum"
        self.group = group
        self.in_features: int = self.parts[0][1].in_features
        self.out_features: int = sum(packed.out_features for _, packed in self.parts)
        in_attention = site is not None and site.first % len(MODULES) < MODULES.index("gate_proj")
        self.level = ATTENTION_ADAPTERS if in_attention else ALL_ADAPTERS

    def __call__(self, x_TK: torch.Tensor, step: StepContext, workspace: Workspace, last: bool = False) -> Product:
        """Return the product; the expansion of few rows is left pending, unless the product is the `last` one, which
        two readers may read, or is summed."""
        product = self._multiply(x_TK, step, workspace, last or self.group is not None)
        if self.group is not None:
            self.group.sum(product.whole)
        return product

    def _multiply(self, x_TK: torch.Tensor, step: StepContext, workspace: Workspace, whole: bool) -> Product:
        """Return the product of these weights and the adapters."""
        product = self._memory(x_TK.shape[0], workspace)
        if self.lora is None or self.site is None or step.adapters < self.level:
            self._base(x_TK, product, workspace)
            return product
        if step.arriving is not None:
            step.arriving.before(self.site)
        beside = workspace.side if x_TK.shape[0] >= SIDE_STREAM_ROWS else None
        if beside is not None:
            beside.wait_stream(torch.cuda.current_stream(x_TK.device))
        with (
            nullcontext() if beside is None else torch.cuda.stream(beside)
        ):  # the base weights' product reads the same x
            shrunk = self.lora.shrink(x_TK, self.site, step, workspace, beside is not None)
        self._base(x_TK, product, workspace)
        if beside is not None:
            torch.cuda.current_stream(x_TK.device).wait_stream(beside)
        few = x_TK.shape[0] <= PENDING_ROWS
        pending = self.lora.defer(shrunk, self.reader == "norm") if few and not whole else None
        if pending is not None:
            return replace(product, pending=pending)
        self.lora.expand(shrunk, product.first, step)
        return product

    def split(self, rows: int) -> Parts | None:
        """Return the layout of a product in parts, or None where it is whole."""
        if self.reader != "norm" or rows > PARTS_ROWS or len(self.parts) > 1:
            return None
        backend, packed = self.parts[0]
        parts: Callable[[Any, int], Parts | None] | None = getattr(backend, "parts", None)  # isinstance takes 60 us
        return None if parts is None else parts(packed, rows)

    def _memory(self, rows: int, workspace: Workspace) -> Product:
        """Return a product yet to be written. On fewer multiprocessors there may be more parts than have room."""
        parts = self.split(rows)
        if parts is None or not workspace.fits("parts", parts.most * rows * self.out_features):
            return Product(workspace.take(self.reader, rows, self.out_features))
        return Product(workspace.take("parts", parts.most, rows, self.out_features), parts)

    def _base(self, x_TK: torch.Tensor, product: Product, workspace: Workspace) -> None:
        """Write the product with the base weights, and the bias."""
        if product.parts is not None:
            backend, packed = self.parts[0]
            assert isinstance(backend, GemmInParts)
            backend.gemm_in_parts(x_TK, packed, product.tensor)
        elif len(self.parts) == 1:
            backend, packed = self.parts[0]
            backend.gemm(x_TK, packed, product.tensor)
        else:
            self._siblings(x_TK, product.tensor)
        if self.bias_N is not None:
            product.first.add_(self.bias_N)

    def _siblings(self, x_TK: torch.Tensor, out_TN: torch.Tensor) -> None:
        """Compute siblings that could not be fused, each into contiguous memory of its own, then move it into place."""
        start = 0
        for backend, packed in self.parts:
            part_TN = out_TN.new_empty(x_TK.shape[0], packed.out_features)
            backend.gemm(x_TK, packed, part_TN)
            out_TN[:, start : start + packed.out_features].copy_(part_TN)
            start += packed.out_features
